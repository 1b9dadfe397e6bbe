"""Draws the map of the house: which room of the code uses which, from the imports. `vlqc/docs/house.svg` is made of it.

    python tools/draw_house.py            writes the picture
    python tools/draw_house.py --check    exit code 1, and words, if the README's table or the picture are not the truth

The rooms stand in the README's table "Where to find what", the uppermost first; a room may use those below it only. An
arrow is left out where a longer way leads there, too.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "vlqc" / "docs" / "house.svg"
HEADING = "## Where to find what"
LINKED = ("passes", "kernels_ref")
WIDTH, MARGIN, GAP = 1040, 24, 28  # pixels
BOX_WIDTH, LINE, ROW = 236, 15, 62  # of a room, of its small print, between two rows
LETTERS = 36  # of small print that fit into one line
STYLE = """
.room { fill: #ffffff; stroke: #7a869a; }
.name { font: 600 15px sans-serif; fill: #17202e; }
.files { font: 11.5px sans-serif; fill: #4a5568; }
.way { fill: none; stroke: #8a97ab; stroke-width: 1.4; }
.tip { fill: #8a97ab; }
.wall { fill: #f4f6f9; }
@media (prefers-color-scheme: dark) {
  .room { fill: #1d2531; stroke: #64748b; }
  .name { fill: #eef2f7; }
  .files { fill: #b4c0d0; }
  .way { stroke: #71809a; }
  .tip { fill: #71809a; }
  .wall { fill: #11161e; }
}
"""


@dataclass(frozen=True)
class Room:
    """name: for people; files: patterns over paths without ".py", folders with a slash at their end."""

    name: str
    files: tuple[str, ...]

    def holds(self, module: str) -> bool:
        """Whether a module, as a path such as `verify/source`, belongs here."""
        return any(module.startswith(it) if it.endswith("/") else fnmatchcase(module, it) for it in self.files)


def rooms(readme: str) -> list[Room]:
    """The rooms of the README's table, the uppermost first. ValueError if there is no such table."""
    _, found, rest = readme.partition(HEADING)
    rows = [line.strip("| \n").split("|") for line in rest.partition("\n## ")[0].splitlines() if line.startswith("|")]
    if not found or len(rows) < 3:
        raise ValueError(f"the README has no table under {HEADING!r}")
    return [
        Room(cells[0].strip(), tuple(it.strip(" `") for it in cells[1].replace(" ", "").split(",")))
        for cells in rows[2:]
    ]


def modules() -> dict[str, Path]:
    """Path without ".py", below `vlqc/` -> file. A folder's own `__init__` is the folder with a slash."""
    found = {}
    for base in (ROOT / "vlqc", *(ROOT / name for name in LINKED)):
        for path in sorted(base.rglob("*.py")):
            inner = path.relative_to(base)
            if base.name == "vlqc" and inner.parts[0] in LINKED:  # reached through a link
                continue
            parts = inner.parts if base.name == "vlqc" else (base.name, *inner.parts)
            name = "/".join(parts).removesuffix(".py")
            found["__init__" if name == "__init__" else name.removesuffix("__init__")] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the project that a file imports anywhere, but for what only type checkers read."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        yield node
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
        for name in names:
            inner = name.removeprefix("vlqc.").replace(".", "/")
            if name.startswith("vlqc."):
                yield from (it for it in (inner, f"{inner}/") if it in known)


def faults(houses: list[Room]) -> list[str]:
    """What is wrong with the rooms: modules in none or in several of them, and those that use a room above them."""
    known, found = modules(), []
    place: dict[str, int] = {}
    for module in known:
        holding = [number for number, room in enumerate(houses) if room.holds(module)]
        if len(holding) != 1:
            names = " and ".join(houses[number].name for number in holding) or "no room"
            found.append(f"vlqc/{module} is in {names}")
        place[module] = holding[0] if holding else -1
    for room in houses:
        found += [f"{room.name}: there is no {it}" for it in room.files if not any(map(Room("", (it,)).holds, known))]
    for module, path in known.items():
        for used in sorted(set(imported(path, known))):
            if 0 <= place[used] < place[module]:
                found.append(
                    f"{module} ({houses[place[module]].name}) uses {used}, above it ({houses[place[used]].name})"
                )
    return found


def ways(houses: list[Room]) -> list[tuple[int, int]]:
    """(room, room that it uses), by number, without those that a longer way makes up for."""
    known = modules()
    place = {module: next(n for n, room in enumerate(houses) if room.holds(module)) for module in known}
    uses: dict[int, set[int]] = {number: set() for number in range(len(houses))}
    for module, path in known.items():
        uses[place[module]] |= {place[used] for used in imported(path, known)} - {place[module]}
    reached: dict[int, set[int]] = {}
    for number in reversed(range(len(houses))):  # what is below comes first
        reached[number] = uses[number].union(*(reached[below] for below in uses[number]))
    return [
        (number, below)
        for number in range(len(houses))
        for below in sorted(uses[number])
        if not any(below in reached[other] for other in uses[number] - {below})
    ]


def floors(count: int, arrows: list[tuple[int, int]]) -> list[list[int]]:
    """Rooms per floor, the uppermost first: each above all that it uses, and those in one floor near what uses them."""
    height: dict[int, int] = {}
    for number in reversed(range(count)):
        height[number] = 1 + max((height[below] for above, below in arrows if above == number), default=-1)
    found: list[list[int]] = [[] for _ in range(max(height.values()) + 1)]
    for number in range(count):
        found[-1 - height[number]].append(number)
    middle: dict[int, float] = {}
    for floor in found:

        def wish(number: int) -> float:
            above = [middle[one] for one, below in arrows if below == number and one in middle]
            return sum(above) / len(above) if above else WIDTH / 2

        floor.sort(key=lambda number: (wish(number), number))
        for position, number in enumerate(floor):
            middle[number] = WIDTH * (position + 0.5) / len(floor)
    return found


def small_print(room: Room) -> list[str]:
    lines = [""]
    for number, file in enumerate(room.files):
        word = file + ("," if number + 1 < len(room.files) else "")
        if lines[-1] and len(lines[-1]) + 1 + len(word) > LETTERS:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def picture(houses: list[Room]) -> str:
    """The map as SVG; the same rooms and imports give the same text."""
    arrows = ways(houses)
    boxes: dict[int, tuple[float, float, float]] = {}  # left, top, height
    top = float(MARGIN)
    for floor in floors(len(houses), arrows):
        tall = max(34 + LINE * len(small_print(houses[number])) for number in floor)
        for position, number in enumerate(floor):
            centre = WIDTH * (position + 0.5) / len(floor)
            boxes[number] = (centre - BOX_WIDTH / 2, top, 34 + LINE * len(small_print(houses[number])))
        top += tall + ROW
    bottom = top - ROW + MARGIN
    title = "The rooms of vlqc, and which uses which"
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom:.0f}" role="img" aria-label="{title}">',
        f"<title>{title}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="wall" width="{WIDTH}" height="{bottom:.0f}" rx="10"/>',
    ]
    for above, below in arrows:
        # From left to right as the other ends lie, so that arrows of one room do not cross.
        leaving = sorted((it for one, it in arrows if one == above), key=lambda number: boxes[number])
        coming = sorted((one for one, it in arrows if it == below), key=lambda number: boxes[number])
        left, high, tall = boxes[above]
        start = left + BOX_WIDTH * (leaving.index(below) + 1) / (len(leaving) + 1)
        end = boxes[below][0] + BOX_WIDTH * (coming.index(above) + 1) / (len(coming) + 1)
        begin, until = high + tall, boxes[below][1] - 7
        bend = max(ROW * 0.6, (until - begin) * 0.4)
        drawn.append(
            f'<path class="way" d="M{start:.0f} {begin:.0f} C{start:.0f} {begin + bend:.0f} '
            f'{end:.0f} {until - bend:.0f} {end:.0f} {until:.0f}"/>'
            f'<path class="tip" d="M{end:.0f} {until + 6:.0f} l-4.5 -8 h9 z"/>'
        )
    for number, room in enumerate(houses):
        left, high, tall = boxes[number]
        drawn.append(
            f'<rect class="room" x="{left:.0f}" y="{high:.0f}" width="{BOX_WIDTH}" height="{tall:.0f}" rx="7"/>'
        )
        drawn.append(f'<text class="name" x="{left + 12:.0f}" y="{high + 22:.0f}">{escape(room.name)}</text>')
        for line, text in enumerate(small_print(room)):
            at = high + 40 + LINE * line
            drawn.append(f'<text class="files" x="{left + 12:.0f}" y="{at:.0f}">{escape(text)}</text>')
    return "\n".join([*drawn, "</svg>"]) + "\n"


def main() -> int:
    """Writes the picture, or with --check says what is not the truth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    houses = rooms((ROOT / "README.md").read_text(encoding="utf-8"))
    wrong = faults(houses)
    if not wrong and not check:
        PICTURE.write_text(picture(houses), encoding="utf-8")
    elif not wrong and PICTURE.read_text(encoding="utf-8") != picture(houses):
        wrong = ["the picture is not that of the imports: run python tools/draw_house.py"]
    print("\n".join(wrong) or f"{len(houses)} rooms, {len(ways(houses))} arrows")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
