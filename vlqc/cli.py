"""The command line: arguments and exit codes, no logic.

0: fine; 1: a folder failed verification; 2: something in the user's input; 70: a fault of vlqc; 130: interrupted.
"""

import functools
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from vlqc.errors import Fault, UserError, VlqcError, printable
from vlqc.option_values import Refused, read_bool
from vlqc.options import PANELS, Options, extra_of, flag_of
from vlqc.world import here, joined

USER, INTERNAL, INTERRUPTED = 2, 70, 130

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("-", "_"),
}
app = typer.Typer(
    name="vlqc",
    help="Quantization compiler for Qwen2.5-VL checkpoints that vLLM Ascend and MindIE serve. "
    "In option names a dash and an underscore are the same.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)

COMPARISON = "Comparison with the float checkpoint"
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Checkpoint folder.", show_default=False)]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the findings as JSON.")]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(", ".join(f"{name} {version(name)}" for name in ("vlqc", "torch", "transformers", "safetensors")))
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    """Only what stands before a command."""


def main() -> None:
    """Entry of `vlqc` and `python -m vlqc`."""
    app(prog_name="vlqc")


def compile_main(name: str) -> None:
    """Entry of a script of that name which takes the options of `vlqc compile`, without the word."""
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=CONTEXT)
    script.command()(compile_command)
    script(prog_name=name)


def _answering(command: Callable[..., None]) -> Callable[..., None]:
    """Turns what `command` raises into text on stderr and an exit code."""

    @functools.wraps(command)
    def answer(*args: Any, **given: Any) -> None:
        try:
            command(*args, **given)
        except VlqcError as error:
            if here().tells(error):
                _print_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as error:
            if here().tells(error):
                _stderr().print("interrupted")
                _print_notes(error)
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if here().tells(error):
                traceback.print_exc()  # with the notes
                _stderr().print("this is a fault of vlqc; please report it with the lines above")
            raise typer.Exit(INTERNAL) from None

    return answer


def _together(command: Callable[..., None]) -> Callable[..., None]:
    """Lets `command` run in all processes that torchrun started. Around everything: bad options, too, are told once."""

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> None:
        try:
            with joined():
                command(*args, **given)
        except UserError as error:  # the processes do not find each other
            _print_error(error)
            raise typer.Exit(error.exit_code) from None

    return run


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command`, which takes **options, one parameter per field of Options. Only what was given arrives."""
    taken = [each for each in inspect.signature(command).parameters.values() if each.kind is not each.VAR_KEYWORD]
    in_panels = sorted(
        Options.model_fields, key=lambda name: PANELS.index(extra_of(Options.model_fields[name])["panel"])
    )
    # Panels appear in the order of their first option: the command's own come last.
    parameters = [_parameter(name) for name in in_panels] + [each.replace(kind=each.KEYWORD_ONLY) for each in taken]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        command(**{name: value for name, value in given.items() if value is not None and value != []})

    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_options


def _parameter(name: str) -> inspect.Parameter:
    """A field of Options as typer sees it. Values stay text: Options reads them, so that all faults come at once."""
    field = Options.model_fields[name]
    extra = extra_of(field)
    many = extra["kind"] == "globs"
    default: Any = (
        False if extra["flag"] else None if many or field.is_required() or field.default is None else str(field.default)
    )
    option = typer.Option(
        flag_of(name),
        help=field.description,
        rich_help_panel=extra["panel"],
        metavar=None if extra["flag"] else _placeholder(field.annotation, extra),
    )
    kind: Any = bool if extra["flag"] else list[str] | None if many else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _placeholder(annotation: object, extra: dict[str, Any]) -> str:
    """What stands for the value in the help."""
    if extra["values"] and extra["kind"] is None:
        return "|".join(map(str, extra["values"]))
    if extra["kind"]:
        return {"globs": "GLOB", "target": "ENGINE", "formats": "LIST"}[extra["kind"]]
    words = {"bool": "True|False", "Path": "PATH", "int": "NUMBER", "float": "NUMBER"}
    return next((word for part, word in words.items() if part in str(annotation)), "TEXT")


@app.command("compile")
@_together
@_answering
@_with_options
def compile_command(
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Say what would be done, from headers alone, and stop.", rich_help_panel=PANELS[4]),
    ] = False,
    stop_after: Annotated[
        str | None,
        typer.Option(
            "--stop_after",
            metavar="PASS",
            help="End after this pass on the stages of --dump_stages, or on all: for what --dump_ir and --print_after "
            "show. No save folder is written.",
            rich_help_panel=PANELS[5],
        ),
    ] = None,
    **options: Any,
) -> None:
    """Quantize a checkpoint: float folder in, int8 folder out."""
    if stop_after is not None:
        _look_until(stop_after, **options)
        return
    Options.from_user(**options)  # before anything heavy is imported
    if plan:
        from vlqc.preflight import preflight, render

        render(preflight(**options), Console())
        return

    from vlqc.compiler import compile
    from vlqc.progress import TerminalProgress, print_summary

    progress = TerminalProgress(_stderr())
    try:
        result = compile(progress=progress, **options)
    finally:
        progress.finish()
    if here().first:
        print_summary(result, Console())


def _look_until(stop_after: str, **options: Any) -> None:
    from vlqc.dumps.looking import look_until
    from vlqc.progress import TerminalProgress

    progress = TerminalProgress(_stderr())
    try:
        looked = look_until(stop_after, progress=progress, **options)
    finally:
        progress.finish()
    told = f"stopped after {stop_after} on {len(looked.stages)} of {looked.of} stages; no save folder was written"
    _print_progress(told if looked.folder is None else f"{told}; the dump is in {looked.folder}")


@app.command("dump")
@_answering
def dump_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a float checkpoint.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write STAGE/00-traced files instead of printing texts."),
    ] = None,
    stages: Annotated[
        list[str] | None,
        typer.Option("--stages", metavar="GLOB", help="Only these stages, such as 'model.layers.1*'; repeatable."),
    ] = None,
    formats: Annotated[
        str, typer.Option("--formats", metavar="LIST", help="What to write: text,json,onnx,bundle.")
    ] = "text",
    calib_images: Annotated[
        Path | None,
        typer.Option("--calib_images", metavar="PICTURES", help="What to trace with; left out: a picture of noise."),
    ] = None,
    trust_remote_code: Annotated[
        str, typer.Option("--trust_remote_code", metavar="True|False", help="Allow the checkpoint's own code to run.")
    ] = "False",
) -> None:
    """Print the stages of a float checkpoint as traced: graph, tensors, sites. Nothing is quantized."""
    chosen = Options.without_paths(
        model_path=model, dump_ir=output or ".", dump_formats=formats, dump_stages=stages or [],
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if output is None and formats != "text":
        raise UserError(Fault(f"--formats {formats}", why="only text is printed", fix="add --output DIR"))
    from vlqc.dumps import Dumper
    from vlqc.dumps.looking import trace

    dumper = Dumper(
        output, stages=chosen.dump_stages, formats=chosen.dump_formats.split(","), model_path=model,
        print_traced=output is None, show=functools.partial(typer.echo, nl=False),
    )  # fmt: skip
    trace(model, dumper, calib_images=calib_images, trust_remote_code=chosen.trust_remote_code)


@app.command("inspect")
@_answering
def inspect_command(folder: Folder, json_file: JsonFile = None) -> None:
    """Show what a float or compiled checkpoint holds: schemes, sizes and ranges per part of the model."""
    _check_json_file(json_file)
    from vlqc.inspection import inspect_folder

    inspection = inspect_folder(folder)
    inspection.render(Console())
    if json_file is not None:
        json_file.write_text(inspection.to_json(), encoding="utf-8")


@app.command("verify")
@_answering
def verify_command(
    folder: Folder,
    model_path: Annotated[
        Path | None,
        typer.Option(
            "--model_path",
            metavar="FLOAT",
            help="Float checkpoint to compare with.",
            rich_help_panel=COMPARISON,
        ),
    ] = None,
    calib_images: Annotated[
        Path | None,
        typer.Option(
            "--calib_images",
            metavar="PICTURES",
            help="What to compare logits on.",
            rich_help_panel=COMPARISON,
        ),
    ] = None,
    min_sqnr: Annotated[
        float | None,
        typer.Option(
            "--min_sqnr",
            metavar="DB",
            help="Fail if the logits stand less than this above their error.",
            rich_help_panel=COMPARISON,
        ),
    ] = None,
    trust_remote_code: Annotated[
        str,
        typer.Option(
            "--trust_remote_code",
            metavar="True|False",
            help="Allow model code from the float checkpoint to run.",
            rich_help_panel=COMPARISON,
        ),
    ] = "False",
    locate: Annotated[
        bool,
        typer.Option(
            "--locate",
            help="Also rank the layers by their share of the logits' error, and say what to do about the first three.",
            rich_help_panel=COMPARISON,
        ),
    ] = False,
    locate_tokens: Annotated[
        int | None,
        typer.Option(
            "--locate_tokens",
            metavar="NUMBER",
            help="How many tokens --locate looks at, in whole samples, the short ones first. 256 if left out.",
            rich_help_panel=COMPARISON,
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="ENGINE",
            help="Engine whose rules count, if need be with its version: vllm-ascend, vllm-ascend@0.18, mindie@2.2, "
            "both. Left out: what the folder itself claims.",
            show_default=False,
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Check a compiled folder as the engines would, before anybody needs an NPU. Exit code 1 if anything is wrong."""
    _check_json_file(json_file)
    from vlqc.verify import verify_folder

    located: dict[str, Any] = {"locate": True, "progress": _print_progress} if locate else {}
    if locate_tokens is not None:
        located["locate_tokens"] = locate_tokens
    report = verify_folder(
        folder,
        engine=engine,
        model_path=model_path,
        calib_images=calib_images,
        min_sqnr=min_sqnr,
        trust_remote_code=_bool("trust_remote_code", trust_remote_code),
        **located,
    )
    report.render(Console())
    if json_file is not None:
        json_file.write_text(report.to_json(), encoding="utf-8")
    if not report.ok:
        raise typer.Exit(1)


@app.command("report")
@_answering
def report_command(
    folder: Folder,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Where the page goes."),
    ] = Path("vlqc_report.html"),
    timings: Annotated[
        Path | None,
        typer.Option("--timings", metavar="FILE", help="What `vlqc compile --timings FILE` wrote: time and memory."),
    ] = None,
    verification: Annotated[
        Path | None,
        typer.Option(
            "--verification",
            metavar="FILE",
            help="What `vlqc verify --locate --json FILE` wrote: logits, and which layers lose the accuracy.",
        ),
    ] = None,
) -> None:
    """Write one page of HTML about a compiled folder: what became what, ranges, smoothing, noise of every stage."""
    from vlqc.report import write_report

    write_report(folder, output, timings=timings, verification=verification)
    Console().print(Text(f"the report is in {output}"), soft_wrap=True)


@app.command("diff")
@_answering
def diff_command(
    first: Annotated[Path, typer.Argument(metavar="A", help="A dump, a stage's folder in it, a bundle or a text.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="What to compare it with.")],
) -> None:
    """Say what differs between two dumps of --dump_ir: per stage, pass and site, in words. Exit code 1 if anything."""
    from vlqc.dumps.comparison import compare

    comparison = compare(first, second)
    for line in comparison.lines():
        Console().print(Text(printable(line)), soft_wrap=True)
    if comparison.differs:
        raise typer.Exit(1)


@app.command("run-pass")
@_answering
def run_pass_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder NN-STATE.bundle of a dump.")],
    pipeline: Annotated[str, typer.Argument(metavar="PASS", help="A pass with its options, or several: 'a{b=1},c'.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the stage's text behind it.")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Print that text, and not what has changed.")] = False,
) -> None:
    """Run a pass again on one stage, from a bundle of --dump_formats bundle, and say what it changed."""
    from vlqc.dumps.run_pass import run_pass

    _check_file("--output", output)
    run = run_pass(bundle, pipeline)
    if output is not None:
        output.write_text(run.text, encoding="utf-8")
    if text:
        typer.echo(run.text, nl=False)
        return
    for about, sentences in run.found.items():
        Console().print(Text(printable("\n  ".join([about, *sentences]))), soft_wrap=True)
    for note in run.notes:
        Console().print(Text(printable(f"note: {note}")), soft_wrap=True)
    Console().print("nothing changed" if not run.found else f"{len(run.found)} things changed")


@app.command("passes")
@_answering
@_with_options
def passes_command(
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the pipeline that the compile options below build.")
    ] = False,
    **options: Any,
) -> None:
    """List the passes with their options, or explain which of them a compilation runs."""
    if explain:
        checked = Options.without_paths(**options)
        from vlqc.pipeline import pipeline_text

        typer.echo(pipeline_text(checked))
        return
    from vlqc.pass_table import print_passes

    print_passes(Console())


def _bool(name: str, word: str) -> bool:
    try:
        return read_bool(name, word)
    except Refused as refused:
        raise UserError(refused.fault) from refused


def _check_json_file(file: Path | None) -> None:
    _check_file("--json", file)


def _check_file(flag: str, file: Path | None) -> None:
    """Before the work, not after it."""
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        why = "it is a folder" if file.is_dir() else f"there is no folder {file.parent}"
        raise UserError(Fault(f"{flag} {file} cannot be written", why=why, fix="name a file in an existing folder"))


def _print_progress(line: str) -> None:
    _stderr().print(Text(line), soft_wrap=True)


def _stderr() -> Console:
    return Console(stderr=True)


def _print_error(error: VlqcError) -> None:
    """The faults one below the other, what is wrong in bold where the terminal can."""
    console = _stderr()
    if not isinstance(error, UserError):
        console.print(Text(str(error)), soft_wrap=True)
    for fault in error.faults if isinstance(error, UserError) else ():
        head, *rest = str(fault).split("\n")
        console.print(Text.assemble(("error: ", "bold red"), (head, "bold")), soft_wrap=True)
        for line in rest:
            console.print(Text(line), soft_wrap=True)
    _print_notes(error)


def _print_notes(error: BaseException) -> None:
    """How to go on, where that is possible."""
    for note in getattr(error, "__notes__", ()):
        _stderr().print(Text(note), soft_wrap=True)
