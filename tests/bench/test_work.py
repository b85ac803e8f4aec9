"""The computation that stands beside the library's is the same function."""

import numpy as np
import torch

import linattn
from linattn import tolerance
from linattn.bench.cases import Figure
from linattn.bench.work import inputs, prepare, released_cosformer


def test_the_restated_cosformer_is_cosformer():
    n, heads, d, e = 70, 2, 5, 3
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, n, heads, size)) for size in (d, d, e))
    heads_first = (torch.from_numpy(x.swapaxes(1, 2)) for x in (q, k, v))
    restated = released_cosformer(*heads_first).numpy().swapaxes(1, 2)
    ours = linattn.cosformer_attention(*(torch.from_numpy(x) for x in (q, k, v)), causal=True).numpy()
    exact = linattn.cosformer_attention(q, k, v, causal=True, backend="reference")
    allowed = tolerance.bound(
        q,
        k,
        v,
        rounding=tolerance.Rounding("float64"),
        theta=np.full((heads, d), np.pi / (2 * n)),
        feature_map="relu",
        normalize=True,
    ).o
    assert (abs(restated - exact) <= allowed).all()
    assert (abs(ours - restated) <= 2 * allowed).all()


def test_everyone_gets_the_same_inputs():
    ours, theirs = (
        prepare(Figure(who, "cosformer", 40))().numpy() for who in ("torch", "released cosFormer")
    )
    q, k, v = inputs(40, 3)
    again = linattn.cosformer_attention(*(torch.from_numpy(x) for x in (q, k, v)), causal=True)
    assert (ours == again.numpy()).all()
    allowed = tolerance.bound(
        q,
        k,
        v,
        rounding=tolerance.Rounding("float32"),
        theta=np.full((q.shape[2], q.shape[3]), np.pi / 80),
        feature_map="relu",
        normalize=True,
    ).o
    assert (abs(ours - theirs.swapaxes(1, 2)) <= 2 * allowed).all()


def test_forward_and_backward_leave_nothing_behind():
    call = prepare(Figure("torch", "decay", 20, backward=True))
    first, second = call(), call()
    assert [tuple(x.shape) for x in first] == [(1, 20, 8, 64)] * 3
    assert all((x == y).all() for x, y in zip(first, second, strict=True))
