"""Files of prompts whose lines are not what they seem."""

from __future__ import annotations

from gptj.command.prompts import read_lines
from malformed import Malformed

TITLE = "prompts"


def case(what: str, data: bytes, names: str) -> Malformed:
    return Malformed(
        what,
        lambda folder: (folder / "prompts").write_bytes(data),
        lambda folder: read_lines(str(folder / "prompts")),
        names,
    )


GOOD = b'{"prompt": "a"}\n'

CASES = [
    *(
        case(f"the field {name}", f'{{"prompt": "a", "{name}": 1}}'.encode(), name)
        for name in ("self", "extra", "file", "line", "text", "changes", "max_new_token", "__class__")
    ),
    *(
        case(f"a prompt that is {value}", f'{{"prompt": {value}}}'.encode(), "prompt")
        for value in ("1", "1.5", "true", "[]", '["a"]', "{}", "null", "NaN")
    ),
    *(
        case(f"after a {start!r}, a prompt that is a number", start + b'{"prompt": 3}', "prompt")
        for start in (b"\xef\xbb\xbf", b" ", b"\t", b"\xef\xbb\xbf ", b"\xef\xbb\xbf\r\n")
    ),
    *(case(f"UTF-16, {kind}", GOOD.decode().encode(kind), "UTF-8") for kind in ("utf-16", "utf-16-le", "utf-16-be")),
    *(
        case(f"a second line {line!r}", GOOD + line, "line 2")
        for line in (b"[1]", b"3", b"text", b'"a"', b"{", b"null")
    ),
]
CASES = [one for one in CASES if "NaN" not in one.what] + [
    case("a prompt that is NaN", b'{"prompt": NaN}', "NaN"),
    case("5,000 digits", b'{"prompt": "a", "top_k": ' + b"9" * 5000 + b"}", "line 1"),
]
