"""Commands that look inside: dump, diff, run-pass, and `vlqc compile --stop_after`. Arguments only, as in `cli`."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from vlqc.cli.command_help import BARE
from vlqc.cli.completion import one_pass, several_of
from vlqc.cli.output import FAILED, Answer, answering, check_file, stderr, write_file
from vlqc.errors import Fault, UserError
from vlqc.formatting import escape_control_chars
from vlqc.options.options import DUMP_FORMATS, Options


def compile_until(stop_after: str, answer: Answer, **options: Any) -> None:
    """`vlqc compile --stop_after`."""
    from vlqc.reporting.dumps.trace_only import run_until
    from vlqc.reporting.progress import Progress, TerminalProgress

    progress = Progress() if answer.quiet else TerminalProgress(stderr())
    try:
        looked = run_until(stop_after, progress=progress, **options)
    finally:
        progress.finish()
    told = f"stopped after {stop_after} on {len(looked.stages)} of {looked.of} stages; no save folder was written"
    where = "" if looked.folder is None else f"; the dump is in {looked.folder}"
    described = {"stop_after": stop_after, **looked.to_dict()}
    answer.give(described, lambda _: stderr().print(Text(told + where), soft_wrap=True))


@answering
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
        str,
        typer.Option(
            "--formats",
            metavar="LIST",
            help="What to write: text,json,onnx,bundle.",
            autocompletion=several_of(list(DUMP_FORMATS)),
        ),
    ] = "text",
    calib_images: Annotated[
        Path | None,
        typer.Option("--calib_images", metavar="PICTURES", help="What to trace with; left out: a picture of noise."),
    ] = None,
    trust_remote_code: Annotated[
        str, typer.Option("--trust_remote_code", metavar="True|False", help="Allow the checkpoint's own code to run.")
    ] = "False",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar=BARE, help="Replace what --output holds of the same stages.")
    ] = False,
    *,
    answer: Answer,
) -> None:
    """Print the stages of a float checkpoint as traced: graph, tensors, sites. Nothing is quantized."""
    if answer.quiet and output is None and not answer.as_json and answer.json_file is None:
        raise UserError(Fault("--quiet", why="nobody would see the stages", fix="add --output DIR or --json_file FILE"))
    try:
        chosen = Options.without_paths(
            model_path=model, dump_ir=output or ".", dump_formats=formats, dump_stages=stages or [],
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    except UserError as error:
        raise UserError(*map(_in_words_of_dump, error.faults)) from None
    if output is None and formats != "text":
        raise UserError(Fault(f"--formats {formats}", why="only text is printed", fix="add --output DIR"))
    from vlqc.reporting.dumps.trace_only import trace
    from vlqc.reporting.dumps.writer import Dumper

    texts: list[str] = []

    def show(text: str) -> None:
        if answer.as_json or answer.json_file is not None:
            texts.append(text)
        if not answer.as_json and not answer.quiet:
            typer.echo(text, nl=False)

    dumper = Dumper(
        output, stages=chosen.dump_stages, formats=chosen.dump_formats.split(","), model_path=model,
        print_traced=output is None, show=show, overwrite=overwrite, flag="--output",
    )  # fmt: skip
    looked = trace(model, dumper, calib_images=calib_images, trust_remote_code=chosen.trust_remote_code)
    described = {**looked.to_dict(), "texts": dict(zip(looked.stages, texts, strict=False))}
    answer.give(described, lambda _: None)


@answering
def diff_command(
    first: Annotated[Path, typer.Argument(metavar="A", help="A dump, a stage's folder in it, a bundle or a text.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="What to compare it with.")],
    *,
    answer: Answer,
) -> None:
    """Say what differs between two dumps of --dump_ir: per stage, pass and site, in words. Exit code 1 if anything."""
    from vlqc.reporting.dumps.comparison import compare

    comparison = compare(first, second)
    answer.give(comparison.to_dict(), lambda console: _print_lines(comparison.lines(), console))
    if comparison.differs:
        raise typer.Exit(FAILED)


@answering
def run_pass_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder NN-STATE.bundle of a dump.")],
    pipeline: Annotated[
        str,
        typer.Argument(
            metavar="PASS", help="A pass with its options, or several: 'a{b=1},c'.", autocompletion=one_pass
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the stage's text behind it.")
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", metavar=BARE, help="Print that text, and not what has changed.")
    ] = False,
    *,
    answer: Answer,
) -> None:
    """Run a pass again on one stage, from a bundle of --dump_formats bundle, and say what it changed."""
    check_file("--output", output)
    from vlqc.reporting.dumps.replay import run_pass

    run = run_pass(bundle, pipeline)
    if output is not None:
        write_file("--output", output, run.text)
    if text:
        answer.give(run.to_dict(), lambda _: typer.echo(run.text, nl=False))
    else:
        answer.give(run.to_dict(), lambda console: _print_lines(run.lines(), console))


def _in_words_of_dump(fault: Fault) -> Fault:
    """A fault of a compilation's options, under the names that `vlqc dump` has for them."""
    parts = {name: text.replace("--dump_", "--") for name, text in asdict(fault).items()}
    return Fault(**{name: text.replace("--ir", "--output") for name, text in parts.items()})


def _print_lines(lines: Iterable[str], console: Console) -> None:
    for line in lines:
        console.print(Text(escape_control_chars(line)), soft_wrap=True)
