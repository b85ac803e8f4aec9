"""What a backend is, what it gets and returns, and which ones come with the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from linattn.arrays import Array
from linattn.problem import Problem
from linattn.state import State

# Modules whose `backend` object is built in, in the order in which "auto" prefers them.
BUILTIN = (
    "linattn.backends.triton",
    "linattn.backends.cupy",
    "linattn.backends.torch",
    "linattn.backends.numpy",
    "linattn.backends.reference",
)


@dataclass(frozen=True)
class Saved:
    """The arrays of a call, in the shapes of `Backend.forward`; a backward pass gets them back, with the
    output.
    """

    q: Array
    k: Array
    v: Array
    log_decay: Array | None = None
    theta: Array | None = None
    key_mask: Array | None = None
    lengths: Array | None = None
    cu_seqlens: Array | None = None
    state: State | None = None
    o: Array | None = None  # only for a backward pass, and only with normalize
    want_log_decay: bool = True  # False: its gradient may be left out
    want_theta: bool = True
    kept: Array | None = None  # sums of weights [B, N, H], as `Keeping.forward_keeping` returns them


class Inputs(NamedTuple):
    """The arrays of a forward pass, in the shapes of `Backend.forward`: `Saved`, which costs microseconds to
    fill, without what it lacks.
    """

    q: Array
    k: Array
    v: Array
    log_decay: Array | None
    theta: Array | None
    key_mask: Array | None
    lengths: Array | None
    cu_seqlens: Array | None
    state: State | None


@dataclass(frozen=True)
class Gradients:
    """Gradients of the inputs, in their shapes; None for what the call does not have.

    q, k, v have the dtype of the inputs, the others the accumulation dtype.
    """

    q: Array
    k: Array
    v: Array
    log_decay: Array | None = None
    theta: Array | None = None
    kv: Array | None = None
    z: Array | None = None


@runtime_checkable
class Backend(Protocol):
    """One implementation of the specification.

    name: what users write. arrays: the kinds it takes ("numpy", "torch", "cupy"), each with True if "auto"
    may choose it for them, False if it wants to be named. More methods are optional, above all
    `Differentiable.backward` and `Decoding.decode_step`. Without them the built-in backend for the same
    arrays differentiates, and `forward` over one token decodes.
    """

    name: str
    arrays: Mapping[str, bool]

    def unavailable(self) -> str | None:
        """None if this machine can run it, else the sentence that says why not."""

    def unsupported(self, problem: Problem) -> str | None:
        """None if it takes this call, else the sentence that says why not; reads nothing but the problem."""

    def forward(
        self,
        problem: Problem,
        q: Array,
        k: Array,
        v: Array,
        log_decay: Array | None,
        theta: Array | None,
        key_mask: Array | None,
        lengths: Array | None,
        cu_seqlens: Array | None,
        state: State | None,
    ) -> tuple[Array, State | None]:
        """The work. q, k [B, N, H, D], v [B, N, H, E] -> o [B, N, H, E], and the final state if it is asked
        for.

        log_decay [H] or [B, N, H] and theta [H, D] are in the accumulation dtype, beside q. The state has one
        row per sequence; it is not changed. `problem.slots` is handled by the caller.
        """


@runtime_checkable
class Differentiable(Protocol):
    """A backend that brings its own backward pass."""

    def backward(self, problem: Problem, saved: Saved, do: Array, dstate: State | None) -> Gradients:
        """Gradients of every input, from those of o [B, N, H, E] and of the returned state (None: zeros)."""


@runtime_checkable
class Keeping(Protocol):
    """A `Differentiable` backend whose forward pass keeps denominators for its backward pass."""

    def forward_keeping(self, problem: Problem, saved: Saved) -> tuple[Array, State | None, Array]:
        """`forward` of a normalized call, and its row sums of weights [B, N, H]: scaled, not clamped, in the
        accumulation dtype. Calls that compilers see do not come here: they form the sums again.
        """


@runtime_checkable
class Decoding(Protocol):
    """A backend that brings its own decode step."""

    def decode_step(
        self,
        problem: Problem,
        q: Array,
        k: Array,
        v: Array,
        log_decay: Array | None,
        theta: Array | None,
        state: State,
        slots: Array | None,
    ) -> Array:
        """q, k [B, H, D], v [B, H, E], log_decay [H] or [B, H] -> o [B, H, E]; changes `state` in place."""


@runtime_checkable
class Pooling(Protocol):
    """A backend that works on rows of a pool of states in place, without gathering them first."""

    def forward_in_pool(self, problem: Problem, saved: Saved, slots: Array) -> Array:
        """o; `saved.state` is the pool, without gaps; sequence s works on its row slots[s] (-1: padding).

        slots: [S] int64.
        """
