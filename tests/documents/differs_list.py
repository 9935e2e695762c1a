"""CONTRIBUTING's list of where the wings differ, made from the `Differs:` comments in the wings themselves.

python tests/documents/differs_list.py --write  put it into CONTRIBUTING.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WINGS = {"pt": "PyTorch", "tf": "TensorFlow", "flax": "Flax"}
BEGIN, END = "<!-- differences: made by tests/documents/differs_list.py -->", "<!-- differences end -->"


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
    return "\n".join(lines).rstrip()


def placed(page: str, text: str) -> str:
    """The page with the list between its two marks."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return re.sub(r"[ \t]+\n", "\n", f"{page[:start]}\n\n{text}\n\n{page[end:]}")


if __name__ == "__main__":
    made = listing(ROOT / "src" / "gptj")
    if "--write" in sys.argv[1:]:
        path = ROOT / "CONTRIBUTING.md"
        path.write_text(placed(path.read_text(), made))
    else:
        print(made)
