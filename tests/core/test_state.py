"""States: copies, files, pools, and merging with its own gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import linattn
from linattn import LRPE, Cosine, State, errors

KINDS = ["numpy", "torch"]


def run(kind: str, n: int = 20, rows: int = 3, seed: int = 0, **options: Any) -> tuple[Any, Any, Any, State]:
    rng = np.random.default_rng(seed)
    x: list[Any] = [rng.integers(-3, 4, (rows, n, 2, d)).astype(np.float64) for d in (4, 4, 3)]  # exact sums
    if kind == "torch":
        x = [torch.from_numpy(part) for part in x]
    _, state = linattn.attention(*x, return_state=True, **options)
    return *x, state


def host(x: Any) -> np.ndarray:
    return x.numpy() if isinstance(x, torch.Tensor) else x


def same(a: State, b: State) -> None:
    for x, y in ((a.kv, b.kv), (a.z, b.z), (a.length, b.length)):
        if x is None or y is None:
            assert x is y
        else:
            assert type(x) is type(y)
            assert x.dtype == y.dtype
            assert np.array_equal(host(x), host(y))
    assert (a.feature_map, a.reweight, a.d) == (b.feature_map, b.reweight, b.d)


def test_states_are_selected_and_merged_inside_a_compiler() -> None:
    decay, turned = -torch.arange(2.0, dtype=torch.float64), Cosine(99)
    parts = [run("torch", seed=seed, log_decay=decay, reweight=turned)[-1] for seed in range(2)]

    def beams(left: State, right: State, rows: torch.Tensor) -> State:
        return linattn.merge_states(left, right, log_decay=decay, reweight=turned).select(rows)

    rows = torch.tensor([2, 0, 0])
    compiled = torch.compile(beams, fullgraph=True, backend="aot_eager")
    same(compiled(*parts, rows), beams(*parts, rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_file_gives_every_bit_back(kind: str, normalize: bool, tmp_path: Path) -> None:
    *_, state = run(kind, normalize=normalize, feature_map="relu", reweight=Cosine(30))
    state.save(tmp_path / "state.safetensors")
    same(State.load(tmp_path / "state.safetensors", kind=kind), state)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    *_, state = run("numpy")
    path = tmp_path / "state.safetensors"
    state.save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(errors.CheckpointError, match="is damaged or no safetensors file"):
        State.load(path)
    with pytest.raises(errors.CheckpointError, match="does not exist"):
        State.load(tmp_path / "none")
    with pytest.raises(errors.CheckpointError, match="cannot write"):
        state.save(tmp_path / "no" / "folder")


def test_a_state_that_lacks_a_tensor(tmp_path: Path) -> None:
    from linattn import safetensors_io

    safetensors_io.save(tmp_path / "x", {"kv": np.zeros(3)})
    with pytest.raises(errors.StateError, match="no tensor length"):
        State.load(tmp_path / "x")


@pytest.mark.parametrize("kind", KINDS)
def test_clone_and_select_share_nothing(kind: str) -> None:
    *_, state = run(kind)
    before = host(state.kv).copy()
    for copy in (state.clone(), state.select([2, 0, 0])):
        copy.kv[...] = 7
        copy.length[...] = 7
    assert np.array_equal(host(state.kv), before)
    assert state.select([2, 0]).kv[0].tolist() == before[2].tolist()


def test_a_torch_state_moves() -> None:
    *_, state = run("torch")
    assert state.to("meta").kv.device.type == "meta"
    with pytest.raises(errors.ArgumentTypeError, match="moves torch states"):
        run("numpy")[3].to("cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_slots_continue_rows_of_a_pool(kind: str, packed: bool) -> None:
    """Named rows are continued in place, padding gives 0, and every other row keeps its bits."""
    q, k, v, _ = run(kind)
    *_, pool = run(kind, rows=5, seed=1)
    slots: Any = np.array([4, -1, 1])
    cu: Any = np.array([0, 20, 40, 60])
    if kind == "torch":
        slots, cu = torch.from_numpy(slots), torch.from_numpy(cu)
    before = pool.clone()
    want, final = linattn.attention(q, k, v, initial_state=before.select([4, 0, 1]), return_state=True)
    if packed:
        flat = [x.reshape(1, 60, 2, -1) for x in (q, k, v)]
        got = linattn.attention(*flat, initial_state=pool, slots=slots, cu_seqlens=cu).reshape(3, 20, 2, 3)
    else:
        got = linattn.attention(q, k, v, initial_state=pool, slots=slots)
    for row, slot in ((0, 4), (2, 1)):
        assert np.array_equal(host(got[row]), host(want[row]))
        same(pool.select([slot]), final.select([row]))
    assert not host(got[1]).any()
    same(pool.select([0, 2, 3]), before.select([0, 2, 3]))


def test_a_merged_state_has_gradients() -> None:
    torch.manual_seed(0)
    kv = [torch.randn(2, 2, 6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    theta = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    decay = (-torch.rand(2, dtype=torch.float64)).requires_grad_()

    def merge(left: torch.Tensor, right: torch.Tensor, theta: torch.Tensor, decay: torch.Tensor) -> Any:
        lengths = torch.tensor([3, 0]), torch.tensor([2, 5])
        states = [State(x, None, length) for x, length in zip((left, right), lengths, strict=True)]
        return linattn.merge_states(*states, log_decay=decay, reweight=LRPE(theta)).kv

    assert torch.autograd.gradcheck(merge, (*kv, theta, decay))


def test_attention_leaves_its_initial_state_alone() -> None:
    q, k, v, state = run("numpy")
    before = state.clone()
    _, after = linattn.attention(q, k, v, initial_state=state, return_state=True)
    same(state, before)
    assert not np.shares_memory(after.kv, state.kv)
    _, passed = linattn.attention(q[:, :0], k[:, :0], v[:, :0], initial_state=state, return_state=True)
    same(passed, State(state.kv, None, state.length, None, None, 4))
    assert not np.shares_memory(passed.kv, state.kv)
