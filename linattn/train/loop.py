"""The training loop: AdamW, warm-up and cosine, bits per byte, and checkpoints that continue bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from linattn.errors import CheckpointError, DataError, OptionError, ValueRangeError
from linattn.models import TransNormerConfig, TransNormerLM
from linattn.train import checkpoint
from linattn.train.data import Text, Windows
from linattn.train.evaluate import bits_per_byte, spread
from linattn.train.loading import load_model

BETAS = (0.9, 0.95)
JUDGED = 1 << 17  # bytes of the held-out text that are measured, spread over all of it
FLOOR = 0.05  # the learning rate at the end, as a part of its peak


@dataclass(frozen=True)
class Settings:
    """What a run does besides the model: together with the text and the seed it fixes every bit of it.

    steps: optimizer steps of `batch` windows of `seq_len` bytes. lr: peak learning rate, reached after
    `warmup` steps and lowered along a cosine to a twentieth. weight_decay acts on matrices other than the
    embedding. clip: largest norm of the whole gradient.

    Raises ValueRangeError for values outside their domain.
    """

    steps: int = 1000
    batch: int = 16
    seq_len: int = 256
    lr: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (
            ("steps", 1),
            ("batch", 1),
            ("seq_len", 1),
            ("warmup", 0),
            ("seed", 0),
            ("weight_decay", 0),
        ):
            if not getattr(self, name) >= low:
                raise ValueRangeError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueRangeError(f"{name} must be a number above 0, got {getattr(self, name)}")


# What each model preset is trained with unless told otherwise.
SETTINGS = {
    "tiny": Settings(batch=16, seq_len=128, lr=2e-2, warmup=30),
    "small": Settings(batch=32, seq_len=512, lr=1e-3, warmup=200),
}


def check_text(text: Text, settings: Settings) -> None:
    """Raise DataError for a text with less than a window to learn from, or nothing to be judged by."""
    Windows(text.train, settings.seq_len, settings.batch, settings.seed)
    if not len(text.held_out):
        raise DataError("there is no held-out text to measure: give more text")


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step.

    fraction: of the whole run. train_bits: bits per byte of this step's batch. held_out_bits: of the held-out
    text, at the steps where it is measured, else None. bytes_per_second: since this process began to train.
    saved: the checkpoint that was just written, if one was.
    """

    step: int
    steps: int | None
    fraction: float
    train_bits: float
    held_out_bits: float | None
    bytes_per_second: float
    saved: Path | None


class Trainer:
    """One run: a model, its optimizer and its place in the data.

    out: the run's folder; None saves nothing. seconds: learn for this time (measuring and saving not counted)
    rather than for settings.steps, the learning rate following the clock; such a run cannot be continued.

    Raises ValueRangeError unless seconds is above 0, OptionError where `out` holds a model that is no run's.
    """

    def __init__(
        self,
        config: TransNormerConfig,
        text: Text,
        settings: Settings,
        *,
        out: Path | None = None,
        device: torch.device | str = "cpu",
        seconds: float | None = None,
    ) -> None:
        if seconds is not None and not seconds > 0:
            raise ValueRangeError(f"seconds must be above 0, got {seconds}")
        if out is not None:
            checkpoint.refuse_model(out)
        self.text, self.settings, self.out, self.seconds = text, settings, out, seconds
        self.device = torch.device(device)
        self.judged = spread(text.held_out, JUDGED)
        self.windows = Windows(text.train, settings.seq_len, settings.batch, settings.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = TransNormerLM(config)  # drawn on the CPU: the same weights for every device
        self.model.to(self.device)
        self.optimizer = _optimizer(self.model, settings)
        self.step = 0
        if out is not None:
            checkpoint.prepare(out)

    @property
    def facts(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to continue this run."""
        return {
            "config": self.model.config.to_dict(),
            "settings": dataclasses.asdict(self.settings),
            "text": self.text.fingerprint,
            "seconds": self.seconds,
        }

    def resume(self) -> None:
        """Go on from the newest checkpoint in `out`.

        Raises CheckpointError when there is none, it is damaged, or it belongs to a run with another model,
        other settings or another text; OptionError for a run by the clock.
        """
        if self.out is None or self.seconds is not None:
            raise OptionError("only a run with a folder and a number of steps can be resumed")
        folder = checkpoint.find(self.out)
        run = checkpoint.load_run(folder)
        for what, own in self.facts.items():
            saved = run.facts.get(what)
            if saved == own:
                continue
            if isinstance(own, dict) and isinstance(saved, dict):
                differing = [
                    f"{name} is {saved.get(name)!r} there and {own[name]!r} here"
                    for name in own
                    if saved.get(name) != own[name]
                ]
                raise CheckpointError(f"{folder} is of another run: {'; '.join(differing) or what}")
            raise CheckpointError(
                f"{folder} is of another run: its {what} is {saved!r} there and {own!r} here"
            )
        loaded = load_model(folder, self.device)
        moments = _moments(self.model, self.optimizer, run.optimizer, folder)
        self.model.load_state_dict(loaded.state_dict())
        self.optimizer.load_state_dict(moments)
        self.step = run.step

    def save(self) -> Path:
        """Write a checkpoint of the steps done so far. Raises CheckpointError when that fails."""
        assert self.out is not None
        tensors = {
            f"{what}.{name}": value
            for name, parameter in self.model.named_parameters()
            for what, value in self.optimizer.state[parameter].items()
        }
        return checkpoint.save(self.out, self.model, checkpoint.Run(self.step, tensors, self.facts))

    def run(self, *, save_every: int = 0, evaluations: int = 10) -> Iterator[Progress]:
        """Train to the end, yielding after every step.

        save_every: steps between checkpoints; 0 saves only at the end. evaluations: how often in the whole
        run the held-out text is measured; always at the end.

        Raises OptionError when `out` holds a run that went further, ValueRangeError when a loss is no longer
        finite, before what gives it is saved, CheckpointError when a checkpoint cannot be written.
        """
        if self.out is not None and any(
            entry > checkpoint.folder_of(self.out, self.step) for entry in checkpoint.checkpoints(self.out)
        ):
            raise OptionError(
                f"{self.out} holds later checkpoints of an earlier run: resume it, or choose another folder"
            )
        began, first = time.monotonic(), self.step  # `began` moves on while nothing is learned
        fraction = 0.0
        while (fraction < 1.0) if self.seconds is not None else (self.step < self.settings.steps):
            before = fraction if self.seconds is not None else self.step / self.settings.steps
            train_bits = self._take_step(before)
            elapsed = time.monotonic() - began
            fraction = (
                min(1.0, elapsed / self.seconds)
                if self.seconds is not None
                else self.step / self.settings.steps
            )
            done = fraction >= 1.0
            measure = done or math.floor(fraction * evaluations) > math.floor(before * evaluations)
            rate = (self.step - first) * self.settings.batch * self.settings.seq_len / max(elapsed, 1e-9)
            paused = time.monotonic()
            held_out = self._held_out() if measure else None
            due = self.out is not None and (done or (save_every > 0 and self.step % save_every == 0))
            if due:
                refuse_weights(self.model, self.step)
                with torch.no_grad():  # finite weights whose loss is not are not saved, either
                    self._loss()
            saved = self.save() if due else None
            began += time.monotonic() - paused
            steps = self.settings.steps if self.seconds is None else None
            yield Progress(self.step, steps, fraction, train_bits, held_out, rate, saved)

    def _loss(self) -> tuple[torch.Tensor, float]:
        """The loss of the next step's batch, and in bits per byte."""
        ids = torch.from_numpy(self.windows(self.step)).to(self.device)
        with diverging(self.model, self.step):
            logits = self.model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        return loss, finite(loss.item() / math.log(2), f"the loss of step {self.step + 1}")

    def _held_out(self) -> float:
        with diverging(self.model, self.step):
            bits = bits_per_byte(self.model, self.judged)
        return finite(bits, f"the held-out loss after step {self.step}")

    def _take_step(self, fraction: float) -> float:
        settings = self.settings
        loss, value = self._loss()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        factor = min(1.0, (self.step + 1) / max(settings.warmup, 1))
        factor *= FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * fraction))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * factor
        self.optimizer.step()
        self.step += 1
        return value


def _diverged(what: str) -> ValueRangeError:
    return ValueRangeError(f"{what}: training diverged; lower the learning rate")


def finite(value: float, what: str) -> float:
    """Return a loss; raise ValueRangeError, which says that training diverged, unless it is finite."""
    if not math.isfinite(value):
        raise _diverged(f"{what} is {value}")
    return value


def refuse_weights(model: torch.nn.Module, step: int) -> None:
    """Raise ValueRangeError, which says that training diverged, unless all weights are finite."""
    if not torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all():
        raise _diverged(f"weights are no longer finite after step {step}")


@contextlib.contextmanager
def diverging(model: torch.nn.Module, step: int) -> Iterator[None]:
    """Around a call of the model: where it refuses values because training diverged, says so instead."""
    try:
        yield
    except ValueRangeError:
        refuse_weights(model, step)
        raise


def _optimizer(model: TransNormerLM, settings: Settings) -> torch.optim.AdamW:
    decayed: list[torch.nn.Parameter] = []
    kept: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and not name.startswith("embed_tokens")
        (decayed if matrix else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=BETAS, fused=True)


def _moments(
    model: TransNormerLM, optimizer: torch.optim.AdamW, tensors: Mapping[str, torch.Tensor], folder: Path
) -> dict[str, Any]:
    """The optimizer's state dict with the saved tensors in it, by the index torch numbers parameters with."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in order}
    for key, tensor in tensors.items():
        what, _, name = key.partition(".")
        if name not in found or (what != "step" and tensor.shape != shapes[name]):
            raise CheckpointError(
                f"{folder} is of another model: its optimizer has {key} {tuple(tensor.shape)}"
            )
        found[name][what] = tensor
    if lacking := [name for name in order if found[name].keys() != {"step", "exp_avg", "exp_avg_sq"}]:
        raise CheckpointError(f"{folder} is damaged: its optimizer lacks tensors of {lacking[0]}")
    return optimizer.state_dict() | {"state": dict(enumerate(found.values()))}
