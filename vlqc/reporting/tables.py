"""Tables and labeled lines that the summary of a compilation, `--plan` and the report page have in common."""

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from vlqc.families.family import Part
from vlqc.formatting import escape_control_chars, format_bytes, format_sqnr
from vlqc.pipeline.precision_search import GroupPrecision, group_title
from vlqc.targets.schemes import Scheme

LABEL_WIDTH = 12
LISTED_GROUPS = 5


def part_order(part_and_scheme: tuple[str, str]) -> tuple[int, str, str]:
    """Sort key of (part, scheme): parts in the order of the model's forward."""
    order: list[str] = list(Part)
    part, scheme = part_and_scheme
    return (order.index(part) if part in order else len(order), part, scheme)


def layer_table(title: str, counts: Mapping[tuple[str, str], int]) -> Table:
    """counts: number of linear layers by (part, scheme)."""
    table = Table(title=title, title_justify="left")
    for column in ("part", "scheme", "linear layers"):
        table.add_column(column, justify="right" if column == "linear layers" else "left")
    for part, scheme in sorted(counts, key=part_order):
        table.add_row(part, scheme, str(counts[part, scheme]))
    return table


def candidate_table(groups: Sequence[GroupPrecision], most: int = LISTED_GROUPS) -> Table:
    """The groups with the largest share of the noise: a row for every scheme that they could have, with SQNR and size.
    The chosen one has an asterisk."""
    listed = sorted(groups, key=lambda group: -group.noise_share)[:most]
    title = "Candidates of the groups with the most noise" if len(groups) > len(listed) else "Candidates"
    table = Table(title=f"{title} (SQNR if only this group is quantized, size; * is chosen)", title_justify="left")
    table.add_column("group", overflow="fold")
    table.add_column("noise", justify="right", no_wrap=True)
    table.add_column("scheme", no_wrap=True)
    for column in ("SQNR", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    for group in listed:
        first: list[Text | str] = [Text(escape_control_chars(group_title(group.sites))), f"{group.noise_share:.0%}"]
        for each in sorted(group.candidates, key=lambda each: list(Scheme).index(each.scheme)):
            mark = "* " if each.scheme == group.scheme else "  "
            table.add_row(*first, f"{mark}{each.scheme}", format_sqnr(each.sqnr), format_bytes(each.bytes))
            first = [Text(), ""]
        table.add_section()
    return table


def labeled_lines(rows: Iterable[tuple[str, str]]) -> list[Text]:
    """(label, text) -> one line each, never wrapped, so that commands can be copied. Warnings are highlighted.

    A label is shown on the first of several consecutive lines only, except on notes and warnings.
    """
    lines, previous = [], ""
    for label, text in rows:
        shown = "" if label == previous and label not in ("note", "warning") else label
        style = "bold yellow" if label == "warning" else "bold"
        line = Text(no_wrap=True, overflow="ignore")
        line.append(f"{shown:<{LABEL_WIDTH}}", style).append(escape_control_chars(text))
        lines.append(line)
        previous = label
    return lines


def is_warning(note: str) -> bool:
    """Whether a note is a warning: it has several lines, the first of which summarizes the others."""
    return "\n" in note
