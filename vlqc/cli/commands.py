"""The commands of `vlqc`. They parse arguments, call the API and write its result; see `output` for exit codes.

torch and transformers are imported inside the commands, so that --help and errors in the options appear at once.
"""

from pathlib import Path
from typing import Any

import click

from vlqc.cli.debug_commands import compile_until, diff_command, dump_command, run_pass_command
from vlqc.cli.output import FAILED, CommandOutput, distributed_command, prepare_process, print_lines, stderr
from vlqc.cli.parameters import (
    CONTEXT,
    EXAMPLES,
    GUIDE,
    PATH,
    CommandGroup,
    argument,
    compile_options,
    complete_pass,
    family_option,
    links_option,
    option,
    output_options,
)
from vlqc.errors import Fault, UserError
from vlqc.frontend.distributed import current_process_group
from vlqc.options.fields import DEBUGGING, RUNNING
from vlqc.options.options import Options

COMPARISON = "Comparison with the float checkpoint"


def main() -> None:
    """Entry point of `vlqc`."""
    prepare_process()
    app.main(prog_name="vlqc")


def compile_main(name: str) -> None:
    """Entry point of a script of that name that takes the arguments of `vlqc compile`."""
    prepare_process()
    compile_command.main(prog_name=name)


def _print_versions(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from importlib.metadata import version

        click.echo(", ".join(f"{name} {version(name)}" for name in ("vlqc", "torch", "transformers", "safetensors")))
        context.exit()


@click.group(cls=CommandGroup, epilog=GUIDE, context_settings=CONTEXT)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_versions, help="Print versions."
)
def app() -> None:
    """Quantization compiler for vision-language and language models that vLLM Ascend and MindIE serve."""


@app.command("compile", epilog=EXAMPLES, context_settings=CONTEXT)
@compile_options
@option(
    "--plan",
    is_flag=True,
    help="Estimate time, memory and result from the checkpoint's headers, and exit. --save_directory is optional.",
    panel=RUNNING,
)
@option(
    "--stop_after",
    default=None,
    metavar="PASS",
    shell_complete=complete_pass,
    help="Run the passes up to this one, on the stages of --dump_stages (default: all), for --dump_ir and "
    "--print_after. No save folder is written; --save_directory is optional.",
    panel=DEBUGGING,
)
@output_options
def compile_command(plan: bool, stop_after: str | None, options: dict[str, Any], output: CommandOutput) -> None:
    """Quantize a float checkpoint."""
    with distributed_command():
        if plan and stop_after is not None:
            why = "--plan runs no pass, --stop_after runs some"
            raise UserError(Fault("--plan with --stop_after", why=why, fix="omit one of them"))
        if stop_after is not None:
            compile_until(stop_after, output, options)
        elif plan:
            _plan(options, output)
        else:
            _compile(options, output)


def _plan(options: dict[str, Any], output: CommandOutput) -> None:
    checked = Options.without_saving(**options)  # before torch and transformers are imported
    from vlqc.reporting.plan import plan_compilation

    plan = plan_compilation(options=checked)
    if current_process_group().is_rank0:
        output.write(plan.to_dict(), plan.render)


def _compile(options: dict[str, Any], output: CommandOutput) -> None:
    checked = Options.from_user(**options)  # before torch and transformers are imported
    from vlqc.compiler import compile
    from vlqc.reporting.progress import Progress, TerminalProgress

    progress = Progress() if output.quiet else TerminalProgress(stderr())
    try:
        result = compile(progress=progress, options=checked)
    finally:
        progress.finish()
    if current_process_group().is_rank0:
        output.write(result.to_dict(), result.render)


@app.command("inspect")
@argument("folder", type=PATH, metavar="FOLDER", description="Folder of a float or compiled checkpoint.")
@links_option("folder")
@family_option
@output_options
def inspect_command(folder: Path, output: CommandOutput) -> None:
    """Show what a checkpoint contains.

    Schemes, sizes and ranges of a float or compiled checkpoint, per part of the model.
    """
    from vlqc.reporting.checkpoint_summary import inspect_folder

    summary = inspect_folder(folder)
    output.write(summary.to_dict(), summary.render)


@app.command("verify")
@argument("folder", type=PATH, metavar="FOLDER", description="Folder of the compiled checkpoint.")
@option(
    "--engine",
    default=None,
    metavar="ENGINE",
    help="Engine whose rules apply, with or without its version: vllm-ascend, vllm-ascend@0.18, mindie@2.2, both. "
    "Default: the one that the folder names.",
)
@option("--model_path", type=PATH, default=None, metavar="FLOAT", help="The float checkpoint.", panel=COMPARISON)
@option(
    "--lora",
    type=PATH,
    multiple=True,
    metavar="FOLDER",
    help="Adapter that was merged. May be repeated, in the order of the compilation.",
    panel=COMPARISON,
)
@option(
    "--calib_images", type=PATH, default=None, metavar="IMAGES", help="Images to compare logits on.", panel=COMPARISON
)
@option(
    "--min_sqnr",
    type=float,
    default=None,
    metavar="DB",
    help="Fail if the signal-to-quantization-noise ratio of the logits is lower.",
    panel=COMPARISON,
)
@option(
    "--trust_remote_code",
    default="False",
    metavar="True|False",
    help="Allow model code from the checkpoint folder to run.",
    panel=COMPARISON,
)
@option(
    "--locate",
    is_flag=True,
    help="Also rank the layers by their share of the logits' error, and suggest what to do about the first three.",
    panel=COMPARISON,
)
@option(
    "--locate_tokens",
    type=int,
    default=None,
    metavar="NUMBER",
    help="Number of tokens for --locate, in whole samples, shortest first. Default: 256.",
    panel=COMPARISON,
)
@links_option("model_path")
@family_option
@output_options
def verify_command(
    folder: Path,
    trust_remote_code: str,
    locate: bool,
    locate_tokens: int | None,
    output: CommandOutput,
    **options: Any,
) -> int:
    """Check a compiled folder.

    Applies the rules of the engines, without an NPU. The exit code is 1 if anything is wrong.
    """
    from vlqc.verify import verify_folder

    if locate:
        options["locate"] = True
        if not output.quiet:
            options["progress"] = lambda line: print_lines([line], stderr())
    if locate_tokens is not None:
        options["locate_tokens"] = locate_tokens
    options["trust_remote_code"] = Options.without_paths(trust_remote_code=trust_remote_code).trust_remote_code
    result = verify_folder(folder, **options)
    output.write(result.to_dict(), result.render)
    if not result.ok and output.quiet and not output.as_json:
        result.render(stderr())
    return 0 if result.ok else FAILED


@app.command("report")
@argument("folder", type=PATH, metavar="FOLDER", description="Folder of the compiled checkpoint.")
@option("--output", "-o", "page", type=PATH, default="vlqc_report.html", metavar="FILE", help="The page to write.")
@option(
    "--timings",
    type=PATH,
    default=None,
    metavar="FILE",
    help="Output of `vlqc compile --timings FILE`: time and memory.",
)
@option(
    "--verification",
    type=PATH,
    default=None,
    metavar="FILE",
    help="Output of `vlqc verify --locate --json_file FILE`: error of the logits, and of each layer.",
)
@family_option
@output_options
def report_command(
    folder: Path, page: Path, timings: Path | None, verification: Path | None, output: CommandOutput
) -> None:
    """Write an HTML page about a compiled folder.

    Schemes, ranges, smoothing and the error of every stage.
    """
    from vlqc.reporting.html import write_report

    write_report(folder, page, timings=timings, verification=verification)
    value = {"folder": str(folder), "page": str(page), "bytes": page.stat().st_size}
    output.write(value, lambda console: print_lines([f"report written to {page}"], console))


@app.command("passes")
@compile_options
@option("--explain", is_flag=True, help="Print the pipeline that the options of a compilation select.")
@output_options
def passes_command(explain: bool, options: dict[str, Any], output: CommandOutput) -> None:
    """List the passes with their options.

    With --explain, print the pipeline that the options of a compilation select instead.
    """
    if explain:
        checked = Options.without_paths(**options)
        from vlqc.pipeline.presets import pipeline_text

        text = pipeline_text(checked)
        output.write({"pipeline": text}, lambda console: click.echo(text))
        return
    if options:
        flags = " ".join(f"--{name}" for name in options)
        raise UserError(Fault(flags, why="the list of passes does not depend on options", fix="add --explain"))
    from vlqc.cli.pass_listing import describe_passes, print_passes

    output.write({"passes": describe_passes()}, print_passes)


for command in (dump_command, diff_command, run_pass_command):
    app.add_command(command)
