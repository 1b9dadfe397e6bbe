"""Code in untrusted files does not run."""

import ast
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import vlqc
from tests.support.fuzz.tiny import TINY
from tests.support.untrusted_files import edit, photo
from tools.fuzz import bounded
from vlqc.errors import UserError
from vlqc.frontend.calibration.dataset import load_samples
from vlqc.frontend.calibration.images import ImageError, read_image
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.reporting.checkpoint_summary import inspect_folder
from vlqc.verify import verify_folder

ROOT = Path(__file__).parents[2]


class Payload:
    """Creates the file `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


LOADERS = {
    "eval",
    "exec",
    "__import__",
    "system",
    "popen",
    "Popen",
    "run_path",
    "loads",
    "load",
    "Unpickler",
}
HARMLESS = {"re.compile", "vlqc.load", "json.loads", "platform.system"}
PICKLE = "vlqc/frontend/torch_process_group.py"  # unpickles what other processes of the same run have sent
YAML = "vlqc/options/recipe.py"
ALLOWED = {
    ("vlqc/__init__.py", "loads"), ("vlqc/reporting/summary.py", "loads"),
    (PICKLE, "unpickler.load"),
    ("vlqc/verify/accuracy.py", "load"), ("vlqc/frontend/streamed_model.py", "model.eval"),
    ("vlqc/frontend/calibration/images.py", "opened.load"), ("vlqc/emit/folder_writer.py", "deferred.load"),
}  # fmt: skip


def source_files() -> dict[str, ast.Module]:
    """Path in the repository -> syntax tree, of all product files."""
    files = [path for folder in ("vlqc", "passes", "kernels_ref") for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def test_no_call_executes_data() -> None:
    """Catches a call that executes data: pickle, torch.load, eval, a shell."""
    found = set()
    for name, tree in source_files().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called.rpartition(".")[2] in LOADERS and called not in HARMLESS:
                    found.add((name, called))
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not modules & {"subprocess", "marshal", "shelve", "joblib", "dill"}, name
                assert "yaml" not in modules or name == YAML, name
                assert "pickle" not in modules or name == PICKLE, name
    assert found <= ALLOWED, found - ALLOWED
    assert {name for name, _ in ALLOWED} <= set(source_files())


def test_yaml_is_read_as_text() -> None:
    """Catches a YAML loader that creates other objects than text."""
    attributes = (node for node in ast.walk(source_files()[YAML]) if isinstance(node, ast.Attribute))
    used = {node.attr for node in attributes if ast.unparse(node.value) == "yaml"}
    harmless = {name for name in used if name.endswith(("Node", "Event", "Error"))}
    assert used - harmless <= {"parse", "compose", "load", "BaseLoader"}


def test_pickles_are_never_loaded(model: Path, tmp_path: Path) -> None:
    """Catches a pickle in the checkpoint folder that is loaded."""
    mark = tmp_path / "ran"
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "training_args.bin", "vocab.pkl", "merges.pkl"):
        (model / name).write_bytes(pickle.dumps(Payload(mark)))
    out = tmp_path / "out"
    vlqc.compile(model_path=model, save_directory=out, calib_images=photo(tmp_path), weight_method="round")
    inspect_folder(model)
    verify_folder(out, model_path=model)
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not read because loading them runs code"):
        Checkpoint(model)
    assert not mark.exists() and not list(out.glob("*.bin")) and not list(out.glob("*.pt*"))
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists(), "the payload must work when it is loaded"


@pytest.mark.every_transformers
@pytest.mark.parametrize("place", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_code_in_the_checkpoint_does_not_run(model: Path, tmp_path: Path, place: str) -> None:
    """Catches code in the checkpoint that runs without --trust_remote_code."""
    mark = tmp_path / "ran"
    (model / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise SystemExit\n")
    mapped = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer", "AutoModelForCausalLM")
    edit(model / place, auto_map={name: "own.Own" for name in mapped})
    out = tmp_path / "out"
    try:
        vlqc.compile(model_path=model, save_directory=out, calib_images=photo(tmp_path), weight_method="round")
    except UserError as error:
        assert "--trust_remote_code" in str(error)
    assert not mark.exists() and not (out / "own.py").exists()


@pytest.mark.parametrize("name", ["TransfoXLTokenizer", "RagTokenizer", "BertJapaneseTokenizer", "os.system"])
def test_tokenizers_of_other_models_are_not_loaded(model: Path, tmp_path: Path, name: str) -> None:
    """Catches a tokenizer class chosen by the checkpoint; some of them unpickle files."""
    edit(model / "tokenizer_config.json", tokenizer_class=name)
    with pytest.raises(UserError, match=f"tokenizer_class is '{name}'"):
        load_samples(model, photo(tmp_path))


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}",
    "{{ messages.append(1) }}{{ messages.__class__.__base__.__subclasses__() }}",
    "{% include '/etc/passwd' %}",
    "{% for a in range(10**9) %}{% endfor %}",
)


@pytest.mark.every_transformers
@pytest.mark.parametrize("template", ESCAPES)
def test_chat_templates_are_sandboxed(model: Path, tmp_path: Path, template: str) -> None:
    """Catches a template that accesses Python objects or files, or loops endlessly."""
    (model / "chat_template.json").unlink()
    (model / "chat_template.jinja").write_text(template)
    with bounded(30.0), pytest.raises(UserError, match="chat template"):
        load_samples(model, photo(tmp_path))
    assert not Path("ran").exists()


def test_images_start_no_subprocess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a PostScript file named .jpg, for which Pillow would start Ghostscript."""

    def started(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"started {args}")

    for name in ("Popen", "run", "check_call", "check_output", "call"):
        monkeypatch.setattr(subprocess, name, started)
    (tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(ImageError, match="format"):
        read_image(tmp_path / "a.jpg")
