"""What a causal head remembers: the state, and the merging of two of them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from linattn import safetensors_io
from linattn.arrays import (
    Array,
    cast,
    device_name,
    dtype_name,
    kind_of,
    namespace,
    readable,
    table,
    zeros_like_kind,
)
from linattn.errors import (
    ArgumentTypeError,
    DeviceError,
    DtypeError,
    OptionError,
    ShapeError,
    StateError,
    ValueRangeError,
)
from linattn.features import FEATURE_MAPS
from linattn.reweight import LRPE, Cosine
from linattn.signatures import known_keywords

Reweight = Cosine | LRPE | None


@dataclass(eq=False)
class State:
    """The memory of a causal call: S sequences, H heads; independent of any absolute position.

    kv: [S, H, F, E], float32 (float64 for float64 calls), sum of decayed outer products phi(k) v, without
    `scale`.
        F = D, or 2 D with reweighting: first the cosine part, then the sine part, in the frame of the last
        token.
    z: [S, H, F], the same sums with 1 in place of v; None unless the call normalizes.
    length: [S] int64, tokens seen so far (masked ones count).
    feature_map, reweight ("cosine" | "lrpe"), d: the problem it belongs to; d is None when built by hand.

    Source: kv is $[kv]_t$ of TransNormerLLM's robust inference, arXiv:2307.14995; z and the two parts of
    reweighted states are derived in `linattn.reference.recurrent`.
    """

    kv: Array
    z: Array | None
    length: Array
    feature_map: str | None = None
    reweight: str | None = None
    d: int | None = None

    @staticmethod
    def zeros(
        like: Array,
        sequences: int,
        heads: int,
        d: int,
        e: int,
        *,
        reweight: Reweight = None,
        feature_map: str | None = None,
        normalize: bool = False,
    ) -> State:
        """Return the state of `sequences` sequences before their first token, on the device of the array
        `like`.

        Its dtype is float64 if `like` is float64, else float32. Raises ArgumentTypeError, OptionError or
        ValueRangeError for what no call could have.
        """
        if kind_of(like) is None:
            raise ArgumentTypeError(f"State.zeros: like must be an array, got {type(like).__name__}")
        for name, size in (("sequences", sequences), ("heads", heads), ("d", d), ("e", e)):
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
                raise ArgumentTypeError(f"State.zeros: {name} must be an int, got {size!r}")
            if size < (0 if name == "sequences" else 1):
                raise ValueRangeError(f"State.zeros: {name} must be positive, got {size}")
        if reweight is not None and not isinstance(reweight, (Cosine, LRPE)):
            raise ArgumentTypeError(f"State.zeros: reweight must be a Cosine or an LRPE, got {reweight!r}")
        if feature_map is not None and feature_map not in FEATURE_MAPS:
            known = ", ".join(FEATURE_MAPS)
            raise OptionError(f"State.zeros: feature_map must be one of {known}, got {feature_map!r}")
        dtype = "float64" if dtype_name(like) == "float64" else "float32"
        f = d if reweight is None else 2 * d
        z = zeros_like_kind(like, (sequences, heads, f), dtype) if normalize else None
        kv = zeros_like_kind(like, (sequences, heads, f, e), dtype)
        return State(
            kv, z, zeros_like_kind(like, (sequences,), "int64"), feature_map, reweight_name(reweight), d
        )

    def _map(self, fn: Any) -> State:
        z = None if self.z is None else fn(self.z)
        return replace(self, kv=fn(self.kv), z=z, length=fn(self.length))

    def clone(self) -> State:
        """A copy that shares no memory with this one."""
        return self._map(lambda x: x.clone() if kind_of(x) == "torch" else x.copy())

    def cut(self) -> None:
        """Let go of what autograd has recorded of the numbers, which then lie in memory of their own."""
        for name in ("kv", "z"):
            x = getattr(self, name)
            if getattr(x, "requires_grad", False):
                # out of inference mode: as it was, it may change anywhere
                with namespace("torch").inference_mode(False):
                    setattr(self, name, x.detach().clone())

    def assign(self, new: State) -> None:
        """Take the values of another state of the same shapes, in place."""
        self.kv[...] = new.kv
        self.length[...] = new.length
        if self.z is not None:
            self.z[...] = new.z

    def to(self, device: Any) -> State:
        """The same state on another device (torch; dtypes stay: a state is float32 or float64).

        Raises ArgumentTypeError for states of other arrays.
        """
        if kind_of(self.kv) != "torch":
            raise ArgumentTypeError(f"State.to moves torch states, this one is {kind_of(self.kv)}")
        return self._map(lambda x: x.to(device=device))

    def select(self, rows: Any) -> State:
        """The states of `rows` ([R] integers, repeats allowed: a beam's reordering), as a new State.

        Raises ShapeError, DtypeError or ValueRangeError for anything else (values on the host).
        """
        kind = kind_of(self.kv) or "numpy"
        index = rows if kind_of(rows) == kind else np.asarray(rows)
        if isinstance(index, np.ndarray) and index.shape == (0,):
            index = index.astype(np.int64)  # an empty list has no dtype of its own
        if index.ndim != 1:
            raise ShapeError(f"State.select: rows must have shape [R], got {tuple(index.shape)}")
        if "int" not in dtype_name(index):
            raise DtypeError(f"State.select: rows must be integers, got {dtype_name(index)}")
        if readable(index) and bool(((index < 0) | (index >= self.kv.shape[0])).any()):
            raise ValueRangeError(f"State.select: rows must lie in 0 … {self.kv.shape[0] - 1}")
        if kind == "torch":
            torch = namespace("torch")
            index = torch.as_tensor(index, device=self.kv.device, dtype=torch.int64)
            return self._map(lambda x: x.index_select(0, index))
        return self._map(lambda x: x[index])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, replacing `path` only when the new file is whole."""
        tensors = {"kv": self.kv, "length": self.length} | ({} if self.z is None else {"z": self.z})
        facts = {"feature_map": self.feature_map, "reweight": self.reweight, "d": self.d}
        safetensors_io.save(
            path, tensors, {name: str(value) for name, value in facts.items() if value is not None}
        )

    @staticmethod
    def load(path: str | os.PathLike[str], *, kind: str = "numpy", device: str = "cpu") -> State:
        """Read a state back as NumPy (`kind="numpy"`) or torch arrays, every bit as it was saved.

        Raises StateError for a file that holds anything else.
        """
        tensors, facts = safetensors_io.load(path, kind, device)
        missing = {"kv", "length"} - tensors.keys()
        if missing:
            raise StateError(f"{path} is not a saved State: it has no tensor {', '.join(sorted(missing))}")
        d = facts.get("d")
        if d is not None and not d.isdecimal():
            raise StateError(f"{path} is not a saved State: its d is {d!r}")
        parts = tensors["kv"], tensors.get("z"), tensors["length"]
        state = State(*parts, facts.get("feature_map"), facts.get("reweight"), None if d is None else int(d))
        check_parts(state, str(path))
        return state


def reweight_name(reweight: Reweight) -> str | None:
    """The name under which a state records its reweighting."""
    return None if reweight is None else "cosine" if isinstance(reweight, Cosine) else "lrpe"


def check_dense(name: str, x: Array) -> None:
    """Refuse sparse and nested tensors: their values do not lie where a stride says."""
    if kind_of(x) == "torch" and (str(x.layout) != "torch.strided" or x.is_nested):
        what = "it is nested" if x.is_nested else f"its layout is {x.layout}"
        raise ArgumentTypeError(f"{name} must be a dense tensor, {what}")


def check_parts(state: State, name: str) -> None:
    """Refuse a state whose own parts do not fit together."""
    if not isinstance(state, State):
        raise ArgumentTypeError(f"{name} must be a linattn.State, got {type(state).__name__}")
    parts = {"kv": state.kv, "length": state.length} | ({} if state.z is None else {"z": state.z})
    kinds = {part: kind_of(x) for part, x in parts.items()}
    if None in kinds.values() or len(set(kinds.values())) > 1:
        raise ArgumentTypeError(f"{name}: kv, z and length must be arrays of one kind, got {kinds}")
    for part, x in parts.items():
        check_dense(f"{name}.{part}", x)
    if state.kv.ndim != 4:
        raise ShapeError(f"{name}: kv must have shape [S, H, F, E], got {tuple(state.kv.shape)}")
    if state.z is not None and tuple(state.z.shape) != tuple(state.kv.shape[:3]):
        raise ShapeError(f"{name}: z must have shape {tuple(state.kv.shape[:3])}, got {tuple(state.z.shape)}")
    if tuple(state.length.shape) != (state.kv.shape[0],):
        raise ShapeError(
            f"{name}: length must have shape ({state.kv.shape[0]},), got {tuple(state.length.shape)}"
        )
    if dtype_name(state.length) != "int64":
        raise DtypeError(f"{name}: length must be int64, got {dtype_name(state.length)}")
    for part in ("kv", "z"):
        if part in parts and dtype_name(parts[part]) not in ("float32", "float64"):
            raise DtypeError(f"{name}: {part} must be float32 or float64, got {dtype_name(parts[part])}")
    if len({device_name(x) for x in parts.values()}) > 1:
        raise DeviceError(f"{name}: kv, z and length must be on one device")


def tokens_seen(q: Array, lengths: Array | None, cu_seqlens: Array | None, before: Array | None) -> Array:
    """Tokens that each sequence has seen after a causal call with q [B, N, H, D]: [S] int64, a new array.

    before: those that its initial state has seen.
    """
    if cu_seqlens is not None:
        borders = cast(cu_seqlens, "int64")
        tokens = borders[1:] - borders[:-1]
    elif lengths is not None:
        tokens = cast(lengths, "int64")
    elif before is not None:
        return before + q.shape[1]
    else:
        return zeros_like_kind(q, (q.shape[0],), "int64") + q.shape[1]
    return tokens + (0 if before is None else before)


def check_lengths(state: State, name: str) -> None:
    """Refuse a state that claims to have seen fewer than no tokens; read on the host only."""
    if readable(state.length) and bool((state.length < 0).any()):
        raise ValueRangeError(f"{name}.length must be >= 0, it counts tokens")


def check_recorded(state: State, name: str, feature_map: str | None, reweight: str | None, d: int) -> None:
    """Refuse a state that was recorded for another problem."""
    for what, recorded, wanted in (
        ("feature_map", state.feature_map, feature_map),
        ("reweight", state.reweight, reweight),
        ("D", state.d, d),
    ):
        known = recorded is not None or state.d is not None
        if known and recorded != wanted:
            raise StateError(
                f"{name} belongs to another problem: its {what} is {recorded!r}, this call's is {wanted!r}"
            )


def _angle(reweight: Reweight, state: State) -> Array | float:
    """theta as float64: a number (cosine) or [H, D, 1] beside the state."""
    if isinstance(reweight, Cosine):
        if reweight.max_len is None:
            raise OptionError("merge_states: Cosine needs its max_len, there is no call to take it from")
        return math.pi / (2 * reweight.max_len)
    assert isinstance(reweight, LRPE)
    theta = reweight.theta
    _check_table("theta", theta, state)
    half = state.kv.shape[2] // 2
    if tuple(theta.shape) != (state.kv.shape[1], half):
        raise ShapeError(
            f"LRPE: theta must be [H, D] = {(state.kv.shape[1], half)}, got {tuple(theta.shape)}"
        )
    theta = table(theta, state.kv, "float64") if isinstance(theta, np.ndarray) else cast(theta, "float64")
    return theta[:, :, None]


@known_keywords
def merge_states(
    left: State,
    right: State,
    *,
    log_decay: Array | None = None,
    total_log_decay: Array | None = None,
    reweight: Reweight = None,
) -> State:
    """Return the state after left's tokens and then right's: left advanced by right's length, plus right.

    log_decay: [H], the call's decay per head. total_log_decay: [S, H], with per-token decay: the sum over
    right's tokens. reweight: as in the call. `right` must have begun without an initial state. Lengths add.

    Raises StateError for states of two problems, OptionError if both decays are given, ValueRangeError for a
    decay above 0 on the host or a total length above Cosine's max_len; ArgumentTypeError, DtypeError and
    DeviceError for arrays that do not go with the states.
    Source: TransNormerLLM's robust inference, arXiv:2307.14995, over all of right's tokens at once; with
    angles left is also turned, as in `linattn.reference.recurrent`.
    """
    check_parts(left, "left")
    check_parts(right, "right")
    if reweight is not None and not isinstance(reweight, (Cosine, LRPE)):
        wanted = "None, linattn.Cosine or linattn.LRPE"
        raise ArgumentTypeError(f"reweight must be {wanted}, got {type(reweight).__name__}")
    check_lengths(left, "left")
    check_lengths(right, "right")
    if tuple(left.kv.shape) != tuple(right.kv.shape) or (left.z is None) != (right.z is None):
        raise StateError(
            "left and right must hold the same sequences of one problem, got kv "
            f"{tuple(left.kv.shape)} and {tuple(right.kv.shape)}"
            + ("" if (left.z is None) == (right.z is None) else ", and only one of them has z")
        )
    if kind_of(left.kv) != kind_of(right.kv) or device_name(left.kv) != device_name(right.kv):
        raise DeviceError("left and right must be arrays of one kind on one device")
    if dtype_name(left.kv) != dtype_name(right.kv):
        raise DtypeError(
            f"left and right must share a dtype, got {dtype_name(left.kv)} and {dtype_name(right.kv)}"
        )
    name = reweight_name(reweight)
    if name is not None and left.kv.shape[2] % 2:
        raise StateError(
            f"a reweighted state has an even number of features, this one has {left.kv.shape[2]}"
        )
    for side, state in (("left", left), ("right", right)):
        d = left.d if left.d is not None else right.d
        feature_map = left.feature_map if left.d is not None else right.feature_map
        if state.d is not None and d is not None:
            check_recorded(state, side, feature_map, name, d)
    xp = namespace(kind_of(left.kv) or "numpy")
    length = cast(right.length, "float64")  # [s]
    total = _total_log_decay(xp, left, log_decay, total_log_decay, length)

    def advanced(x: Array) -> Array:  # [s h f ...], by right's length
        wide = cast(x, "float64")
        rank = (1,) * (x.ndim - 2)
        if reweight is not None:
            theta = _angle(reweight, left)
            if x.ndim == 3 and not isinstance(theta, float):
                theta = theta[:, :, 0]
            angle = theta * length.reshape(-1, 1, *rank)
            c, s = xp.cos(angle), xp.sin(angle)
            half = x.shape[2] // 2
            cosine, sine = wide[:, :, :half], wide[:, :, half:]
            wide = xp.concatenate((c * cosine - s * sine, s * cosine + c * sine), 2)
        if total is not None:
            factor = xp.exp(total).reshape(*total.shape, *rank)
            wide = xp.where(factor > 0, wide * factor, 0.0)
        return wide

    max_len = reweight.max_len if isinstance(reweight, Cosine) else None
    new_length = left.length + right.length
    if max_len is not None and readable(new_length) and bool((new_length > max_len).any()):
        raise ValueRangeError(f"the merged length exceeds Cosine's max_len = {max_len}")
    dtype = dtype_name(left.kv)
    kv = cast(advanced(left.kv) + cast(right.kv, "float64"), dtype)
    z = None
    if left.z is not None and right.z is not None:
        z = cast(advanced(left.z) + cast(right.z, "float64"), dtype)
    known = left if left.d is not None else right
    return State(kv, z, new_length, known.feature_map, known.reweight or name, known.d)


def _check_table(name: str, x: Array, state: State) -> None:
    """A decay or angle table: floating point, and a NumPy table or an array beside the state."""
    if kind_of(x) is None:
        raise ArgumentTypeError(f"{name} must be an array, got {type(x).__name__}")
    check_dense(name, x)
    if not isinstance(x, np.ndarray):
        if kind_of(x) != kind_of(state.kv):
            raise ArgumentTypeError(f"{name} must be a {kind_of(state.kv)} array as kv is, got {kind_of(x)}")
        if device_name(x) != device_name(state.kv):
            raise DeviceError(f"{name} must be on {device_name(state.kv)} as kv is, got {device_name(x)}")
    if dtype_name(x) not in ("float32", "float64"):
        raise DtypeError(f"{name} must be float32 or float64, got {dtype_name(x)}")


def _total_log_decay(
    xp: Any, left: State, log_decay: Array | None, total_log_decay: Array | None, length: Array
) -> Array | None:
    """The decay over right's tokens, [S, H] float64, or None."""
    if log_decay is not None and total_log_decay is not None:
        raise OptionError("merge_states: give log_decay (per head) or total_log_decay (per token), not both")
    given = log_decay if total_log_decay is None else total_log_decay
    if given is None:
        return None
    name = "log_decay" if total_log_decay is None else "total_log_decay"
    shape = left.kv.shape[1:2] if total_log_decay is None else left.kv.shape[:2]
    _check_table(name, given, left)
    if tuple(given.shape) != tuple(shape):
        raise ShapeError(f"{name} must have shape {tuple(shape)}, got {tuple(given.shape)}")
    given = table(given, left.kv, "float64") if isinstance(given, np.ndarray) else cast(given, "float64")
    if readable(given) and not bool((given <= 0).all()):
        raise ValueRangeError(
            f"{name} must be <= 0 (natural log of a factor in (0, 1]); if these are slopes, pass -slopes"
        )
    if total_log_decay is not None:
        return given
    rows = length[:, None]
    return xp.where(
        rows > 0, given[None] * xp.where(rows > 0, rows, 1.0), 0.0
    )  # 0 tokens of -inf decay nothing
