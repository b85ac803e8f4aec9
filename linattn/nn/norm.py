"""SimpleRMSNorm: divide by the root mean square, and nothing else; in one kernel where asked for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd import forward_ad

from linattn.errors import GradientError
from linattn.prepared import PLAIN

if TYPE_CHECKING:
    from jaxtyping import Float

Tensor = torch.Tensor

FUSED = (torch.bfloat16, torch.float16, torch.float32)
HAS_TRITON = importlib.util.find_spec("triton") is not None


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last axis: no weight, no bias, no mean taken off.

    Computed in float32 (float64 for float64) and returned in the dtype of x. The released module is given the
    width and never uses it; here none is asked for.

    fused (an attribute, which may be changed): CUDA tensors of float32, float16 and bfloat16 go through one
    kernel each way where Triton is installed and the GPU has compute capability 8.0; it has no second
    derivative. Elsewhere, under torch.func and forward mode, and by default, torch's own operations compute
    it: the kernels are proven in Triton's interpreter, but have not been measured on a GPU yet.

    Source: TransNormerLLM, arXiv:2307.14995, section 3.4; eps inside the root as in the released
    `SimpleRMSNorm`.
    """

    def __init__(self, eps: float = 1e-6, *, fused: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.fused = fused

    def forward(self, x: Float[torch.Tensor, "... e"]) -> Float[torch.Tensor, "... e"]:
        """Return x with every row scaled to a root mean square of (almost) 1.

        Raises GradientError when gradients of the fused kernel are differentiated again.
        """
        if self.fused and _fuses(x):
            return _fused(x, None, self.eps)
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def gated(
        self, x: Float[torch.Tensor, "... e"], u: Float[torch.Tensor, "... e"]
    ) -> Float[torch.Tensor, "... e"]:
        """Return u * norm(x), the gate of gated linear attention (section 3.2 there).

        The fused kernel rounds once, the product to the dtype; torch's operations round the norm to it
        first. It takes x and u of one shape and dtype; for others the product is an operation of torch.
        Raises GradientError when gradients of the fused kernel are differentiated again.
        """
        if self.fused and _fuses(x, u):
            return _fused(x, u, self.eps)
        y: Tensor = u * self(x)
        return y

    def extra_repr(self) -> str:
        """Show eps when the module is printed."""
        return f"eps={self.eps}" + (", fused=True" if self.fused else "")


def _fuses(x: Tensor, u: Tensor | None = None) -> bool:
    """Whether the kernels take these tensors, here and now."""
    if not (HAS_TRITON and x.is_cuda and x.dtype in FUSED and x.ndim):
        return False
    if u is not None and not (u.dtype == x.dtype and u.device == x.device and u.shape == x.shape):
        return False
    for part in (x,) if u is None else (x, u):
        if type(part) not in PLAIN or part.layout is not torch.strided or part.is_nested:
            return False
    if torch.compiler.is_compiling():  # the op asks the device
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    return _compiles_for(x.device)


@functools.cache
def _compiles_for(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device."""
    oldest: tuple[int, int] = importlib.import_module("linattn.backends.triton").OLDEST
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= oldest


@functools.cache
def _kernels() -> Any:
    """The module with kernels, which imports Triton."""
    return importlib.import_module("linattn.backends.triton.norm")


def _fused(x: Tensor, u: Tensor | None, eps: float) -> Tensor:
    """Through one autograd node, or through the op where something sees every op."""
    eps = float(eps)
    y: Tensor
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        y = torch.ops.linattn.simple_rms_norm(x, u, eps)
    elif torch.is_grad_enabled() and (x.requires_grad or (u is not None and u.requires_grad)):
        y = _Fused.apply(x, u, eps)  # type: ignore[no-untyped-call]
    else:
        y = _kernels().forward(x, u, eps)
    return y


class _Fused(torch.autograd.Function):
    """The fused norm and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor | None, eps: float) -> Any:
        ctx.save_for_backward(x, u)
        ctx.eps = eps
        return _kernels().forward(x, u, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, u = ctx.saved_tensors
        # where somebody differentiates again, the op has the sentence for that
        run = _backward_op if torch.is_grad_enabled() else _kernels().backward
        dx, du = run(x, u, dy, ctx.eps)
        needs = ctx.needs_input_grad
        return dx if needs[0] else None, du if needs[1] else None, None


# The ops, for compilers. Whether a GPU is too old for Triton is known only when they run.


@torch.library.custom_op(
    "linattn::simple_rms_norm", mutates_args=(), schema="(Tensor x, Tensor? u, float eps) -> Tensor"
)
def _op(x: Tensor, u: Tensor | None, eps: float) -> Tensor:
    if _compiles_for(x.device):
        return _kernels().forward(x, u, eps)  # type: ignore[no-any-return]
    normed, _ = _normed(x, eps)
    return (normed if u is None else u.float() * normed).to(x.dtype).contiguous()


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * r, r


@_op.register_fake
def _op_fake(x: Tensor, u: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, u, ctx.eps = inputs
    ctx.save_for_backward(x, u)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, u = ctx.saved_tensors
    return *_backward_op(x, u, dy, ctx.eps), None


def _backward_op(x: Tensor, u: Tensor | None, dy: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    dx, du = torch.ops.linattn.simple_rms_norm_backward(x, u, dy, eps)
    return dx, None if u is None else du


_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op(
    "linattn::simple_rms_norm_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor? u, Tensor dy, float eps) -> (Tensor, Tensor)",
)
def _slopes(x: Tensor, u: Tensor | None, dy: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if _compiles_for(x.device):
        dx, du = _kernels().backward(x, u, dy, eps)
    else:
        normed, r = _normed(x, eps)
        g = dy.float() if u is None else dy.float() * u.float()
        dx = ((g - normed * (g * normed).mean(-1, keepdim=True)) * r).to(x.dtype).contiguous()
        du = None if u is None else (dy.float() * normed).to(u.dtype).contiguous()
    return dx, x.new_empty(0) if du is None else du


@_slopes.register_fake
def _slopes_fake(x: Tensor, u: Tensor | None, dy: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if u is None else u.shape)


def _no_setup(ctx: Any, inputs: Any, output: Any) -> None:
    """Nothing is kept: there is no second derivative."""


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise GradientError(
        "double backward is not offered: gradients of the fused norm cannot be differentiated again, but "
        "those of SimpleRMSNorm() can"
    )


_slopes.register_autograd(_no_double_backward, setup_context=_no_setup)
