"""TransNormerLLM in its published sizes, trained or fine-tuned by transformers' Trainer."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

from linattn.errors import CheckpointError, DataError, OptionError, ValueRangeError
from linattn.models.transnormer import PRESETS, TransNormerConfig, TransNormerForCausalLM, preset
from linattn.safetensors_io import write_whole
from linattn.train import checkpoint, trainer_checkpoint
from linattn.train.corpus import Corpus
from linattn.train.processes import together
from linattn.train.trainer_checkpoint import Trainer

FACTS = "run.json"  # what a run is, beside its checkpoints
LOSS_CHUNK = 8192  # tokens whose logits are there at once,
LOGITS = 1 << 29  # or fewer: so many logits, 1 GiB in bfloat16
SEEDS = 1 << 32  # that transformers takes
JUDGED = 64  # windows of the held-out text that are measured, spread over all of it


@dataclass(frozen=True)
class Plan:
    """What a run does: steps of `batch` windows of seq_len tokens, AdamW, warm-up and a cosine.

    accumulate: windows are split into so many passes a step. checkpointing: activations are formed again in
    the backward pass, for less memory.
    """

    steps: int = 1000
    batch: int = 4
    seq_len: int = 8192
    lr: float = 3e-4
    warmup: int = 100
    seed: int = 0
    save_every: int = 100
    accumulate: int = 1
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("seq_len", 2), ("save_every", 1), ("accumulate", 1)):
            if getattr(self, name) < least:
                raise ValueRangeError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueRangeError(f"lr must be above 0, got {self.lr}")
        if not 0 <= self.seed < SEEDS:
            raise ValueRangeError(
                f"seed must be from 0 to {SEEDS - 1} for transformers' Trainer, got {self.seed}"
            )
        if self.batch % self.accumulate:
            raise ValueRangeError(f"accumulate must divide batch, got {self.accumulate} and {self.batch}")

    def windows(self, processes: int) -> int:
        """How many windows each of so many processes takes at once. Raises ValueRangeError for a rest."""
        parts = self.accumulate * processes
        if self.batch % parts:
            raise ValueRangeError(
                f"batch must be a multiple of {parts}, a step's passes times its processes, got {self.batch}"
            )
        return self.batch // parts


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Windows of seq_len tokens, one after the other; what is left at the end is not used."""

    def __init__(self, ids: np.ndarray, seq_len: int, what: str, most: int | None = None) -> None:
        count = len(ids) // seq_len
        if count < 1:
            raise DataError(
                f"the {what} text has {len(ids)} tokens, one window needs {seq_len}: give more text"
            )
        every = range(count) if most is None or count <= most else np.linspace(0, count - 1, most).astype(int)
        self.ids, self.seq_len, self.rows = ids, seq_len, [int(row) for row in every]

    def __len__(self) -> int:
        """How many windows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = self.rows[index] * self.seq_len
        row = torch.from_numpy(self.ids[start : start + self.seq_len].astype(np.int64))
        return {"input_ids": row, "labels": row}


def known(size: str) -> None:
    """Raise OptionError unless a size is a published one or a folder with a configuration."""
    if size.lower() not in PRESETS and not (Path(size) / "config.json").is_file():
        sizes = ", ".join(("tiny", "small", *PRESETS))
        raise OptionError(f"--preset must be one of {sizes}, or a folder with a config.json, got {size!r}")


def model_of(size: str, vocab_size: int) -> TransNormerForCausalLM:
    """Return a new model of a published size, or of a folder's configuration, or that folder's weights.

    Raises OptionError for a name that is neither, CheckpointError for weights of another vocabulary.
    """
    folder = Path(size)
    if size.lower() in PRESETS:
        return TransNormerForCausalLM(preset(size, vocab_size=vocab_size, pad_token_id=None))
    known(size)
    kind = checkpoint.read_json(folder / "config.json").get("model_type")
    if kind != TransNormerConfig.model_type:
        raise CheckpointError(f"{folder / 'config.json'} is for a model of type {kind!r}, not 'transnormer'")
    config = TransNormerConfig.from_pretrained(folder)
    if not any(folder.glob("*.safetensors")):
        if pickles := sorted([*folder.glob("*.bin"), *folder.glob("*.pt")]):
            raise CheckpointError(
                f"{pickles[0]} is a pickle, which can run code: where you trust it, load the model with "
                "use_safetensors=False and save it again"
            )
        config.vocab_size = vocab_size
        return TransNormerForCausalLM(config)
    trainer_checkpoint.check_model(folder)
    if config.vocab_size < vocab_size:
        raise CheckpointError(
            f"{folder} is of a vocabulary of {config.vocab_size}, the text's tokens need {vocab_size}"
        )
    # in float32: steps of a small learning rate are lost in half precision
    model: TransNormerForCausalLM = TransNormerForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def loss_chunk(vocab_size: int) -> int:
    """How many tokens have logits at once: 8192, or less of a wide vocabulary, in whole tiles of products."""
    return max(128, min(LOSS_CHUNK, LOGITS // vocab_size // 128 * 128))


class Lines(TrainerCallback):
    """A line now and then, or JSON: loss in bits per token, and of held-out text in bits per byte."""

    def __init__(self, bytes_per_token: float, as_json: bool) -> None:
        self.bytes_per_token, self.as_json = bytes_per_token, as_json

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """What Trainer has to say."""
        if not state.is_world_process_zero:
            return
        logs = logs or {}
        fields: dict[str, Any] = {"event": "step", "step": state.global_step}
        if "loss" in logs:
            fields["train_bits_per_token"] = logs["loss"] / math.log(2)
        if "eval_loss" in logs:
            fields["held_out_bits_per_byte"] = logs["eval_loss"] / math.log(2) / self.bytes_per_token
        if len(fields) == 2:
            return
        if self.as_json:
            typer.echo(json.dumps(fields))
            return
        words = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in list(fields.items())[2:]]
        typer.echo(f"step {state.global_step:>6} of {state.max_steps}  {', '.join(words)}")


@contextlib.contextmanager
def bars(shown: bool) -> Iterator[None]:
    """Let transformers draw its progress bars, on standard error, or not."""
    before = logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if before and not shown:
            logging.enable_progress_bar()


def train(
    size: str,
    corpus: Corpus,
    plan: Plan,
    out: Path,
    *,
    device: torch.device,
    resume: bool = False,
    as_json: bool = False,
    tokenizer: Any = None,
) -> None:
    """Run transformers' Trainer to the end of the plan and leave the model in `out`.

    bfloat16 autocast on CUDA, float32 on the CPU, where a run that was interrupted goes on bit for bit.
    as_json: standard output is JSON, an object a line, and there are no progress bars; otherwise those of
    files are on standard error where that is a terminal.
    Processes that torchrun or accelerate started, one a GPU, share a step's windows: what they learn is what
    one process would, but for the order of sums, and for an epoch's last step where windows are left over,
    which are filled up with the first ones. The first process holds `out`, writes and prints.

    Raises DataError for a text that is too short, CheckpointError where there is nothing to resume, or a file
    of it is missing or damaged, or the disk takes no more, OptionError where another run trains into `out` or
    left a model there, or for a GPU other than the first, ValueRangeError where processes cannot share a
    batch, or where training diverged, before that is saved.
    """
    if device.index:
        raise OptionError(
            "transformers' Trainer takes the first GPU that it sees: instead of --device "
            f"{device}, --device cuda where CUDA_VISIBLE_DEVICES is {device.index}"
        )
    processes = PartialState(cpu=device.type == "cpu")
    count, first = processes.num_processes, processes.is_main_process
    plan.windows(count)
    with contextlib.ExitStack() as held, bars(shown=first and not as_json and sys.stderr.isatty()):

        def begin() -> list[Path]:
            if resume and not out.exists():
                raise CheckpointError(f"{out} holds no checkpoint to go on from")
            held.enter_context(checkpoint.alone(out))
            return _begin(size, corpus, plan, out, resume, tokenizer)

        saved = together(processes, begin)
        _train(size, corpus, plan, out, device, saved, count, as_json, tokenizer)
    if first and not as_json:
        typer.echo(f"saved {out}")


def _begin(size: str, corpus: Corpus, plan: Plan, out: Path, resume: bool, tokenizer: Any) -> list[Path]:
    """Look at a run's folder and write down what the run is; return the checkpoints to go on from."""
    saved = checkpoint.of_trainer(out)
    if (small := checkpoint.checkpoints(out)) or (saved and not resume):
        last = (small or saved)[-1].name
        raise OptionError(f"{out} holds a run already ({last}): pass --resume to go on, or another --out")
    if resume and not saved:
        raise CheckpointError(f"{out} holds no checkpoint to go on from")
    if not resume:
        checkpoint.refuse_model(out)
    checkpoint.prepare(out)
    facts = {**asdict(plan), "preset": size, "text": corpus.fingerprint, "vocab_size": corpus.vocab_size}
    facts["tokenizer"] = None if tokenizer is None else _fingerprint(tokenizer, corpus)
    _same_run(out, facts, resume=resume)
    if saved:
        _look_at(saved[-1], plan)
    return saved


def _fingerprint(tokenizer: Any, corpus: Corpus) -> str:
    """What tells a tokenizer from others of its size: its vocabulary, and what it makes of the text."""
    words = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    total = zlib.crc32(words)
    for ids in (corpus.train, corpus.held_out):
        total = zlib.crc32(ids.data, total)
    return f"{total:08x}"


def _look_at(last: Path, plan: Plan) -> None:
    """Refuse to go on from a checkpoint that is not whole; say which newer folders are no checkpoints."""
    try:
        if ended([last], plan):
            trainer_checkpoint.check_model(last)
        else:
            trainer_checkpoint.check(last, plan.batch // plan.accumulate)
    except CheckpointError as error:
        advice = checkpoint.instead(last) or "; there is no other: train anew into another --out"
        raise CheckpointError(f"{error}{advice}") from error
    everything = checkpoint.of_trainer(last.parent, whole=False)
    if torn := [path.name for path in everything[everything.index(last) + 1 :]]:
        typer.echo(f"not written to the end: {', '.join(torn)}; going on from {last}", err=True)


def ended(saved: list[Path], plan: Plan) -> bool:
    """Whether the last step of a run is done, but for what its folder itself holds."""
    return bool(saved) and checkpoint.step_of(saved[-1]) >= plan.steps


def _train(
    size: str,
    corpus: Corpus,
    plan: Plan,
    out: Path,
    device: torch.device,
    saved: list[Path],
    processes: int,
    as_json: bool,
    tokenizer: Any,
) -> None:
    windows = plan.windows(processes)
    rows = Rows(corpus.train, plan.seq_len, "training")
    if len(rows) < plan.batch:
        raise DataError(
            f"the training text has {len(rows)} windows of {plan.seq_len} tokens, a batch needs "
            f"{plan.batch}: give more text, or a smaller batch"
        )
    torch.manual_seed(plan.seed)
    done = ended(saved, plan)
    model = model_of(str(saved[-1]) if done else size, corpus.vocab_size)
    model.loss_chunk = loss_chunk(model.config.vocab_size)
    held_out = Rows(corpus.held_out, plan.seq_len, "held-out", JUDGED)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=plan.steps,
        per_device_train_batch_size=windows,
        per_device_eval_batch_size=windows if processes == 1 else 1,  # several would count some twice
        gradient_accumulation_steps=plan.accumulate,
        learning_rate=plan.lr,
        warmup_steps=min(plan.warmup, plan.steps),
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        gradient_checkpointing=plan.checkpointing,
        save_steps=plan.save_every,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=plan.save_every,
        logging_steps=max(1, plan.steps // 100),
        logging_nan_inf_filter=False,  # it shows a loss that is not finite as 0
        seed=plan.seed,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else one process would give every GPU that it sees a batch
    if device.type == "cpu":
        arguments._setup_devices = device  # several processes have "cpu:0", which torch.load does not know
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[Lines(max(1, corpus.held_out_bytes) / max(1, len(corpus.held_out)), as_json)],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if not done:
        trainer.train(resume_from_checkpoint=str(saved[-1]) if saved else None)
    trainer_checkpoint.save_model(trainer, out)


def _same_run(out: Path, facts: dict[str, Any], *, resume: bool) -> None:
    """Write down what a run is, or raise OptionError where one that goes on is another."""
    place = out / FACTS
    if not resume:
        write_whole(place, (json.dumps(facts, indent=2) + "\n").encode())
        checkpoint.readable(place, out / checkpoint.LOCK)
        return
    before = checkpoint.read_json(place) if place.is_file() else facts
    before.setdefault("tokenizer", facts["tokenizer"])  # runs once did not write it down
    for name, value in facts.items():
        if before.get(name) != value:
            raise OptionError(
                f"{out} is a run with {name} {before.get(name)!r}, not {value!r}: resume it as it was"
            )
