"""Runs that end as if their process had been killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from linattn.train import published


class StoppedError(Exception):
    """As if the process had been killed."""


@contextlib.contextmanager
def killed_after(steps: int) -> Iterator[None]:
    """The run inside has to come to its step steps + 1, and ends there."""
    plain = published.Trainer.training_step

    def stopping(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == steps:
            raise StoppedError
        return plain(self, *arguments, **options)

    with mock.patch.object(published.Trainer, "training_step", stopping):
        try:
            yield
        except StoppedError:
            return
    raise AssertionError(f"the run never took its step {steps + 1}")
