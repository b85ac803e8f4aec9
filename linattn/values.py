"""Values that a call may not have: read where they lie on the host, and on a device only when asked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from linattn.arrays import Array, device_name, to_numpy
from linattn.checks import Call
from linattn.errors import ArgumentTypeError, ValueRangeError
from linattn.reweight import Cosine
from linattn.state import check_lengths

Reader = Callable[[Array | None], np.ndarray | None]


def check_values(call: Call, *, device_too: bool) -> None:
    """Raise ValueRangeError for the first value outside its domain. `device_too` costs synchronisations."""
    if not isinstance(device_too, (bool, np.bool_)):
        raise ArgumentTypeError(f"check must be True or False, got {device_too!r}")

    def readable(x: Array | None) -> np.ndarray | None:
        if x is None or not (device_too or device_name(x) == "cpu") or device_name(x) == "meta":
            return None  # meta tensors have none
        return to_numpy(x)

    if (decay := readable(call.log_decay)) is not None:
        check_log_decay(decay)
    if (theta := readable(call.theta)) is not None and not np.isfinite(theta).all():
        head, feature = np.argwhere(~np.isfinite(theta))[0]
        raise ValueRangeError(
            f"theta must be finite; head {head} feature {feature} has {theta[head, feature]}"
        )
    n = call.q.shape[1]
    spans: np.ndarray | None = None
    if (lengths := readable(call.lengths)) is not None:
        if ((lengths < 0) | (lengths > n)).any():
            raise ValueRangeError(f"lengths must lie in 0 … N = {n}, got {_short(lengths)}")
        spans = lengths
    if (cu := readable(call.cu_seqlens)) is not None:
        if cu[0] != 0 or cu[-1] != n or (np.diff(cu) < 0).any():
            raise ValueRangeError(f"cu_seqlens must rise from 0 to N = {n}, got {_short(cu)}")
        spans = np.diff(cu)
    if call.initial_state is not None:
        check_lengths(call.initial_state, "initial_state")
    slots = readable(call.slots)
    if slots is not None and call.initial_state is not None:
        check_slots(slots, call.initial_state.kv.shape[0])
    if isinstance(call.reweight, Cosine) and call.reweight.max_len is not None:
        _check_positions(call, call.reweight.max_len, spans, slots, readable)


def check_log_decay(decay: np.ndarray) -> None:
    """Refuse decays that are NaN or above 0, naming the first."""
    bad = ~(decay <= 0)
    if not bad.any():
        return
    index = np.argwhere(bad)[0]
    where = f"head {index[-1]}"
    if decay.ndim == 3:
        where = f"batch {index[0]} position {index[1]} " + where
    elif decay.ndim == 2:
        where = f"row {index[0]} " + where
    raise ValueRangeError(
        f"log_decay must be <= 0 (natural log of a factor in (0, 1]); {where} has {decay[tuple(index)]:g}. "
        "If these are slopes, pass -slopes."
    )


def check_slots(slots: np.ndarray, rows: int) -> None:
    """Refuse slots outside -1 … rows - 1, and a row named twice (-1 is padding and may repeat)."""
    if ((slots < -1) | (slots >= rows)).any():
        raise ValueRangeError(f"slots must lie in 0 … {rows - 1} (-1: padding), got {_short(slots)}")
    named = slots[slots >= 0]
    if len(np.unique(named)) < len(named):
        raise ValueRangeError(f"slots must name each row once, got {_short(slots)}")


def _check_positions(
    call: Call, max_len: int, spans: np.ndarray | None, slots: np.ndarray | None, readable: Reader
) -> None:
    """With a state, length + N may not pass Cosine's max_len; every sequence counts its own tokens."""
    if spans is None:
        if call.lengths is not None or call.cu_seqlens is not None:
            return  # they live on a device
        rows = call.q.shape[0]
        spans = np.full(rows, call.q.shape[1], dtype=np.int64)
    ends = spans.astype(np.int64)
    if call.initial_state is not None:
        before = readable(call.initial_state.length)
        if before is None or (call.slots is not None and slots is None):
            return
        if slots is not None:
            rows = np.append(before, 0)  # a pool may have no rows: then there is padding only
            before = np.where(slots >= 0, rows[np.clip(slots, 0, len(before))], 0)
        ends = ends + before
    if (ends > max_len).any():
        raise ValueRangeError(
            f"Cosine(max_len={max_len}) is shorter than the {int(ends.max())} positions that state and call "
            "reach together"
        )


def _short(x: np.ndarray) -> str:
    return np.array2string(x, threshold=8, edgeitems=4, separator=", ")
