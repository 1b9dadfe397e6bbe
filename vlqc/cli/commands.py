"""The command line: arguments of every command, no logic. How commands end is in `answering`.

0: fine; 1: a folder failed verification; 2: something in the user's input; 70: a fault of vlqc; 130: interrupted.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from vlqc.cli.command_help import BARE, EXAMPLES, GUIDE
from vlqc.cli.completion import one_pass
from vlqc.cli.debug_commands import compile_until, diff_command, dump_command, run_pass_command
from vlqc.cli.output import (
    FAILED,
    Answer,
    Commands,
    answering,
    end_as_if_interrupted,
    stderr,
    together,
)
from vlqc.cli.parameters import with_options
from vlqc.cli.standard_streams import guard
from vlqc.errors import Fault, UserError
from vlqc.formatting import escape_control_chars
from vlqc.frontend.distributed import current_process_group
from vlqc.options.options import PANELS, Options

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("-", "_"),
}
app = typer.Typer(
    name="vlqc",
    cls=Commands,
    epilog=GUIDE,
    help="Quantization compiler for Qwen2.5-VL checkpoints that vLLM Ascend and MindIE serve. "
    "In option names a dash and an underscore are the same.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)

COMPARISON = "Comparison with the float checkpoint"
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Checkpoint folder.", show_default=False)]


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
    """The command line, with its exit codes."""
    guard()
    end_as_if_interrupted()
    app(prog_name="vlqc")


def compile_main(name: str) -> None:
    """Entry of a script of that name which takes the options of `vlqc compile`, without the word."""
    guard()
    end_as_if_interrupted()
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=CONTEXT)
    script.command(epilog=EXAMPLES)(compile_command)
    script(prog_name=name)


@app.command("compile", epilog=EXAMPLES)
@together
@answering
@with_options
def compile_command(
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            metavar=BARE,
            help="Say what would be done, from headers alone, and stop. --save_directory may be left out.",
            rich_help_panel=PANELS[4],
        ),
    ] = False,
    stop_after: Annotated[
        str | None,
        typer.Option(
            "--stop_after",
            metavar="PASS",
            autocompletion=one_pass,
            help="End after this pass on the stages of --dump_stages, or on all: for what --dump_ir and --print_after "
            "show. No save folder is written, so --save_directory may be left out.",
            rich_help_panel=PANELS[5],
        ),
    ] = None,
    *,
    answer: Answer,
    **options: Any,
) -> None:
    """Quantize a checkpoint: float folder in, int8 folder out."""
    if plan and stop_after is not None:
        why = "one says what a whole compilation would do, the other begins one"
        raise UserError(Fault("--plan with --stop_after", why=why, fix="leave out one of them"))
    if stop_after is not None:
        compile_until(stop_after, answer, **options)
        return
    # Before anything heavy is imported.
    (Options.without_saving if plan else Options.from_user)(**options)
    if plan:
        from vlqc.reporting.plan import plan_compilation

        planned = plan_compilation(**options)
        if not current_process_group().is_rank0:
            return
        answer.give(planned.to_dict(), planned.render)
        return

    from vlqc.compiler import compile
    from vlqc.reporting.progress import Progress, TerminalProgress

    progress = Progress() if answer.quiet else TerminalProgress(stderr())
    try:
        result = compile(progress=progress, **options)
    finally:
        progress.finish()
    if current_process_group().is_rank0:
        answer.give(result.to_dict(), result.render)


@app.command("inspect")
@answering
def inspect_command(folder: Folder, *, answer: Answer) -> None:
    """Show what a float or compiled checkpoint holds: schemes, sizes and ranges per part of the model."""
    from vlqc.reporting.checkpoint_summary import inspect_folder

    inspection = inspect_folder(folder)
    answer.give(inspection.to_dict(), inspection.render)


@app.command("verify")
@answering
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
            metavar=BARE,
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
    *,
    answer: Answer,
) -> None:
    """Check a compiled folder as the engines would, before anybody needs an NPU. Exit code 1 if anything is wrong."""
    from vlqc.verify import verify_folder

    located: dict[str, Any] = {"locate": True} if locate else {}
    if locate and not answer.quiet:
        located["progress"] = _print_progress
    if locate_tokens is not None:
        located["locate_tokens"] = locate_tokens
    report = verify_folder(
        folder,
        engine=engine,
        model_path=model_path,
        calib_images=calib_images,
        min_sqnr=min_sqnr,
        trust_remote_code=Options.without_paths(trust_remote_code=trust_remote_code).trust_remote_code,
        **located,
    )
    answer.give(report.to_dict(), report.render)
    if not report.ok:
        if answer.quiet and not answer.as_json:
            report.render(stderr())
        raise typer.Exit(FAILED)


@app.command("report")
@answering
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
            help="What `vlqc verify --locate --json_file FILE` wrote: logits, and which layers lose the accuracy.",
        ),
    ] = None,
    *,
    answer: Answer,
) -> None:
    """Write one page of HTML about a compiled folder: what became what, ranges, smoothing, noise of every stage."""
    from vlqc.reporting.html import write_report

    write_report(folder, output, timings=timings, verification=verification)
    told = {"folder": str(folder), "page": str(output), "bytes": output.stat().st_size}
    line = Text(escape_control_chars(f"the report is in {output}"))
    answer.give(told, lambda console: console.print(line, soft_wrap=True))


@app.command("passes")
@answering
@with_options
def passes_command(
    explain: Annotated[
        bool, typer.Option("--explain", metavar=BARE, help="Print the pipeline that the compile options below build.")
    ] = False,
    *,
    answer: Answer,
    **options: Any,
) -> None:
    """List the passes with their options, or explain which of them a compilation runs."""
    if explain:
        checked = Options.without_paths(**options)
        from vlqc.pipeline.presets import pipeline_text

        text = pipeline_text(checked)
        answer.give({"pipeline": text}, lambda console: typer.echo(text))
        return
    if options:
        given = " ".join(f"--{name}" for name in options)
        raise UserError(Fault(given, why="the list of passes is the same for all options", fix="add --explain"))
    from vlqc.cli.pass_listing import describe_passes, print_passes

    answer.give({"passes": describe_passes()}, print_passes)


app.command("dump")(dump_command)
app.command("diff")(diff_command)
app.command("run-pass")(run_pass_command)


def _print_progress(line: str) -> None:
    stderr().print(Text(line), soft_wrap=True)
