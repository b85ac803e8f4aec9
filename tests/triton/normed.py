"""The norm and its gradients by the formula in float64, what a kernel may be off by, and rows to try."""

from __future__ import annotations

from typing import Any

import torch

from linattn.tolerance import SUBNORMAL, UNIT

EPS = 1e-6
U = UNIT["float32"]

# Sums have positive terms or are bounded by those of their absolute values, so their relative error is at
# most U times the additions that one term passes through: up to 32 in a thread and 10 between threads on a
# GPU, 16 + 10 in NumPy, and one a block (of 2^14 numbers) where rows are wider.
DEPTH = 64
# r: half the sum's error and half of three roundings (a square, the division by W, of up to 2 ulps on a GPU,
# and eps), then 2 ulps of the reciprocal root, which are 4 U.
ROOT = DEPTH / 2 + 4 + 4


def given(width: int, dtype: torch.dtype, *, device: str = "cpu", rows: int = 21, seed: int = 0) -> Any:
    """x, u, dy [rows width]: rows of usual size, around sqrt(eps), of 0, and with squares beyond float16."""
    generator = torch.Generator(device).manual_seed(seed)
    x, u, dy = (torch.randn(rows, width, generator=generator, device=device) for _ in range(3))
    sizes = torch.tensor([1.0, 2e-3, 0.0, 9e3 if dtype == torch.float16 else 1e15, 30.0], device=device)
    x *= sizes[torch.arange(rows, device=device) % len(sizes)][:, None]
    x.clamp_(max=torch.finfo(dtype).max, min=torch.finfo(dtype).min)
    return x.to(dtype), u.to(dtype), dy.to(dtype)


def exact(x: Any, u: Any, dy: Any, eps: float = EPS, more: Any = None) -> dict[str, Any]:
    """y, again y, dx and du in float64; u may be None. more: what is added to dx."""
    wide, slope = x.double(), dy.double()
    gate = 1.0 if u is None else u.double()
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    g = slope * gate
    dx = r * g - wide * r**3 * (g * wide).mean(-1, keepdim=True)
    found = {"y": wide * r * gate, "again": wide * r * gate}
    found["dx"] = dx if more is None else dx + more.double()
    return found if u is None else found | {"du": slope * wide * r}


def inexact(x: Any, u: Any, dy: Any, eps: float = EPS, more: Any = None) -> dict[str, Any]:
    """How far from `exact` each number may be before it is rounded to its dtype."""
    wide, want = x.double(), exact(x, u, dy, eps)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    g = abs(dy.double() * (1.0 if u is None else u.double()))
    # y and du: r, and two products. dx: its first term has r and three roundings; the other has r three
    # times, a sum, and eight roundings, the last of them of the difference. Then `more` is added.
    found = {key: abs(value) * (ROOT + 2) * U for key, value in want.items()}
    along = abs(wide) * r**3 * (g * abs(wide)).mean(-1, keepdim=True)
    found["dx"] = (r * g * (ROOT + 3) + along * (3 * ROOT + DEPTH + 8)) * U
    if more is not None:
        found["dx"] += (abs(want["dx"]) + found["dx"] + abs(more.double())) * U
    return found


def compare(
    got: dict[str, Any], x: Any, u: Any, dy: Any, eps: float = EPS, more: Any = None, dtype: Any = None
) -> None:
    """Assert every number within its bound; y in dtype, all others in that of x."""
    want, room = exact(x, u, dy, eps, more), inexact(x, u, dy, eps, more)
    assert {"y", "dx"} | ({"du"} if u is not None else set()) <= got.keys() <= want.keys()
    for name, value in got.items():
        kind = dtype if dtype is not None and name in ("y", "again") else x.dtype
        assert value.dtype == kind and value.shape == x.shape and value.is_contiguous(), name
        # the result is rounded once, or is as small as no number of its dtype
        said = str(kind).removeprefix("torch.")
        largest = abs(want[name]) + room[name]
        excess = abs(value.double() - want[name]) - room[name] - largest * UNIT[said] - SUBNORMAL[said]
        where = divmod(int(excess.argmax()), max(1, x.shape[-1]))
        assert bool((excess <= 0).all()), (
            f"{name} at [n w] {where}: {float(excess.max()):.3e} beyond the bound"
        )


def computed(
    kernels: Any, x: Any, u: Any, dy: Any, eps: float = EPS, more: Any = None, dtype: Any = None
) -> dict[str, Any]:
    """What a module of kernels makes of the same; with a dtype it is y's, which is formed again as well."""
    dx, du, again = kernels.backward(x, u, dy, eps, more, dtype)
    assert (again is None) == (dtype is None) and (du is None) == (u is None)
    found = {"y": kernels.forward(x, u, eps, dtype), "dx": dx}
    found |= {} if again is None else {"again": again}
    return found if u is None else found | {"du": du}
