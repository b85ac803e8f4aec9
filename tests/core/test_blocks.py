"""Blocks tile an axis exactly, and a packed table gives every token to one block of its own sequence."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from linattn import blocks
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
    assert many == 1 or many * size * 2 * d * 4 * 4 <= blocks.SCRATCH["cpu"]
