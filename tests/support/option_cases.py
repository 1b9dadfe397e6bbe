"""Option values, and the faults that are reported for them."""

from pathlib import Path
from typing import Any

import pytest

from vlqc.errors import UserError
from vlqc.options.options import Options

W4A8 = {"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False, "act_method": 1}


def two_folders(folder: Path) -> dict[str, Any]:
    """The two required options, for folders in this folder."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    return {"model_path": folder / "model", "save_directory": folder / "save"}


def faults_of(**values: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        Options.from_user(**values)
    return [str(fault) for fault in caught.value.faults]
