"""Linear maps that keep what their operand is made of, and form it again in the backward pass.

norm(x), u * norm(o) and a * b cost one pass over memory, and the kernel of their own backward pass reads what
they are made of anyway: it writes the operand once more, and the linear map's gradient is formed from that.
Plain modules keep the operand, too.

    map       plain modules keep     here
    normed    x, norm(x)             x
    gated     o, u, u * norm(o)      o, u
    product   a, b, a * b            a, b

The nodes stand in for modules where gradients are wanted, the fused norm runs (`SimpleRMSNorm.fused`) and
every linear map is a plain `nn.Linear` that nobody watches. Elsewhere these functions call the modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from linattn.nn.norm import FUSED, NORM, SimpleRMSNorm, fuses, kernels, once, plain
from linattn.prepared import PLAIN
from linattn.surroundings import as_they_are, lowers

if TYPE_CHECKING:
    from jaxtyping import Float

Tensor = torch.Tensor


def normed(
    norm: SimpleRMSNorm, linears: Sequence[nn.Linear], x: Float[torch.Tensor, "... e"]
) -> tuple[torch.Tensor, ...]:
    """Return x, and linear(norm(x)) [... f] for each of `linears`.

    The first is x for the residual branch: a gradient that comes back through it is added where that of
    norm(x) is formed, in no pass of its own. It may be a view, which must not be changed in place.
    Under autocast operands have its dtype, as in `nn.Linear`.

    Raises GradientError when gradients of the fused kernels are differentiated again.
    """
    dtype = _operand_dtype(linears, x) if fusing(norm) else None
    if dtype is None or not plain(norm, SimpleRMSNorm):
        y = norm(x)
        return x, *(linear(y) for linear in linears)
    same, *results = _apply(float(norm.eps), dtype, x, None, linears)
    return same if x.requires_grad else x, *results


def gated(
    norm: SimpleRMSNorm, linear: nn.Linear, o: Float[torch.Tensor, "... e"], u: Float[torch.Tensor, "... e"]
) -> Float[torch.Tensor, "... f"]:
    """Return linear(u * norm(o)). Errors and dtypes are those of `normed`."""
    dtype = _operand_dtype((linear,), o, u) if fusing(norm) else None
    y: Tensor
    if dtype is None or not plain(norm, SimpleRMSNorm):
        y = linear(norm.gated(o, u) if isinstance(norm, SimpleRMSNorm) else u * norm(o))
    else:
        (y,) = _apply(float(norm.eps), dtype, o, u, (linear,))
    return y


def product(
    linear: nn.Linear, a: Float[torch.Tensor, "... e"], b: Float[torch.Tensor, "... e"]
) -> Float[torch.Tensor, "... f"]:
    """Return linear(a * b). Errors and dtypes are those of `normed`."""
    dtype = _operand_dtype((linear,), a, b)
    y: Tensor
    if dtype is None:
        y = linear(a * b)
    else:
        (y,) = _apply(None, dtype, a, b, (linear,))
    return y


def fusing(norm: nn.Module) -> bool:
    """Whether a norm, which may be one of another class, asks for the fused kernels."""
    return isinstance(norm, SimpleRMSNorm) and norm.fused


def unwatched(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is exactly of one of these classes, and nothing sees or replaces its calls."""
    if torch.compiler.is_compiling():  # looking at hooks would guard them
        return False
    return type(module) in kinds and plain(module, type(module))


def _operand_dtype(linears: Sequence[nn.Linear], *parts: Tensor) -> torch.dtype | None:
    """The dtype of the matrix products of a node; None where modules are to be called."""
    x = parts[0]
    if not torch.is_grad_enabled() or not fuses(*parts):
        return None
    if not all(plain(linear, nn.Linear) for linear in linears):
        return None
    tensors = [part for linear in linears for part in (linear.weight, linear.bias) if part is not None]
    where = x.device.type
    lowered = lowers(where)
    dtype = torch.get_autocast_dtype(where) if lowered else x.dtype
    if dtype not in FUSED:
        return None
    for part in tensors:
        if type(part) not in PLAIN or part.layout is not torch.strided or part.device != x.device:
            return None
        if part.dtype not in (FUSED if lowered else (dtype,)):
            return None
    return dtype


def _apply(
    eps: float | None, dtype: torch.dtype, a: Tensor, b: Tensor | None, linears: Sequence[nn.Linear]
) -> tuple[Tensor, ...]:
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears]
    found: tuple[Tensor, ...] = _Linears.apply(eps, dtype, a, b, *weights, *biases)  # type: ignore[no-untyped-call]
    return found


class _Linears(torch.autograd.Function):
    """Linear maps of one operand: norm(a), norm(a) * b, or with eps None a * b; of the first, a as well."""

    @staticmethod
    def forward(
        ctx: Any, eps: float | None, dtype: torch.dtype, a: Tensor, b: Tensor | None, *maps: Tensor | None
    ) -> Any:
        half = len(maps) // 2
        operand = _operand(eps, dtype, a, b)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b, *maps[:half])
        ctx.eps, ctx.dtype = eps, dtype
        ctx.biases = [None if bias is None else bias.dtype for bias in maps[half:]]
        results = []
        for weight, bias in zip(maps[:half], maps[half:], strict=True):
            assert weight is not None
            results.append(
                functional.linear(operand, weight.to(dtype), None if bias is None else bias.to(dtype))
            )
        return tuple(results) if b is not None else (a, *results)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> Any:
        a, b, *weights = ctx.saved_tensors
        more, dys = (None, slopes) if b is not None else (slopes[0], slopes[1:])

        def work() -> tuple[Any, ...]:
            return _gradients(ctx, a, b, weights, more, dys)

        # products take operands as they are, also where a backward pass runs under autocast
        with as_they_are(a.device.type):
            return None, None, *once(work, NORM, a, b, *weights, *slopes)


def _operand(eps: float | None, dtype: torch.dtype, a: Tensor, b: Tensor | None) -> Tensor:
    """What the linear maps are applied to, without gaps."""
    operand: Tensor
    if eps is None:
        assert b is not None
        operand = (a * b).to(dtype)
    else:
        operand = kernels().forward(a, b, eps, dtype)
    return operand


def _gradients(
    ctx: Any, a: Tensor, b: Tensor | None, weights: list[Tensor], more: Tensor | None, dys: Any
) -> tuple[Any, ...]:
    """Gradients of a, b, weights and biases, None for those that nobody wants."""
    needs, count = ctx.needs_input_grad[2:], len(weights)
    rows = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
    wanted = [dy is not None and need for dy, need in zip(rows, needs[2 : 2 + count], strict=True)]
    again = ctx.dtype if any(wanted) else None
    da, db, slope, operand = more, None, None, None
    if needs[0] or needs[1]:
        for dy, weight in zip(rows, weights, strict=True):
            if dy is not None:
                weight = weight.to(ctx.dtype)
                slope = dy @ weight if slope is None else slope.addmm_(dy, weight)
    if slope is not None:
        slope = slope.view(a.shape)
        if ctx.eps is None:
            da, db, operand = kernels("glu").backward(a, b, slope, again)
        else:
            da, db, operand = kernels().backward(a, b, slope, ctx.eps, more, again)
    elif again is not None:
        operand = _operand(ctx.eps, ctx.dtype, a, b)
    del slope
    found: list[Any] = [da if needs[0] else None, db if needs[1] else None]
    if operand is not None:
        operand = operand.view(-1, operand.shape[-1])
    for dy, weight, want in zip(rows, weights, wanted, strict=True):
        found.append((dy.mT @ operand).to(weight.dtype) if want and dy is not None else None)
    for dy, dtype, need in zip(rows, ctx.biases, needs[2 + count :], strict=True):
        found.append(dy.sum(0, dtype=dtype) if need and dy is not None else None)
    return tuple(found)
