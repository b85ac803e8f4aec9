"""What a training run shows: a progress bar on a terminal, lines when piped, JSON when asked."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from types import TracebackType

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text as RichText

from linattn.train.data import counted
from linattn.train.evaluate import compressed_bits_per_byte
from linattn.train.loop import Progress as Step
from linattn.train.loop import Trainer

LINE_SECONDS = 10.0  # between lines when piped


class _Speed(ProgressColumn):
    def render(self, task: Task) -> RichText:
        return RichText(f"{task.fields['rate'] / 1000:.1f} kB/s")


class Bar:
    """A progress bar where there is a terminal, plain lines elsewhere; both say the same."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.fields[step]}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("train {task.fields[bits]:.3f} bits/byte"),
                _Speed(),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=1.0, step=0, bits=8.0, rate=0.0)
        self._last = time.monotonic()

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: Step, smooth: float) -> None:
        """Show a step; `smooth` is the running mean of the training bits per byte."""
        if self._bar is not None:
            self._bar.update(
                self._task, completed=step.fraction, step=step.step, bits=smooth, rate=step.bytes_per_second
            )
        elif time.monotonic() - self._last > LINE_SECONDS:
            self._last = time.monotonic()
            self.line(f"step {step.step:>6}  {100 * step.fraction:3.0f} %  train {smooth:.3f} bits/byte")

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False, highlight=False)


class Report:
    """Runs a trainer and tells about it, in bits per byte; "held out" is text it never trains on."""

    def __init__(self, trainer: Trainer, *, as_json: bool = False) -> None:
        self.trainer, self.as_json = trainer, as_json
        self.held_out: list[tuple[int, float]] = []  # (step, bits per byte)

    def run(self, *, save_every: int = 0, evaluations: int = 10) -> Mapping[str, float]:
        """Train to the end; return the compressors' bits per byte on the same held-out text."""
        trainer = self.trainer
        baselines = compressed_bits_per_byte(trainer.judged)
        steps = trainer.run(save_every=save_every, evaluations=evaluations)
        if self.as_json:
            self._json(baselines)
            for step in steps:
                self._json_step(step)
            return baselines
        from linattn.cli.output import console

        screen = console()
        for line in self.heading(baselines):
            screen.print(line, markup=False, highlight=False)
        smooth = None
        with Bar(screen) as bar:
            for step in steps:
                smooth = step.train_bits if smooth is None else 0.95 * smooth + 0.05 * step.train_bits
                bar.update(step, smooth)
                if step.held_out_bits is not None:
                    self.held_out.append((step.step, step.held_out_bits))
                    bar.line(_row(step, smooth, step.held_out_bits, baselines))
                if step.saved is not None:
                    bar.line(f"saved {step.saved}")
        return baselines

    def heading(self, baselines: Mapping[str, float]) -> list[str]:
        """What is known before the first step."""
        trainer, text = self.trainer, self.trainer.text
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        be = "is" if text.skipped == 1 else "are"
        skipped = f" ({counted(text.skipped, 'file')} that {be} no text left out)" if text.skipped else ""
        lines = [
            f"model     {parameters:,} parameters on {trainer.device}, seed {trainer.settings.seed}",
            f"text      {counted(len(text.train), 'byte')} to learn from, {len(text.held_out):,} held out, "
            f"{counted(text.files, 'file')}{skipped}",
            f"judged by {counted(len(trainer.judged), 'byte')} of the held-out text; "
            + ", ".join(f"{name} needs {bits:.3f} bits/byte" for name, bits in baselines.items()),
        ]
        if trainer.step:
            lines.append(f"resumed   after step {trainer.step}")
        return lines

    def _json(self, baselines: Mapping[str, float]) -> None:
        trainer = self.trainer
        facts = {"event": "start", "step": trainer.step, "device": str(trainer.device), **trainer.facts}
        typer.echo(json.dumps(facts | {"baselines": dict(baselines), "judged_bytes": len(trainer.judged)}))

    def _json_step(self, step: Step) -> None:
        fields = {
            "event": "step",
            "step": step.step,
            "train_bits": step.train_bits,
            "bytes_per_second": step.bytes_per_second,
        }
        if step.held_out_bits is not None:
            self.held_out.append((step.step, step.held_out_bits))
            fields["held_out_bits"] = step.held_out_bits
        if step.saved is not None:
            fields["saved"] = str(step.saved)
        typer.echo(json.dumps(fields))


def _row(step: Step, smooth: float, held_out: float, baselines: Mapping[str, float]) -> str:
    beside = "  ".join(f"{name} {bits:.3f}" for name, bits in baselines.items())
    rate = f"{step.bytes_per_second / 1000:.1f} kB/s"
    return f"step {step.step:>6}  held out {held_out:.3f} bits/byte  train {smooth:.3f}  ({beside})  {rate}"
