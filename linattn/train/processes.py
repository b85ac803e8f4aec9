"""Several processes that a launcher starts for one run: how many there are, and what one does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from linattn.errors import LinattnError, OptionError

Found = TypeVar("Found")


def refuse_several(preset: str) -> None:
    """Raise OptionError where torchrun or accelerate started more processes than this one."""
    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        return
    own = not distributed.is_initialized()
    if own:
        distributed.init_process_group("gloo")
    count = distributed.get_world_size()
    if own:
        distributed.destroy_process_group()
    if count > 1:
        raise OptionError(
            f"--preset {preset} is trained by one process, not by {count}: start it without torchrun, or "
            "train a published size, which transformers' Trainer spreads over processes"
        )


def together(processes: Any, work: Callable[[], Found]) -> Found:
    """What `work` returns to the first of `processes` (an `accelerate.PartialState`), in all of them.

    The others wait. Raises the LinattnError that the first one met, in all of them.
    """
    from accelerate.utils import broadcast_object_list

    said: list[Any] = [None, None]
    if processes.is_main_process:
        try:
            said[0] = work()
        except LinattnError as error:
            said[1] = error
    found, refusal = broadcast_object_list(said)
    if refusal is not None:
        raise refusal
    return found  # type: ignore[no-any-return]
