"""The kernels for tensor cores without a GPU: properties of the suite, with a warp's products by hand."""

from __future__ import annotations

import ctypes
import itertools
import re
from typing import Any

import pytest

import linattn
from linattn import testing
from linattn.backends.cupy import CupyBackend, tensor
from linattn.backends.cupy.launch import Blocks, Room
from linattn.backends.cupy.tensor import Shape
from linattn.testing import arrays
from linattn.testing.properties.equality import compare_gradients, gradient_limits
from linattn.testing.subject import natives
from tests.cupy.hosted import COMPILER, Host, library
from tests.triton.drawing import check, drawn, rows

pytest.importorskip("torch", reason="torch is not installed, and NumPy has no bfloat16")
pytestmark = pytest.mark.skipif(
    COMPILER is None, reason="g++ is not installed, by which the kernels run on a CPU"
)

EXAMPLES = 1
LENGTHS = (0, 1, 5, 63, 64, 65, 130)


class Narrow(Host):
    """A host with tensor cores, and blocks of one shape."""

    def __init__(self, *shapes: Shape) -> None:
        super().__init__()
        self.shapes = shapes

    def room(self, like: Any) -> Room:
        return Room(1 << 18, (Blocks(32, 16),), self.shapes)


class Warps(testing.BackendSubject):
    """The backend on torch's arrays, in dtypes whose operands are rounded."""

    def __init__(self, dtype: str, *shapes: Shape, precision: str = "ieee") -> None:
        super().__init__(CupyBackend(runner=Narrow(*shapes), arrays={"torch": False}), "torch", "cpu")
        self.dtype, self.shapes, self.precision = dtype, shapes, precision
        self.reach, self.narrow = 300, True

    def axes(self) -> dict[str, tuple[Any, ...]]:
        return {"dtype": (self.dtype,)}

    def adapt(self, case: testing.Case) -> testing.Case:
        return case.replace(precision=self.precision)

    def expression(self) -> tuple[str, str]:
        shapes = "".join(f", {one!r}" for one in self.shapes)
        made = f"Warps({self.dtype!r}{shapes}, precision={self.precision!r})"
        return "; from tests.cupy.test_warps import Shape, Warps", made


SUBJECTS = {
    "bfloat16": ("bfloat16", (Shape(64, 2),), "ieee"),
    "bfloat16 in shared memory": ("bfloat16", (Shape(32, 0),), "ieee"),
    "float16": ("float16", (Shape(32, 1), Shape(32, 0)), "ieee"),
    "tf32": ("float32", (Shape(32, 0),), "tf32"),
}


def subject(kind: str) -> Warps:
    dtype, shapes, precision = SUBJECTS[kind]
    return Warps(dtype, *shapes, precision=precision)


TELLING = {
    "bfloat16": sorted(testing.PROPERTIES),
    "bfloat16 in shared memory": [
        "gradients_match_the_reference",
        "matches_the_reference",
        "splits_anywhere",
    ],
    "float16": ["gradients_match_the_reference", "matches_the_reference"],
    "tf32": ["matches_the_reference", "reads_any_strides", "splits_anywhere"],
}
TRIED = [(name, kind) for kind, names in TELLING.items() for name in names]


@pytest.mark.parametrize(("name", "kind"), TRIED)
def test_property(pytestconfig: pytest.Config, name: str, kind: str) -> None:
    of = subject(kind)
    chosen = rows(of, name, full=pytestconfig.getoption("all_rows", False))
    assert check(of, name, (drawn(name, row, LENGTHS, i) for row in chosen for i in range(EXAMPLES)))


WIDE: dict[str, dict[str, Any]] = {
    "columns": {"d": 70, "e": 72, "decay": "head", "feature_map": "elu+1", "scale": -0.37},
    "angles": {
        "d": 60,
        "e": 62,
        "reweight": "lrpe",
        "decay": "token",
        "normalize": True,
        "feature_map": "relu",
    },
    "sums": {
        "d": 62,
        "e": 60,
        "reweight": "cosine",
        "normalize": True,
        "feature_map": "silu",
        "causal": False,
    },
}


def wide_case(of: Warps, name: str) -> testing.Case:
    options = {"n": 70, "heads": 2, "dtype": of.dtype, "rates": (0.1, 1.0), "values": 1.0, **WIDE[name]}
    return of.adapt(testing.Case(state=options.get("causal", True), **options))


@pytest.mark.parametrize("kind", SUBJECTS)
@pytest.mark.parametrize("name", WIDE)
def test_chunks_and_slices(name: str, kind: str) -> None:
    """More features than a chunk has, more columns than a slice."""
    of = subject(kind)
    for prop in ("matches_the_reference", "gradients_match_the_reference"):
        testing.PROPERTIES[prop].check(of, wide_case(of, name))


@pytest.mark.parametrize("kind", SUBJECTS)
def test_gradients_with_fixed_angles(kind: str) -> None:
    """Those of angles are formed in float64, with the others; where nobody asks for them, these are not."""
    torch, of = pytest.importorskip("torch", reason="torch is not installed"), subject(kind)
    x = wide_case(of, "angles").replace(normalize=False, decay="head").inputs()
    given, _ = natives(of, x)
    leaves = {name: given[name].requires_grad_() for name in ("q", "k", "v", "log_decay")}
    o = of.run(x, given).o
    do = arrays.place(x.do, "torch", of.dtype).array
    found = torch.autograd.grad(o, list(leaves.values()), do)
    want = linattn.reference.gradients(x.q, x.k, x.v, x.do, None, **x.options())
    read = {name: arrays.back(part) for name, part in zip(leaves, found, strict=True)}
    compare_gradients(
        read, {name: want[name] for name in leaves}, gradient_limits(of, x.replace(dstate=None)), x
    )
    assert {re.match(r"\w+", one)[0] for one in of.backend.given.kernels} == {"tensor", "suffix_sums"}


@pytest.mark.parametrize("dtype", tensor.SIZES)
def test_shared_memory_is_counted_as_the_kernel_counts_it(dtype: str) -> None:
    names = {"bfloat16": "__nv_bfloat16", "float16": "__half", "float32": "float"}
    for shape in {one for _, shapes, _ in SUBJECTS.values() for one in shapes}:
        chosen = f"-DHOST_T={names[dtype]}", f"-DHOST_BE={shape.columns}", f"-DHOST_HELD={shape.held}"
        count = library("tensor.cu", *chosen).tensor_bytes
        count.restype = ctypes.c_int64
        for f, turns, normalize in itertools.product((1, 64, 128, 300), (0, 1, 70), (False, True)):
            told = count(*(ctypes.c_int64(x) for x in (f, turns, normalize)))
            assert shape.shared(dtype, f, turns, normalize=normalize) == told


def test_a_decay_of_0_forgets_nan() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for kind in ("bfloat16", "tf32"):
        of = subject(kind)
        q = torch.ones((1, 3, 2, 4), dtype=getattr(torch, of.dtype))
        state = linattn.State.zeros(q, 1, 2, 4, 4)
        state.kv[...] = torch.nan
        decay = torch.full((2,), -torch.inf)
        options = {"precision": of.precision, "backend": of.backend, "return_state": True}
        o, final = linattn.attention(q, q, q, log_decay=decay, initial_state=state, **options)
        assert torch.isfinite(o).all()
        assert torch.isfinite(final.kv).all()
