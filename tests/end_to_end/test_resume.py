"""Resuming after errors, Ctrl-C, full disks and concurrent runs; kills are in test_resume_kills."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import greenlet
import pytest
from click.testing import CliRunner
from torch import Tensor

import vlqc
from tests.support.interrupted_runs import (
    STAGES,
    compile_and_read,
    compile_into,
    fail_at_stage,
    file_contents,
    interrupt_compile,
    run_folders,
    small_checkpoint,
    stage_runs,
)
from vlqc.cli.commands import app
from vlqc.emit.atomic_folder import WorkFolder
from vlqc.emit.resume.journal import Journal
from vlqc.emit.shard_writer import ShardWriter
from vlqc.errors import InternalError, UserError
from vlqc.ir.execution import StageRun

pytestmark = pytest.mark.slow
PHOTOS = Path(__file__).parents[1] / "photos"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    return compile_and_read(tmp_path_factory.mktemp("whole") / "out", checkpoint)


# ---- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.every_transformers
@pytest.mark.parametrize("stage", STAGES)
def test_resume_at_every_stage(
    stage: str, checkpoint: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches stage outputs that are needed but not saved, also at the boundaries of vision, merger and language."""
    target = tmp_path / "out"
    with fail_at_stage(stage, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        compile_into(target, checkpoint)
    ran = stage_runs(monkeypatch)
    result = compile_into(target, checkpoint, resume=True)
    finished = STAGES.index(stage)
    assert [name for name in dict.fromkeys(ran) if name in STAGES] == STAGES[finished:]
    assert file_contents(target) == whole and run_folders(target) == []
    said = [note for note in result.notes if "resuming an interrupted run" in note]
    assert len(said) == (finished > 0) and all(f"{finished} of 5" in note for note in said)


def test_a_resumed_run_can_be_interrupted_again(checkpoint: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Catches a journal that a resumed run does not extend, and outputs that a second interruption loses."""
    target = tmp_path / "out"
    for number, stage in enumerate(STAGES[1:]):
        with fail_at_stage(stage, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt) as caught:
            compile_into(target, checkpoint, resume=number > 0)
        assert f"{number + 1} of 5 stages are finished" in caught.value.__notes__[0]
    result = compile_into(target, checkpoint, resume=True)
    assert file_contents(target) == whole and run_folders(target) == []
    assert sum(result.counts.values()) == sum(compile_into(tmp_path / "again", checkpoint).counts.values())


def test_an_error_before_any_stage_is_finished_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """Catches files beside the output folder after invalid input."""
    with fail_at_stage(STAGES[0], UserError("no")), pytest.raises(UserError):
        compile_into(tmp_path / "deep" / "out", checkpoint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "raised"),
    [(InternalError("a promise"), InternalError), (MemoryError(), UserError), (UserError("a sample"), UserError)],
)
def test_any_error_keeps_finished_stages(
    error: Exception, raised: type[Exception], checkpoint: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Catches finished stages that are lost by an error in the last stage."""
    with fail_at_stage(STAGES[4], error), pytest.raises(raised) as caught:
        compile_into(tmp_path / "out", checkpoint)
    assert "4 of 5 stages are finished" in caught.value.__notes__[0]
    compile_into(tmp_path / "out", checkpoint, resume=True)
    assert file_contents(tmp_path / "out") == whole


def test_a_failed_verification_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run folder that is kept although resuming would fail again."""

    def refuse(folder: Path, **options: object) -> None:
        raise InternalError("not sound")

    monkeypatch.setattr("vlqc.run.require_valid", refuse)
    with pytest.raises(InternalError):
        compile_into(tmp_path / "out", checkpoint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["weights", "outputs", "journal", "manifest"])
def test_a_full_disk(
    place: str, checkpoint: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback, a partial result, and a run that cannot be resumed after a full disk."""
    owners: dict[str, tuple[str, int]] = {
        "weights": ("vlqc.emit.shard_writer.ShardWriter._write", 60),
        "outputs": ("vlqc.emit.resume.stage_outputs.OutputsWriter._write", 5),
        "journal": ("vlqc.emit.resume.journal_file.os.fsync", 16),  # 1 for the first line, 5 per stage
        "manifest": ("vlqc.emit.resume.journal.write_manifest", 1),
    }
    name, call = owners[place]
    module, _, path = name.rpartition(".")
    real, calls = _found(name), []

    def full(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(name, full)
        with pytest.raises(UserError, match="No space left on device") as caught:
            compile_into(tmp_path / "out", checkpoint)
    assert "stages are finished" in caught.value.__notes__[0], (module, path)
    assert not (tmp_path / "out").exists()
    compile_into(tmp_path / "out", checkpoint, resume=True)
    assert file_contents(tmp_path / "out") == whole and run_folders(tmp_path / "out") == []


def _found(name: str) -> Callable[..., Any]:
    from _pytest.monkeypatch import derive_importpath

    attribute, owner = derive_importpath(name, True)
    original: Callable[..., Any] = getattr(owner, attribute)
    return original


def test_ctrl_c_on_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    """Catches another exit code, and a message without --resume and the number of finished stages."""
    target = tmp_path / "out"
    command = ["compile", "--model_path", str(checkpoint), "--save_directory", str(target), "--calib_images"]
    command += [str(PHOTOS), "--max_tokens", "60", "--max_samples", "1", "--weight_method", "round"]
    run, before = StageRun.forward, signal.getsignal(signal.SIGINT)

    def pressed(stage: StageRun, *watch: Any) -> None:
        if stage.name == STAGES[2]:
            os.kill(os.getpid(), signal.SIGINT)
        run(stage, *watch)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    StageRun.forward = pressed  # type: ignore[method-assign, assignment]
    try:
        ended = CliRunner().invoke(app, command)
    finally:
        StageRun.forward = run  # type: ignore[method-assign]
        signal.signal(signal.SIGINT, before)
    assert ended.exit_code == 130 and not target.exists()
    assert "interrupted" in ended.stderr and "2 of 5 stages are finished" in ended.stderr
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "--resume" in refused.stderr and "--start_over" in refused.stderr
    assert len(run_folders(target)) == 1
    went_on = CliRunner().invoke(app, [*command, "--resume"])
    assert went_on.exit_code == 0 and "2 of 5" in went_on.stderr
    assert vlqc.verify_folder(target).ok and run_folders(target) == []


# ---- options ---------------------------------------------------------------------------------------------------------


def test_resume_without_an_interrupted_run(checkpoint: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Catches an error for --resume in a first run, and a missing note."""
    result = compile_into(tmp_path / "out", checkpoint, resume=True)
    assert file_contents(tmp_path / "out") == whole and any("nothing to resume" in it for it in result.notes)


def test_resume_after_success_is_an_error(checkpoint: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Catches a finished result that is replaced."""
    compile_into(tmp_path / "out", checkpoint)
    for _ in range(2):
        with pytest.raises(UserError, match="not empty"):
            compile_into(tmp_path / "out", checkpoint, resume=True)
        (tmp_path / ".out.partial-left").mkdir(exist_ok=True)  # of an interrupted cleanup
    assert file_contents(tmp_path / "out") == whole


def test_finished_stages_are_discarded_only_with_start_over(checkpoint: Path, tmp_path: Path) -> None:
    """Catches a repeated command without --resume that removes finished stages."""
    work = interrupt_compile(tmp_path / "out", checkpoint)
    for options in ({}, {"overwrite": True}, {"w_bit": 8, "is_dynamic": True}):
        with pytest.raises(UserError, match=r"(?s)--resume.*--start_over"):
            compile_into(tmp_path / "out", checkpoint, **options)
    assert run_folders(tmp_path / "out") == [work]
    compile_into(tmp_path / "out", checkpoint, start_over=True)
    assert run_folders(tmp_path / "out") == [] and (tmp_path / "out").is_dir()


def test_resume_with_another_spelling_of_the_scheme(checkpoint: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Catches a run without --scheme that --scheme cannot resume, or that gives other bytes."""
    interrupt_compile(tmp_path / "out", checkpoint)
    compile_into(tmp_path / "out", checkpoint, resume=True, scheme="w8a8", w_bit=8)
    assert file_contents(tmp_path / "out") == whole


def test_files_created_since_the_interruption_stay(checkpoint: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Catches a resumed run that replaces an output folder which did not exist when it was started."""
    interrupt_compile(tmp_path / "out", checkpoint)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        compile_into(tmp_path / "out", checkpoint, resume=True)
    assert file_contents(tmp_path / "out") == {"mine": b"mine"} and len(run_folders(tmp_path / "out")) == 1
    compile_into(tmp_path / "out", checkpoint, resume=True, overwrite=True)
    assert file_contents(tmp_path / "out") == whole


def test_two_runs_do_not_use_the_same_run_folder(checkpoint: Path, tmp_path: Path) -> None:
    """Catches two commands with --resume that write into one run folder."""
    work = interrupt_compile(tmp_path / "out", checkpoint)
    folder = WorkFolder(tmp_path / "out", work)
    with pytest.raises(UserError, match="another run"):
        compile_into(tmp_path / "out", checkpoint, resume=True)
    folder.close()
    compile_into(tmp_path / "out", checkpoint, resume=True)


# ---- unsupported models, slow disks ----------------------------------------------------------------------------------


def test_placeholders_are_never_used_as_values(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a model that uses the outputs of an early stage again, which a resumed run does not have."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as code

    owner: Any = getattr(code, "Qwen2_5_VLTextModel", None) or code.Qwen2_5_VLModel
    build = owner.__init__
    first: dict[greenlet.greenlet, Tensor] = {}  # per suspended forward, the input of its first layer

    def remember(layer: Any, args: Any) -> None:
        if greenlet.getcurrent().parent is not None:
            first[greenlet.getcurrent()] = args[0]

    def add(layer: Any, args: Any) -> Any:
        return args[0] + first.get(greenlet.getcurrent(), 0), *args[1:]

    def build_with_a_skip_connection(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.layers[0].register_forward_pre_hook(remember)
        self.layers[1].register_forward_pre_hook(add)

    monkeypatch.setattr(owner, "__init__", build_with_a_skip_connection)
    interrupt_compile(tmp_path / "out", checkpoint, at=STAGES[4])
    with pytest.raises(UserError, match="cannot be resumed"):
        compile_into(tmp_path / "out", checkpoint, resume=True)


def test_unsupported_outputs_disable_resuming(
    checkpoint: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that fails because the outputs of a stage cannot be saved."""
    from vlqc.ir.serialization import NotSerializable

    def cannot(self: object, value: object) -> None:
        raise NotSerializable("Thing")

    monkeypatch.setattr("vlqc.emit.resume.stage_outputs.OutputsWriter.add", cannot)
    with fail_at_stage(STAGES[3], KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        compile_into(tmp_path / "out", checkpoint)
    assert list(tmp_path.iterdir()) == []
    result = compile_into(tmp_path / "out", checkpoint)
    assert file_contents(tmp_path / "out") == whole and any("type Thing" in note for note in result.notes)


def test_a_slow_disk_changes_nothing(
    checkpoint: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches conflicts between the writing thread and the main thread when no record is written before the last stage
    is computed."""
    commit, record_stage, saved = ShardWriter.commit, Journal.record_stage, []
    all_recorded = threading.Event()

    def delayed(writer: ShardWriter) -> dict[str, Any]:
        assert all_recorded.wait(timeout=300)
        return commit(writer)

    def counted(journal: Journal, *args: Any) -> None:
        record_stage(journal, *args)
        saved.append(journal.saved_stages)
        if len(saved) == len(STAGES):
            all_recorded.set()

    monkeypatch.setattr(ShardWriter, "commit", delayed)
    monkeypatch.setattr(Journal, "record_stage", counted)
    compile_into(tmp_path / "out", checkpoint)
    assert file_contents(tmp_path / "out") == whole and saved == [0] * len(STAGES)
