"""`linattn eval`: how well a checkpoint predicts text."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from linattn.cli.names import path_of
from linattn.cli.output import Bar, waiting

LARGEST = math.log(sys.float_info.max)  # nats a token whose perplexity is a number


def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Option(
            metavar="<path>",
            parser=path_of("--checkpoint"),
            help="A checkpoint folder, or a run's folder: then its newest checkpoint.",
        ),
    ],
    text: Annotated[
        list[Path],
        typer.Option(
            metavar="<path>",
            parser=path_of("--text"),
            help="A text file, a folder of them, or a folder that `datasets` wrote; several are one text in "
            "this order.",
        ),
    ],
    context: Annotated[
        int | None, typer.Option(help="Forget everything after so many tokens. [default: never]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print bits per byte and perplexity per token of all of the text.

    The checkpoint's own tokenizer is taken where it has one, else text is bytes. Bytes of files are read in
    pieces, so memory does not grow with them; a tokenizer's ids and what datasets hold are kept in memory. In
    a folder of text, the checkpoint's own run is left out.
    """
    with waiting("loading"):
        from linattn.errors import DataError, ValueRangeError
        from linattn.train import load_model
        from linattn.train.checkpoint import find
        from linattn.train.corpus import read_all
        from linattn.train.device import choose_device
        from linattn.train.evaluate import nats_of
        from linattn.train.tokenizers import own_tokenizer, unknown

        folder = find(checkpoint)
        model = load_model(folder, choose_device(device))
        words = own_tokenizer(folder, model.config.vocab_size)
        ids, size = read_all(text, words, exclude=[checkpoint, *_run_around(folder)])
        if not size:  # rows without text may have tokens, each one's end
            raise DataError("there is no text to measure")
    with Bar(len(ids)) as bar:
        bar.at("tokens")
        nats = nats_of(model, ids, context, progress=bar.advance)
    if not nats / len(ids) <= LARGEST:
        raise ValueRangeError(
            f"{folder} predicts no usable numbers ({nats / len(ids):.4g} nats a token): its training "
            "diverged; take an earlier checkpoint"
        )
    found = {
        "tokens": len(ids),
        "bytes": size,
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": math.exp(nats / len(ids)),
        "unknown_tokens": unknown(ids, words),
    }
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(
        f"{found['bits_per_byte']:.4f} bits per byte, perplexity {found['perplexity']:.4f} per token, "
        f"over {len(ids):,} tokens of {size:,} bytes"
    )
    if found["unknown_tokens"]:
        typer.echo(
            f"{found['unknown_tokens']:,} of them stand for words that the tokenizer does not know; which, "
            "bits per byte do not pay for"
        )


def _run_around(folder: Path) -> list[Path]:
    """The folder of the run that a checkpoint belongs to, if it is one of several there."""
    from linattn.train.checkpoint import checkpoints, of_trainer

    folder = folder.resolve()
    run = folder.parent
    return [run] if folder.name in {entry.name for entry in (*checkpoints(run), *of_trainer(run))} else []
