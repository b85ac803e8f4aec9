"""`linattn eval`: how well a checkpoint predicts text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from linattn.cli.output import Bar, waiting


def evaluate(
    checkpoint: Annotated[
        Path, typer.Option(help="A checkpoint folder, or a run's folder: then its newest checkpoint.")
    ],
    text: Annotated[
        Path, typer.Option(help="A text file, a folder of them, or a folder that `datasets` wrote.")
    ],
    context: Annotated[
        int | None, typer.Option(help="Forget everything after so many tokens. [default: never]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print bits per byte and perplexity per token of all of the text; memory does not grow with it.

    The checkpoint's own tokenizer is taken where it has one, else text is bytes.
    """
    with waiting("loading"):
        from linattn.train import load_model
        from linattn.train.checkpoint import find
        from linattn.train.corpus import own_tokenizer, read_all
        from linattn.train.device import choose_device
        from linattn.train.evaluate import nats_of

        folder = find(checkpoint)
        model = load_model(folder, choose_device(device))
        ids, size = read_all(text, own_tokenizer(folder))
    with Bar(len(ids)) as bar:
        bar.at("tokens")
        nats = nats_of(model, ids, context, progress=bar.advance)
    found = {
        "tokens": len(ids),
        "bytes": size,
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": math.exp(nats / len(ids)),
    }
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(
        f"{found['bits_per_byte']:.4f} bits per byte, perplexity {found['perplexity']:.4f} per token, "
        f"over {len(ids):,} tokens of {size:,} bytes"
    )
