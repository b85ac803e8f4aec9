"""`linattn train`: teach a model some text, byte by byte or with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from linattn.cli.names import LARGEST_SEED, path_of


def train(
    text: Annotated[
        list[Path],
        typer.Option(
            metavar="<path>",
            parser=path_of("--text"),
            help="A text file, a folder of them, or a folder that `datasets` wrote.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="<path>", parser=path_of("--out"), help="The run's folder, for checkpoints."),
    ] = Path("out"),
    preset: Annotated[
        str,
        typer.Option(
            help="The model's sizes: tiny or small, which a small loop trains; 385m, 1b, 3b, 7b, 15b, 175b "
            "or a folder with a config.json, and weights to fine-tune, which transformers' Trainer trains."
        ),
    ] = "tiny",
    steps: Annotated[int, typer.Option(help="Optimizer steps in the whole run.")] = 1000,
    batch: Annotated[int | None, typer.Option(help="Windows per step. [default: the preset's]")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window. [default: the preset's]")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. [default: the preset's]")] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=LARGEST_SEED,
            help="Fixes the first weights and the order of the text; with Trainer, below 2^32.",
        ),
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. [default: a tenth of all]")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="<path>",
            parser=path_of("--tokenizer"),
            help="A tokenizer's folder, with Trainer. [default: that of the run or of the folder --preset, "
            "else bytes]",
        ),
    ] = None,
    accumulate: Annotated[int, typer.Option(help="Passes that a step is split into, with Trainer.")] = 1,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Form activations twice for less memory, with Trainer.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Train on text, and measure bits per byte on a part that is held out.

    A run that was killed goes on with --resume and the same options, and ends as if nothing had happened;
    --save-every may be another.
    """
    import dataclasses

    from linattn.errors import CheckpointError, OptionError, ValueRangeError
    from linattn.models import PRESETS
    from linattn.train.device import choose_device

    if len(text) > 1:
        raise OptionError(f"--text is one file or folder, got {len(text)}: put the files into one folder")
    if out.is_dir() and text[0].exists() and text[0].samefile(out):
        raise OptionError(
            f"--out {out} is the folder of --text, where a run's files would be text: another --out"
        )
    if save_every is not None and save_every < 1:
        raise ValueRangeError(f"--save-every must be at least 1, got {save_every}")
    given = {"batch": batch, "seq_len": seq_len, "lr": lr, "steps": steps, "seed": seed}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if preset not in PRESETS:
        from accelerate import PartialState

        from linattn.train import published
        from linattn.train.checkpoint import of_trainer
        from linattn.train.corpus import read_corpus
        from linattn.train.presets import known, tokenizer_of
        from linattn.train.tokenizers import load_tokenizer

        plan = published.Plan(
            **changes,
            save_every=save_every or max(1, steps // 10),
            accumulate=accumulate,
            checkpointing=checkpointing,
        )
        place = choose_device(device)
        saved = of_trainer(out) if resume else []
        if not saved:
            known(preset)
        if tokenizer is not None:
            words = load_tokenizer(tokenizer)
        else:
            words, folder = tokenizer_of(preset, saved[-1] if saved else None)
            if folder is not None and PartialState(cpu=place.type == "cpu").is_main_process:
                typer.echo(f"text is read with the tokenizer in {folder}", err=as_json)
        published.train(
            preset,
            read_corpus(text[0], words, exclude=[out]),
            plan,
            out,
            device=place,
            resume=resume,
            as_json=as_json,
            tokenizer=words,
        )
        PartialState().destroy_process_group()  # the processes of a launcher end here
        return
    if tokenizer is not None or accumulate != 1 or checkpointing:
        raise OptionError(f"--preset {preset} is trained on bytes by a small loop, without these options")

    from linattn.train import SETTINGS, Trainer
    from linattn.train.checkpoint import alone, checkpoints, of_trainer, refuse_model
    from linattn.train.corpus import read_plain
    from linattn.train.loop import check_text
    from linattn.train.processes import refuse_several
    from linattn.train.report import Report

    refuse_several(preset)
    settings = dataclasses.replace(SETTINGS[preset], **changes)
    place = choose_device(device)
    data = read_plain(text[0], exclude=[out])
    check_text(data, settings)

    def look() -> None:
        found = checkpoints(out)
        if trained := of_trainer(out):
            raise OptionError(f"{out} holds a run of a published size ({trained[-1].name}): another --out")
        if found and not resume:
            raise OptionError(
                f"{out} holds a run already ({found[-1].name}): pass --resume to go on, or another --out"
            )
        refuse_model(out)
        if resume and not found:
            raise CheckpointError(f"{out} holds no checkpoint to go on from")

    look()  # before the folder is made, or a file in it,
    with alone(out):
        look()  # and again when nobody else can change it
        trainer = Trainer(PRESETS[preset], data, settings, out=out, device=place)
        report = Report(trainer, as_json=as_json)
        if resume:
            trainer.resume()
        report.run(save_every=save_every or max(1, settings.steps // 10))
