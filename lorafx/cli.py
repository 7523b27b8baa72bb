"""The command line, one command a call. Thin; errors are one clear line, and status 2."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console

import lorafx
from lorafx.errors import LorafxError
from lorafx.export.report import check_place
from lorafx.progress import Parts

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune PyTorch models with adapters, fold them away, and write verified ONNX files.",
)
_console = Console()
_errors = Console(stderr=True)
_Part = Annotated[
    str | None,
    typer.Option(help="The module that the file is of, if the model was exported as several: encoder, decoder."),
]


def _version(show: bool) -> None:
    if show:
        _console.print(lorafx.__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the ONNX file and the report.")] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Seed of the adapters and the order of the batches.")] = 0,
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 200,
) -> None:
    """Fine-tune MiniLM on the standard library's documentation, merge, export, and check the result."""
    from lorafx.demo.run import run_demo

    run_demo(out, seed=seed, steps=steps, console=_console)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint, or package.module:function.")],
    spec: Annotated[Path | None, typer.Option(help="JSON file of a LoraSpec, or PEFT's adapter_config.json.")] = None,
    r: Annotated[int, typer.Option(help="Rank (without --spec).", min=1)] = 8,
    alpha: Annotated[float, typer.Option(help="Numerator of the scaling (without --spec).")] = 16,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A layer's name or dotted suffix; may be repeated (without --spec)."),
    ] = None,
) -> None:
    """Show what would be adapted, and why the rest is left out. Changes and writes nothing."""
    from lorafx.sources import find_model

    found, inputs = find_model(model)
    chosen = (
        lorafx.LoraSpec.from_json(spec)
        if spec
        else lorafx.LoraSpec(r=r, alpha=alpha, target_modules=target or "all-linear")
    )
    with Parts(_errors, transient=True) as parts, parts.part("capture"):
        result = lorafx.plan(found, chosen, inputs)
    _console.print(str(result), highlight=False, soft_wrap=True)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Folder of an adapter: adapter_config.json and its weights.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="The model it was trained on: folder of a checkpoint with weights, or package.module:function."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw a map and the spectra into this file (.png, .svg, .pdf).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show where an adapter learned: each site's rank, norm, effective rank and share of the base's weight."""
    from lorafx.sources import find_model

    model, inputs = (None, None) if base is None else find_model(base, weights=True)
    with Parts(_errors, transient=True) as parts, parts.part("inspect"):
        result = lorafx.inspect_adapter(directory, base=model, example_inputs=inputs)
        if plot is not None:
            lorafx.plot_inspection(result, plot)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        _console.print(str(result), highlight=False, markup=False, soft_wrap=True)
        if plot is not None:
            _console.print(f"drawn into {plot}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="The ONNX file of the model that the adapter was trained on.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter: adapter_config.json and its weights.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The ONNX file to write.")],
    part: _Part = None,
    data_name: Annotated[
        str | None, typer.Option(help="Keep the weights in a file of this name beside it: the one to swap.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Split the weights into files of at most this size, as 2GB or 500MiB.")
    ] = None,
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="Prove the file before it gets its name.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report into this file, with digests of adapter and base.")
    ] = None,
) -> None:
    """Fold an adapter into an ONNX file, without the model. Lists what it matched; refuses what is ambiguous."""
    if json_file is not None:
        mine = {str(file): "a file of the adapter" for file in adapter.glob("*")}
        check_place(json_file, {**mine, str(base): "the base", str(out): "the file to write"})
    with Parts(_errors, transient=True) as parts, parts.part("merge"):
        result = lorafx.merge_onnx(
            base, adapter, out, part=part, data_name=data_name, max_shard_size=max_shard_size, verify=check
        )
        if json_file is not None:
            result.save_json(json_file)
    _console.print(str(result), highlight=False, markup=False, soft_wrap=True)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="An ONNX file.")],
    second: Annotated[Path, typer.Argument(help="The ONNX file to compare it with.")],
    inputs: Annotated[Path | None, typer.Option(help="An .npz file of inputs by name: run both files on them.")] = None,
    random: Annotated[bool, typer.Option("--random", help="Run both files on random inputs.")] = False,
) -> None:
    """Say what differs between two ONNX files: nodes, tensors and by how much, numbers. Status 1: something does."""
    with Parts(_errors, transient=True) as parts, parts.part("compare"):
        result = lorafx.diff_onnx(first, second, inputs, random=random)
    _console.print(str(result), highlight=False, markup=False, soft_wrap=True)
    if not result.same:
        raise typer.Exit(1)


@app.command()
def verify(
    merged: Annotated[Path, typer.Argument(help="The ONNX file to prove.")],
    base: Annotated[Path, typer.Option(help="The ONNX file it was made from.")],
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter that was merged into it.")],
    part: _Part = None,
) -> None:
    """Prove, without the model, that an ONNX file is another one with an adapter merged. Status 1: it is not."""
    with Parts(_errors, transient=True) as parts, parts.part("verify"):
        result = lorafx.verify_onnx(merged, base, adapter, part=part)
    _console.print(str(result), highlight=False, markup=False, soft_wrap=True)
    if not result.passed:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; what lorafx refuses is printed as one line, with ``--debug`` as a traceback."""
    debug = "--debug" in sys.argv
    if not debug:
        warnings.showwarning = _show_warning
    try:
        app([a for a in sys.argv[1:] if a != "--debug"])  # anywhere on the line
    except LorafxError as error:
        if debug:
            raise
        _errors.print(f"lorafx: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show what lorafx warns of, as one line; other packages' warnings are for ``--debug``."""
    if category.__module__.startswith("lorafx"):
        _errors.print(f"warning: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True)
