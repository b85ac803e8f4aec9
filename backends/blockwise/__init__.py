"""Lightning Attention over an array namespace: one algorithm for NumPy, torch and anything like them.

A sequence is cut into blocks. Inside a block pairs are weighed one by one; everything before it comes through
the state. Forward and backward are exact for decays per head and per token, for both reweightings, for padded
and packed batches.
"""

from linattn.backends.blockwise.rows import backward, forward
from linattn.backends.blockwise.step import decode_step

__all__ = ["backward", "decode_step", "forward"]
