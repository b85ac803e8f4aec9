"""The `linattn` command: every subcommand is a module of its own, imported only when it is called."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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
REFUSED = 2  # the exit status of what is said in a sentence
INTERRUPTED = 130  # the exit status of what Ctrl-C ended
# what is said where memory is full by errors without a class for it: of torch on a CPU, of CUDA
OUT_OF_MEMORY = re.compile("DefaultCPUAllocator|can't allocate memory|not enough memory|out of memory", re.I)
LONGEST_NAME = 100  # characters of a file's name in a sentence
ASKED = re.compile(r"allocate ([\d.]+ \w+)")  # what there was no room for
# name -> what `linattn NAME --help` ends with; in this order, each finds what it needs
EXAMPLES = {
    "backends": "linattn backends --json",
    "explain": "linattn explain --shape 4,8192,32,128 --dtype bf16 --device cuda --decay head",
    "verify": "linattn verify --backend numpy --quick",
    "train": "linattn train --text README.md --steps 50 --out run",
    "generate": "linattn generate --checkpoint run --prompt 'Linear attention' --tokens 200",
    "eval": "linattn eval --checkpoint run --text README.md",
    "demo": "linattn demo --seconds 20 --no-verify",
    "bench": "linattn bench --quick --case softmax --out figures.json",
    "tune": "linattn tune --case 'forward 128' --dry-run",
}


class _Commands(TyperGroup):
    """Subcommands that are loaded to complete their options, too, not only to run them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if ctx.resilient_parsing and name in COMMANDS:  # a shell asks what may come next
            with contextlib.suppress(ModuleNotFoundError):
                command = typer.main.get_command(_typer(name))
        return name, command, rest


app = typer.Typer(
    cls=_Commands,
    help="Linear attention: one specification, and the backends that are proven equal to it.",
    epilog="\b\nlinattn COMMAND --help has an example of every command. Start with:\n"
    "  linattn backends\n  linattn demo --seconds 20\n"
    "Commands and options complete with Tab after: linattn --install-completion",
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


def _typer(name: str) -> typer.Typer:
    """A subcommand as a typer command of its own."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    command.command(name, epilog=f"\b\nExample:\n  {EXAMPLES[name]}")(_load(name))
    return command


def _run(name: str, arguments: list[str]) -> int:
    """Run one subcommand; return its exit status.

    Raises LinattnError, with the pip command that helps, where an optional package is missing.
    """
    try:
        status = _typer(name)(args=arguments, prog_name=f"linattn {name}", standalone_mode=False)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra = EXTRAS[package]
        if name in WITH_MODELS and extra == "torch":
            extra = "models"
        raise LinattnError(f"`linattn {name}` needs {package}: pip install 'linattn[{extra}]'") from error
    return status if isinstance(status, int) else 0


def _sentence(error: Exception) -> str | None:
    """What to say of an error instead of a traceback, or None: then it is a bug."""
    if isinstance(error, LinattnError):
        return str(error)
    if isinstance(error, OSError):  # of what was named: too long a name, a folder that must not be read
        return f"{str(error.filename)[:LONGEST_NAME]}: {error.strerror}" if error.filename else None
    if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
        return None
    asked = f", {found[1]} more were asked for" if (found := ASKED.search(str(error))) else ""
    return f"out of memory{asked}: give a smaller model, batch, length or text"


def _subcommand(name: str, summary: str) -> None:
    # the light stand-in that `linattn --help` lists; options, --help included, go through to the real one
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}

    @app.command(name, help=summary, add_help_option=False, context_settings=settings)
    def stand_in(ctx: typer.Context) -> None:
        debug = ctx.obj or DEBUG in ctx.args
        try:
            status = _run(name, [argument for argument in ctx.args if argument != DEBUG])
        except (LinattnError, MemoryError, RuntimeError, OSError) as error:
            said = _sentence(error)
            if debug or said is None:
                raise
            typer.echo(f"error: {said}", err=True)
            status = REFUSED
        except typer.Abort:
            status = INTERRUPTED
        if status == INTERRUPTED:
            typer.echo("interrupted", err=True)
        raise typer.Exit(status)


for _name, _summary in COMMANDS.items():
    _subcommand(_name, _summary)


def main() -> None:
    """Run the command line: what the console script and `python -m linattn` call."""
    from linattn.cli.output import guarded_output

    with guarded_output():
        try:
            app(prog_name="linattn")
        except LinattnError as error:
            typer.echo(f"error: {error}", err=True)
            sys.exit(REFUSED)
