"""A stranger's callable, described so that the suite can call it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from linattn.errors import OptionError
from linattn.testing import arrays
from linattn.testing.case import Case, Inputs
from linattn.testing.subject import Natives, Result, autograd
from linattn.testing.variants import AXES

COMPUTED = ("causal", "feature_map", "normalize")
PASSED = (
    "log_decay",
    "theta",
    "max_len",
    "key_mask",
    "lengths",
    "cu_seqlens",
    "initial_state",
    "return_state",
)


@dataclass(frozen=True, kw_only=True)
class _Defaults:
    layout: str = "bnhd"
    decay: str | None = None
    scale: float | Callable[[int], float] = 1.0
    names: Mapping[str, str] = field(default_factory=dict)
    returns_state: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    arrays: str = "torch"
    device: str = "cpu"
    name: str = ""
    block: int = 16
    reach: int = 20000
    gradients: Callable[..., dict[str, Any]] | bool = True
    decode_step: Callable[..., Any] | None = None
    merge_states: Callable[..., Any] | None = None


@dataclass(frozen=True)
class _Function:
    fn: Callable[..., Any]


@dataclass(frozen=True)
class Kernel(_Defaults, _Function):
    """`fn(q, k, v, **named)`, wrapped for `check_kernel`. What is not claimed here is not offered.

    layout: the order of the axes of q, k, v, o and a per-token decay: "bnhd", or "bhnd" with heads first.
    decay: the unit in which `fn` wants decays: "log" (ln λ, <= 0), "slope" (-ln λ), "factor" (λ), or None.
    scale: what `fn` multiplies weights with by itself: a number, or a function of D.
    names: linattn's keyword -> fn's, for every optional argument that `fn` takes: log_decay (named so by
        default where there is a decay), theta [H, D], max_len, key_mask, lengths, cu_seqlens, initial_state,
        return_state, scale, eps, causal, feature_map, normalize.
    returns_state: `fn` returns (o, state), always or where `return_state` asks. A state is kv [S, H, F, E],
        or (kv, z) where the call is normalised: those of `linattn.State`.
    options: what `fn` computes: a value, or a tuple of values, on each of the axes causal, decay ("head",
        "token"), reweight, feature_map, normalize, dtype. What is left out: causal, no feature map, not
        normalised, float32, one decay per head. What is normalised and does not take eps clamps at 1e-6.
    arguments: passed along with every call. arrays: "torch", "numpy" or "cupy". device: where they live.
    name: "module:object" under which this Kernel can be imported, so that a failing call can be pasted.
    block: tokens between two roundings of a carried state, 1 for a recurrence. Where decays are factors it
        counts as 4 at most: λ itself is rounded, and each token loses that much.
    reach: the longest call that is worth its time.
    gradients: True: torch's autograd; False: none; or `(q, k, v, do, dstate=None, **named) -> dict`.
    decode_step: `(q, k, v, state, slots=None, **options) -> o`, which updates `state`, a dict of kv, z and
        length, in place; a pool may be strided, and rows without a slot (-1) hold NaN. merge_states:
        `(left, right, total_log_decay=None, **options)` on two such dicts, returns one and changes neither.
        Both in linattn's layout and units; options are log_decay, theta, feature_map, normalize, eps, scale.

    Raises OptionError for a description that means nothing.
    """

    def __post_init__(self) -> None:
        """Refuse descriptions that mean nothing."""
        if self.layout not in ("bnhd", "bhnd"):
            raise OptionError(f"Kernel: layout must be 'bnhd' or 'bhnd', got {self.layout!r}")
        if self.decay not in (None, "log", "slope", "factor"):
            raise OptionError(f"Kernel: decay must be 'log', 'slope', 'factor' or None, got {self.decay!r}")
        if self.arrays not in arrays.HALVES:
            raise OptionError(
                f"Kernel: arrays must be one of {', '.join(arrays.HALVES)}, got {self.arrays!r}"
            )
        known = {*PASSED, *COMPUTED, "scale", "eps"}
        if unknown := sorted(set(self.names) - known):
            raise OptionError(
                f"Kernel: names has unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        if unknown := sorted(set(self.options) - set(AXES)):
            raise OptionError(
                f"Kernel: options has unknown keys {', '.join(unknown)}; known: {', '.join(AXES)}"
            )
        if not self.name:
            module, name = getattr(self.fn, "__module__", ""), getattr(self.fn, "__qualname__", repr(self.fn))
            object.__setattr__(self, "name", f"{module}:{name}")

    @property
    def kind(self) -> str:
        return self.arrays

    @property
    def update_every(self) -> int:
        """Tokens between two roundings of a carried state, as `linattn.tolerance` counts them."""
        return min(self.block, 4) if self.decay == "factor" else self.block

    def expression(self) -> tuple[str, str]:
        """Python that finds it again, if `name` is the "module:object" under which it can be imported."""
        module, _, path = self.name.partition(":")
        return (f"; import {module}", f"{module}.{path}") if path else ("", self.name)

    def axes(self) -> dict[str, tuple[Any, ...]]:
        """What is offered on each axis."""
        out: dict[str, tuple[Any, ...]] = {axis: (AXES[axis][0],) for axis in AXES}
        out |= {axis: AXES[axis] for axis in (*COMPUTED, "scale") if axis in self.names}
        out["decay"] = ("head",) if self.decay else (None,)
        angles = [kind for kind, name in (("lrpe", "theta"), ("cosine", "max_len")) if name in self.names]
        out["reweight"] = (None, *angles)
        out["key_mask"] = (False, True) if "key_mask" in self.names else (False,)
        borders = [
            kind for kind, name in (("lengths", "lengths"), ("packed", "cu_seqlens")) if name in self.names
        ]
        out["borders"] = (None, *borders)
        out["state"] = (False, True) if "initial_state" in self.names else (False,)
        return out | {axis: v if isinstance(v, tuple) else (v,) for axis, v in self.options.items()}

    def missing(self, case: Case, *needs: str) -> str | None:
        axes = self.axes()
        borders = "packed" if case.packed else "lengths" if case.lengths else None
        for axis, offered in axes.items():
            value = borders if axis == "borders" else getattr(case, axis)
            if axis != "scale" and value not in offered:
                return f"{axis}={value!r} is not among what it computes, {offered}"
        offers = {
            "state": self.returns_state,
            "gradients": callable(self.gradients) or (self.gradients and self.arrays == "torch"),
            "decode": self.decode_step is not None,
            "slots": self.decode_step is not None,
            "pool": False,
            "merge": self.merge_states is not None and self.returns_state,
        }
        return next((f"it offers no {need}" for need in needs if not offers.get(need, True)), None)

    def adapt(self, case: Case) -> Case:
        """The case with the kernel's own scale and eps."""
        if "eps" not in self.names:
            case = case.replace(eps=1e-6)
        if "scale" in self.names:
            return case
        return case.replace(scale=self.scale(case.d) if callable(self.scale) else self.scale)

    def _heads_first(self, x: Any) -> Any:
        return x.swapaxes(1, 2) if self.layout == "bhnd" else x

    def _decay(self, g: Any) -> Any:
        if g.ndim == 3:
            g = self._heads_first(g)
        if self.decay == "slope":
            return -g
        if self.decay == "factor":
            return arrays.namespace(self.arrays).exp(g)
        return g

    def _named(self, x: Inputs, given: Natives, return_state: bool) -> Natives:
        case = x.case
        values: Natives = {
            name: given[name] for name in ("theta", "key_mask", "lengths", "cu_seqlens") if name in given
        }
        if "log_decay" in given:
            values["log_decay"] = self._decay(given["log_decay"])
        if "kv" in given:
            values["initial_state"] = (given["kv"], given.get("z")) if case.normalize else given["kv"]
        if "return_state" in self.names:
            values["return_state"] = return_state
        if case.reweight == "cosine":
            values["max_len"] = x.max_len
        values |= {name: getattr(case, name) for name in (*COMPUTED, "scale", "eps") if name in self.names}
        names = {"log_decay": "log_decay", **self.names}
        return {names[key]: value for key, value in values.items() if key in names} | dict(self.arguments)

    def run(self, x: Inputs, given: Natives, *, return_state: bool = False, slots: Any = None) -> Result:
        """Call `fn`; its state, if it returns one, split into kv and z."""
        q, k, v = (self._heads_first(given[name]) for name in "qkv")
        out = self.fn(q, k, v, **self._named(x, given, return_state))
        if isinstance(out, tuple):
            o, state = out[0], out[1]
            kv, z = state if isinstance(state, tuple) else (state, None)
            return Result(self._heads_first(o), kv, z) if return_state else Result(self._heads_first(o))
        return Result(self._heads_first(out))

    def vjp(self, x: Inputs, given: Natives, do: Any, dstate: tuple[Any, Any] | None) -> dict[str, Any]:
        """Gradients by torch's autograd, or by the function that was given; in linattn's units."""
        if not callable(self.gradients):
            return autograd(
                lambda leaves: self.run(x, leaves, return_state=dstate is not None), given, do, dstate
            )
        q, k, v = (self._heads_first(given[name]) for name in "qkv")
        named = self._named(x, given, dstate is not None)
        grads = self.gradients(q, k, v, self._heads_first(do), dstate=dstate, **named)
        return {name: self._heads_first(g) if name in ("q", "k", "v") else g for name, g in grads.items()}

    def _linattn(self, x: Inputs, given: Natives) -> Natives:
        case = x.case
        theta = x.options()["theta"]
        if theta is not None:
            theta = arrays.place(theta, self.arrays, "float64", self.device).array
        return {
            "log_decay": given.get("log_decay"),
            "theta": theta,
            "feature_map": case.feature_map,
            "normalize": case.normalize,
            "eps": case.eps,
            "scale": case.scale,
        }

    def decode(self, x: Inputs, given: Natives, slots: Any = None) -> Any:
        """One step of `decode_step`."""
        assert self.decode_step is not None
        state = {name: given.get(name) for name in ("kv", "z", "length")}
        return self.decode_step(
            given["q"], given["k"], given["v"], state, slots=slots, **self._linattn(x, given)
        )

    def merge(self, x: Inputs, left: Result, right: Result, total_log_decay: Any) -> Result:
        """One call of `merge_states`."""
        assert self.merge_states is not None
        from linattn.testing.subject import natives

        states = [{"kv": part.kv, "z": part.z, "length": part.length} for part in (left, right)]
        named = self._linattn(x, natives(self, x)[0])
        out = self.merge_states(*states, total_log_decay=total_log_decay, **named)
        return Result(None, out["kv"], out["z"], out["length"])
