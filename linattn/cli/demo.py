"""`linattn demo`: everything once, on text that every Python installation has."""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linattn.cli.names import LARGEST_SEED
from linattn.cli.output import console, print_json, waiting

if TYPE_CHECKING:
    from linattn.models import TransNormerLM
    from linattn.train import Text

SAMPLE_BYTES = 700
PROMPT = "def read_text(self, "


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, the sample and the picture.")] = Path(
        "demo-output"
    ),
    seconds: Annotated[float, typer.Option(help="How long to train.")] = 120.0,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=LARGEST_SEED, help="Fixes the first weights, the order of the text and the sample."
        ),
    ] = 0,
    verify: Annotated[bool, typer.Option(help="Whether to verify the backends first.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what came out as JSON; the rest goes to standard error.")
    ] = False,
) -> None:
    """List the backends, verify them, train a model, let it write, and draw what it looks at.

    Needs no download: the text is the standard library's own sources, with the help topics of pydoc among
    them.
    """
    from linattn.errors import ValueRangeError
    from linattn.train.checkpoint import alone

    if not 0 < seconds < math.inf:
        raise ValueRangeError(f"--seconds must be a number above 0, got {seconds}")
    elsewhere = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    _look(out)  # before the folder is made, or a file in it,
    with alone(out), elsewhere:
        for old in _look(out):  # and again when nobody else can change it
            shutil.rmtree(old)
        found = _told(out, seconds, seed, verify)
    if as_json:
        print_json(found)


def _look(out: Path) -> list[Path]:
    """Return an earlier demo's checkpoints. Raises OptionError where another run or a model lies there."""
    from linattn.errors import OptionError
    from linattn.train.checkpoint import checkpoints, load_facts, of_trainer, refuse_model

    refuse_model(out)
    found = checkpoints(out)
    others = [one for one in found if load_facts(one).get("seconds") is None]
    if others := others + of_trainer(out, whole=False):
        raise OptionError(
            f"{out} holds a run that is no demo's ({others[-1].name}), or one of an older version: choose "
            "another --out"
        )
    return found


def _told(out: Path, seconds: float, seed: int, verified: bool) -> dict[str, object]:
    """Do it, and tell about it; return what came out."""
    began = time.monotonic()
    number = itertools.count(1)

    def heading(text: str) -> None:
        text = f"{next(number)}. {text}"
        console().print(f"\n{text}\n{'─' * len(text)}", style="bold", markup=False, highlight=False)

    heading("What can run here (linattn backends)")
    from linattn.cli.backends import backends

    backends()
    if verified:
        heading("Are the backends right? (linattn verify --quick)")
        _verify()
    heading(f"A language model learns the standard library, for {seconds:g} seconds")
    model, text, learned = _train(out, seconds, seed)
    heading("The model writes (linattn generate)")
    sample, per_byte = _write_sample(model, out, seed)
    heading("What the first layer looks at")
    from linattn.models.picture import draw

    picture = out / "pair-weights.png"
    with waiting("drawing"):
        draw(model, _snippet(text), picture)
    typer.echo(f"{picture}: the weights of softmax, cosFormer, LRPE with decay, and decay alone")
    typer.echo(f"\nDone in {time.monotonic() - began:.0f} s; everything is in {out}")
    told = {"verified": verified, **learned, "sample": sample, "ms_per_byte": per_byte}
    return {**told, "picture": str(picture), "seconds": time.monotonic() - began}


def _verify() -> None:
    from linattn.cli.verify import verify

    verify(quick=True)


def _standard_library() -> Text:
    import sysconfig

    from linattn.train import read_text

    # some systems install without tests: without them the text is nearly the same everywhere
    elsewhere = ("site-packages", "dist-packages", "test", "tests", "idle_test")
    return read_text(Path(sysconfig.get_path("stdlib")), exclude_names=elsewhere, suffixes=(".py",))


def _train(out: Path, seconds: float, seed: int) -> tuple[TransNormerLM, Text, dict[str, object]]:
    import dataclasses

    from linattn.models import PRESETS
    from linattn.train import SETTINGS, Trainer
    from linattn.train.report import Report

    with waiting("reading the standard library"):
        text = _standard_library()
    settings = dataclasses.replace(SETTINGS["tiny"], seed=seed)
    trainer = Trainer(PRESETS["tiny"], text, settings, out=out, seconds=seconds)
    report = Report(trainer)
    baselines = report.run(evaluations=10)
    bits = report.held_out[-1][1]
    beaten = [name for name, baseline in baselines.items() if bits < baseline]
    typer.echo(
        f"{bits:.3f} bits per byte of text that it never saw"
        + (f": less than {' and '.join(beaten)} need{'s' if len(beaten) == 1 else ''}" if beaten else "")
        + ".\nThe compressors start from nothing; the model has read other files before."
    )
    return trainer.model, text, {"bits_per_byte": bits, "compressors": {**baselines}, "steps": trainer.step}


def _write_sample(model: TransNormerLM, out: Path, seed: int) -> tuple[str, float]:
    """The sample, and the milliseconds that a byte took."""
    from linattn.cli.generate import on_screen
    from linattn.errors import LinattnError
    from linattn.train import generate
    from linattn.train.generate import decoded

    typer.echo(PROMPT, nl=False)
    sample = PROMPT
    began = time.monotonic()
    for piece in decoded(generate(model, PROMPT.encode(), SAMPLE_BYTES, temperature=0.7, seed=seed)):
        typer.echo(on_screen(piece), nl=False)
        sample += piece
    per_byte = (time.monotonic() - began) / SAMPLE_BYTES * 1e3
    typer.echo(f"\n\n{per_byte:.2f} ms a byte, however long the text: the state has a fixed size")
    try:
        (out / "sample.txt").write_text(sample + "\n", encoding="utf-8")
    except OSError as error:
        raise LinattnError(f"{out / 'sample.txt'} cannot be written: {error.strerror}") from error
    return sample, per_byte


def _snippet(text: Text) -> bytes:
    """Some held-out bytes that begin at a line with code in it."""
    held_out = text.held_out.tobytes()
    start = held_out.find(b"\n    def ")
    return held_out[start + 5 :] if start >= 0 else held_out
