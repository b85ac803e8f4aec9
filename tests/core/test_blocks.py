"""Blocks tile an axis exactly, and a packed table gives every token to one block of its own sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import linattn
from linattn import blocks
from linattn.backends.blockwise import causal
from linattn.backends.blockwise.tiles import cut
from linattn.checks import Call, problem_of


@given(total=st.integers(0, 700), size=st.integers(1, 70), per_group=st.integers(1, 9))
def test_groups_tile_the_axis(total: int, size: int, per_group: int) -> None:
    covered = [
        position
        for group in blocks.groups(total, size, per_group)
        for position in range(group.start, group.start + group.blocks * group.size)
    ]
    assert covered == list(range(total))
    assert all(group.blocks <= per_group for group in blocks.groups(total, size, per_group))


@given(spans=st.lists(st.integers(0, 150), max_size=6), reverse=st.booleans())
def test_a_packed_table_holds_every_token_once_and_in_order(spans: list[int], reverse: bool) -> None:
    cu = np.concatenate(([0], np.cumsum(spans, dtype=np.int64))).astype(np.int64)
    x = np.zeros((1, int(cu[-1]), 1, 2), np.float32)
    problem = problem_of(Call(x, x, x, cu_seqlens=cu))
    way = cut(np, problem, None, cu, reverse=reverse)
    seen: dict[int, list[int]] = {s: [] for s in range(len(spans))}
    ends = []
    for tile in way.tiles:
        for g in range(tile.group.blocks):
            real = slice(None) if tile.valid is None else tile.valid[0, g]
            seen[int(tile.sequence[g])] += tile.index[0, g][real].tolist()
            if tile.last[g]:
                ends.append(int(tile.sequence[g]))
    for s, span in enumerate(spans):
        tokens = list(range(int(cu[s]), int(cu[s]) + span))
        assert seen[s] == (tokens[::-1] if reverse else tokens)
    assert ends == [s for s, span in enumerate(spans) if span]
    if spans:
        assert way.empty.tolist() == [span == 0 for span in spans]


@given(n=st.integers(0, 5000), d=st.integers(1, 256), decay=st.sampled_from([None, "head", "token"]))
def test_a_group_keeps_to_the_scratch_limit(n: int, d: int, decay: str | None) -> None:
    x = np.zeros((1, n, 2, d), np.float32)
    table = {None: None, "head": np.zeros(2), "token": np.zeros((1, n, 2))}[decay]
    problem = problem_of(Call(x, x, x, log_decay=table))
    size = blocks.block_size(problem)
    many = blocks.blocks_per_group(problem, size)
    assert many == 1 or many * size * 2 * d * 4 * 4 <= blocks.SCRATCH["cpu"][1]


@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("padded", [False, True])
def test_every_array_inside_has_the_accumulation_dtype(
    monkeypatch: pytest.MonkeyPatch, decay: str, padded: bool
) -> None:
    """NumPy widens int64 times float32 to float64: twice the work, and other bits on the other branch."""
    seen: set[str] = set()
    weigh = causal.block_sum

    def watched(xp: Any, block: causal.Block) -> Any:
        result = weigh(xp, block)
        factors = block.decays.pairs, block.decays.to_query, block.decays.to_end
        for x in (block.fq, block.fk, block.v, *factors, *result):
            seen.update([] if x is None else [x.dtype.name])
        return result

    monkeypatch.setattr(causal, "block_sum", watched)
    q = np.ones((1, 100, 2, 8), np.float16)
    linattn.attention(
        q,
        q,
        q,
        log_decay={"none": None, "head": linattn.decay.alibi(2), "token": np.zeros((1, 100, 2))}[decay],
        reweight=linattn.LRPE(linattn.LRPE.default_theta(2, 8)),
        feature_map="elu+1",
        normalize=True,
        key_mask=np.ones((1, 100), bool),
        lengths=np.array([70]) if padded else None,
    )
    assert seen == {"float32"}
