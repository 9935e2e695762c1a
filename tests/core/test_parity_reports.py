"""Reports made from findings: what each shows, what no name can do in it, and how large it may be."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import itertools
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import finding_samples
import pytest

from gptj.errors import InputError, WriteError
from gptj.parity.findings import Findings, MatrixRow, PairFound, TapFound
from gptj.parity.reports import page as page_module
from gptj.parity.reports.junit import render_junit
from gptj.parity.reports.line_chart import Line, line_chart
from gptj.parity.reports.markdown import SUMMARY_BYTES, render_markdown
from gptj.parity.reports.output import KINDS, kind_of, render, write_report
from gptj.parity.reports.page import render_page
from gptj.parity.reports.spelling import legible, share_of, spell_percent
from gptj.parity.reports.text import render_text

SAMPLES = ("full", "holding", "hostile", "huge")
VOID = {"meta", "br", "hr"}


def sample(name: str) -> Findings:
    return getattr(finding_samples, name)()


class Page(HTMLParser):
    """The elements of a page, each with its attributes, its parents' names and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "elements that nothing closes"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        self.elements.append((tag, dict(attrs), [*self.open]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.elements
                if name == tag and wanted.items() <= attributes.items()]  # fmt: skip

    @property
    def text(self) -> str:
        return "".join(data for place, data in self.texts if place != "style")


@pytest.fixture(scope="module", params=SAMPLES)
def page(request) -> Page:
    return Page(render_page(sample(request.param)))


class TestPage:
    def test_it_needs_nothing_else_and_runs_nothing(self, page):
        names = Counter(tag for tag, _, _ in page.elements)
        assert not names.keys() & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "use"}
        for tag, attributes, _ in page.elements:
            assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "srcset")], tag
            assert (attributes.get("href") or "#").startswith("#")
        [policy] = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
        [style] = [data for place, data in page.texts if place == "style"]
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        assert f"default-src 'none'; style-src 'sha256-{digest}'" in str(policy["content"])
        assert "url(" not in style and "@import" not in style

    def test_its_links_lead_somewhere_and_its_headings_follow_each_other(self, page):
        ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
        assert len({*ids}) == len(ids)
        assert {str(a["href"])[1:] for a in page.all("a")} <= {*ids}
        assert {label["aria-labelledby"] for label in page.all("section")} <= {*ids}
        levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))

    def test_what_scrolls_is_reached_by_the_keyboard_and_has_a_name(self, page):
        scrolled = [attributes for _, attributes, _ in page.elements if attributes.get("class") == "scroll"]
        for attributes in scrolled:
            assert attributes["tabindex"] == "0" and attributes["role"] == "region" and attributes["aria-label"]
        assert len(scrolled) == len(page.all("table")) + len(page.all("svg", role="img"))
        for picture in page.all("svg"):
            assert picture.get("role") == "img" or picture.get("aria-hidden") == "true"
        assert len(page.all("th", scope="col")) + len(page.all("th", scope="row")) == len(page.all("th"))

    def test_it_is_for_light_and_dark_and_print_and_small_screens(self, page):
        [style] = [data for place, data in page.texts if place == "style"]
        for asked in ("prefers-color-scheme: dark", "@media print", "max-width: 40rem", "focus-visible"):
            assert asked in style
        assert page.all("meta", name="viewport") and page.all("html", lang="en")

    def test_every_section_is_there_and_only_those_that_have_something(self):
        titles = ("What does not hold", "Where computations part", "Along generated tokens", "Measures", "Invariances",
                  "Precisions against float64", "Planted mistakes")  # fmt: skip
        full, few = (Page(render_page(sample(name))).text for name in ("full", "holding"))
        assert [title for title in titles if full.count(title) == 2] == [*titles]  # the link and the heading
        assert [title for title in titles if title in few] == ["Measures"]

    def test_a_cell_for_every_value_says_in_signs_what_its_colour_says(self):
        page = Page(render_page(finding_samples.huge()))
        groups = [str(attributes.get("class")) for tag, attributes, parents in page.elements
                  if tag == "g" and "ul" not in parents]  # fmt: skip
        cells = [name for name in groups if re.fullmatch("l[0-6]", name)]
        assert len(cells) == 6 * (28 * 15 + 4)
        drawn = Counter(name[1:] for name in cells)
        told = Counter(str(share_of(tap).level) for pair in finding_samples.huge().pairs for tap in pair.taps)
        assert drawn == told and drawn["5"] == 1
        assert page.text.count("✗● 2e5×") == 2  # the cell and the table's row

    def test_the_sign_of_each_level_is_its_own(self):
        taps = [TapFound("q", d, 1.0, right, born) for d, right, born in [
            (0.0, True, None), (0.001, True, None), (0.05, True, None), (0.9, True, False), (9.0, False, False),
            (9.0, False, True), (None, True, None)]]  # fmt: skip
        shares = [share_of(tap) for tap in taps]
        assert [share.level for share in shares] == [*range(7)]
        assert [share.text for share in shares] == ["0", "<1%", "5%", "90%", "✗ 9×", "✗● 9×", "?"]

    def test_a_backend_has_one_column_of_the_matrix_and_its_own_worst_parameter_stands_in_its_cell(self):
        rows = (
            MatrixRow("pt", "gradients", "wte", 1e-7, 1e-6, True),
            MatrixRow("tf", "gradients", "ln_f", 2.0, 1.0, False, "[3]"),
            MatrixRow("pt", "cached", "logits", 0.0, 1.0, True),
            MatrixRow("tf", "cached", "logits", 0.5, 1.0, True),
            MatrixRow("pt", "gradient against oracle", "a", 1.0, 2.0, True),
            MatrixRow("pt", "gradient against oracle", "b", 1.0, 2.0, True),
        )
        found = Findings("differs", "one differs", matrix=rows)
        page = Page(render_page(found))
        heads = [data for place, data in page.texts if place == "th"]
        assert heads == ["two ways", "of", "pt", "tf", "gradients", "cached", *["gradient against oracle"] * 2]
        assert (
            "✓ 1.0e-07 of 1.0e-06" in page.text and "✗ 2.0e+00 of 1.0e+00" in page.text and "ln_f at [3]" in page.text
        )
        assert [line.split() for line in render_text(found).splitlines()[-5:]] == [
            ["pt", "tf"], ["gradients", "✓", "1.0e-07", "10%", "✗", "2.0e+00"],
            ["cached:", "logits", "✓", "0", "✓", "5.0e-01", "50%"],
            ["gradient", "against", "oracle:", "a", "✓", "1.0e+00", "50%", "-"],
            ["gradient", "against", "oracle:", "b", "✓", "1.0e+00", "50%", "-"],
        ]  # fmt: skip
        twice = dataclasses.replace(found, matrix=rows[:1] * 2)
        odd = tuple(dataclasses.replace(rows[0], limit=limit) for limit in (math.nan, math.inf, None, 0.0, 5e-324))
        assert "✓ 1.0e-07, ✓ 1.0e-07 0%" in render_text(dataclasses.replace(found, matrix=odd))
        assert "✓ 1.0e-07 10%, ✓ 1.0e-07 10%" in render_text(twice) and render_page(twice).count("✓ 1.0e-07 of") == 2

    def test_lines_of_a_chart_are_told_apart_without_colour_and_labels_do_not_meet(self):
        lines = [Line(name, [1.0, 2.0]) for name in "abcd"] + [Line("bound", [3.0, 3.0], dashed=True)]
        chart = Page(line_chart("t", ["0", "1"], lines, marks=(1, 1, 7)))
        corners = [len(str(one["points"]).split()) for one in chart.all("polygon")]
        assert corners == [4, 4, 3, 3, 4, 4] and len(chart.all("circle")) == 2
        assert [data for place, data in chart.texts if place == "span"] == [*"●■▲◆", "╌╌"]
        assert len(chart.all("line", **{"class": "mark"})) == 1
        many = Page(line_chart("t", [f"a long name {n}" for n in range(99)], [Line("a", [1.0] * 99)]))
        drawn = [data for place, data in many.texts if data.startswith("a long name")]
        assert 3 < len(drawn) < 8 and drawn[0] == "a long name 0"

    def test_many_measures_that_hold_are_folded_and_open_where_one_does_not(self):
        one = finding_samples.holding().measures[0]
        for wrong in (False, True):
            measures = (*[one] * 20, dataclasses.replace(one, holds=not wrong))
            [details] = Page(render_page(Findings("differs", "x", measures=measures))).all("details")
            assert ("open" in details) == wrong

    def test_no_number_is_lost_where_it_is_not_finite(self):
        text = Page(render_page(finding_samples.full())).text
        assert "✗ NaN of 0" in text and "inf" in text
        chart = line_chart("t", ["0", "1"], [Line("a", [float("nan"), float("inf")]), Line("b", [None, 0.0])])
        assert ">NaN</text>" in chart and ">inf</text>" in chart and "nan," not in chart
        assert line_chart("t", [], []) == "<p>t: no numbers.</p>" == line_chart("t", ["0"], [Line("a", [None])])

    def test_names_are_text_and_nothing_else(self):
        page = Page(render_page(finding_samples.hostile()))
        assert page.text.count("<script>alert(1)</script>") > 20 and r"\x00\x1b[31m\ud800\u202e]]>" in page.text
        assert not page.all("b") and "javascript:x" in page.text

    def test_several_runs_are_one_page(self):
        page = Page(render_page(finding_samples.full(), finding_samples.holding()))
        assert len(page.all("article")) == len(page.all("h1")) == 2
        ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
        assert len({*ids}) == len(ids) and "r2-measures" in ids
        assert "✗ Parity of models/tiny, tiny" in page.text

    def test_a_pair_without_values_or_outside_of_blocks_alone_is_shown(self):
        far = TapFound(f"h.{'9' * 5000}.q", 1.0, 2.0, True)
        pairs = (PairFound("a", "b", ()), PairFound("a", "c", (TapFound("logits", 1.0, 2.0, True),)),
                 PairFound("a", "d", (TapFound("h.7.q", 1.0, 0.0, True), far)))  # fmt: skip
        many = tuple(TapFound(f"value {n}", 1.0, 2.0, True) for n in range(40))
        page = Page(render_page(Findings("holds", "all", pairs=(*pairs, PairFound("a", "e", many)))))
        assert max(int(str(picture["width"])) for picture in page.all("svg", **{"class": "heat"})) < 1100
        text = page.text
        assert "No values were compared." in text and "50%" in text and "block 7" in text


def luminance(colour: str) -> float:
    """Relative luminance, of WCAG 2."""
    digits = colour.lstrip("#")
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(scheme):
    style = (Path(page_module.__file__).parent / "page.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", style, re.S)[scheme]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
    pairs = [(name, back) for name in ("ink", "soft", "link", "good", "bad") for back in ("paper",)]
    pairs += [("cell", f"l{level}") for level in (0, 1, 2, 3, 4, 6)] + [("cell5", "l5"), ("ink", "panel")]
    for pair in pairs:
        darker, lighter = sorted(luminance(colours[name]) for name in pair)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, pair


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

if BROWSER is not None:

    def test_a_browser_draws_it_and_complains_of_nothing(tmp_path):
        found = [finding_samples.full(), finding_samples.hostile()]
        (tmp_path / "page.html").write_text(render_page(*found), encoding="utf-8")
        done = subprocess.run(
            [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
             f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()],
            capture_output=True, encoding="utf-8", timeout=120, check=True,
        )  # fmt: skip
        assert "CONSOLE" not in done.stderr
        drawn = Page(done.stdout)
        assert len(drawn.all("svg", **{"class": "heat"})) == 4 and not drawn.all("script") and not drawn.all("img")


class TestJUnit:
    @pytest.mark.parametrize("name", SAMPLES)
    def test_its_counts_are_right_and_it_fails_where_the_verdict_does(self, name):
        root = ET.fromstring(render_junit(sample(name)))
        cases = root.findall(".//testcase")
        assert int(root.get("tests", "")) == len(cases) == sum(int(suite.get("tests", "")) for suite in root)
        assert int(root.get("failures", "")) == len(root.findall(".//failure"))
        assert int(root.get("skipped", "")) == len(root.findall(".//skipped"))
        assert bool(root.findall(".//failure")) == (not sample(name).passed)

    def test_a_case_for_each_thing_and_the_headline_where_it_failed(self):
        found = finding_samples.full()
        root = ET.fromstring(render_junit(found))
        by_class = Counter(case.get("classname") for case in root.iter("testcase"))
        assert by_class == {
            "gptj.parity.verdict": 1, "gptj.parity.measures": 3, "gptj.parity.pairs": 3, "gptj.parity.texts": 3,
            "gptj.parity.matrix": len(found.matrix), "gptj.parity.sensitivity": 3,
        }  # fmt: skip
        [failed] = [c for c in root.iter("testcase") if c.get("name") == "tf float32 against oracle float64"]
        failure = failed.find("failure")
        assert failure is not None and failure.get("message") == found.headline
        assert "looks like: rotary sign" in str(failure.text) and "h.2.q_rotated: 4.1e-01 of 2.0e-06, born" in str(
            failure.text
        )
        assert [case.get("name") for case in root.iter("testcase") if case.find("skipped") is not None] == [
            "pt: epsilon 1.1e-5"
        ]
        assert len(root.findall(".//property")) == len(found.ladder) + len(found.smallest)

    def test_a_difference_that_no_part_shows_fails_all_the_same(self):
        found = dataclasses.replace(finding_samples.holding(), verdict="differs", headline="the weights are others")
        [failure] = ET.fromstring(render_junit(found)).findall(".//failure")
        assert failure.get("message") == "the weights are others"

    def test_names_cannot_leave_their_place(self):
        root = ET.fromstring(render_junit(finding_samples.hostile()))
        assert {element.tag for element in root.iter()} == {
            "testsuites", "testsuite", "testcase", "failure", "skipped", "properties", "property",
        }  # fmt: skip


class TestMarkdown:
    def test_it_has_every_section_the_map_and_the_headline(self):
        text = render_markdown(finding_samples.full())
        assert text.startswith("## ✗ differs: parity of models/tiny")
        for heading in (
            "What does not hold",
            "Measures",
            "Invariances",
            "Texts",
            "Precisions",
            "Planted mistakes",
            "The smallest",
        ):
            assert f"### {heading}" in text
        assert "| block 2 |" in text and "✗● 2e5×" in text and "Looks like: rotary sign" in html.unescape(text)

    @pytest.mark.parametrize("name", SAMPLES)
    def test_every_row_of_a_table_has_its_columns(self, name):
        width = 0
        for line in render_markdown(sample(name)).splitlines():
            assert not line.startswith("|") or not width or line.count("|") == width, line
            width = line.count("|") if line.startswith("|") else 0

    def test_names_are_no_markup_no_mention_and_no_link(self):
        text = render_markdown(finding_samples.hostile())
        for line in text.splitlines():
            assert not set("<>`[]()@$\x00\x1b") & {*line} and "](" not in line
        assert "<script>alert(1)</script>" in html.unescape(text)

    @pytest.mark.parametrize("limit_bytes", [SUMMARY_BYTES, 40_000, 20_000, 8_000, 4_000, 600, 100])
    def test_it_keeps_to_a_size_and_says_what_is_left_out(self, limit_bytes):
        text = render_markdown(finding_samples.huge(), limit_bytes=limit_bytes)
        assert len(text.encode("utf-8")) < limit_bytes
        assert ("left out here: the summary would be too long." in text) == (limit_bytes < SUMMARY_BYTES)
        if limit_bytes >= 600:
            assert text.startswith("## ✗ differs: parity of gpt&#45;j&#45;6b")

    def test_more_than_github_takes_is_cut(self):
        many = dataclasses.replace(finding_samples.huge(), pairs=finding_samples.huge().pairs * 60)
        text = render_markdown(many)
        assert 200_000 < len(text.encode("utf-8")) < 1024 * 1024
        assert re.search(r"\n\d+ of 28 rows are left out here: ", text)


class TestText:
    @pytest.mark.parametrize("name", ["full", "holding", "huge"])
    @pytest.mark.parametrize("width", [80, 132])
    def test_no_line_is_wider_than_the_terminal(self, name, width):
        lines = render_text(sample(name), width=width).splitlines()
        assert max(map(len, lines)) <= width and not any(line != line.rstrip() for line in lines)

    def test_it_says_what_differs_and_where_it_was_born(self):
        text = render_text(finding_samples.full())
        assert text.startswith("✗ differs: models/tiny: tf first differs") and "looks like: rotary sign" in text
        [born] = [line for line in text.splitlines() if "●" in line and "born" not in line]
        assert born.split()[:6] == ["2", "5", "60", "<1", "5", "●"]
        assert "NaN" in text and "✗ pt: epsilon 1.1e-5" in text and "Planted mistakes: 2 of 3 noticed" in text
        assert "pt  float32  one weight  3.0e-05  h.0.q" in text
        assert render_text(finding_samples.holding()).count("\n") == 1

    def test_nothing_in_it_steers_a_terminal(self):
        text = render_text(finding_samples.hostile(), width=40)
        assert all(character.isprintable() or character == "\n" for character in text)


class TestFiles:
    @pytest.mark.parametrize("suffix", KINDS)
    def test_an_ending_says_which_report_and_nothing_is_replaced_unasked(self, tmp_path, suffix):
        path, found = tmp_path / f"r{suffix}", finding_samples.full()
        assert write_report(path, found) == [path]
        assert path.read_text(encoding="utf-8") == render(KINDS[suffix], found)
        with pytest.raises(WriteError, match="is there already"):
            write_report(path, found)
        write_report(path, finding_samples.holding(), overwrite=True)
        assert "tiny" in path.read_text(encoding="utf-8")
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]

    def test_another_ending_a_folder_and_no_folder_are_refused(self, tmp_path):
        with pytest.raises(InputError, match=r"r\.txt.*\.html"):
            kind_of("r.txt")
        with pytest.raises(WriteError, match="its folder is not there"):
            write_report(tmp_path / "no" / "r.html", finding_samples.full())
        (tmp_path / "d.html").mkdir()
        with pytest.raises(WriteError, match="is a folder"):
            write_report(tmp_path / "d.html", finding_samples.full(), overwrite=True)

    def test_json_of_several_runs_is_several_files(self, tmp_path):
        found = [finding_samples.full(), finding_samples.holding()]
        files = write_report(tmp_path / "r.json", *found)
        assert [file.name for file in files] == ["r.json", "r-2.json"]
        assert [Findings.from_file(file).verdict for file in files] == ["differs", "holds"]


def test_the_style_is_shipped_beside_the_code():
    import gptj.parity.reports

    folder = Path(gptj.parity.reports.__file__).parent
    assert (folder / "page.css").is_file() and (folder.parent / "findings.schema.json").is_file()


def test_percent_never_rounds_up_to_all_and_texts_are_cut():
    assert [spell_percent(s) for s in (1.0, 1 - 1e-7, 1 - 1e-15, 0.0, 0.123456)] == [
        "100%",
        "99.99%",
        "99.99%",
        "0%",
        "12.34%",
    ]
    assert legible("x" * 9_999).endswith("(9,999 characters)") and legible("\ufffe") == r"\U0000fffe"
