"""`linattn generate`: continue a prompt from a checkpoint."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linattn.cli.names import LARGEST_SEED, path_of
from linattn.cli.output import print_json, waiting

if TYPE_CHECKING:
    import torch


def generate(
    checkpoint: Annotated[
        Path,
        typer.Option(
            metavar="<path>",
            parser=path_of("--checkpoint"),
            help="A checkpoint folder, or a run's folder: then its newest checkpoint.",
        ),
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "",
    tokens: Annotated[int, typer.Option(help="How many tokens to add: bytes, or a tokenizer's.")] = 500,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample among so many likeliest tokens only.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="The same seed gives the same text.")
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, when all is written.")
    ] = False,
) -> None:
    """Print the prompt and stream its continuation, byte by byte.

    Time and memory per byte do not depend on how long the text is.
    """
    began = time.monotonic()
    with waiting("loading"):
        from linattn.train.device import choose_device

        place = choose_device(device)
        text = _continued(checkpoint, prompt, tokens, place, temperature=temperature, top_k=top_k, seed=seed)
        first = next(text, "")
    if as_json:
        with waiting(f"writing {tokens:,} tokens"):
            found = first + "".join(text)
        print_json({"prompt": prompt, "text": found, "seconds": time.monotonic() - began})
        return
    typer.echo(prompt, nl=False)
    for piece in itertools.chain((first,), text):
        typer.echo(on_screen(piece), nl=False)
    typer.echo()


def _continued(checkpoint: Path, prompt: str, tokens: int, device: torch.device, **how: Any) -> Iterator[str]:
    """The text after the prompt, in pieces; of a checkpoint with a tokenizer until its end of text."""
    from linattn.train import generate, load_model
    from linattn.train.checkpoint import find
    from linattn.train.generate import continue_ids, decoded, pieces
    from linattn.train.tokenizers import own_tokenizer

    folder = find(checkpoint)
    model = load_model(folder, device)
    words = own_tokenizer(folder, model.config.vocab_size)
    if words is None:
        yield from decoded(generate(model, prompt.encode("utf-8", "surrogateescape"), tokens, **how))
        return
    prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # bytes that are no UTF-8
    start = words(prompt, add_special_tokens=False)["input_ids"] or [words.eos_token_id or 0]
    ids = continue_ids(model, start, tokens, **how)
    yield from pieces(words, start, itertools.takewhile(lambda one: one != words.eos_token_id, ids))


def on_screen(text: str) -> str:
    """Return text that cannot steer a terminal; where the output is no terminal, the text as it is."""
    if sys.stdout is None or not sys.stdout.isatty():  # None where it is closed
        return text
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
