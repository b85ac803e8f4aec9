"""TransNormerLLM in its published sizes, trained or fine-tuned by transformers' Trainer."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import typer
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerState, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

from linattn.errors import DataError, OptionError, ValueRangeError
from linattn.models.huggingface.newer import CHECKPOINTING
from linattn.models.transnormer import TransNormerForCausalLM
from linattn.train import checkpoint, run_folder, trainer_checkpoint
from linattn.train.corpus import Corpus
from linattn.train.data import counted
from linattn.train.presets import config_of, fields_of, has_weights, is_there, loss_chunk, model_of
from linattn.train.processes import together
from linattn.train.trainer_checkpoint import Trainer

SEEDS = 1 << 32  # that transformers takes
JUDGED = 64  # windows of the held-out text that are measured, spread over all of it


@dataclass(frozen=True)
class Plan:
    """What a run does: steps of `batch` windows of seq_len tokens, AdamW, warm-up and a cosine.

    lr: peak learning rate. It is reached in `warmup` steps, or a tenth of all where that is less, beginning
    with its part of one step, and falls along half a cosine to 0 after the last step.
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
            raise ValueRangeError(f"lr must be a number above 0, got {self.lr}")
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
                f"the {what} text has {counted(len(ids), 'token')}, one window needs {seq_len}: "
                "give more text"
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


class Saving(TrainerCallback):
    """Saves and measures as often as the run is told now; a checkpoint's state says how often it was."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Overwrite what came with a checkpoint."""
        state.save_steps = state.eval_steps = self.every


class Interrupts(TrainerCallback):
    """Ctrl-C ends a run after its step where Python dropped the exception, as it does in a `__del__`."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End here. Raises KeyboardInterrupt."""
        if self.asked:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Take down that somebody asks, where nobody else listens."""
        before = signal.getsignal(signal.SIGINT)
        if (
            before is not signal.default_int_handler
            or threading.current_thread() is not threading.main_thread()
        ):
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True
            signal.default_int_handler(number, frame)

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


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
    if device.type == "cuda" and device.index:
        raise OptionError(
            "transformers' Trainer takes the first GPU that it sees: instead of --device "
            f"{device}, --device cuda where CUDA_VISIBLE_DEVICES is {device.index}"
        )
    processes = PartialState(cpu=device.type == "cpu")
    count, first = processes.num_processes, processes.is_main_process
    plan.windows(count)
    # what needs no folder is refused before there is one
    rows, held_out = _rows(corpus, plan)
    config = config_of(size, corpus.vocab_size, tokenizer) if is_there(size) or not resume else None
    facts = {
        **asdict(plan),
        "preset": size,
        "text": corpus.fingerprint,
        "vocab_size": corpus.vocab_size,
        "tokenizer": None if tokenizer is None else run_folder.fingerprint(tokenizer, corpus),
        run_folder.CONFIG: None if config is None else fields_of(config),
    }
    with contextlib.ExitStack() as held, bars(shown=first and not as_json and sys.stderr.isatty()):

        def begin() -> list[Path]:
            run_folder.look(out, resume=resume)
            if not resume and has_weights(size):
                trainer_checkpoint.check_model(Path(size))
            held.enter_context(checkpoint.alone(out))
            saved = run_folder.begin(out, facts, resume=resume)
            if saved:
                run_folder.check_last(saved[-1], plan.steps, plan.batch // plan.accumulate)
            return saved

        saved = together(processes, begin)
        torch.manual_seed(plan.seed)
        begins = str(saved[-1]) if saved else size  # a preset may have changed since
        model = model_of(begins, corpus.vocab_size, tokenizer, looked_at=True)
        model.loss_chunk = loss_chunk(model.config.vocab_size)
        lines = Lines(max(1, corpus.held_out_bytes) / max(1, len(corpus.held_out)), as_json)
        trainer = _trainer(model, rows, held_out, plan, out, device, saved, count, lines, tokenizer)
        interrupts = Interrupts()
        trainer.add_callback(interrupts)
        if not _ended(saved, plan):
            with interrupts.heard():
                trainer.train(resume_from_checkpoint=str(saved[-1]) if saved else None)
        trainer_checkpoint.save_model(trainer, out)
    if first and not as_json:
        typer.echo(f"saved {out}")


def _rows(corpus: Corpus, plan: Plan) -> tuple[Rows, Rows]:
    """What is learned, and what is measured."""
    rows = Rows(corpus.train, plan.seq_len, "training")
    if len(rows) < plan.batch:
        raise DataError(
            f"the training text has {counted(len(rows), 'window')} of {plan.seq_len} tokens, a batch needs "
            f"{plan.batch}: give more text, or a smaller batch"
        )
    return rows, Rows(corpus.held_out, plan.seq_len, "held-out", JUDGED)


def _ended(saved: list[Path], plan: Plan) -> bool:
    """Whether the last step of a run is done, but for what its folder itself holds."""
    return bool(saved) and checkpoint.step_of(saved[-1]) >= plan.steps


def _trainer(
    model: TransNormerForCausalLM,
    rows: Rows,
    held_out: Rows,
    plan: Plan,
    out: Path,
    device: torch.device,
    saved: list[Path],
    processes: int,
    lines: Lines,
    tokenizer: Any,
) -> Trainer:
    windows = plan.windows(processes)
    every = plan.save_every
    if saved and not _ended(saved, plan):  # transformers warns of another number; Saving has the new one
        every = TrainerState.load_from_json(str(saved[-1] / checkpoint.STATE)).save_steps
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=plan.steps,
        per_device_train_batch_size=windows,
        per_device_eval_batch_size=windows if processes == 1 else 1,  # several would count some twice
        gradient_accumulation_steps=plan.accumulate,
        learning_rate=plan.lr,
        warmup_steps=min(plan.warmup, plan.steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        save_steps=every,
        eval_strategy="steps",
        eval_steps=every,
        logging_steps=max(1, plan.steps // 100),
        logging_nan_inf_filter=False,  # it shows a loss that is not finite as 0
        seed=plan.seed,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        **{CHECKPOINTING: plan.checkpointing},
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
        callbacks=[lines, Saving(plan.save_every)],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer
