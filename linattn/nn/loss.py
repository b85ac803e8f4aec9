"""The cross entropy of a linear head, without ever holding all of its logits."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from linattn.errors import (
    ArgumentTypeError,
    DeviceError,
    DtypeError,
    OptionError,
    ShapeError,
    ValueRangeError,
)
from linattn.nn.norm import FUSED, HAS_TRITON, compiles_for, kernels, once
from linattn.prepared import PLAIN
from linattn.surroundings import as_they_are, lowers

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Tensor = torch.Tensor

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LOSS = (
    "gradients of linear_cross_entropy cannot be differentiated again, but those of torch's linear and "
    "cross_entropy can"
)
MIXED = torch.__version__ >= "2.8"  # `mm` of halves may give float32
MIXED_SUM = torch.__version__ >= "2.10"  # and `addmm` may add it to float32


def linear_cross_entropy(
    x: Float[torch.Tensor, "t e"],
    weight: Float[torch.Tensor, "v e"],
    labels: Int[torch.Tensor, " t"],
    *,
    chunk: int | None = None,
    ignore_index: int = -100,
) -> Float[torch.Tensor, ""]:
    """Return the sum over rows of -log softmax(x weight^T)[label], in float32 (float64 for float64).

    The logits of `chunk` rows exist at a time (None: of all), once: with softmax p and o the label's unit
    vector, the forward pass turns them into p - o at once, and from that into both gradients, (p - o) weight
    and the sum over chunks of (p - o)^T x, which the backward pass multiplies by its one number. It costs the
    three matrix products and no fourth. Logits and p - o are rounded to the dtype of x, everything between is
    float32, and so is the gradient of weight until it is multiplied. A frozen x or weight costs nothing.

    A row whose label is ignore_index has loss 0 and gradient 0, and leaves no trace in the gradient of
    weight, even if it holds NaN. Any other label outside of 0 … v - 1 gives NaN on a device, where looking at
    values would wait for it. NaN and infinities come out as from torch's cross_entropy.

    Under autocast x and weight are cast as by torch's linear; gradients have the dtypes of x and weight.
    Tensors on CUDA go through a Triton kernel for everything between the products, where `SimpleRMSNorm` has
    kernels too, elsewhere through torch's operations; under torch.func and forward mode, and for subclasses
    of Tensor, through operations that autograd differentiates.

    Raises ArgumentTypeError for what are no tensors or no int, ShapeError, DtypeError and DeviceError for
    tensors that do not go together, OptionError for a chunk below 1, ValueRangeError for a label out of range
    on the CPU, and GradientError when the gradients are differentiated again.
    Source: `torch.nn.functional.cross_entropy` with reduction="sum", and its gradients.
    """
    dtype = _checked(x, weight, labels, chunk)
    labels, chunk = labels.long(), int(chunk) if isinstance(chunk, np.integer) else chunk
    loss: Tensor
    if torch.compiler.is_compiling():
        loss, _, _ = torch.ops.linattn.linear_cross_entropy(
            x, weight, labels, chunk, ignore_index, dtype, *_asked(x, weight)
        )
    elif (transformed := _transformed()) or not {type(x), type(weight), type(labels)} <= {*PLAIN}:
        loss = _by_operations(x, weight, labels, chunk, ignore_index, dtype, keep=transformed)
    elif any(_asked(x, weight)):
        loss = _Formed.apply(x, weight, labels, chunk, ignore_index, dtype)  # type: ignore[no-untyped-call]
    else:
        loss, _, _ = _formed(x, weight, labels, chunk, ignore_index, dtype, False, False)
    return loss


def _checked(x: Tensor, weight: Tensor, labels: Tensor, chunk: int | None) -> torch.dtype:
    """The dtype of the products, or an error."""
    for name, one in (("x", x), ("weight", weight), ("labels", labels)):
        if not isinstance(one, Tensor):
            raise ArgumentTypeError(f"{name} must be a tensor, got {type(one).__name__}")
    if isinstance(chunk, bool) or not isinstance(chunk, int | np.integer | torch.SymInt | None):
        raise ArgumentTypeError(f"chunk must be an int or None, got {chunk!r}")
    if x.ndim != 2 or weight.ndim != 2 or labels.ndim != 1:
        raise ShapeError(
            "x, weight and labels must have shapes [t, e], [v, e] and [t], got "
            f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if x.shape[1] != weight.shape[1] or x.shape[0] != labels.shape[0]:
        raise ShapeError(
            f"x {tuple(x.shape)} needs a weight [v, {x.shape[1]}] and labels [{x.shape[0]}], got "
            f"{tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if not x.device == weight.device == labels.device:
        raise DeviceError(
            f"x, weight and labels must be on one device, got {x.device}, {weight.device} and {labels.device}"
        )
    if labels.dtype not in WHOLE:
        raise DtypeError(f"labels must be integers, got {labels.dtype}")
    if chunk is not None and chunk < 1:
        raise OptionError(f"chunk must be at least 1, or None for all rows at once, got {chunk}")
    dtypes = [x.dtype, weight.dtype]
    kind = x.device.type
    if lowers(kind):
        dtypes = [one if one == torch.float64 else torch.get_autocast_dtype(kind) for one in dtypes]
    if dtypes[0] != dtypes[1] or not x.is_floating_point():
        raise DtypeError(f"x and weight must have one floating dtype, got {x.dtype} and {weight.dtype}")
    return dtypes[0]


def _asked(x: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Whose gradients are wanted."""
    on = torch.is_grad_enabled()
    return on and x.requires_grad, on and weight.requires_grad


def _transformed() -> bool:
    """Whether torch.func or forward mode is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _parts(count: int, chunk: int | None) -> Iterator[slice]:
    step = chunk or max(1, count)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _by_operations(
    x: Tensor, weight: Tensor, labels: Tensor, chunk: int | None, ignore_index: int, dtype: torch.dtype, *,
    keep: bool,
) -> Tensor:  # fmt: skip
    """For autograd; a chunk's logits are formed again in the backward pass, or kept."""

    def summed(x: Tensor, labels: Tensor) -> Tensor:
        ignored = labels == ignore_index
        rows = x.to(dtype).masked_fill(ignored[:, None], 0)
        scores = nn.functional.linear(rows, weight.to(dtype)).to(_wide(dtype))
        return _losses(scores.log_softmax(1), labels, ignored).sum()

    total = x.new_zeros((), dtype=_wide(dtype))
    for part in _parts(len(x), chunk):
        given = x[part], labels[part]
        total = total + (summed(*given) if keep else checkpoint(summed, *given, use_reentrant=False))
    return total


def _losses(log_p: Tensor, labels: Tensor, ignored: Tensor) -> Tensor:
    """Each row's loss, from the logarithms of its softmax."""
    last = log_p.shape[1] - 1
    losses = -log_p.gather(1, labels.clamp(0, last)[:, None])[:, 0]
    losses = losses.masked_fill((labels < 0) | (labels > last), torch.nan)
    return losses.masked_fill(ignored, 0)


def _formed(
    x: Tensor, weight: Tensor, labels: Tensor, chunk: int | None, ignore_index: int, dtype: torch.dtype,
    asks_x: bool, asks_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss and what its gradients are before they are multiplied, in dtype and wide; empty if not asked.

    Raises ValueRangeError for a label out of range on the CPU.
    """
    count, wide = len(x), _wide(dtype)
    watched = torch._C._len_torch_dispatch_stack() > 0  # a mode sees operations, not kernels, nor values
    fused = HAS_TRITON and x.is_cuda and dtype in FUSED and not watched and compiles_for(x.device)
    if labels.device.type == "cpu" and not watched:
        _look_at(labels, len(weight), ignore_index)
    turn = kernels("loss").turned if fused else _turned
    losses = x.new_empty(count, dtype=wide)
    dx = x.new_empty(x.shape if asks_x else 0, dtype=dtype)
    dw: Tensor | None = None
    with as_they_are(x.device.type):
        w = weight.to(dtype)
        room = kernels("loss").room(min(chunk or count, count), len(w), w) if fused else None
        for part in _parts(count, chunk):
            ignored = labels[part] == ignore_index
            rows = x[part].to(dtype).masked_fill(ignored[:, None], 0)  # 0 times NaN would be NaN
            logits = torch.mm(rows, w.T, out=None if room is None else room[: len(rows)])
            slopes = turn(logits, labels[part], ignored, losses[part], ignore_index, asks_x or asks_weight)
            if asks_x:
                torch.mm(slopes, w, out=dx[part])
                dx[part].masked_fill_(ignored[:, None], 0)  # where a weight is not finite
            if asks_weight:
                dw = _added(dw, slopes.T, rows, wide)
    if dw is None:
        dw = weight.new_zeros(weight.shape if asks_weight else 0, dtype=wide)
    return losses.sum(), dx, dw


def _look_at(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise ValueRangeError for a label out of range."""
    wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueRangeError(
            f"labels must be 0 … {vocabulary - 1}, or {ignore_index} where nothing is asked; "
            f"row {at} has {int(labels[at])}"
        )


def _turned(
    logits: Tensor, labels: Tensor, ignored: Tensor, losses: Tensor, ignore_index: int, gradient: bool
) -> Tensor:
    """Write the rows' losses; return the gradient of their sum, softmax less the label's unit vector."""
    log_p = logits.to(losses.dtype).log_softmax(1)
    losses.copy_(_losses(log_p, labels, ignored))
    if not gradient:
        return logits
    slopes, last = log_p.exp_(), log_p.shape[1] - 1
    own = labels.clamp(0, last)[:, None]
    slopes.scatter_(1, own, slopes.gather(1, own) - 1)
    slopes.masked_fill_(((labels < 0) | (labels > last))[:, None], torch.nan)
    return slopes.masked_fill_(ignored[:, None], 0).to(logits.dtype)


def _added(total: Tensor | None, left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """total + left @ right (total: None or a tensor that changes in place), in the wide dtype.

    Where no product of halves gives float32, that of bfloat16 is rounded to bfloat16 once a chunk. float16
    would overflow: a column is a sum over many tokens that nothing has divided yet.
    """
    if left.dtype == wide:
        return torch.mm(left, right) if total is None else torch.addmm(total, left, right, out=total)
    if _mixes(left.device):
        if total is None or not MIXED_SUM:
            product = torch.mm(left, right, out_dtype=wide)
        else:
            return torch.addmm(total, left, right, out_dtype=wide, out=total)
    elif left.dtype == torch.bfloat16:
        product = torch.mm(left, right).to(wide)
    else:
        product = torch.mm(left.to(wide), right.to(wide))
    return product if total is None else total.add_(product)


@functools.cache
def _mixes(device: torch.device) -> bool:
    """Whether products of halves may give float32 on a device."""
    if device.type != "cuda" or torch.version.hip is not None or not MIXED:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


class _Formed(torch.autograd.Function):
    """The loss; its gradients are ready when it is."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, chunk: int | None, ignore: int, dtype: Any
    ) -> Any:
        loss, dx, dw = _formed(x, weight, labels, chunk, ignore, dtype, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(x, weight, dx, dw)
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return *_gradients(ctx, g), *[None] * 4


def _gradients(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
    if g is None:
        return None, None
    x, weight, dx, dw = ctx.saved_tensors
    of_x, of_weight = ctx.needs_input_grad[:2]

    def work() -> tuple[Tensor | None, Tensor | None]:
        return _scaled(x, dx, g) if of_x else None, _scaled(weight, dw, g) if of_weight else None

    return once(work, LOSS, x, weight, g)


def _scaled(like: Tensor, part: Tensor, g: Tensor) -> Tensor:
    """part times a number, rounded once, to the dtype of `like`."""
    # an axis keeps g in float32: a number without one would be rounded to the dtype of part before
    return torch.mul(part, g.reshape(1, 1), out=torch.empty_like(part, dtype=like.dtype))


# The op, for compilers, which could not see how the gradients come about.


@torch.library.custom_op(
    "linattn::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor labels, SymInt? chunk, int ignore_index, ScalarType dtype, "
    "bool asks_x, bool asks_weight) -> (Tensor, Tensor, Tensor)",
)
def _op(
    x: Tensor, weight: Tensor, labels: Tensor, chunk: int | None, ignore_index: int, dtype: torch.dtype,
    asks_x: bool, asks_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _formed(x, weight, labels, chunk, ignore_index, dtype, asks_x, asks_weight)


@_op.register_fake
def _op_fake(
    x: Tensor, weight: Tensor, labels: Tensor, chunk: int | None, ignore_index: int, dtype: torch.dtype,
    asks_x: bool, asks_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = _wide(dtype)
    return (
        x.new_empty((), dtype=wide),
        x.new_empty(x.shape if asks_x else 0, dtype=dtype),
        weight.new_empty(weight.shape if asks_weight else 0, dtype=wide),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], *output[1:])


def _backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return *_gradients(ctx, g), *[None] * 6


_op.register_autograd(_backward, setup_context=_setup)
