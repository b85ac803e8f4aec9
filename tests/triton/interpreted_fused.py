"""Checks of linear maps that form operands again, in Triton's interpreter; run with TRITON_INTERPRET=1."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from linattn import tolerance
from linattn.backends.triton import glu
from linattn.backends.triton import norm as kernels
from linattn.errors import GradientError
from linattn.nn import SimpleRMSNorm
from linattn.nn.fused import gated, normed, product
from tests.triton.interpreted_norm import fused
from tests.triton.programs import main

U = tolerance.UNIT
WIDTH, OUT = 24, 10


def close(got: Any, want: Any, dtype: torch.dtype, terms: int = 4 * WIDTH) -> None:
    """Assert two lists of tensors equal up to a few roundings to dtype around sums of so many terms."""
    allowed = tolerance.SLACK * (U["float32"] * math.sqrt(terms) + U[str(dtype).removeprefix("torch.")])
    for i, (mine, other) in enumerate(zip(got, want, strict=True)):
        assert (mine is None) == (other is None), i
        if mine is not None:
            error = (mine.double() - other.double()).norm()
            assert error <= allowed * other.double().norm(), (i, float(error / other.double().norm()))


def products() -> None:
    """The kernel of a product: the bits of torch's own operations, which round once as well."""
    for dtype, size in itertools.product((torch.float32, torch.float16), ((5, 100), (3, 1500), (0, 4))):
        a, b, dp = (torch.randn(size, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
        want = dp * b, dp * a, a * b
        strided = torch.stack([a, a], -1)[..., 0]
        for first, again in itertools.product((a, strided), (None, dtype)):
            got = glu.backward(first, b, dp, again)
            assert all(part.is_contiguous() for part in got[:2])
            assert (got[2] is None) == (again is None)
            assert all(
                torch.equal(mine, other) for mine, other in zip(got, want, strict=True) if mine is not None
            )
    wide = glu.backward(a.float(), b.float(), dp, torch.float16)
    assert [part.dtype for part in wide if part is not None] == [torch.float32, torch.float32, torch.float16]


class Case:
    """One of the maps with its parts, its linear maps and gradients of its results."""

    def __init__(self, name: str, dtype: torch.dtype, bias: bool) -> None:
        torch.manual_seed(0)
        self.name, self.norm = name, SimpleRMSNorm()
        self.linears = [nn.Linear(WIDTH, OUT, bias).to(dtype) for _ in range(2 if name == "normed" else 1)]
        rows = torch.randn(2, 9, 4 * WIDTH).to(dtype)  # parts have gaps, as those of one projection
        self.parts = list(rows.chunk(4, -1)[: 1 if name == "normed" else 2])
        self.slopes = [torch.randn(2, 9, OUT).to(dtype) for _ in self.linears]
        if name == "normed":
            self.slopes.insert(0, torch.randn(2, 9, WIDTH).to(dtype))
        self.leaves = [True] * len(self.parts)

    def run(self, parts: Any, linears: Any) -> Any:
        if self.name == "normed":
            return normed(self.norm, linears, *parts)
        if self.name == "gated":
            return (gated(self.norm, linears[0], *parts),)
        return (product(linears[0], *parts),)

    def results(self, dtype: torch.dtype | None = None) -> Any:
        """Outputs, then the gradients of parts, weights and biases; in another dtype if one is given."""
        parts = [part.detach().to(dtype or part.dtype) for part in self.parts]
        linears = (
            copy.deepcopy(self.linears)
            if dtype is None
            else [copy.deepcopy(f).to(dtype) for f in self.linears]
        )
        for part, leaf in zip(parts, self.leaves, strict=True):
            part.requires_grad_(leaf)
        outs = self.run(parts, linears)
        used = [(out, slope) for out, slope in zip(outs, self.slopes, strict=True) if slope is not None]
        torch.autograd.backward([out for out, _ in used], [slope.to(out.dtype) for out, slope in used])
        leaves = [*parts, *(part for linear in linears for part in linear.parameters())]
        return [out.detach() for out in outs] + [leaf.grad for leaf in leaves]


NAMES = ("normed", "gated", "product")


def node(outs: Any) -> bool:
    """Whether one of the nodes made these."""
    return any("_Linears" in type(out.grad_fn).__name__ for out in outs)


def formula() -> None:
    """Every map and all its gradients, whoever wants them, beside plain modules in float64."""
    for name, dtype, bias in itertools.product(NAMES, (torch.float32, torch.float16), (False, True)):
        for frozen in ("nothing", "weights", "biases", "parts", "first part", "all but a bias"):
            case = Case(name, dtype, bias)
            for key, parameter in [pair for linear in case.linears for pair in linear.named_parameters()]:
                asked = {"weights": key == "bias", "biases": key == "weight", "all but a bias": key == "bias"}
                parameter.requires_grad_(asked.get(frozen, True))
            if frozen in ("parts", "all but a bias"):
                case.leaves = [False] * len(case.leaves)
            elif frozen == "first part":
                case.leaves[0] = False
            if not any((*case.leaves, *(p.requires_grad for f in case.linears for p in f.parameters()))):
                continue
            if case.name == "normed" and not case.leaves[0]:
                case.slopes[0] = None
            want = case.results(torch.float64)
            with fused():
                close(case.results(), want, dtype)


def unused() -> None:
    """Results that nobody uses have no gradient: the residual branch, or one of two linear maps."""
    for dead in range(1, 7):
        case = Case("normed", torch.float32, True)
        case.slopes = [None if dead >> i & 1 else slope for i, slope in enumerate(case.slopes)]
        want = case.results(torch.float64)
        with fused():
            close(case.results(), want, torch.float32)


def lowered() -> None:
    """Under autocast products have its dtype, and gradients that of what they belong to."""
    for name in NAMES:
        for half in (False, True):  # a projection under autocast leaves parts in its dtype
            case = Case(name, torch.float32, True)
            if half:
                case.parts = [part.half() for part in case.parts]
            want = case.results(torch.float64)
            with fused(), torch.autocast("cpu", torch.float16):
                got = case.results()  # its backward pass, too, runs under autocast
                weights = [linear.weight for linear in case.linears]
                alone = torch.autograd.grad(case.run(case.parts, case.linears)[-1].sum(), weights[-1])
            close(got, want, torch.float16)
            assert alone[0].dtype == torch.float32
            outs = len(case.slopes)
            first = (got[0],) if name == "normed" else ()
            parts = got[outs : outs + len(case.parts)]
            assert {part.dtype for part in (*parts, *first)} == {torch.float16 if half else torch.float32}
            assert {part.dtype for part in got[len(first) : outs]} == {torch.float16}
            assert {part.dtype for part in got[outs + len(parts) :]} == {torch.float32}


def outside() -> None:
    """A backward pass under autocast of a forward pass that was not: float32 stays float32."""
    for name in NAMES:
        case = Case(name, torch.float32, True)
        want = case.results(torch.float64)[len(case.slopes) :]
        parts = [part.clone().requires_grad_() for part in case.parts]
        with fused():
            outs = case.run(parts, case.linears)
            leaves = [*parts, *(part for linear in case.linears for part in linear.parameters())]
            with torch.autocast("cpu", torch.float16):
                got = torch.autograd.grad(outs, leaves, case.slopes)
        close(got, want, torch.float32)


def frozen() -> None:
    """Where no weight wants a gradient the operand is not formed again; where no part does, only it is."""
    for name in NAMES:
        module = glu if name == "product" else kernels
        for parts, weights in itertools.product((True, False), repeat=2):
            case = Case(name, torch.float32, True)
            case.leaves = [parts] * len(case.leaves)
            if name == "normed" and not parts:
                case.slopes[0] = None
            for linear in case.linears:
                linear.weight.requires_grad_(weights)
            with fused(), mock.patch.object(module, "backward", wraps=module.backward) as backward:
                case.results()
            assert backward.call_count == parts
            assert not parts or (backward.call_args.args[-1] is not None) == weights


def kept(run: Any, besides: Any = ()) -> int:
    """Bytes of memory that autograd keeps for a call, without those of some tensors."""
    seen: dict[int, int] = {}

    def pack(x: Any) -> Any:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    for x in besides:
        seen.pop(x.untyped_storage().data_ptr(), None)
    del out
    return sum(seen.values())


def memory() -> None:
    """Operands are not kept; where nothing wants a gradient, nothing is."""
    for name in NAMES:
        case = Case(name, torch.float32, False)
        parts = [part.clone().requires_grad_() for part in case.parts]
        weights = [linear.weight for linear in case.linears]
        with fused():
            found = kept(lambda case=case, parts=parts: case.run(parts, case.linears), weights)
            assert found == sum(part.numel() * 4 for part in parts)
            with torch.no_grad():
                outs = case.run(parts, case.linears)
                assert not any(out.requires_grad for out in outs if out is not parts[0])
            for linear in case.linears:
                linear.requires_grad_(False)
            assert kept(lambda case=case: case.run(case.parts, case.linears)) == 0


def twice() -> None:
    """A second derivative is refused; the first is the same."""
    for name in NAMES:
        case = Case(name, torch.float32, True)
        with fused():
            parts = [part.clone().requires_grad_() for part in case.parts]
            want = torch.autograd.grad(case.run(parts, case.linears), parts, case.slopes)
            got = torch.autograd.grad(case.run(parts, case.linears), parts, case.slopes, create_graph=True)
            assert all(torch.equal(mine, other) for mine, other in zip(got, want, strict=True))
            with pytest.raises(GradientError, match=r"those of SimpleRMSNorm\(fused=False\) can"):
                got[0].sum().backward()


if __name__ == "__main__":
    main(globals())
