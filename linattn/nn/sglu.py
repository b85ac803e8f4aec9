"""SGLU: a gated linear unit whose gate has no activation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from linattn.checks import check_flag, check_ints
from linattn.nn.fused import fusing, normed, product
from linattn.nn.norm import SimpleRMSNorm

if TYPE_CHECKING:
    from jaxtyping import Float


class SGLU(nn.Module):
    """W_3((W_1 x) * (W_2 x)), the channel mixer of TransNormerLLM.

    `l1` and `l2` map embed_dim to glu_dim, `l3` maps back; no bias unless asked for, no activation.

    Raises ArgumentTypeError for sizes that are no int, or a bias that is no bool.
    Source: TransNormerLLM, arXiv:2307.14995, section 3.3; names from the released `GLU`.
    """

    def __init__(self, embed_dim: int, glu_dim: int, bias: bool = False) -> None:
        super().__init__()
        check_ints(embed_dim=embed_dim, glu_dim=glu_dim)
        check_flag("bias", bias)
        self.l1 = nn.Linear(embed_dim, glu_dim, bias=bias)
        self.l2 = nn.Linear(embed_dim, glu_dim, bias=bias)
        self.l3 = nn.Linear(glu_dim, embed_dim, bias=bias)

    def forward(
        self, x: Float[torch.Tensor, "... e"], *, prenorm: SimpleRMSNorm | None = None
    ) -> Float[torch.Tensor, "... e"]:
        """Mix the channels of every position on its own.

        prenorm: return x + mixed(prenorm(x)), a residual branch as a whole, which keeps less for its backward
        pass where the fused norm runs (`linattn.nn.fused`).
        """
        if prenorm is None:
            mixed: torch.Tensor = self.l3(self.l1(x) * self.l2(x))
            return mixed
        x, a, b = normed(prenorm, (self.l1, self.l2), x)
        return x + (product(self.l3, a, b) if fusing(prenorm) else self.l3(a * b))
