"""The commands that show intermediate results: dump, diff, run-pass, and `vlqc compile --stop_after`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from vlqc.cli.output import FAILED, CommandOutput, check_output_file, print_lines, stderr, write_file
from vlqc.cli.parameters import (
    PATH,
    Command,
    argument,
    complete_list,
    complete_pass,
    family_option,
    links_option,
    option,
    output_options,
)
from vlqc.errors import Fault, UserError
from vlqc.formatting import pluralize
from vlqc.options.fields import DUMP_FORMATS
from vlqc.options.options import Options


def compile_until(stop_after: str, output: CommandOutput, options: dict[str, Any]) -> None:
    """`vlqc compile --stop_after PASS`."""
    from vlqc.reporting.dumps.trace_only import run_until
    from vlqc.reporting.progress import Progress, TerminalProgress

    progress = Progress() if output.quiet else TerminalProgress(stderr())
    try:
        result = run_until(stop_after, progress=progress, **options)
    finally:
        progress.finish()
    stages = f"{len(result.stages)} of {pluralize(result.total, 'stage')}"
    line = f"stopped after {stop_after} on {stages}; no save folder written"
    if result.folder is not None:
        line += f"; the dump is in {result.folder}"
    output.write({"stop_after": stop_after, **result.to_dict()}, lambda _: print_lines([line], stderr()))


@click.command("dump", cls=Command)
@argument("model", type=PATH, metavar="MODEL", description="Folder of the float checkpoint.")
@option(
    "--output",
    "-o",
    "folder",
    type=PATH,
    default=None,
    metavar="DIR",
    help="Write STAGE/00-traced files instead of printing.",
)
@option(
    "--stages",
    multiple=True,
    default=(),
    metavar="GLOB",
    help="Only these stages, for example '*.layers.1*'. May be repeated.",
)
@option(
    "--formats",
    default="text",
    metavar="LIST",
    shell_complete=complete_list(list(DUMP_FORMATS)),
    help=f"Formats to write, separated by commas: {', '.join(DUMP_FORMATS)}.",
)
@option(
    "--calib_images",
    type=PATH,
    default=None,
    metavar="IMAGES",
    help="Images to trace with. Default: random text and, unless text-only, an image of noise.",
)
@option("--lora", type=PATH, multiple=True, metavar="FOLDER", help="Adapter to merge, as in `vlqc compile`.")
@option(
    "--trust_remote_code",
    default="False",
    metavar="True|False",
    help="Allow model code from the checkpoint folder to run.",
)
@option("--overwrite", is_flag=True, help="Replace older dumps of the same stages in --output.")
@links_option("model")
@family_option
@output_options
def dump_command(
    model: Path,
    folder: Path | None,
    stages: tuple[str, ...],
    formats: str,
    calib_images: Path | None,
    lora: tuple[Path, ...],
    trust_remote_code: str,
    overwrite: bool,
    output: CommandOutput,
) -> None:
    """Print the stages of a float checkpoint.

    As traced: graph, tensors and sites. Nothing is quantized.
    """
    if output.quiet and folder is None and not output.as_json and output.json_file is None:
        what, why = "--quiet needs --output or --json_file", "the stages would not be shown"
        raise UserError(Fault(what, why=why, fix="add --output DIR"))
    try:
        checked = Options.without_paths(
            model_path=model, dump_ir=folder or ".", dump_formats=formats, dump_stages=stages,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    except UserError as error:
        raise UserError(*map(_with_flags_of_dump, error.faults)) from None
    if folder is None and formats != "text":
        raise UserError(Fault(f"--formats {formats}", why="only text can be printed", fix="add --output DIR"))
    from vlqc.reporting.dumps.trace_only import trace
    from vlqc.reporting.dumps.writer import Dumper

    texts: list[str] = []

    def show(text: str) -> None:
        if output.as_json or output.json_file is not None:
            texts.append(text)
        if not output.as_json and not output.quiet:
            click.echo(text, nl=False)

    dumper = Dumper(
        folder, stages=checked.dump_stages, formats=checked.dump_formats.split(","), model_path=model,
        print_traced=folder is None, show=show, overwrite=overwrite, flag="--output",
    )  # fmt: skip
    result = trace(model, dumper, calib_images=calib_images, lora=lora, trust_remote_code=checked.trust_remote_code)
    value = {**result.to_dict(), "texts": dict(zip(result.stages, texts, strict=False))}
    output.write(value, lambda _: None)


def _with_flags_of_dump(fault: Fault) -> Fault:
    """A fault of `vlqc compile` under the flags of `vlqc dump`."""
    parts = {name: text.replace("--dump_", "--") for name, text in asdict(fault).items()}
    return Fault(**{name: text.replace("--ir", "--output") for name, text in parts.items()})


@click.command("diff", cls=Command)
@argument(
    "first",
    type=PATH,
    metavar="A",
    description="A folder of --dump_ir, the folder of one stage in it, a bundle, or a text.",
)
@argument("second", type=PATH, metavar="B", description="A dump of the same kind.")
@output_options
def diff_command(first: Path, second: Path, output: CommandOutput) -> int:
    """Compare two dumps.

    The exit code is 1 if they differ.
    """
    from vlqc.reporting.dumps.diff import diff_dumps

    difference = diff_dumps(first, second)
    output.write(difference.to_dict(), lambda console: print_lines(difference.lines(), console))
    return FAILED if difference.differs else 0


@click.command("run-pass", cls=Command)
@argument("bundle", type=PATH, metavar="BUNDLE", description="A folder NN-STATE.bundle of --dump_formats bundle.")
@argument(
    "pipeline",
    metavar="PASS",
    shell_complete=complete_pass,
    description="A pass with its options, or several: 'a{b=1},c'.",
)
@option(
    "--output", "-o", "file", type=PATH, default=None, metavar="FILE", help="Also write the stage's text to this file."
)
@option("--text", is_flag=True, help="Print the stage's text instead of what changed.")
@family_option
@output_options
def run_pass_command(bundle: Path, pipeline: str, file: Path | None, text: bool, output: CommandOutput) -> None:
    """Run passes on one stage from a bundle.

    Prints what they changed.
    """
    check_output_file("--output", file)
    from vlqc.reporting.dumps.replay import run_pass

    rerun = run_pass(bundle, pipeline)
    if file is not None:
        write_file("--output", file, rerun.text)
    if text:
        output.write(rerun.to_dict(), lambda _: click.echo(rerun.text, nl=False))
    else:
        output.write(rerun.to_dict(), lambda console: print_lines(rerun.lines(), console))
