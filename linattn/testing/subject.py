"""What is under test: a backend or a stranger's kernel, behind one small set of calls on native arrays."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from linattn.arrays import Array
from linattn.errors import UnsupportedError
from linattn.testing import arrays
from linattn.testing.case import Case, Inputs
from linattn.testing.compare import Mismatch, NotOffered, assert_equal
from linattn.tolerance import UPDATE_EVERY, Rounding

Natives = dict[str, Any]

LETTERS = {"o": "b n h e", "kv": "s h f e", "z": "s h f", "length": "s"}


@dataclass
class Result:
    """What a call returned, as it came."""

    o: Any
    kv: Any = None
    z: Any = None
    length: Any = None

    def read(self) -> dict[str, Array]:
        """The parts that exist, as NumPy."""
        parts = {"o": self.o, "kv": self.kv, "z": self.z, "length": self.length}
        return {name: arrays.back(x) for name, x in parts.items() if x is not None}

    def read_state(self) -> dict[str, Array]:
        """The same without o."""
        return {name: value for name, value in self.read().items() if name != "o"}


@runtime_checkable
class Subject(Protocol):
    """What the properties need. `Kernel` and `BackendSubject` are the two there are.

    name: as it is reported. kind, device: of its arrays. reach: the longest call that is worth its time.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def reach(self) -> int: ...

    def expression(self) -> tuple[str, str]:
        """Python that makes this subject again: what to import first, and the expression."""

    def axes(self) -> dict[str, tuple[Any, ...]]:
        """What it offers on each axis of `linattn.testing.variants.AXES`."""

    def missing(self, case: Case, *needs: str) -> str | None:
        """Why it does not offer this case with these needs (state, gradients, decode, slots, pool, merge), or
        None.
        """

    def adapt(self, case: Case) -> Case:
        """The case with what the subject decides for itself (a built-in scale, its only eps)."""

    def run(self, x: Inputs, given: Natives, *, return_state: bool = False, slots: Any = None) -> Result:
        """One call of attention; `slots` continues rows of a pool, which is given as the initial state."""

    def vjp(self, x: Inputs, given: Natives, do: Any, dstate: tuple[Any, Any] | None) -> dict[str, Any]:
        """Gradients by name, as arrays; initial_state's as (kv, z)."""

    def decode(self, x: Inputs, given: Natives, slots: Any = None) -> Any:
        """One token for each row: q, k [b h d], v [b h e]; changes given's kv, z and length in place;
        returns o.
        """

    def merge(self, x: Inputs, left: Result, right: Result, total_log_decay: Any) -> Result:
        """Merge two states."""


def subject(target: Any) -> Subject:
    """The subject behind a backend's name, a Backend, a Kernel, or a Subject."""
    if isinstance(target, Subject):
        return target
    return BackendSubject(target)


def natives(of: Subject, x: Inputs, layout: str | None = None) -> tuple[Natives, dict[str, Any]]:
    """The arrays of a call as the subject takes them, and the buffers that they are views of."""
    case = x.case
    layout = case.layout if layout is None else layout
    kv, z, length = x.state if x.state is not None else (None, None, None)
    wanted = {
        "q": (x.q, case.dtype),
        "k": (x.k, case.dtype),
        "v": (x.v, case.dtype),
        "log_decay": (x.log_decay, case.accumulate),
        "theta": (x.theta, case.accumulate),
        "key_mask": (x.key_mask, ""),
        "lengths": (x.lengths, ""),
        "cu_seqlens": (x.cu_seqlens, ""),
        "kv": (kv, case.accumulate),
        "z": (z, case.accumulate),
        "length": (length, ""),
    }
    placed = {
        name: arrays.place(value, of.kind, dtype, of.device, layout)
        for name, (value, dtype) in wanted.items()
        if value is not None
    }
    return {name: p.array for name, p in placed.items()}, {name: p.buffer for name, p in placed.items()}


def call(of: Subject, x: Inputs, *, return_state: bool = False) -> dict[str, Array]:
    """Run on converted copies of the inputs; the result's parts as NumPy."""
    given, _ = natives(of, x)
    return of.run(x, given, return_state=return_state).read()


def require(of: Subject, case: Case, *needs: str) -> Case:
    """The case as the subject has it; raises NotOffered with the subject's own sentence."""
    reason = of.missing(case, *needs)
    if reason is not None:
        raise NotOffered(reason)
    return of.adapt(case)


def rounding(of: Subject, case: Case, *, decode: bool = False) -> Rounding:
    """What the subject rounds: on a GPU the operands of half-precision dots stay in their own format, and so
    they do where a subject says that it is `narrow`.
    """
    half = case.dtype in ("float16", "bfloat16") and getattr(of, "narrow", of.device != "cpu")
    every = 1 if decode else getattr(of, "update_every", UPDATE_EVERY)
    return Rounding(case.dtype, case.precision, case.dtype if half else None, every)


class BackendSubject:
    """A backend, by its name or as an object, through the public functions of linattn."""

    def __init__(self, backend: Any, kind: str | None = None, device: str | None = None) -> None:
        from linattn import registry

        self.backend = backend
        known = registry.get(backend) if isinstance(backend, str) else backend
        self.name: str = known.name
        self.kind = kind or next((k for k in known.arrays if k != "cupy"), "cupy")
        self.device = device or ("cuda" if self.kind == "cupy" or self.name == "triton" else "cpu")
        self.reach = 200 if self.name == "reference" else 20000

    def expression(self) -> tuple[str, str]:
        usual = BackendSubject(self.backend)
        if (self.kind, self.device) == (usual.kind, usual.device):
            return "", repr(self.name)
        return "", f"testing.BackendSubject({self.name!r}, kind={self.kind!r}, device={self.device!r})"

    def axes(self) -> dict[str, tuple[Any, ...]]:
        return {"dtype": arrays.dtypes(self.kind)}

    def adapt(self, case: Case) -> Case:
        return case

    def missing(self, case: Case, *needs: str) -> str | None:
        if case.dtype not in arrays.dtypes(self.kind):
            return f"{self.kind} has no {case.dtype}"
        return _refusal(
            self, case.replace(n=min(case.n, 3), m=None if case.m is None else min(case.m, 3)), needs
        )

    def _keywords(self, x: Inputs, given: Mapping[str, Any]) -> Natives:
        import linattn

        case = x.case
        reweight: Any = None
        if case.reweight == "cosine":
            reweight = linattn.Cosine(x.max_len)
        elif case.reweight == "lrpe":
            reweight = linattn.LRPE(given["theta"])
        return {
            "log_decay": given.get("log_decay"),
            "reweight": reweight,
            "feature_map": case.feature_map,
            "normalize": case.normalize,
            "eps": case.eps,
            "scale": case.scale,
            "backend": self.backend,
        }

    def _all(self, x: Inputs, given: Mapping[str, Any]) -> Natives:
        keywords = self._keywords(x, given) | {"causal": x.case.causal, "precision": x.case.precision}
        return keywords | {
            "key_mask": given.get("key_mask"),
            "lengths": given.get("lengths"),
            "cu_seqlens": given.get("cu_seqlens"),
            "initial_state": self._state(given) if "kv" in given else None,
        }

    @staticmethod
    def _state(given: Mapping[str, Any]) -> Any:
        import linattn

        return linattn.State(given["kv"], given.get("z"), given["length"])

    def explain(self, x: Inputs, given: Natives, *, return_state: bool = False) -> Any:
        """The library's own word on whether the backend takes this call."""
        import linattn

        keywords = self._all(x, given) | {"return_state": return_state}
        return linattn.explain(given["q"], given["k"], given["v"], **keywords)

    def run(self, x: Inputs, given: Natives, *, return_state: bool = False, slots: Any = None) -> Result:
        import linattn

        keywords = self._all(x, given) | {"return_state": return_state}
        if slots is not None:
            keywords["slots"] = slots
        out = linattn.attention(given["q"], given["k"], given["v"], **keywords)
        if not return_state:
            return Result(out)
        return Result(out[0], out[1].kv, out[1].z, out[1].length)

    def vjp(self, x: Inputs, given: Natives, do: Any, dstate: tuple[Any, Any] | None) -> dict[str, Any]:
        import linattn

        if self.kind == "torch":
            return autograd(
                lambda leaves: self.run(x, leaves, return_state=dstate is not None), given, do, dstate
            )
        keywords = self._all(x, given) | {"return_state": dstate is not None}
        out, vjp = linattn.attention_vjp(given["q"], given["k"], given["v"], **keywords)
        last = None
        if dstate is not None:
            last = linattn.State(dstate[0], dstate[1], out[1].length)
        grads: dict[str, Any] = dict(vjp(do, last))
        start = grads.get("initial_state")
        if start is not None:
            grads["initial_state"] = (start.kv, start.z)
        return grads

    def decode(self, x: Inputs, given: Natives, slots: Any = None) -> Any:
        import linattn

        keywords = self._keywords(x, given) | ({} if slots is None else {"slots": slots})
        state = self._state(given)
        return linattn.decode_step(given["q"], given["k"], given["v"], state, **keywords)

    def merge(self, x: Inputs, left: Result, right: Result, total_log_decay: Any) -> Result:
        import linattn

        given = natives(self, x)[0]
        reweight = self._keywords(x, given)["reweight"]
        states = [linattn.State(part.kv, part.z, part.length) for part in (left, right)]
        head = given.get("log_decay") if x.case.decay == "head" else None
        out = linattn.merge_states(
            *states, log_decay=head, total_log_decay=total_log_decay, reweight=reweight
        )
        return Result(None, out.kv, out.z, out.length)


def autograd(run: Any, given: Natives, do: Any, dstate: tuple[Any, Any] | None) -> dict[str, Any]:
    """Gradients of a torch callable from natives to a Result, by torch's own autograd."""
    torch = arrays.namespace("torch")
    names = [name for name in ("q", "k", "v", "log_decay", "theta", "kv", "z") if name in given]
    leaves = {name: given[name].detach().requires_grad_() for name in names}
    result = run(given | leaves)
    pairs = (
        [(result.o, do)]
        if dstate is None
        else [(result.o, do), (result.kv, dstate[0]), (result.z, dstate[1])]
    )
    kept = [(out, grad) for out, grad in pairs if out is not None and grad is not None and out.requires_grad]
    inputs = list(leaves.values())
    found = torch.autograd.grad(
        [out for out, _ in kept], inputs, [grad for _, grad in kept], allow_unused=True
    )
    filled = (torch.zeros_like(leaf) if g is None else g for leaf, g in zip(inputs, found, strict=True))
    grads = dict(zip(names, filled, strict=True))
    if "kv" in grads:
        grads["initial_state"] = (grads.pop("kv"), grads.pop("z", None))
    return grads


@functools.lru_cache(maxsize=4096)
def _sentence(backend: Any, kind: str, device: str, case: Case, needs: tuple[str, ...]) -> str | None:
    """Ask before any work is done; where the answer is a refusal, the call must raise that very sentence."""
    probe = BackendSubject(backend, kind, device)
    x = case.inputs()
    given, _ = natives(probe, x)
    reason: str | None = probe.explain(x, given, return_state="state" in needs).reasons[probe.name]
    if reason is None:
        return None
    try:
        probe.run(x, given, return_state="state" in needs)
    except UnsupportedError as error:
        assert_equal(f"the refusal of {case!r}", error.reasons.get(probe.name), reason)
        return reason
    raise Mismatch(f"{probe.name} says of {case!r} that it {reason}, but runs it")


def _refusal(of: BackendSubject, case: Case, needs: tuple[str, ...]) -> str | None:
    """The sentence with which a backend refuses a small call of this kind, as its callers would get it."""
    plain = case.replace(seed=0, values=1.0, rates=(0.1,), layout="plain", batch=1, heads=1)
    return _sentence(of.backend, of.kind, of.device, plain.replace(n=plain.n and 2), needs)
