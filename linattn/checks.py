"""Every shape and option of a call, checked once; what comes out is a `Problem`."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np

from linattn.arrays import FLOATS, Array, accumulate_dtype, device_name, dtype_name, kind_of
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
from linattn.problem import Problem
from linattn.reweight import LRPE, Cosine
from linattn.state import Reweight, State, check_dense, check_parts, check_recorded, reweight_name


@dataclass(slots=True, eq=False)
class Call:
    """The arguments of one call as they came, never changed (frozen would cost microseconds a call).

    `backend` and `check` are the router's business.
    """

    q: Array
    k: Array
    v: Array
    log_decay: Array | None = None
    reweight: Reweight = None
    feature_map: str | None = None
    normalize: bool = False
    eps: float = 1e-6
    causal: bool = True
    scale: float = 1.0
    key_mask: Array | None = None
    lengths: Array | None = None
    cu_seqlens: Array | None = None
    initial_state: State | None = None
    return_state: bool = False
    slots: Array | None = None
    precision: str = "ieee"
    batch_invariant: bool = False

    @property
    def theta(self) -> Array | None:
        """The angles of LRPE, or None."""
        return self.reweight.theta if isinstance(self.reweight, LRPE) else None

    @property
    def max_len(self) -> int | None:
        """Cosine's length, taken from the call if it was not given."""
        if not isinstance(self.reweight, Cosine):
            return None
        return self.reweight.max_len or max(self.q.shape[1], self.k.shape[1], 1)


def check_flag(name: str, value: object) -> None:
    """Raise ArgumentTypeError for what is no bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentTypeError(f"{name} must be True or False, got {value!r}")


def check_ints(**named: object) -> None:
    """Raise ArgumentTypeError for what is no int, Python's or NumPy's."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ArgumentTypeError(f"{name} must be an int, got {value!r}")


def check_feature_map(name: object) -> None:
    """Raise OptionError for what is no feature map, nor None."""
    if name is not None:
        _choice("feature_map", name, FEATURE_MAPS, "None or one of ")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentTypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueRangeError(f"{name} must be finite, got {value!r}")
    return number


def _choice(name: str, value: object, known: tuple[str, ...], before: str = "one of ") -> None:
    if not isinstance(value, str) or value not in known:
        raise OptionError(f"{name} must be {before}{', '.join(map(repr, known))}, got {value!r}")


def check_eps(eps: object) -> None:
    """Raise ArgumentTypeError or ValueRangeError for what no denominator can be clamped to."""
    if _number("eps", eps) <= 0:
        raise ValueRangeError(f"eps must be > 0, got {eps!r}: a row whose weights are all 0 divides by it")


def check_options(call: Call) -> None:
    """Options alone: their types, their names, and which exclude each other."""
    for name in ("normalize", "causal", "return_state", "batch_invariant"):
        check_flag(name, getattr(call, name))
    _number("scale", call.scale)
    check_eps(call.eps)
    check_feature_map(call.feature_map)
    _choice("precision", call.precision, ("ieee", "tf32"))
    if call.reweight is not None and not isinstance(call.reweight, (Cosine, LRPE)):
        raise ArgumentTypeError(
            f"reweight must be None, linattn.Cosine or linattn.LRPE, got {type(call.reweight).__name__}"
        )
    if not call.causal:
        for name in ("initial_state", "slots"):
            if getattr(call, name) is not None:
                raise OptionError(f"{name} needs causal=True: without an order of tokens there is no state")
        if call.return_state:
            raise OptionError("return_state needs causal=True: without an order of tokens there is no state")
    if isinstance(call.reweight, Cosine) and call.reweight.max_len is None:
        given = [name for name in ("initial_state", "cu_seqlens") if getattr(call, name) is not None]
        given += ["return_state"] if call.return_state else []
        if given:
            raise OptionError(
                f"Cosine() takes max_len from the length of the call, so it cannot be used with {given[0]}: "
                "outputs would depend on how the text was cut. Give Cosine(max_len)."
            )
    if call.slots is not None and call.initial_state is None:
        raise OptionError("slots needs initial_state: the pool whose rows the slots name")
    if call.cu_seqlens is not None and call.lengths is not None:
        raise OptionError("give lengths (padded sequences) or cu_seqlens (packed ones), not both")


def _check_arrays(call: Call) -> None:
    """q, k, v: kind, rank, dtype, device, and the lengths that must agree."""
    for name in ("q", "k", "v"):
        x = getattr(call, name)
        if kind_of(x) is None:
            raise ArgumentTypeError(
                f"{name} must be a NumPy, torch or CuPy array, got {type(x).__module__}.{type(x).__name__}"
            )
        check_dense(name, x)
    q, k, v = call.q, call.k, call.v
    check_one_kind(q, k, v)
    for name in ("q", "k", "v"):
        if getattr(call, name).ndim != 4:
            letter = {"q": "N, H, D", "k": "M, H, D", "v": "M, H, E"}[name]
            raise ShapeError(f"{name} must have shape [B, {letter}], got {tuple(getattr(call, name).shape)}")
    dtypes = [dtype_name(x) for x in (q, k, v)]
    if dtypes[0] not in FLOATS or len(set(dtypes)) > 1:
        raise DtypeError(f"q, k and v must share one dtype of {', '.join(FLOATS)}, got {', '.join(dtypes)}")
    devices = [device_name(x) for x in (q, k, v)]
    if len(set(devices)) > 1:
        raise DeviceError(f"q, k and v must be on one device, got {', '.join(devices)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ShapeError(f"q [B, N, H, D] and k [B, M, H, D] must share B and D, got {_shapes(q, k)}")
    if q.shape[2] != k.shape[2]:
        raise ShapeError(
            f"q and k must have the same number of heads, got {_shapes(q, k)}"
            + (
                "; grouped heads are not offered yet: repeat k and v along H"
                if k.shape[2] == v.shape[2]
                else ""
            )
        )
    if tuple(k.shape[:3]) != tuple(v.shape[:3]):
        raise ShapeError(f"k [B, M, H, D] and v [B, M, H, E] must share B, M and H, got {_shapes(k, v)}")
    if call.causal and q.shape[1] != k.shape[1]:
        raise ShapeError(
            f"a causal call needs q and k of one length, got {_shapes(q, k)}; pass causal=False to cross"
        )
    for name, size in (("H", q.shape[2]), ("D", q.shape[3]), ("E", v.shape[3])):
        if size == 0:
            raise ShapeError(f"{name} must be at least 1, got {_shapes(q, k, v)}")


def check_one_kind(q: Array, k: Array, v: Array) -> None:
    """Refuse a mixture of NumPy, torch and CuPy."""
    kinds = [kind_of(x) for x in (q, k, v)]
    if len(set(kinds)) > 1:
        raise ArgumentTypeError(f"q, k and v must be one kind of array, got {', '.join(map(str, kinds))}")


def _shapes(*arrays: Array) -> str:
    return " and ".join(str(tuple(x.shape)) for x in arrays)


def _beside(q: Array, name: str, x: Any, dtypes: tuple[str, ...], *, tables: bool = False) -> None:
    """An auxiliary array: the kind and device of q (or a NumPy table), and one of these dtypes."""
    if kind_of(x) is None:
        raise ArgumentTypeError(f"{name} must be an array, got {type(x).__name__}")
    check_dense(name, x)
    if not (tables and isinstance(x, np.ndarray)):
        if kind_of(x) != kind_of(q):
            raise ArgumentTypeError(f"{name} must be a {kind_of(q)} array as q is, got {kind_of(x)}")
        if device_name(x) != device_name(q):
            raise DeviceError(f"{name} must be on {device_name(q)} as q is, got {device_name(x)}")
    if dtype_name(x) not in dtypes:
        raise DtypeError(f"{name} must be {' or '.join(dtypes)}, got {dtype_name(x)}")


WIDE = ("float32", "float64")
SMALLEST = {"float32": 2.0**-126, "float64": 2.0**-1022}  # the smallest normal numbers
INTEGERS = ("int64", "int32")


def check_ends(q: Array, key_mask: Any, lengths: Any, shape: tuple[int, int]) -> None:
    """What says which keys [B, M] count, beside q, but for its values. Raises what `attention` raises."""
    if key_mask is not None:
        _beside(q, "key_mask", key_mask, ("bool",))
        if tuple(key_mask.shape) != shape:
            raise ShapeError(f"key_mask must have shape [B, M] = {shape}, got {tuple(key_mask.shape)}")
    if lengths is not None:
        _beside(q, "lengths", lengths, INTEGERS)
        if tuple(lengths.shape) != shape[:1]:
            raise ShapeError(f"lengths must have shape [B] = {shape[:1]}, got {tuple(lengths.shape)}")


def _check_auxiliary(call: Call) -> None:
    b, n, h, d = call.q.shape
    m = call.k.shape[1]
    if call.log_decay is not None:
        _beside(call.q, "log_decay", call.log_decay, WIDE, tables=True)
        shape = tuple(call.log_decay.shape)
        if shape not in ((h,), (b, n, h)):
            raise ShapeError(
                f"log_decay must have shape [H] = ({h},) or [B, N, H] = {(b, n, h)}, got {shape}"
            )
        if len(shape) == 3 and not call.causal:
            raise OptionError("log_decay per token needs causal=True; without it, decay is per head [H]")
    if call.theta is not None:
        _beside(call.q, "theta", call.theta, WIDE, tables=True)
        if tuple(call.theta.shape) != (h, d):
            raise ShapeError(f"theta must have shape [H, D] = {(h, d)}, got {tuple(call.theta.shape)}")
    check_ends(call.q, call.key_mask, call.lengths, (b, m))
    if call.lengths is not None and n != m:
        raise OptionError("lengths needs q and k of one length; in a cross call mask the keys with key_mask")
    if call.cu_seqlens is not None:
        _beside(call.q, "cu_seqlens", call.cu_seqlens, INTEGERS)
        if call.cu_seqlens.ndim != 1 or call.cu_seqlens.shape[0] < 1:
            raise ShapeError(f"cu_seqlens must have shape [S + 1], got {tuple(call.cu_seqlens.shape)}")
        if b != 1:
            raise ShapeError(f"cu_seqlens packs sequences along N, so B must be 1, got {b}")
        if n != m:
            raise OptionError(
                "packed cross attention is not offered yet: with cu_seqlens q and k need one length"
            )


def sequences_of(call: Call) -> int:
    """The number of states: packed sequences, or rows of the batch."""
    # no int(): a compiler that leaves the batch open would fix it here
    count: int = call.q.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    return count


def _check_state(call: Call, state: State, pool: bool) -> None:
    rows = None if pool else sequences_of(call)
    h, d = call.q.shape[2:]
    check_state(
        state, call.q, (rows, h, d, call.v.shape[3]), reweight=reweight_name(call.reweight),
        feature_map=call.feature_map, normalize=call.normalize,
    )  # fmt: skip


def check_state(
    state: State,
    q: Array,
    sizes: tuple[int | None, int, int, int],
    *,
    reweight: str | None,
    feature_map: str | None,
    normalize: bool,
) -> None:
    """Refuse a state that does not go with queries like q, with S, H, D and E (S is None of a pool)."""
    check_parts(state, "initial_state")
    if kind_of(state.kv) != kind_of(q):
        raise ArgumentTypeError(
            f"initial_state must hold {kind_of(q)} arrays as q is, got {kind_of(state.kv)}"
        )
    if device_name(state.kv) != device_name(q):
        raise DeviceError(f"initial_state must be on {device_name(q)} as q is, got {device_name(state.kv)}")
    wanted = accumulate_dtype(dtype_name(q))
    if dtype_name(state.kv) != wanted or (state.z is not None and dtype_name(state.z) != wanted):
        raise DtypeError(
            f"initial_state must be {wanted} for {dtype_name(q)} calls, got {dtype_name(state.kv)}"
        )
    rows, h, d, e = sizes
    shape = (state.kv.shape[0] if rows is None else rows, h, d if reweight is None else 2 * d, e)
    if tuple(state.kv.shape) != shape:
        raise StateError(
            f"initial_state.kv must have shape [S, H, F, E] = {shape}, got {tuple(state.kv.shape)}"
        )
    if normalize and state.z is None:
        raise StateError(
            "initial_state has no z, but normalize=True needs it: it comes from a call that did not normalize"
        )
    if not normalize and state.z is not None:
        raise StateError("initial_state has z, but normalize=False: it comes from a call that did normalize")
    check_recorded(state, "initial_state", feature_map, reweight, d)


def _check_slots(call: Call) -> None:
    _beside(call.q, "slots", call.slots, INTEGERS)
    assert call.slots is not None
    if tuple(call.slots.shape) != (sequences_of(call),):
        raise ShapeError(
            f"slots must have shape [S] = ({sequences_of(call)},), got {tuple(call.slots.shape)}"
        )


def _strides(x: Array) -> tuple[int, ...]:
    if kind_of(x) == "torch":
        return tuple(x.stride())
    return tuple(s // x.itemsize for s in x.strides)


def problem_of(call: Call, *, needs_grad: bool = False) -> Problem:
    """Check everything about a call that needs no data; raise the first refusal, or return its facts."""
    check_options(call)
    _check_arrays(call)
    _check_auxiliary(call)
    if call.initial_state is not None:
        _check_state(call, call.initial_state, pool=call.slots is not None)
    if call.slots is not None:
        _check_slots(call)
        if needs_grad:
            raise OptionError(
                "slots writes states in place, for inference: use torch.no_grad(), or initial_state alone"
            )
    smallest = SMALLEST[accumulate_dtype(dtype_name(call.q))]
    if call.normalize and call.eps < smallest:
        raise ValueRangeError(
            f"eps must be at least {smallest:.3g} for {dtype_name(call.q)}, got {call.eps!r}"
        )
    b, n, h, d = call.q.shape
    longest = max(n, call.k.shape[1])
    if isinstance(call.reweight, Cosine) and call.cu_seqlens is None and call.lengths is None:
        limit = call.reweight.max_len
        if limit is not None and longest > limit:
            raise ValueRangeError(f"Cosine(max_len={limit}) is shorter than the call's {longest} positions")
    return Problem(
        kind=kind_of(call.q) or "numpy",
        device=device_name(call.q),
        dtype=dtype_name(call.q),
        batch=b,
        n=n,
        m=call.k.shape[1],
        heads=h,
        d=d,
        e=call.v.shape[3],
        sequences=sequences_of(call),
        decay=None if call.log_decay is None else ("head" if call.log_decay.ndim == 1 else "token"),
        reweight=reweight_name(call.reweight),
        max_len=call.max_len,
        feature_map=call.feature_map,
        normalize=bool(call.normalize),
        eps=float(call.eps),
        causal=bool(call.causal),
        scale=float(call.scale),
        key_mask=call.key_mask is not None,
        lengths=call.lengths is not None,
        packed=call.cu_seqlens is not None,
        initial_state=call.initial_state is not None,
        return_state=bool(call.return_state),
        slots=call.slots is not None,
        precision=call.precision,
        batch_invariant=bool(call.batch_invariant),
        needs_grad=needs_grad,
        strides=(_strides(call.q), _strides(call.k), _strides(call.v)),
    )
