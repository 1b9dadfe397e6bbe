"""Two dumps side by side: which states belong together, and what is different in them. `vlqc diff` prints it."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlqc.errors import Fault, UserError
from vlqc.formatting import pluralize
from vlqc.ir.parser import parse_stage
from vlqc.ir.snapshot import StageSnapshot
from vlqc.reporting.dumps.diff import Changes, changes

GRAPH_FILE = "graph.vlqc"  # the text in a bundle
LARGEST_TEXT = 64 * 2**20  # bytes: a stage of a large model takes a hundredth of it
TITLE = re.compile(r"\d\d-(.+)")


@dataclass(frozen=True)
class Compared:
    """One state in both dumps, or in only one of them.

    title: of the state; found: what is different; repeated: how many more sentences an earlier state of the same stage
    has told already; only: "first" or "second" where the other one lacks it.
    """

    title: str
    found: Changes
    repeated: int = 0
    only: str = ""


@dataclass(frozen=True)
class Comparison:
    """All states, in order; same: how many of them are alike."""

    states: list[Compared]
    same: int

    @property
    def differs(self) -> bool:
        return bool(self.states)

    def to_dict(self) -> dict[str, Any]:
        """As a value of JSON."""
        return {"states": [asdict(state) for state in self.states], "same": self.same}

    def lines(self) -> Iterator[str]:
        """The comparison as text."""
        for state in self.states:
            if state.only:
                yield f"{state.title}: only in the {state.only} dump"
                continue
            yield f"{state.title}:"
            for about, sentences in state.found.items():
                yield f"  {about}"
                yield from (f"    {sentence}" for sentence in sentences)
            if state.repeated:
                yield f"  and {pluralize(state.repeated, 'difference')} of an earlier state of this stage"
        yield f"{pluralize(self.same, 'state')} alike, {len(self.states)} not"


def compare(first: Path, second: Path) -> Comparison:
    """Two dumps (folders of --dump_ir, folders of one stage, bundles or texts) -> what is different.

    States are paired by stage and pass, so pipelines may differ. UserError for what is no dump.
    """
    old, new = _states(first), _states(second)
    if len(old) == len(new) == 1:  # two files, whatever they are called
        title = " and ".join(dict.fromkeys([*old, *new]))
        old, new = ({title: path} for states in (old, new) for path in states.values())
    states, same = [], 0
    told: dict[str, set[tuple[str, str]]] = {}
    for title in _merged(list(old), list(new)):
        if title not in old or title not in new:
            states.append(Compared(title, {}, only="first" if title in old else "second"))
            continue
        found = changes(read_stage(old[title]), read_stage(new[title]))
        if not found:
            same += 1
            continue
        known = told.setdefault(title.rpartition("/")[0], set())
        fresh = {
            about: kept for about, lines in found.items() if (kept := [it for it in lines if (about, it) not in known])
        }
        known |= {(about, line) for about, lines in found.items() for line in lines}
        repeated = sum(map(len, found.values())) - sum(map(len, fresh.values()))
        states.append(Compared(title, fresh, repeated))
    return Comparison(states, same)


def read_stage(path: Path) -> StageSnapshot:
    """A stage from a file of text. UserError naming the file."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_TEXT:
            raise UserError(Fault("this is no text of a stage", str(path), "it is no ordinary file, or far too large"))
        return parse_stage(path.read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError(*error.faults, Fault("the text cannot be read", str(path))) from None
    except (OSError, ValueError) as error:
        raise UserError(Fault("the text cannot be read", str(path), str(error))) from error


def _states(dump: Path) -> dict[str, Path]:
    """STAGE/TITLE -> the file of text, in order; a state's number is left out of its title."""
    if not dump.exists():
        raise UserError(Fault(f"{dump} is no dump", why="there is no such file or folder"))
    if dump.is_file() and dump.suffix in (".json", ".onnx"):
        why = f"the text of a stage is compared, not its {dump.suffix.removeprefix('.')}"
        raise UserError(Fault(f"{dump} cannot be compared", why=why, fix="give the .vlqc of the same state"))
    if dump.is_file():
        return {dump.name: dump}
    if (dump / GRAPH_FILE).is_file():
        return {dump.name: dump / GRAPH_FILE}
    named = {path.parent.with_suffix(""): path for path in dump.rglob(f"*.bundle/{GRAPH_FILE}")}
    named |= {path.with_suffix(""): path for path in dump.rglob("*.vlqc") if path.name != GRAPH_FILE}
    found: dict[str, Path] = {}
    for place in sorted(named):
        stage, title = place.relative_to(dump).parent.as_posix(), place.name
        if (numbered := TITLE.fullmatch(title)) is not None:
            title = numbered[1]
        key, count = f"{stage}/{title}".removeprefix("./"), 1  # of a stage's own folder
        while key in found:  # a pass that runs twice
            count += 1
            key = f"{stage}/{title} ({count})".removeprefix("./")
        found[key] = named[place]
    if not found:
        why = "there is no text of a stage in it"
        fix = "dump with text or bundle among --dump_formats"
        raise UserError(Fault(f"{dump} is no dump", why=why, fix=fix))
    return found


def _merged(old: list[str], new: list[str]) -> list[str]:
    """Titles of both, in the order of the first one; those of the second alone follow behind their predecessors."""
    merged = list(old)
    place = 0
    for title in new:
        if title in merged:
            place = merged.index(title) + 1
        else:
            merged.insert(place, title)
            place += 1
    return merged
