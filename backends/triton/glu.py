"""The backward pass of a product of two tensors, which forms the product again: one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from linattn.backends.triton.launcher import Launcher
from linattn.backends.triton.norm import on

Tensor = torch.Tensor

# M numbers in all; b is the number of bytes of one.
#
#             reads, writes            bytes   operations
# backward    a, b, dp -> da, db       5 b M   2 M
#   again     a, b, dp -> da, db, p    6 b M   3 M
#
# The forward pass is torch's a * b: 3 b M. Three operations of torch take 9 b M for the second line.


@triton.jit
def product_backward(
    a_ptr,  # [M], as are all others
    b_ptr,
    dp_ptr,
    da_ptr,
    db_ptr,
    p_ptr,  # written only if AGAIN
    M,  # a multiple of 16 has loads as wide as they get
    BLOCK: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """da = dp b, db = dp a and p = a b; BLOCK numbers in a program."""
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = m < M
    a = tl.load(a_ptr + m, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + m, mask=inside, other=0.0).to(tl.float32)
    dp = tl.load(dp_ptr + m, mask=inside, other=0.0).to(tl.float32)
    tl.store(da_ptr + m, (dp * b).to(da_ptr.dtype.element_ty), mask=inside)
    tl.store(db_ptr + m, (dp * a).to(db_ptr.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(p_ptr + m, (a * b).to(p_ptr.dtype.element_ty), mask=inside)


BLOCK = 2048
WARPS = 4

start = Launcher(product_backward)


def backward(
    a: Tensor, b: Tensor, dp: Tensor, again: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of a and b from the gradient dp of a * b; and a * b in the dtype `again`, or None.

    All of one shape, in any layout (what has gaps is copied); float32 arithmetic, rounded once. Starts one
    kernel on the device of a and its current stream.
    """
    a, b, dp = (part.resolve_neg().contiguous() for part in (a, b, dp))
    da, db = torch.empty_like(a), torch.empty_like(b)
    p = None if again is None else torch.empty_like(a, dtype=again)
    m = a.numel()
    if not m:
        return da, db, p
    key: Any = a.dtype, b.dtype, dp.dtype, again, a.device, m % 16 == 0, m == 1, m >= 1 << 31
    with on(a.device):
        start(
            triton.cdiv(m, BLOCK), key, (a, b, dp, da, db, da if p is None else p, m),
            (BLOCK, p is not None), num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    return da, db, p
