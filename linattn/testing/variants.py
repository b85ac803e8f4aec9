"""Which combinations of options to try: named variants, and rows that cover every pair."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Options = dict[str, Any]

AXES: dict[str, tuple[Any, ...]] = {
    "causal": (True, False),
    "decay": (None, "head", "token"),
    "reweight": (None, "cosine", "lrpe"),
    "feature_map": (None, "relu", "silu", "elu+1"),
    "normalize": (False, True),
    "key_mask": (False, True),
    "borders": (None, "lengths", "packed"),
    "state": (False, True),
    "scale": (1.0, -0.37),
    "dtype": ("float32", "float64", "float16", "bfloat16"),
}
"""Every option of a call that changes what is computed; "borders" stands for lengths and cu_seqlens, never
both.
"""

VARIANTS: dict[str, Options] = {
    "plain": {
        "causal": True,
        "decay": None,
        "reweight": None,
        "feature_map": None,
        "normalize": False,
        "scale": 1.0,
    },
    "lightning": {
        "causal": True,
        "decay": "head",
        "reweight": None,
        "feature_map": None,
        "normalize": False,
        "scale": 1.0,
    },
    "gla": {
        "causal": True,
        "decay": "token",
        "reweight": None,
        "feature_map": None,
        "normalize": False,
        "scale": 1.0,
    },
    "cosformer": {
        "causal": False,
        "decay": None,
        "reweight": "cosine",
        "feature_map": "relu",
        "normalize": True,
        "scale": 1.0,
    },
    "cosformer-causal": {
        "causal": True,
        "decay": None,
        "reweight": "cosine",
        "feature_map": "relu",
        "normalize": True,
        "scale": 1.0,
    },
    "lrpe": {
        "causal": True,
        "decay": "head",
        "reweight": "lrpe",
        "feature_map": "silu",
        "normalize": False,
        "scale": 1.0,
    },
    "elu": {
        "causal": True,
        "decay": None,
        "reweight": None,
        "feature_map": "elu+1",
        "normalize": True,
        "scale": 1.0,
    },
    "bidirectional": {"causal": False, "decay": "head", "borders": None, "state": False},
    "packed": {"borders": "packed"},
    "padded": {"borders": "lengths"},
    "masked": {"key_mask": True},
    "continued": {"causal": True, "state": True},
}
"""Names for options that belong together; what a name leaves open is covered pairwise."""


def allowed(options: Mapping[str, Any]) -> bool:
    """Whether the definition (and the formats' range) knows this combination; options not yet chosen are
    ignored.
    """
    known = options.get
    if known("causal") is False and (known("decay") == "token" or known("state")):
        return False
    # a denominator of any sign may be clamped to eps: outputs near 1/eps, outside float16
    signed = "feature_map" in options and known("feature_map") in (None, "silu")
    indefinite = known("normalize") and (signed or known("reweight") == "lrpe" or known("scale", 1.0) < 0)
    return not (indefinite and known("dtype") == "float16")


def combinations(full: bool = False, **fixed: Any) -> list[Options]:
    """Option combinations in which every pair of values meets (or, with `full`, every combination).

    `fixed` holds axes still: a value, or a tuple of values to vary over. Deterministic.
    """
    axes = {name: fixed.get(name, values) for name, values in AXES.items()}
    axes = {name: values if isinstance(values, tuple) else (values,) for name, values in axes.items()}
    if full:
        rows = (dict(zip(axes, row, strict=True)) for row in itertools.product(*axes.values()))
        return [row for row in rows if allowed(row)]
    return _pairwise(axes)


def fields_of(options: Mapping[str, Any]) -> Options:
    """The options as fields of a Case."""
    out = dict(options)
    borders = out.pop("borders", None)
    return out | {"lengths": borders == "lengths", "packed": borders == "packed"}


def _pairwise(axes: Mapping[str, Sequence[Any]]) -> list[Options]:
    """Greedy: each row takes an uncovered pair, then for every other axis the value that covers most."""
    names = list(axes)
    pairs = [
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(axes[a], axes[b])
        if allowed({a: x, b: y})
    ]
    left = dict.fromkeys(pairs)
    rows: list[Options] = []
    while left:
        seed_pair = next(iter(left))
        row = _complete(dict(seed_pair), axes, left)
        if row is None:
            del left[seed_pair]  # no whole row holds this pair
            continue
        for pair in itertools.combinations([(name, row[name]) for name in names], 2):
            left.pop(pair, None)
        rows.append(row)
    return rows or [row for row in [_complete({}, axes, left)] if row is not None]


def _complete(row: Options, axes: Mapping[str, Sequence[Any]], left: Mapping[Any, None]) -> Options | None:
    missing = [name for name in axes if name not in row]
    if not missing:
        return {name: row[name] for name in axes} if allowed(row) else None
    name = missing[0]
    order = list(axes)

    def gain(value: Any) -> int:
        both = (
            sorted([(name, value), (other, row[other])], key=lambda item: order.index(item[0]))
            for other in row
        )
        return sum(tuple(pair) in left for pair in both)

    for value in sorted(axes[name], key=gain, reverse=True):
        if allowed(row | {name: value}):
            whole = _complete(row | {name: value}, axes, left)
            if whole is not None:
                return whole
    return None
