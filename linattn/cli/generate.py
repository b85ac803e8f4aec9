"""`linattn generate`: continue a prompt from a checkpoint."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Annotated

import typer


def generate(
    checkpoint: Annotated[
        Path, typer.Option(help="A checkpoint folder, or a run's folder: then its newest checkpoint.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "",
    tokens: Annotated[int, typer.Option(help="How many tokens to add: bytes, or a tokenizer's.")] = 500,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest byte.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample among so many likeliest bytes only.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
) -> None:
    """Print the prompt and stream its continuation, byte by byte.

    Time and memory per byte do not depend on how long the text is.
    """
    from linattn.train import generate as continue_text
    from linattn.train import load_model
    from linattn.train.device import choose_device
    from linattn.train.generate import continue_ids, decoded, pieces

    model = load_model(checkpoint, choose_device(device))
    if (checkpoint / "tokenizer_config.json").is_file():
        from linattn.train.corpus import load_tokenizer

        words = load_tokenizer(checkpoint)
        start = words(prompt, add_special_tokens=False)["input_ids"] or [words.eos_token_id or 0]
        ids = continue_ids(model, start, tokens, temperature=temperature, top_k=top_k, seed=seed)
        typer.echo(prompt, nl=False)
        for piece in pieces(words, start, itertools.takewhile(lambda one: one != words.eos_token_id, ids)):
            typer.echo(on_screen(piece), nl=False)
        typer.echo()
        return
    stream = continue_text(
        model,
        prompt.encode("utf-8", "surrogateescape"),
        tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    typer.echo(prompt, nl=False)
    for text in decoded(stream):
        typer.echo(on_screen(text), nl=False)
    typer.echo()


def on_screen(text: str) -> str:
    """Return text that cannot steer a terminal; where the output is no terminal, the text as it is."""
    if not sys.stdout.isatty():
        return text
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
