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


def check_adapters(folder: Path, lora: Sequence[Path], result: VerificationResult) -> None:
    """Adds a fault if other adapters are merged into the float checkpoint than vlqc_report.json lists.

    lora: their folders. A folder without vlqc_report.json says nothing of adapters.
    """
    if not (folder / SUMMARY).is_file():
        return
    stated, merged = stated_adapters(folder), [adapter.id for adapter in read_adapters(lora)]
    result.add_examined(CHECK, max(len(stated), len(merged)))
    if [each.sha256 for each in stated] == [each.sha256 for each in merged]:
        return
    wanted, given = (", ".join(each.name for each in adapters) or "none" for adapters in (stated, merged))
    if sorted(each.sha256 for each in stated) == sorted(each.sha256 for each in merged):
        why = f"it was compiled with {wanted}; the order matters where an adapter replaces a weight, and for DoRA"
        result.add_warning(CHECK, SUMMARY, f"the adapters of the folder are merged in another order: {given}", why)
        return
    what = f"the folder was compiled with other adapters merged than the float checkpoint is compared with: {wanted}"
    fix = f"add {FLAG} with the folder of each, in this order" if stated else f"omit {FLAG}"
    result.add_fault(CHECK, SUMMARY, what, f"{FLAG}: {given}", fix)
