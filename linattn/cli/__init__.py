"""The `linattn` command: every subcommand is a module of its own, imported only when it is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated

import typer

from linattn.errors import LinattnError

# name -> what `linattn --help` says; linattn/cli/NAME.py holds one function of that name with the options
COMMANDS = {
    "backends": "What can run on this machine, and why the rest cannot.",
    "explain": "Which backend a call uses, and why not the others.",
    "verify": "Prove the backends, or your own kernel, right.",
    "train": "Train a language model on text, small or of a published size.",
    "generate": "Continue a prompt from a checkpoint.",
    "eval": "Bits per byte or perplexity of a checkpoint on text.",
    "demo": "Verify, train, generate and draw, with no download.",
    "bench": "Time and memory, beside softmax attention.",
    "tune": "Find faster launch configurations for this GPU.",
}
# what a subcommand may find missing -> the extra that brings it; three subcommands need more than one package
EXTRAS = {
    "torch": "torch", "hypothesis": "testing", "safetensors": "models", "matplotlib": "models",
    "transformers": "transformers", "accelerate": "transformers", "datasets": "transformers",
}  # fmt: skip
WITH_MODELS = ("train", "generate", "eval", "demo")
MODULES = {"eval": "evaluate"}  # a name that Python has for something else
DEBUG = "--debug"

app = typer.Typer(
    help="Linear attention: one specification, and the backends that are proven equal to it.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help texts say [B, N, H, D], which rich would read as markup
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import linattn

        typer.echo(f"linattn {linattn.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error.")] = False,
) -> None:
    ctx.obj = debug


def _load(name: str) -> Callable[..., object]:
    """Import a subcommand's function."""
    module = importlib.import_module(f"linattn.cli.{MODULES.get(name, name)}")
    function: Callable[..., object] = getattr(module, MODULES.get(name, name))
    return function


def _run(name: str, arguments: list[str]) -> int:
    """Run one subcommand as a typer command of its own; return its exit status.

    Raises LinattnError, with the pip command that helps, where an optional package is missing.
    """
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    try:
        command.command(name)(_load(name))
        status = command(args=arguments, prog_name=f"linattn {name}", standalone_mode=False)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra = EXTRAS[package]
        if name in WITH_MODELS and extra == "torch":
            extra = "models"
        raise LinattnError(f"`linattn {name}` needs {package}: pip install 'linattn[{extra}]'") from error
    return status if isinstance(status, int) else 0


def _subcommand(name: str, summary: str) -> None:
    # the light stand-in that `linattn --help` lists; options, --help included, go through to the real one
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}

    @app.command(name, help=summary, add_help_option=False, context_settings=settings)
    def stand_in(ctx: typer.Context) -> None:
        debug = ctx.obj or DEBUG in ctx.args
        try:
            status = _run(name, [argument for argument in ctx.args if argument != DEBUG])
        except LinattnError as error:
            if debug:
                raise
            typer.echo(f"error: {error}", err=True)
            status = 2
        raise typer.Exit(status)


for _name, _summary in COMMANDS.items():
    _subcommand(_name, _summary)


def main() -> None:
    """Run the command line: what the console script and `python -m linattn` call."""
    app(prog_name="linattn")
