"""Losses of rows of logits and their gradients in float64, what a kernel may be off by, and rows to try."""

from __future__ import annotations

from typing import Any

import torch

from linattn.tolerance import NORMAL, SLACK, SUBNORMAL, UNIT

IGNORED = -100
U = UNIT["float32"]

# The additions that one term of a sum passes through: up to 16 in a thread and 10 between threads on a GPU,
# 16 + 10 in NumPy, and one a block.
DEPTH = 32
# exp(d): d is rounded once, its product with log2(e) twice, and a GPU's power of 2 is off by 2 ulps, 4 U.
POWER = 4
# log: a GPU's logarithm to base 2 is off by 4 U, or 4 U of itself; times ln(2), rounded twice.
LOGARITHM = 6


def given(width: int, dtype: torch.dtype, *, device: str = "cpu", rows: int = 21, seed: int = 0) -> Any:
    """Logits [rows width] of several sizes, and labels: some asked for nothing, some the largest logit."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = torch.tensor([1.0, 0.0, 30.0, 1e-3, 8.0, 300.0], device=device)
    turn = torch.arange(rows, device=device)
    logits = torch.randn(rows, width, generator=generator, device=device) * sizes[turn % 6][:, None]
    logits = logits.to(dtype)
    labels = torch.randint(0, width, (rows,), generator=generator, device=device)
    labels = torch.where(turn % 5 == 1, logits.argmax(1), labels)
    return logits, torch.where(turn % 7 == 3, IGNORED, labels)


def exact(logits: Any, labels: Any) -> tuple[Any, Any]:
    """Each row's loss [n], and the gradient of their sum [n v], in float64."""
    log_p = logits.double().log_softmax(1)
    asked = labels != IGNORED
    own = torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[1]).bool()
    losses = torch.where(asked, -(log_p.masked_fill(~own, 0)).sum(1), 0)
    return losses, torch.where(asked[:, None], log_p.exp() - own.double(), 0)


def allowed(logits: Any, labels: Any, block: int) -> tuple[Any, Any]:
    """How far from `exact` each number may be, where a kernel takes `block` logits at a time."""
    name, x = str(logits.dtype).removeprefix("torch."), logits.double()
    blocks = -(-logits.shape[1] // block)
    far = x.amax(1, keepdim=True) - x  # [n v], >= 0
    p = x.softmax(1)
    # a term of the sum: each block may multiply it by one more exponential, whose exponents add up to `far`
    each = 3 * far + (POWER + 1) * (blocks + 1)
    total = (p * each).sum(1, keepdim=True) + DEPTH + blocks  # [n 1], of the sum, in U of itself
    losses, slopes = exact(logits, labels)
    log_total = (x - x.amax(1, keepdim=True)).logsumexp(1)
    own = far.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    room = U * (total[:, 0] + LOGARITHM * (1 + log_total) + own + losses) + SUBNORMAL["float32"]
    # the reciprocal, two products and a difference; the result is rounded once, or smaller than any number
    inner = U * (p * (3 * far + POWER + total + 6) + abs(slopes)) + NORMAL["float32"]
    return room, inner + (abs(slopes) + inner) * UNIT[name] + SUBNORMAL[name]


def compare(losses: Any, slopes: Any, logits: Any, labels: Any, block: int) -> None:
    """Assert every number within its bound, and nothing at all where nothing is asked."""
    assert losses.dtype == torch.float32 and losses.shape == labels.shape
    for name, got, want, room in zip(
        ("loss", "gradient"),
        (losses, slopes),
        exact(logits, labels),
        allowed(logits, labels, block),
        strict=True,
    ):
        if got is None:
            continue
        excess = abs(got.double() - want) - room
        assert bool((excess <= 0).all()), f"{name}: {float(excess.max()):.3e} beyond the bound"
    assert not losses[labels == IGNORED].any()
    if slopes is not None:
        assert slopes.dtype == logits.dtype and slopes.shape == logits.shape
        assert not slopes[labels == IGNORED].any()


def turned(kernels: Any, logits: Any, labels: Any, gradient: bool = True) -> tuple[Any, Any]:
    """What a module of kernels makes of the same: losses, and the gradient if it is asked for."""
    room = kernels.room(*logits.shape, logits)
    room.copy_(logits)
    losses = torch.full(labels.shape, torch.nan, device=logits.device)
    found = kernels.turned(room, labels, labels == IGNORED, losses, IGNORED, gradient)
    if gradient:
        return losses, found
    assert torch.equal(found.view(logits.dtype), logits) or bool(logits.isnan().any())
    return losses, None


def through_products(
    x: Any, weight: Any, labels: Any, slopes: Any, block: int, logits: Any
) -> dict[str, Any]:
    """Gradients of x and weight in float64, each with its bound, from logits rounded to their dtype.

    What the gradient of the logits is off by goes through the products, which add up in float32.
    """
    name, t = str(logits.dtype).removeprefix("torch."), len(labels)
    _, slope_room = allowed(logits, labels, block)
    wide, maps = x.double(), weight.double()
    found = {}
    for key, left, right, off, terms in (
        ("x", slopes, maps, slope_room, weight.shape[0]),
        ("weight", slopes.T, wide, slope_room.T, t),
    ):
        want = left @ right
        room = off @ abs(right) + SLACK * U * (terms**0.5 + 16) * (abs(left) @ abs(right))
        # rounded to the dtype, and once more when it is multiplied
        found[key] = want, room + 2 * UNIT[name] * (abs(want) + room) + SUBNORMAL[name]
    return found
