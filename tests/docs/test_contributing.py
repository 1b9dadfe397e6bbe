"""The model family of vlqc/docs/contributing.md, whose names all differ from those of vlqc's families, is compiled."""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vlqc
from tests.support import made_up_vl as model_code
from tests.support.made_up_vl import MadeUpForImageText, made_up_checkpoint
from tests.support.naive_w8a8 import signal_to_noise
from vlqc.families import registry
from vlqc.families.family import ModelFamily
from vlqc.frontend.calibration.dataset import load_samples

PAGE = Path(vlqc.__file__).parent / "docs" / "contributing.md"
PHOTOS = Path(__file__).parents[1] / "photos"
FAMILY = "made_up_family:MadeUpVL"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, with the page's code, the package of the model, and a checkpoint."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "made_up_family.py").write_text(code, encoding="utf-8")
    shutil.copy(model_code.__file__, tmp_path / "made_up_vl.py")
    made_up_checkpoint(tmp_path / "float")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_registered", [])
    yield tmp_path
    for name in ("made_up_family", "made_up_vl"):
        sys.modules.pop(name, None)


def float_model(folder: Path) -> MadeUpForImageText:
    model = MadeUpForImageText(MadeUpForImageText.config_class())
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


@pytest.mark.slow
@pytest.mark.every_transformers
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_the_family_of_the_page(folder: Path, is_dynamic: bool) -> None:
    """Catches a name of Qwen models outside of vlqc/families/, an edge that is not found, and a faulty page."""
    result = vlqc.compile(
        model_path="float", save_directory="out", calib_images=PHOTOS, family=FAMILY, is_dynamic=is_dynamic
    )
    counts = {part: sum(number for (of, _), number in result.counts.items() if of == part) for part, _ in result.counts}
    assert counts == {"vision": 12, "merger": 2, "language": 12, "other": 1}
    verified = vlqc.verify_folder("out", model_path="float", calib_images=PHOTOS)
    assert verified.ok, verified.to_dict()
    compiled, reference = vlqc.load("out"), float_model(folder / "float")
    samples = load_samples(Path("float"), PHOTOS).samples
    with torch.no_grad():
        expected = torch.cat([reference(**sample).logits.flatten() for sample in samples])
        actual = torch.cat([compiled(**sample).logits.flatten() for sample in samples])
    assert signal_to_noise(expected, actual) > 40


def test_every_attribute_is_described() -> None:
    """Catches an attribute of ModelFamily that the page does not describe."""
    section = PAGE.read_text(encoding="utf-8").partition("## Add a model family")[2].partition("\n## ")[0]
    attributes = {name for name, value in vars(ModelFamily).items() if not name.startswith("_") and not callable(value)}
    declared = {*ModelFamily.__annotations__, *ModelFamily.__abstractmethods__, *attributes}
    assert not {name for name in declared if f"`{name}`" not in section}


@pytest.mark.slow
def test_a_family_that_no_engine_has(folder: Path) -> None:
    """Catches a compilation that ends in an internal error, or without a warning, where no engine has the family."""
    code = (folder / "made_up_family.py").read_text(encoding="utf-8")
    (folder / "made_up_family.py").write_text(code.replace('engine_rows = "qwen2_vl"', 'engine_rows = ""'))
    result = vlqc.compile(model_path="float", save_directory="out", calib_images=PHOTOS, family=FAMILY)
    refusals = [note for note in result.notes if "loads W8A8 of MadeUp-VL" in note]
    assert len(refusals) == 2 and all(f"set `engine_rows` of {FAMILY}" in note for note in refusals)
    assert result.serve == []
    verified = vlqc.verify_folder("out")
    (warning,) = (warning for warning in verified.warnings if warning.what == "no version loads the folder")
    assert verified.ok and "engine_rows" in warning.fix
