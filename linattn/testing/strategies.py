"""Hypothesis strategies for cases: sizes off the blocks' edges, decays, seeds, layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linattn.testing.case import RATES, Case, Inputs
from linattn.testing.variants import combinations, fields_of

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

EDGES = (0, 1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 150, 200)
"""Lengths at which blocks of any usual size end, begin, or are cut."""

EPS = (1e-6, 1.0, 1e-3)
"""Clamps of a denominator: the usual one, one that many denominators meet, one between them."""

WIDTHS = (16, 20, 33, 64, 65, 128)
"""Features at which tiles of any usual size end, begin, or are cut."""


def cases(
    options: dict[str, Any] | None = None,
    *,
    longest: int = 200,
    layouts: tuple[str, ...] = ("plain",),
    sizes: tuple[int, ...] = (),
    wide: bool = False,
    **fixed: Any,
) -> SearchStrategy[Case]:
    """Draw a Case with these options (a row of `combinations`; None: any row of the pairwise array).

    `fixed` sets fields of the case; `longest` caps the lengths, or `sizes` lists them. `wide` draws features
    or heads as models have them.
    """
    from hypothesis import strategies as st

    rows = [options] if options is not None else combinations()
    edges = [n for n in EDGES if n <= longest]

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case:
        chosen = fields_of(draw(st.sampled_from(rows)))
        n = draw(
            st.sampled_from(sizes) if sizes else st.one_of(st.sampled_from(edges), st.integers(0, longest))
        )
        far = n > longest
        heads = draw(st.sampled_from([1, 2, 4, 5, 9] if wide else [1, 2] if far else [1, 2, 3]))
        features, values = ([1, 3], [1, 2]) if far else ([1, 3, 4, 5, 8], [1, 2, 3, 6, 8])
        if wide and heads < 3:
            features = values = list(WIDTHS)
        picked: dict[str, Any] = {
            "n": n,
            "batch": draw(st.integers(1, 3 if wide else 2)),
            "heads": heads,
            "d": draw(st.sampled_from(features)),
            "e": draw(st.sampled_from(values)),
            "seed": draw(st.integers(0, 2**16)),
            "layout": draw(st.sampled_from(layouts)),
            "values": draw(st.sampled_from([1.0, 8.0, 300.0])),
        }
        if (
            not chosen.get("causal", True)
            and not (chosen["packed"] or chosen["lengths"])
            and draw(st.booleans())
        ):
            picked["m"] = draw(st.integers(0, longest))
        if chosen["packed"]:
            picked["sequences"] = draw(st.sampled_from((1, 2, 3, 4, 5, 9)))
        if chosen.get("normalize"):  # the sums of a drawn state are in no proportion: float16 would overflow
            half = chosen["state"] and chosen.get("dtype") == "float16"
            picked["eps"] = 1.0 if half else draw(st.sampled_from(EPS))
        if chosen.get("decay") is not None:
            picked["rates"] = tuple(sorted(draw(st.sets(st.sampled_from(RATES), min_size=1, max_size=3))))
        return Case(**(chosen | picked | fixed))

    return draw_case()


def inputs(case: Case | SearchStrategy[Case]) -> SearchStrategy[Inputs]:
    """Draw the inputs of a case, or of cases: a seed more than the case's own."""
    from hypothesis import strategies as st

    given = st.just(case) if isinstance(case, Case) else case
    return st.builds(lambda one, seed: one.replace(seed=seed).inputs(), given, st.integers(0, 2**16))
