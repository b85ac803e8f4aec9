"""The properties: plain functions `property(kernel_or_backend, case)` that assert and return nothing."""

from linattn.testing.properties.equality import (
    follows_the_closed_form,
    gradients_follow_the_closed_form,
    gradients_match_the_reference,
    matches_at_any_width,
    matches_the_reference,
)
from linattn.testing.properties.independence import (
    is_causal,
    keeps_heads_apart,
    keeps_nan_in_its_sequence,
    keeps_rows_apart,
)
from linattn.testing.properties.memory import (
    gives_the_same_bits_twice,
    leaves_its_inputs_alone,
    reads_any_strides,
    reads_only_its_inputs,
    returns_memory_of_its_own,
    returns_the_right_kind,
    writes_every_output,
)
from linattn.testing.properties.plan import PROPERTIES, Property
from linattn.testing.properties.selection import (
    cuts_at_lengths,
    forgets_at_minus_infinity,
    packs_as_if_separate,
    takes_masked_keys_as_zero,
    takes_zero_decay_as_none,
)
from linattn.testing.properties.states import (
    continues_only_named_rows,
    decodes_as_the_whole,
    decodes_only_named_rows,
    merges_into_the_whole,
    splits_anywhere,
)

__all__ = [
    "PROPERTIES",
    "Property",
    "continues_only_named_rows",
    "cuts_at_lengths",
    "decodes_as_the_whole",
    "decodes_only_named_rows",
    "follows_the_closed_form",
    "forgets_at_minus_infinity",
    "gives_the_same_bits_twice",
    "gradients_follow_the_closed_form",
    "gradients_match_the_reference",
    "is_causal",
    "keeps_heads_apart",
    "keeps_nan_in_its_sequence",
    "keeps_rows_apart",
    "leaves_its_inputs_alone",
    "matches_at_any_width",
    "matches_the_reference",
    "merges_into_the_whole",
    "packs_as_if_separate",
    "reads_any_strides",
    "reads_only_its_inputs",
    "returns_memory_of_its_own",
    "returns_the_right_kind",
    "splits_anywhere",
    "takes_masked_keys_as_zero",
    "takes_zero_decay_as_none",
    "writes_every_output",
]
