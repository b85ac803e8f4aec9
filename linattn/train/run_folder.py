"""The folder of a run by transformers' Trainer: what it holds already, and whether a run may go on there."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import typer

from linattn.errors import CheckpointError, OptionError
from linattn.safetensors_io import write_whole
from linattn.train import checkpoint, trainer_checkpoint
from linattn.train.corpus import Corpus
from linattn.train.tokenizers import TOKENIZER

FACTS = "run.json"  # what a run is, beside its checkpoints
CONFIG = "config"  # the fact that holds the model's configuration
FREE = {"save_every"}  # facts that change no bit of what is learned
OWN = (checkpoint.CONFIG, TOKENIZER, "tokenizer.json", "tokenizer.model")  # what the end of a run replaces


def look(out: Path, *, resume: bool) -> list[Path]:
    """Return the checkpoints that a run goes on from, oldest first, none where it begins; nothing is changed.

    Raises OptionError where `out` holds another run, a model, or files that the run would replace,
    CheckpointError where there is nothing to resume.
    """
    saved = checkpoint.of_trainer(out)
    if small := checkpoint.checkpoints(out):
        raise OptionError(
            f"{out} holds a run of the preset tiny or small ({small[-1].name}): go on with that --preset, or "
            "choose another --out"
        )
    if resume and not saved:
        raise CheckpointError(f"{out} holds no checkpoint to go on from")
    if resume:
        return saved
    if saved:
        raise OptionError(
            f"{out} holds a run already ({saved[-1].name}): pass --resume to go on, or another --out"
        )
    checkpoint.refuse_model(out)
    if there := [name for name in OWN if (out / name).exists()]:
        raise OptionError(
            f"{out} holds a {there[0]} already, which the run would replace: choose another --out"
        )
    return saved


def begin(out: Path, facts: dict[str, Any], *, resume: bool) -> list[Path]:
    """Write down what a run is, or compare; return the checkpoints to go on from. `alone` holds the folder.

    facts: as JSON holds them; under "config" the model's fields, None where its preset is no longer there.
    Raises what `look` does, OptionError where the run that goes on is another.
    """
    saved = look(out, resume=resume)
    checkpoint.prepare(out)
    place = out / FACTS
    if not resume:
        write_whole(place, (json.dumps(facts, indent=2) + "\n").encode())
        checkpoint.readable(place, out / checkpoint.LOCK)
    elif place.is_file():
        _same(out, checkpoint.read_json(place), facts)
    return saved


def _same(out: Path, before: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raise OptionError unless facts are those of a run. A preset that moved is the same configuration."""
    config, old = facts[CONFIG], before.get(CONFIG)
    if not isinstance(old, dict):
        raise OptionError(
            f"{out} is a run of an older linattn, which had other learning rates: train anew into another "
            "--out"
        )
    pairs = {name: (before.get(name), value) for name, value in facts.items() if name not in FREE | {CONFIG}}
    if config is not None:
        del pairs["preset"]
        pairs |= {name: (old.get(name), value) for name, value in config.items()}
    elif Path(str(before.get("preset"))).resolve() == Path(facts["preset"]).resolve():
        del pairs["preset"]
    for name, (was, value) in pairs.items():
        if was != value:
            raise OptionError(f"{out} is a run with {name} {was!r}, not {value!r}: resume it as it was")


def fingerprint(tokenizer: Any, corpus: Corpus) -> str:
    """What tells a tokenizer from others of its size: its vocabulary, and what it makes of the text."""
    words = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    total = zlib.crc32(words)
    for ids in (corpus.train, corpus.held_out):
        total = zlib.crc32(ids.data, total)
    return f"{total:08x}"


def check_last(last: Path, steps: int, windows: int) -> None:
    """Refuse to go on from a checkpoint that is not whole; say which newer folders are no checkpoints.

    steps: of the whole run; one that has ended needs its model only. windows: that its processes take
    together in one pass. Raises CheckpointError.
    """
    try:
        if checkpoint.step_of(last) >= steps:
            trainer_checkpoint.check_model(last)
        else:
            trainer_checkpoint.check(last, windows)
    except CheckpointError as error:
        advice = checkpoint.instead(last) or "; there is no other: train anew into another --out"
        raise CheckpointError(f"{error}{advice}") from error
    everything = checkpoint.of_trainer(last.parent, whole=False)
    if torn := [path.name for path in everything[everything.index(last) + 1 :]]:
        typer.echo(f"not written to the end: {', '.join(torn)}; going on from {last}", err=True)
