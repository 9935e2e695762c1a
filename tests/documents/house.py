"""The house, counted from its imports: rooms, floors, arrows and circles.

    python tests/documents/house.py            # the picture as it stands
    python tests/documents/house.py --arrows   # and which room imports which
    python tests/documents/house.py --write    # put the floors into CONTRIBUTING.md

A room is a folder of the package, or a file that lies beside the folders; the doors of `gptj_conversion` are one room.
An arrow is a room that imports another, wherever in a file, for type checkers too. A floor is as many rooms as the
longest chain of arrows passes; a circle is a set of modules each of which leads to all others.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from page_parts import ROOT, Part

FLOORS = Part("CONTRIBUTING.md", "floors", "tests/documents/house.py")
PACKAGES = {"gptj": ROOT / "src" / "gptj", "gptj_conversion": ROOT / "conversion" / "gptj_conversion"}
FRONT = {"gptj", "gptj.__main__"}
"""The package's own door, which every import passes through; no room, and no part of a circle."""

Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Every module's dotted name, with its file."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imports_of(name: str, source: str, known: Iterable[str]) -> set[str]:
    """The modules of ours that a source imports. A package counts where one of its own names is taken from it."""
    known = set(known)
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found - {name}


def module_graph() -> Graph:
    """Which module imports which."""
    known = modules()
    graph = {name: imports_of(name, path.read_text(encoding="utf-8"), known) for name, path in known.items()}
    return {name: imported - FRONT for name, imported in graph.items() if name not in FRONT}


def room_of(module: str) -> str:
    """The room that a module is in."""
    parts = module.split(".")
    if parts[0] == "gptj":
        return parts[1] if len(parts) > 1 else "gptj"
    return (
        f"conversion.{parts[1]}"
        if (PACKAGES[parts[0]] / (parts[1] if len(parts) > 1 else "?")).is_dir()
        else "conversion"
    )


def room_graph(graph: Mapping[str, set[str]]) -> Graph:
    """Which room imports which."""
    rooms: Graph = {}
    for module, imported in graph.items():
        rooms.setdefault(room_of(module), set()).update(map(room_of, imported))
    return {room: others - {room} for room, others in rooms.items()}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of two or more nodes that all lead to each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def floors(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Rooms by how long the longest chain below each is, the lowest floor first; the graph must have no circles."""
    height: dict[str, int] = {}

    def visit(node: str) -> int:
        if node not in height:
            height[node] = 1 + max((visit(other) for other in graph.get(node, ())), default=0)
        return height[node]

    for node in graph:
        visit(node)
    return [sorted(node for node, at in height.items() if at == floor) for floor in range(1, max(height.values()) + 1)]


def lines_by_room() -> dict[str, int]:
    """Lines of product, by room."""
    counted: dict[str, int] = {}
    for name, path in modules().items():
        room = room_of(name)
        counted[room] = counted.get(room, 0) + len(path.read_text(encoding="utf-8").splitlines())
    return counted


def list_floors(rooms: Mapping[str, set[str]]) -> str:
    """The rooms of each floor as a block of text, the highest first."""
    lines = [" ".join(floor) for floor in reversed(floors(rooms))]
    return "\n".join(["```text", *lines, "```"])


def main() -> None:
    graph = module_graph()
    if "--write" in sys.argv:
        FLOORS.write(list_floors(room_graph(graph)))
    rooms = room_graph(graph)
    lines = lines_by_room()
    print(f"{len(rooms)} rooms, {sum(map(len, rooms.values()))} arrows, {sum(lines.values())} lines of product")
    for circle in circles(graph):
        print("circle of modules:", *circle)
    for circle in circles(rooms):
        print("circle of rooms:", *circle)
    if not circles(rooms):
        for number, floor in reversed(list(enumerate(floors(rooms), 1))):
            print(f"floor {number:2}:", ", ".join(f"{room} ({lines[room]})" for room in floor))
    if "--arrows" in sys.argv:
        for room in sorted(rooms):
            print(f"{room} -> {', '.join(sorted(rooms[room]))}")


if __name__ == "__main__":
    main()
