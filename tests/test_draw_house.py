"""The map of the house in the README, held against the imports."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))

import draw_house  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
ROOMS = draw_house.rooms(README)


def test_the_map_is_true() -> None:
    """Catches a module that no room of the README holds, and one that uses a room above its own."""
    assert draw_house.faults(ROOMS) == []
    assert sum(map(len, draw_house.modules())) and len(draw_house.modules()) > 100


def test_the_picture_is_that_of_the_imports() -> None:
    """Catches a picture that was not drawn again after rooms or imports changed."""
    assert draw_house.PICTURE.read_text(encoding="utf-8") == draw_house.picture(ROOMS)
    assert "(vlqc/docs/house.svg)" in README


@pytest.mark.parametrize("lost", range(len(ROOMS)))
def test_a_lost_room_is_missed(lost: int) -> None:
    """Catches a check that overlooks the modules of some room."""
    assert any("is in no room" in fault for fault in draw_house.faults(ROOMS[:lost] + ROOMS[lost + 1 :]))


def test_a_room_in_the_wrong_place_is_found() -> None:
    """Catches a check that lets modules use what stands above them, or lie in two rooms."""
    assert any("uses" in fault for fault in draw_house.faults([ROOMS[-1], *ROOMS[:-1]]))
    twice = draw_house.Room("attic", ("errors", "no_such_file"))
    found = draw_house.faults([*ROOMS, twice])
    assert "vlqc/errors is in foundation and attic" in found and "attic: there is no no_such_file" in found


def test_arrows_are_few_and_say_all() -> None:
    """Catches an arrow that is left out although nothing else leads there."""
    arrows = set(draw_house.ways(ROOMS))
    known = draw_house.modules()
    place = {module: next(n for n, room in enumerate(ROOMS) if room.holds(module)) for module in known}
    used = {(place[module], place[it]) for module, path in known.items() for it in draw_house.imported(path, known)}
    reached = {(one, one) for one in range(len(ROOMS))}
    for _ in ROOMS:  # as many steps as the longest way can have
        reached |= {(one, below) for one, other in reached for above, below in arrows if above == other}
    assert used <= reached and arrows <= used and len(arrows) < len(used) / 2
