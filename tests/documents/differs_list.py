"""CONTRIBUTING's list of where the wings differ, made from the `Differs:` comments in the wings themselves.

python tests/documents/differs_list.py --write  put it into CONTRIBUTING.md
"""

from __future__ import annotations

import re
from pathlib import Path

from feature_table import WINGS
from page_parts import ROOT, Part

LIST = Part("CONTRIBUTING.md", "differences", "tests/documents/differs_list.py")


def differences(source: str) -> list[str]:
    """The text of each `Differs:`, from a comment or a docstring, up to the end of its paragraph."""
    found: list[str] = []
    lines = source.splitlines()
    for number, line in enumerate(lines):
        if "Differs:" not in line:
            continue
        comment = line.lstrip().startswith("#")
        text = [line.split("Differs:", 1)[1]]
        for following in lines[number + 1 :]:
            stripped = following.strip()
            if not stripped or (comment != stripped.startswith("#")) or '"""' in text[-1] or stripped == '"""':
                break
            text.append(stripped.lstrip("# "))
        said = " ".join(part.strip() for part in text).replace('"""', "").strip()
        found.append(said)
    return found


def listing(root: Path) -> str:
    """The list in Markdown, a heading a wing."""
    lines = []
    for wing, name in WINGS.items():
        lines.append(f"**{name}**\n")
        for path in sorted((root / wing).glob("*.py")):
            lines += [f"* `{wing}/{path.name}`: {text}" for text in differences(path.read_text())]
        lines.append("")
    return re.sub(r"[ \t]+\n", "\n", "\n".join(lines).rstrip())


if __name__ == "__main__":
    LIST.print_or_write(lambda: listing(ROOT / "src" / "gptj"))
