"""Compares the adapters that a folder says were merged with those that are merged into the float checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vlqc.frontend.checkpoint.adapters import FLAG, AdapterId, read_adapters
from vlqc.verify.findings import VerificationResult
from vlqc.verify.folder.manifest import SUMMARY
from vlqc.verify.folder.reader import read_json_object

CHECK = "adapters"


def stated_adapters(folder: Path) -> list[AdapterId]:
    """The adapters that vlqc_report.json lists, in order; none without the file or with a damaged list."""
    content, _ = read_json_object(folder / SUMMARY)
    entries = (content or {}).get("adapters", [])
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        return []
    return [AdapterId(str(entry.get("name")), str(entry.get("sha256"))) for entry in entries]


def check_adapters(folder: Path, lora: Sequence[Path], result: VerificationResult) -> bool:
    """Whether the adapters that are merged into the float checkpoint are those that vlqc_report.json lists, in order.

    Adds a fault if not: then the weights of the folder are not those to compare with. lora: folders of the adapters.
    A folder without vlqc_report.json says nothing of adapters.
    """
    if not (folder / SUMMARY).is_file():
        return True
    stated, merged = stated_adapters(folder), [adapter.id for adapter in read_adapters(lora)]
    result.add_examined(CHECK, max(len(stated), len(merged)))
    if [each.sha256 for each in stated] == [each.sha256 for each in merged]:
        return True
    what = f"compiled {_text(stated)}, compared {_text(merged)}"
    why = "weights and outputs are not compared, because the float checkpoint would have other weights"
    fix = f"add {FLAG} with the folder of each, in the order of the compilation" if stated else f"omit {FLAG}"
    if sorted(each.sha256 for each in stated) == sorted(each.sha256 for each in merged):
        why = f"the order is another, which matters where an adapter replaces a weight, and for DoRA; {why}"
    elif [each.name for each in stated] == [each.name for each in merged]:
        why = f"the adapters have the same names, but other content; {why}"
        fix = f"pass the adapters of the compilation with {FLAG}"
    result.add_fault(CHECK, SUMMARY, what, why, fix)
    return False


def _text(adapters: Sequence[AdapterId]) -> str:
    return f"with {' '.join(f'{FLAG} {each.name}' for each in adapters)}" if adapters else f"without {FLAG}"
