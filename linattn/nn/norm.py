"""SimpleRMSNorm: divide by the root mean square, and nothing else; in one kernel where there is one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from linattn.checks import check_eps, check_flag
from linattn.errors import GradientError
from linattn.prepared import PLAIN
from linattn.surroundings import watched

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
    derivative. It also decides whether the linear maps around the norm keep what their operands are made of
    instead of the operands (`linattn.nn.fused`). Elsewhere, and where something sees every operation
    (torch.compile, which fuses them itself, torch.func, forward mode, dispatch modes), and with
    `fused=False`, torch's own operations compute it.

    Source: TransNormerLLM, arXiv:2307.14995, section 3.4; eps inside the root as in the released
    `SimpleRMSNorm`.

    Raises ArgumentTypeError or ValueRangeError for an eps that is no number above 0.
    """

    def __init__(self, eps: float = 1e-6, *, fused: bool = True) -> None:
        super().__init__()
        check_eps(eps)
        check_flag("fused", fused)
        self.eps = eps
        self.fused = fused

    def forward(self, x: Float[torch.Tensor, "... e"]) -> Float[torch.Tensor, "... e"]:
        """Return x with every row scaled to a root mean square of (almost) 1.

        Raises GradientError when gradients of the fused kernel are differentiated again.
        """
        if self.fused and fuses(x):
            return _fused(x, None, self.eps)
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def gated(
        self, x: Float[torch.Tensor, "... e"], u: Float[torch.Tensor, "... e"]
    ) -> Float[torch.Tensor, "... e"]:
        """Return u * norm(x), the gate of gated linear attention (section 3.2 there).

        The fused kernel rounds once, the product to the dtype; torch's operations round the norm to it
        first. It takes x and u of one shape and dtype; for others, and where somebody watches or replaces the
        norm, the product is an operation of torch.
        Raises GradientError when gradients of the fused kernel are differentiated again.
        """
        if self.fused and fuses(x, u) and plain(self, SimpleRMSNorm):
            return _fused(x, u, self.eps)
        y: Tensor = u * self(x)
        return y

    def extra_repr(self) -> str:
        """Show eps, and that torch's operations are asked for, when the module is printed."""
        return f"eps={self.eps}" + ("" if self.fused else ", fused=False")


def fuses(x: Tensor, u: Tensor | None = None) -> bool:
    """Whether the kernels take these tensors, here and now."""
    if not HAS_TRITON or torch.compiler.is_compiling() or not x.is_cuda or x.dtype not in FUSED or not x.ndim:
        return False
    if u is not None and not (u.dtype == x.dtype and u.device == x.device and u.shape == x.shape):
        return False
    for part in (x,) if u is None else (x, u):
        if type(part) not in PLAIN or part.layout is not torch.strided or part.is_nested:
            return False
    return not watched() and not torch._C._is_tracing() and compiles_for(x.device)


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of a class, and nothing sees or replaces its calls."""
    return type(module) is kind and bare((module,)) and not any_hook()


def bare(modules: Sequence[nn.Module]) -> bool:
    """Whether nothing sees or replaces the calls of modules that they know of: `any_hook` knows the rest.

    Compilers can follow it.
    """
    # half the time of attributes and generators, and a step asks 240 modules
    everything = [module.__dict__ for module in modules]
    hooks = [own[name] for name in _HOOKS for own in everything]
    replaced = ["forward" in own for own in everything]
    return not (any(hooks) or any(replaced))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def any_hook() -> bool:
    """Whether something sees the calls of every module."""
    return bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


def unseen(*modules: nn.Module) -> bool:
    """Whether nothing sees or replaces the calls of modules, which compilers take for granted."""
    if torch.compiler.is_compiling():  # looking at hooks would guard them
        return True
    return bare(modules) and not any_hook()


def only_matrix(linear: nn.Module) -> bool:
    """Whether a module is a matrix and nothing else: an `nn.Linear` without bias, as `plain` has it."""
    return plain(linear, nn.Linear) and linear.bias is None


@functools.cache
def compiles_for(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device."""
    oldest: tuple[int, int] = importlib.import_module("linattn.backends.triton").OLDEST
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= oldest


@functools.cache
def kernels(name: str = "norm") -> Any:
    """A module with kernels, which imports Triton."""
    return importlib.import_module(f"linattn.backends.triton.{name}")


def _fused(x: Tensor, u: Tensor | None, eps: float) -> Tensor:
    """Through one autograd node where gradients are wanted."""
    eps = float(eps)
    y: Tensor
    if torch.is_grad_enabled() and (x.requires_grad or (u is not None and u.requires_grad)):
        y = _Fused.apply(x, u, eps)  # type: ignore[no-untyped-call]
    else:
        y = kernels().forward(x, u, eps)
    return y


class _Fused(torch.autograd.Function):
    """The fused norm and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor | None, eps: float) -> Any:
        ctx.save_for_backward(x, u)
        ctx.eps = eps
        return kernels().forward(x, u, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, u = ctx.saved_tensors
        dx, du = once(lambda: kernels().backward(x, u, dy, ctx.eps)[:2], NORM, x, u, dy)
        needs = ctx.needs_input_grad
        return dx if needs[0] else None, du if needs[1] else None, None


NORM = (
    "gradients of the fused norm, and of what is fused with it, cannot be differentiated again, but those of "
    "SimpleRMSNorm(fused=False) can"
)


def once(work: Callable[[], tuple[Any, ...]], refusal: str, *inputs: Tensor | None) -> tuple[Any, ...]:
    """work(), the gradients that a node makes of `inputs`; who differentiates them again gets the refusal."""
    if not torch.is_grad_enabled():
        return work()
    found: tuple[Any, ...] = _Once.apply(work, refusal, *inputs)  # type: ignore[no-untyped-call]
    return found


class _Once(torch.autograd.Function):
    """Gradients that have none of their own."""

    @staticmethod
    def forward(ctx: Any, work: Callable[[], tuple[Any, ...]], refusal: str, *inputs: Tensor | None) -> Any:
        ctx.refusal = refusal
        return work()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise GradientError(f"double backward is not offered: {ctx.refusal}")
