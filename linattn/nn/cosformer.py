"""cosFormer attention with the released module's arguments and parameter names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import linattn
from linattn.checks import check_state
from linattn.errors import OptionError, ShapeError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

FEATURE_MAPS = {"relu": "relu", "elu": "elu+1"}


class CosformerAttention(nn.Module):
    """Multi-head cosFormer attention: relu features, cosine reweighting, normalised rows; linear in the
    length.

    A drop-in for the released module: the same arguments, defaults and parameters (`q_proj`, `k_proj`,
    `v_proj`, `out_proj`, which exists even with has_outproj=False), the same outputs. What differs is what
    did not work there: act_fun="elu" is elu(x) + 1, vdim counts without kdim too, and causal attention
    between unequal lengths is refused. dropout_rate is stored and, as in the released module, applied
    nowhere.

    batch_first: inputs and outputs are [B, L, E] instead of the released [L, B, E].
    max_len: the M of the cosine, at least every position that will ever be seen. None takes max(L, S) of each
    call,
    as the released module does: then outputs of a prefix change as the text grows, and nothing can be
    streamed.

    Raises OptionError unless num_heads divides embed_dim, or for an unknown act_fun.
    Source: Qin et al. 2022, cosFormer, https://arxiv.org/abs/2202.08791; `CosformerAttention` of its released
    code.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kdim: int | None = None,
        vdim: int | None = None,
        dropout_rate: float = 0.0,
        causal: bool = False,
        has_outproj: bool = True,
        act_fun: str = "relu",
        *,
        batch_first: bool = False,
        max_len: int | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise OptionError(f"num_heads must divide embed_dim, got {num_heads} heads and width {embed_dim}")
        if act_fun not in FEATURE_MAPS:
            raise OptionError(f"act_fun must be one of {', '.join(FEATURE_MAPS)}, got {act_fun!r}")
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.causal = causal
        self.has_outproj = has_outproj
        self.feature_map = FEATURE_MAPS[act_fun]
        self.batch_first = batch_first
        self.reweight = linattn.Cosine(max_len)
        self.k_proj = nn.Linear(self.kdim, embed_dim)
        self.v_proj = nn.Linear(self.vdim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        query: Float[torch.Tensor, "l b e"],
        key: Float[torch.Tensor, "s b k"] | None = None,
        value: Float[torch.Tensor, "s b v"] | None = None,
        attn_mask: torch.Tensor | None = None,
        eps: float = 1e-6,
        *,
        key_mask: Bool[torch.Tensor, "b s"] | None = None,
        state: linattn.State | None = None,
        return_state: bool = False,
        backend: Any = "auto",
    ) -> torch.Tensor | tuple[torch.Tensor, linattn.State]:
        """Attend from query to key and value; each missing one is the query, as in the released module.

        Shapes are for batch_first=False; `l` and `s` are the lengths. attn_mask: only the causal mask of a
        causal module is taken ([L, L], bool with True above the diagonal, or float with -inf there and 0
        elsewhere), which says nothing new; the released module ignores whatever it is given. key_mask: True
        where a key counts. state continues (causal, with max_len); return_state gives (output, state).

        Raises OptionError for any other attn_mask, ShapeError for lengths that disagree, and what
        `linattn.attention` raises.
        """
        key = query if key is None else key
        value = query if value is None else value
        if query.ndim != 3 or key.ndim != 3 or value.ndim != 3:
            ranks = f"{query.ndim}, {key.ndim} and {value.ndim}"
            raise ShapeError(f"query, key and value must have 3 axes each, got {ranks}")
        for name, x, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.shape[2] != width:
                raise ShapeError(f"{name} must be {width} wide, got {tuple(x.shape)}")
        axis = 1 if self.batch_first else 0
        if key.shape[:2] != value.shape[:2]:
            raise ShapeError(
                f"key and value must have one length and batch, got {tuple(key.shape)} and "
                f"{tuple(value.shape)}; a missing value is the query, as in the released module"
            )
        if self.causal and query.shape[axis] != key.shape[axis]:
            raise ShapeError(
                f"causal attention needs query and key of one length, got {query.shape[axis]} and "
                f"{key.shape[axis]}: the positions of two texts have no common past. Cross with causal=False"
            )
        if attn_mask is not None:
            self._check_mask(attn_mask, query.shape[axis])
        q, k, v = (
            self._heads(project(x))
            for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )  # fmt: skip
        out = linattn.attention(
            q, k, v, **self.options(), eps=eps, causal=self.causal, key_mask=key_mask,
            initial_state=state, return_state=return_state, backend=backend,
        )  # fmt: skip
        if not return_state:
            return self._joined(out)
        o, after = out
        return self._joined(o), after

    def step(
        self, x: Float[torch.Tensor, "b e"], state: linattn.State, *, eps: float = 1e-6, backend: Any = "auto"
    ) -> Float[torch.Tensor, "b e"]:
        """Attend from one more token per row (causal self-attention) and advance the state in place.

        Raises OptionError unless the module is causal.
        """
        if not self.causal:
            raise OptionError("step needs causal=True: without an order of tokens there is no state")
        q, k, v = (_split(project(x), self.num_heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        o = linattn.decode_step(q, k, v, state, **self.options(), eps=eps, backend=backend)
        return self._out(o.flatten(1))

    def options(self) -> dict[str, Any]:
        """Return this module's keywords for `linattn.attention` and `linattn.decode_step`."""
        return {"reweight": self.reweight, "feature_map": self.feature_map, "normalize": True}

    def initial_state(self, batch: int) -> linattn.State:
        """Return the state of `batch` texts before their first token, on the module's device."""
        d = self.embed_dim // self.num_heads
        return linattn.State.zeros(self.q_proj.weight, batch, self.num_heads, d, d, **self.options())

    def check_state(self, x: Float[torch.Tensor, "b *n e"], state: linattn.State) -> None:
        """Raise what `step` raises for a state that is not this module's for rows x; nothing is computed."""
        d = self.embed_dim // self.num_heads
        check_state(
            state,
            x,
            (x.shape[0], self.num_heads, d, d),
            reweight="cosine",
            feature_map=self.feature_map,
            normalize=True,
        )

    def _heads(self, x: torch.Tensor) -> Float[torch.Tensor, "b n h d"]:
        x = x if self.batch_first else x.transpose(0, 1)
        return _split(x, self.num_heads)

    def _joined(self, o: Float[torch.Tensor, "b n h d"]) -> torch.Tensor:
        return self._out(o.flatten(2) if self.batch_first else o.flatten(2).transpose(0, 1))

    def _out(self, y: Float[torch.Tensor, "*b e"]) -> torch.Tensor:
        projected: torch.Tensor = self.out_proj(y) if self.has_outproj else y
        return projected

    def _check_mask(self, mask: torch.Tensor, length: int) -> None:
        if not self.causal:
            raise OptionError(
                "attn_mask must be None when causal=False: linear attention has no matrix of pairs to mask. "
                "To hide keys, pass key_mask."
            )
        if tuple(mask.shape) != (length, length):
            raise OptionError(
                f"attn_mask must be the causal mask ({length}, {length}), got {tuple(mask.shape)}"
            )
        above = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
        expected = (
            above if mask.dtype == torch.bool else torch.zeros_like(mask).masked_fill(above, -torch.inf)
        )
        if not torch.equal(mask, expected):
            raise OptionError(
                "attn_mask may only be the causal mask, which causal=True means already; pass None"
            )


def _split(x: Float[torch.Tensor, "*b e"], heads: int) -> Float[torch.Tensor, "*b h d"]:
    return x.reshape(
        *x.shape[:-1], heads, x.shape[-1] // heads
    )  # a view, whatever the order of the axes before
