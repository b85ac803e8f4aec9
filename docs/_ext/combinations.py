"""What each backend supports, and which options go together, asked of the library itself; Markdown tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

import linattn
from linattn import registry
from linattn.backends import Backend
from linattn.cli.explain import describe
from linattn.errors import LinattnError

GPU = ("triton", "cupy")
NAMES = ("triton", "cupy", "torch", "numpy", "reference")
PLAIN = describe((2, 8, 3, 4), value_dim=5)
# what a row is called -> the calls that a "yes" there promises
ROWS: dict[str, list[dict[str, Any]]] = {
    "causal; not causal; cross lengths": [{}, {"causal": False}, {"causal": False, "m": 12}],
    "decay per head, per token": [{"decay": "head"}, {"decay": "head", "causal": False}, {"decay": "token"}],
    "`Cosine`, `LRPE`": [{"reweight": "cosine", "max_len": 64}, {"reweight": "lrpe"}],
    "relu, silu, elu+1; normalize": [
        {"feature_map": name, "normalize": normalize}
        for name in ("relu", "silu", "elu+1")
        for normalize in (False, True)
    ],
    "key_mask, lengths, cu_seqlens": [
        {"key_mask": True},
        {"lengths": True},
        {"packed": True, "batch": 1, "n": 16, "m": 16},
    ],
    "initial and final state, slots": [
        {"initial_state": True, "return_state": True},
        {"initial_state": True, "slots": True},
    ],
    "float64, float32, float16": [{"dtype": "float64"}, {}, {"dtype": "float16"}],
    "bfloat16 (NumPy: by ml_dtypes)": [{"dtype": "bfloat16"}],
    "gradients": [{"needs_grad": True, "decay": "head", "reweight": "lrpe"}],
}
WIDTHS = (64, 128, 256, 512, 1024)
DTYPES = ("bfloat16", "float16", "float32", "float64")
OPTIONS = (
    "causal=False",
    "log_decay [H]",
    "log_decay [B, N, H]",
    "Cosine()",
    "Cosine(max_len)",
    "LRPE(theta)",
    "feature_map",
    "normalize",
    "key_mask",
    "lengths",
    "cu_seqlens",
    "return_state",
    "initial_state",
    "slots",
)


def _backends() -> list[Backend]:
    return [backend for backend in registry.known().values() if backend.name in NAMES]


def _refusals(backend: Backend, calls: list[dict[str, Any]]) -> list[str | None]:
    where: dict[str, Any] = {
        "kind": next(iter(backend.arrays)),
        "device": "cuda:0" if backend.name in GPU else "cpu",
    }
    return [backend.unsupported(replace(PLAIN, **where, **call)) for call in calls]


def table() -> str:
    """Return the README's table: a row of options, a column for each backend."""
    backends = _backends()
    lines = ["| | " + " | ".join(f"`{backend.name}`" for backend in backends) + " |"]
    lines.append("|---" * (1 + len(backends)) + "|")
    kinds = [
        ", ".join(kind if automatic else f"{kind}, when named" for kind, automatic in backend.arrays.items())
        + (" on CUDA" if backend.name in GPU else "")
        for backend in backends
    ]
    lines.append("| arrays | " + " | ".join(kinds) + " |")
    for row, calls in ROWS.items():
        answers = [_refusals(backend, calls) for backend in backends]
        words = ["no" if all(each) else "some" if any(each) else "yes" for each in answers]
        lines.append(f"| {row} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def widths() -> str:
    """Return the largest D = E of `WIDTHS` by dtype, and each backend's words for refusing more."""
    backends = _backends()
    lines = ["| D = E up to | " + " | ".join(f"`{backend.name}`" for backend in backends) + " |"]
    lines.append("|---" * (1 + len(backends)) + "|")
    said: dict[str, str] = {}
    for dtype in DTYPES:
        cells = []
        for backend in backends:
            refusals = _refusals(backend, [{"dtype": dtype, "d": width, "e": width} for width in WIDTHS])
            taken = [width for width, why in zip(WIDTHS, refusals, strict=True) if why is None]
            first = next((why for why in refusals if why), None)
            cells.append(
                "none" if not taken else f"{WIDTHS[-1]} at least" if first is None else str(taken[-1])
            )
            if first:
                said.setdefault(f"`{backend.name}`, {dtype}", first)
        lines.append(f"| {dtype} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {where}: *{sentence}*" for where, sentence in said.items())])


def _call(option: str) -> dict[str, Any]:
    """The keywords of an option, for q, k and v of shape [1, 6, 2, 4]."""
    pool = linattn.State(np.zeros((1, 2, 4, 4)), None, np.zeros(1, np.int64))
    calls: dict[str, dict[str, Any]] = {
        "causal=False": {"causal": False},
        "log_decay [H]": {"log_decay": np.full(2, -0.1)},
        "log_decay [B, N, H]": {"log_decay": np.full((1, 6, 2), -0.1)},
        "Cosine()": {"reweight": linattn.Cosine()},
        "Cosine(max_len)": {"reweight": linattn.Cosine(64)},
        "LRPE(theta)": {"reweight": linattn.LRPE(np.ones((2, 4)))},
        "feature_map": {"feature_map": "relu"},
        "normalize": {"normalize": True},
        "key_mask": {"key_mask": np.ones((1, 6), bool)},
        "lengths": {"lengths": np.array([4])},
        "cu_seqlens": {"cu_seqlens": np.array([0, 6])},
        "return_state": {"return_state": True},
        "initial_state": {"initial_state": pool},
        "slots": {"initial_state": pool, "slots": np.array([0])},
    }
    return calls[option]


def _pair(first: str, second: str) -> str | None:
    """The sentence with which a call of two options is refused; None if it is computed."""
    call = {**_call(first), **_call(second)}
    if "initial_state" in call:  # one that fits the other option
        like = np.zeros(0)
        fitting = {name: call[name] for name in ("reweight", "feature_map", "normalize") if name in call}
        call["initial_state"] = linattn.State.zeros(like, 1, 2, 4, 4, **fitting)
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 6, 2, 4))
    try:
        linattn.attention(q, k, v, **call)
    except LinattnError as error:
        return str(error)
    return None


def refused_pairs() -> Iterator[tuple[str, str, str]]:
    """Each pair of options that a call refuses whatever the backend, with its sentence."""
    for first, second in itertools.combinations(OPTIONS, 2):
        exclusive = first.partition("(")[0].partition(" ")[0] == second.partition("(")[0].partition(" ")[0]
        if exclusive or {"Cosine", "LRPE"} == {first.partition("(")[0], second.partition("(")[0]}:
            continue  # two values of one argument
        if (why := _pair(first, second)) is not None:
            yield first, second, why


def pairs() -> str:
    """Return a table of the pairs of options that a call refuses."""
    lines = ["| | | refused with |", "|---|---|---|"]
    lines += [f"| `{first}` | `{second}` | {why} |" for first, second, why in refused_pairs()]
    return "\n".join(lines)
