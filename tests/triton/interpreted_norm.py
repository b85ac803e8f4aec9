"""Checks of the fused norm in Triton's interpreter; run as a program, with TRITON_INTERPRET=1."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from linattn.backends.triton import norm as kernels
from linattn.errors import GradientError
from linattn.nn import GatedLinearAttention, SimpleRMSNorm
from linattn.nn import fused as maps
from linattn.nn import norm as module
from linattn.surroundings import watched
from tests.triton.normed import EPS, compare, computed, given
from tests.triton.programs import main, notices

WIDTHS = (1, 3, 100, 1000, 2049)
DTYPES = (torch.float32, torch.float16)  # the interpreter's bfloat16 is wrong


@contextlib.contextmanager
def narrow(of: Any = kernels) -> Iterator[None]:
    """Launches whose blocks are much narrower than their rows."""

    def shape(width: int) -> Any:
        return of.Shape(4, max(1, 1 << (width - 1).bit_length() >> 2), 4)

    with mock.patch.object(of, "shape", shape):
        yield


@contextlib.contextmanager
def fused() -> Iterator[None]:
    """Modules use the kernels on the CPU too, as interpreted."""

    def fuses(x: Any, u: Any = None) -> bool:
        return not torch.compiler.is_compiling() and not watched()

    with mock.patch.object(module, "fuses", fuses), mock.patch.object(maps, "fuses", fuses):
        yield


def holds(of: Any, widths: tuple[int, ...] = WIDTHS, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Results of a module of kernels, with and without a gate, in launches of both kinds."""
    for width, dtype in itertools.product(widths, dtypes):
        x, u, dy = given(width, dtype)
        more = u.flip(0)
        for gate, cut in itertools.product((None, u), (False, True)):
            with narrow(of) if cut else contextlib.nullcontext():
                compare(computed(of, x, gate, dy), x, gate, dy)
                # as a linear map under autocast asks for it, with gradients in its dtype
                half, other = torch.float16, more if gate is None else None
                slope = dy.half()
                got = computed(of, x, gate, slope, more=other, dtype=half)
                compare(got, x, gate, slope, more=other, dtype=half)
                if gate is None and dtype == torch.float32:
                    compare(computed(of, x, None, dy, more=more), x, None, dy, more=more)


def formula() -> None:
    """Every width and dtype."""
    holds(kernels)
    x, u, dy = given(kernels.WIDEST + 5, torch.float32, rows=2)  # as it is launched where a row is cut
    compare(computed(kernels, x, u, dy), x, u, dy)
    assert not kernels.forward(torch.zeros(3, 7), None, EPS).any()


WRONG = {
    "the mean is over the padded width": ("keep_dims=True) / W", "keep_dims=True) / BLOCK"),
    "eps is outside of the root": (
        "tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / W + eps)",
        "1.0 / (tl.sqrt(tl.sum(squares, 1, keep_dims=True) / W) + eps)",
    ),
    "eps is missing": ("/ W + eps)", "/ W)"),
    "eps is a little larger": ("/ W + eps)", "/ W + 1.01 * eps)"),
    "the gate is left out": ("        y *= u\n", "        y *= 1.0\n"),
    "the gate is left out of a later block": ("y *= rows_at(u", "y *= 1.0 + 0.0 * rows_at(u"),
    "the row's length has no gradient": ("dx = (g - x * along) * r", "dx = g * r"),
    "the length's gradient has no mean": ("1, keep_dims=True) / W * r", "1, keep_dims=True) * r"),
    "x is not normed in its own gradient": ("    x *= r\n", "    x *= 1.0\n"),
    "the gate's gradient is gated": ("(dy * x).to", "(g * x).to"),
    "the gate is left out of the gradient": ("        g *= u\n", "        g *= 1.0\n"),
    "later blocks do not count": ("            squares += z * z\n", "            squares += 0.0\n"),
    "rows run into each other": ("tl.sum(squares, 1, keep", "tl.sum(squares, 0, keep"),
    "squares are taken in the dtype of x": (
        "squares = x * x\n",
        "squares = (x * x).to(x_ptr.dtype.element_ty).to(tl.float32)\n",
    ),
    "the last number of a row is lost": ("(w < W)", "(w < W - 1)"),
    "the gradient from elsewhere is lost": ("        dx += more\n", "        dx += 0.0\n"),
    "it is lost in later blocks": ("dx += rows_at(more_ptr", "dx += 0.0 * rows_at(more_ptr"),
    "it is read at the rows of x": ("(n * more_n)", "(n * 2 * more_n)"),
    "the gate is left out of y again": ("y = x * u if GATED else x", "y = x"),
    "y again is not normed": (
        "        y = x * u if GATED else x\n",
        "        y = x * u / r if GATED else x / r\n",
    ),
}


def mutants() -> None:
    """Kernels with one thing wrong each are noticed, where the right ones pass."""
    sizes = (3, 100), DTYPES
    notices(lambda of: holds(of, *sizes), kernels, WRONG)


def not_finite() -> None:
    """A NaN or an infinity stays in its row, forward and backward, in whichever argument it is."""
    for width, place, bad in itertools.product((5, 300), range(3), (float("nan"), float("inf"))):
        right = given(width, torch.float32, rows=11)
        wrong = [part.clone() for part in right]
        wrong[place][4, 2] = bad
        with narrow() if width > 64 else contextlib.nullcontext():
            want, got = computed(kernels, *right), computed(kernels, *wrong)
        others = torch.arange(11) != 4
        assert all(torch.equal(got[name][others], want[name][others]) for name in want)
        assert not all(part[4].isfinite().all() for part in got.values())
        if bad != bad and place == 0:
            assert all(part[4].isnan().all() for part in got.values())


def layouts() -> None:
    """Rows with gaps are read where they lie; any other layout gives the same bits; inputs stay."""
    wide = torch.randn(2, 6, 4 * 40)
    x, u, dy, _ = wide.chunk(4, -1)
    assert kernels.rows_of(u).data_ptr() == u.data_ptr()  # no copy
    shapes = (
        (x, u, dy),
        tuple(part.transpose(0, 1).contiguous().transpose(0, 1) for part in (x, u, dy)),
        tuple(part.mT.contiguous().mT for part in (x, u, dy)),
        tuple(torch.stack([part, part], -1)[..., 0] for part in (x, u, dy)),
        (torch.complex(torch.zeros_like(x), -x).conj().imag, u, dy),
    )
    assert shapes[-1][0].is_neg()
    want = computed(kernels, *(part.contiguous() for part in (x, u, dy)))
    for parts in shapes:
        before = [part.clone() for part in parts]
        got = computed(kernels, *parts)
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))
        assert all(part.is_contiguous() for part in got.values())
    flat = torch.ones(1, 1).expand(5, 40)  # what the gradient of a sum looks like
    assert torch.equal(
        computed(kernels, x[0, :5], None, flat)["dx"], computed(kernels, x[0, :5], None, flat.clone())["dx"]
    )
    for empty in ((0, 7), (3, 0), (0, 0)):
        nothing = torch.zeros(empty)
        assert all(part.shape == empty for part in computed(kernels, nothing, nothing, nothing).values())


def alone() -> None:
    """A row keeps its bits whatever other rows there are, and in every run."""
    x, u, dy = given(100, torch.float32, rows=90)
    whole, again = computed(kernels, x, u, dy), computed(kernels, x, u, dy)
    for n in (0, 20, 89):
        rows = slice(n, n + 1)
        one = computed(kernels, x[rows], u[rows], dy[rows])
        assert all(torch.equal(one[name], whole[name][rows]) for name in whole)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def differentiated(run: Any, x: Any, u: Any, dy: Any) -> dict[str, Any]:
    leaves = [part.detach().requires_grad_() for part in ((x,) if u is None else (x, u))]
    y = run(*leaves)
    names = ("y", "dx") if u is None else ("y", "dx", "du")
    return dict(zip(names, (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))


NORM, PLAIN = SimpleRMSNorm(), SimpleRMSNorm(fused=False)


def eager(x: Any, u: Any = None) -> Any:
    return NORM(x) if u is None else NORM.gated(x, u)


def autograd() -> None:
    """The module's results and gradients are the kernels'; autocast changes nothing."""
    for dtype in DTYPES:
        x, u, dy = given(100, dtype)
        for gate in (None, u):
            want = computed(kernels, x, gate, dy)
            with fused():
                for how in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
                    with how:
                        got = differentiated(eager, x, gate, dy)
                    assert all(torch.equal(got[name], want[name]) for name in want)
                with torch.no_grad():
                    assert torch.equal(eager(x, gate), want["y"])
            assert torch.equal(eager(x, gate), PLAIN(x) if gate is None else gate * PLAIN(x))


class Seen(TorchDispatchMode):
    """A mode that watches."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


def plain() -> None:
    """What sees every operation sees those of torch."""
    x, u, dy = given(100, torch.float32)
    with fused():
        torch.compiler.reset()
        compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
        for gate in (None, u):
            want = differentiated(lambda x, u=None: PLAIN(x) if u is None else PLAIN.gated(x, u), x, gate, dy)
            got = differentiated(compiled, x, gate, dy)
            assert all(torch.equal(got[name], want[name]) for name in want)
            with Seen():
                got = differentiated(eager, x, gate, dy)
            assert all(torch.equal(got[name], want[name]) for name in want)
        assert torch.equal(torch.func.vmap(NORM)(x), PLAIN(x))


def only_one() -> None:
    """Gradients that nobody asked for are not given."""
    x, u, dy = given(10, torch.float32)
    want = computed(kernels, x, u, dy)
    with fused():
        for place, name in enumerate(("dx", "du")):
            parts = [x.clone(), u.clone()]
            parts[place].requires_grad_()
            eager(*parts).backward(dy)
            assert torch.equal(parts[place].grad, want[name])
            assert parts[1 - place].grad is None


def twice() -> None:
    """A second derivative is refused, with a sentence; the first is what it is otherwise."""
    with fused():
        x, u, dy = given(10, torch.float32)
        want = differentiated(eager, x, u, dy)["dx"]
        x.requires_grad_()
        (dx,) = torch.autograd.grad(eager(x, u), x, dy, create_graph=True)
        assert torch.equal(dx, want)
        with pytest.raises(GradientError, match="fused norm, and of what is fused with it, cannot be diff"):
            dx.sum().backward()


def layer() -> None:
    """Gated linear attention by the kernels and without: the same within the norm's own error."""
    torch.manual_seed(0)
    mixer, x = GatedLinearAttention(10, 12, 3), torch.randn(2, 7, 10)
    results = []
    for how in (contextlib.nullcontext(), fused()):
        with how:
            leaf = x.clone().requires_grad_()
            y = mixer(leaf)
            results.append(
                (y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, mixer.qkvu_proj.weight]))
            )
    for mine, other in zip(*results, strict=True):
        assert (mine - other).norm() <= 100 * torch.finfo(torch.float32).eps * other.norm()


if __name__ == "__main__":
    main(globals())
