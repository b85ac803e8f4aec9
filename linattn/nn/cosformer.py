"""cosFormer attention with the released module's arguments and parameter names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import linattn
from linattn import features
from linattn.arrays import dtype_name, readable, traced
from linattn.checks import check_ends, check_eps, check_flag, check_ints, check_state
from linattn.errors import ArgumentTypeError, DtypeError, OptionError, ShapeError, ValueRangeError
from linattn.surroundings import as_they_are

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

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
    call, as the released module does: then outputs of a prefix change as the text grows, and nothing can be
    streamed.

    Raises OptionError unless num_heads divides embed_dim, or for an unknown act_fun; ArgumentTypeError for
    flags that are no bool and sizes that are no int.
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
        kdim, vdim = (embed_dim if width is None else width for width in (kdim, vdim))
        check_ints(embed_dim=embed_dim, num_heads=num_heads, kdim=kdim, vdim=vdim)
        if num_heads < 1 or embed_dim % num_heads:
            raise OptionError(f"num_heads must divide embed_dim, got {num_heads} heads and width {embed_dim}")
        if not isinstance(act_fun, str) or act_fun not in FEATURE_MAPS:
            raise OptionError(f"act_fun must be one of {', '.join(FEATURE_MAPS)}, got {act_fun!r}")
        for name, flag in (("causal", causal), ("has_outproj", has_outproj), ("batch_first", batch_first)):
            check_flag(name, flag)
        self.embed_dim = embed_dim
        self.kdim = kdim
        self.vdim = vdim
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
        lengths: Int[torch.Tensor, " b"] | None = None,
        state: linattn.State | None = None,
        return_state: bool = False,
        positions: Int[torch.Tensor, "b l"] | None = None,
        backend: Any = "auto",
    ) -> torch.Tensor | tuple[torch.Tensor, linattn.State]:
        """Attend from query to key and value; each missing one is the query, as in the released module.

        Shapes are for batch_first=False; `l` and `s` are the lengths. attn_mask: only the causal mask of a
        causal module is taken ([L, L], bool with True above the diagonal, or float with -inf there and 0
        elsewhere), which says nothing new; the released module ignores whatever it is given. key_mask: True
        where a key counts. lengths: keys of each row from there on do not exist, nor, where the key is the
        query itself or the module causal, do queries: their attention is 0.

        return_state gives (output, state), with max_len. Of a causal module it is what `state` continues. Of
        another one it is all of key and value, in a size that does not depend on theirs: `state` instead of
        them is attended to as they were. The query's tokens then lie at `positions` ([b, l], or [1, l] for
        all rows), 0, 1, … by default, all below max_len but for what lengths leave out.

        Raises OptionError for any other attn_mask, positions where no such state is read or returned, and key
        or value beside one; ShapeError for lengths that disagree; ArgumentTypeError, DtypeError or (values on
        the host) ValueRangeError for what are no masks or positions; and what `linattn.attention` raises.
        """
        check_flag("return_state", return_state)
        axis, reads = 1 if self.batch_first else 0, state is not None and not self.causal
        if positions is not None and (self.causal or not (reads or return_state)):
            raise OptionError(
                "positions are of queries that read a state of all keys: of a module with causal=False, with "
                "state or return_state"
            )
        if attn_mask is not None:
            self._check_mask(attn_mask, query.shape[axis])
        if reads:
            given = {"key": key, "value": value, "key_mask": key_mask, "lengths": lengths}
            for name, x in given.items():
                if x is not None:
                    raise OptionError(
                        f"{name}: a state of keys and values is instead of them, pass one or the other"
                    )
            self._check_width("query", query, self.embed_dim)
            assert state is not None
            out = self._recalled(query, state, positions, eps)
            return (out, state) if return_state else out
        key = query if key is None else key
        value = query if value is None else value
        self._check_lengths(query, key, value)
        if return_state and not self.causal:
            state = self._remembered(key, value, key_mask, lengths, backend)
            return self._recalled(query, state, positions, eps, lengths if key is query else None), state
        if lengths is not None and not self.causal and key is not query:
            key, value, key_mask = self._ended(key, value, key_mask, lengths)
            lengths = None
        q, k, v = (
            self._heads(project(x))
            for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )  # fmt: skip
        out = linattn.attention(
            q, k, v, **self.options(), eps=eps, causal=self.causal, key_mask=key_mask, lengths=lengths,
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

    def _remembered(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor | None,
        lengths: torch.Tensor | None,
        backend: Any,
    ) -> linattn.State:
        """All that queries need of key and value: their state."""
        k, v = self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        _, state = linattn.attention(
            k, k, v, **self.options(), causal=True, key_mask=key_mask, lengths=lengths, return_state=True,
            backend=backend,
        )  # fmt: skip
        assert isinstance(state, linattn.State)
        return state

    def _ended(
        self, key: torch.Tensor, value: torch.Tensor, key_mask: Any, lengths: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and a mask of those before the lengths. What is beyond max_len can be none of them."""
        axis, longest = 1 if self.batch_first else 0, self.reweight.max_len
        b, n = key.shape[1 - axis], key.shape[axis]
        if not traced():
            check_ends(key, key_mask, lengths, (b, n))
        real = _real(lengths, n) if key_mask is None else _real(lengths, n) & key_mask
        if longest is None or n <= longest:
            return key, value, real
        if readable(lengths) and bool((lengths > longest).any()):
            raise ValueRangeError(f"Cosine(max_len={longest}) is shorter than {int(lengths.max())} positions")
        return key.narrow(axis, 0, longest), value.narrow(axis, 0, longest), real[:, :longest]

    def _recalled(
        self,
        query: torch.Tensor,
        memory: linattn.State,
        positions: torch.Tensor | None,
        eps: float,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from rows at any positions to remembered keys; 0 from `lengths` on, where no tokens are.

        The state's frame is the last key at e: cos θ(p - j) = cos θ(p - e) cos θ(e - j) minus
        sin θ(p - e) sin θ(e - j), so a query turned by θ(p - e) reads C and S directly.
        """
        max_len = self.reweight.max_len
        if max_len is None:
            raise OptionError("a state needs max_len: without it the cosine's M is the length of each call")
        if not traced():  # a compiler has a symbol for it
            check_eps(eps)
        rows = query if self.batch_first else query.transpose(0, 1)
        b, n = rows.shape[:2]
        if positions is not None:
            _check_positions(positions, b, n, max_len)
        elif n > max_len and lengths is None and not traced():
            raise ValueRangeError(f"Cosine(max_len={max_len}) is shorter than the query's {n} positions")
        else:
            positions = torch.arange(n, device=rows.device)[None].clamp(max=max_len - 1)
        if not traced():
            self.check_state(rows, memory)
        if readable(memory.length) and bool((memory.length > max_len).any()):
            longest = int(memory.length.max())
            raise ValueRangeError(
                f"Cosine(max_len={max_len}) is shorter than the state's {longest} positions"
            )
        assert memory.z is not None
        q = features.apply(torch, self.feature_map, self._heads(self.q_proj(query))).to(memory.kv.dtype)
        ahead = (positions - memory.length[:, None] + 1)[..., None, None].to(torch.float64)
        angle = ahead * (math.pi / (2 * max_len))
        turned = torch.cat([q * angle.cos().to(q.dtype), q * -angle.sin().to(q.dtype)], -1)  # [b n h 2d]
        with as_they_are(turned.device.type):  # what is left of two large numbers would be lost in halves
            total = torch.einsum("bnhf,bhfe->bnhe", turned, memory.kv)
            weight = torch.einsum("bnhf,bhf->bnh", turned, memory.z)
        o = total / weight.clamp(min=eps)[..., None]
        if lengths is not None:
            o = torch.where(_real(lengths, n)[..., None, None], o, 0)
        return self._joined(o.to(query.dtype))

    def _heads(self, x: torch.Tensor) -> Float[torch.Tensor, "b n h d"]:
        x = x if self.batch_first else x.transpose(0, 1)
        return _split(x, self.num_heads)

    def _joined(self, o: Float[torch.Tensor, "b n h d"]) -> torch.Tensor:
        return self._out(o.flatten(2) if self.batch_first else o.flatten(2).transpose(0, 1))

    def _out(self, y: Float[torch.Tensor, "*b e"]) -> torch.Tensor:
        projected: torch.Tensor = self.out_proj(y) if self.has_outproj else y
        return projected

    def _check_width(self, name: str, x: torch.Tensor, width: int) -> None:
        if x.shape[2:] != (width,):
            raise ShapeError(f"{name} must be {width} wide, got {tuple(x.shape)}")

    def _check_lengths(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if query.ndim != 3 or key.ndim != 3 or value.ndim != 3:
            ranks = f"{query.ndim}, {key.ndim} and {value.ndim}"
            raise ShapeError(f"query, key and value must have 3 axes each, got {ranks}")
        self._check_width("query", query, self.embed_dim)
        self._check_width("key", key, self.kdim)
        self._check_width("value", value, self.vdim)
        if key.shape[:2] != value.shape[:2]:
            raise ShapeError(
                f"key and value must have one length and batch, got {tuple(key.shape)} and "
                f"{tuple(value.shape)}; a missing value is the query, as in the released module"
            )
        axis = 1 if self.batch_first else 0
        if self.causal and query.shape[axis] != key.shape[axis]:
            raise ShapeError(
                f"causal attention needs query and key of one length, got {query.shape[axis]} and "
                f"{key.shape[axis]}: the positions of two texts have no common past. Cross with causal=False"
            )

    def _check_mask(self, mask: torch.Tensor, length: int) -> None:
        if not self.causal:
            raise OptionError(
                "attn_mask must be None when causal=False: linear attention has no matrix of pairs to mask. "
                "To hide keys, pass key_mask."
            )
        if not isinstance(mask, torch.Tensor):
            raise ArgumentTypeError(f"attn_mask must be a tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise DtypeError(f"attn_mask must be bool or of floating point, got {dtype_name(mask)}")
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


def _real(lengths: torch.Tensor, n: int) -> Bool[torch.Tensor, "b n"]:
    """Which of n tokens of each row are before the lengths. ValueRangeError, on the host, for others."""
    if readable(lengths) and bool(((lengths < 0) | (lengths > n)).any()):
        raise ValueRangeError(f"lengths must lie in 0 … N = {n}, got {lengths.tolist()}")
    return torch.arange(n, device=lengths.device) < lengths[:, None]


def _split(x: Float[torch.Tensor, "*b e"], heads: int) -> Float[torch.Tensor, "*b h d"]:
    # a view, whatever the order of the axes before
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def _check_positions(positions: Any, b: int, n: int, max_len: int) -> None:
    """Refuse what are no positions of b rows of n; values only where they lie on the host."""
    if not isinstance(positions, torch.Tensor):
        raise ArgumentTypeError(f"positions must be a tensor, got {type(positions).__name__}")
    if positions.dtype == torch.bool or positions.is_floating_point() or positions.is_complex():
        raise DtypeError(f"positions must be integers, got {dtype_name(positions)}")
    if positions.ndim != 2 or positions.shape[0] not in (1, b) or positions.shape[1] != n:
        raise ShapeError(f"positions must be [{b}, {n}] or [1, {n}], got {tuple(positions.shape)}")
    if readable(positions):
        wrong = (positions < 0) | (positions >= max_len)
        if bool(wrong.any()):
            raise ValueRangeError(
                f"positions must lie in 0 … {max_len - 1}, below max_len, got {positions[wrong][0].item()}"
            )
