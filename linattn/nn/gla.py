"""Gated linear attention, the token mixer of TransNormerLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import linattn
from linattn.arrays import traced
from linattn.checks import check_feature_map, check_flag, check_ints, check_state
from linattn.errors import ArgumentTypeError, OptionError, ShapeError, ValueRangeError
from linattn.nn.fused import gated, normed
from linattn.nn.lrpe import Lrpe, device_of_new
from linattn.nn.norm import SimpleRMSNorm
from linattn.prepared import PLAIN

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class GatedLinearAttention(nn.Module):
    """W_o(u * SRMS(o)), where o is causal linear attention with a decay per head.

    One projection `qkvu_proj` gives q, k, v and the gate u, each hidden_dim wide with the heads contiguous
    inside; feature_map acts on q and k only. The norm runs over the concatenated heads, `out_proj` maps
    back to embed_dim. hidden_dim may differ from embed_dim, with and without LRPE.

    log_decay: [H], natural log of the factor per token, <= 0 (a schedule of `linattn.decay`), or None for no
    decay.
    use_lrpe: adds `lrpe`, learnable angles per head and feature. feature_map: as of `linattn.attention`.

    Raises OptionError unless num_heads divides hidden_dim, or for another feature_map, ShapeError when
    log_decay is not [H], ValueRangeError when it is above 0, ArgumentTypeError for sizes that are no int and
    flags that are no bool.
    Source: TransNormerLLM, arXiv:2307.14995, section 3.2; names and order from the released
    `NormLinearAttention`.
    """

    log_decay_bits: torch.Tensor | None
    _rounded: tuple[torch.Tensor, tuple[int, int], dict[int, torch.Tensor]] | None = None

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        num_heads: int,
        *,
        log_decay: Float[np.ndarray, " h"] | None = None,
        use_lrpe: bool = False,
        bias: bool = False,
        feature_map: str | None = "silu",
    ) -> None:
        super().__init__()
        check_ints(embed_dim=embed_dim, hidden_dim=hidden_dim, num_heads=num_heads)
        for name, flag in (("use_lrpe", use_lrpe), ("bias", bias)):
            check_flag(name, flag)
        check_feature_map(feature_map)
        if num_heads < 1 or hidden_dim % num_heads:
            raise OptionError(
                f"num_heads must divide hidden_dim, got {num_heads} heads and width {hidden_dim}"
            )
        try:
            table = None if log_decay is None else np.array(log_decay, np.float64)
        except (TypeError, ValueError, RuntimeError) as error:  # of tensors: those with gradients, of devices
            raise ArgumentTypeError(f"log_decay must be an array of numbers: {error}") from error
        if table is not None and table.shape != (num_heads,):
            raise ShapeError(f"log_decay must have shape ({num_heads},), one per head, got {table.shape}")
        if table is not None and not (table <= 0).all():
            raise ValueRangeError("log_decay must be <= 0 (natural log of a factor in (0, 1]), in each head")
        self.num_heads = num_heads
        self.head_dim = hidden_dim // num_heads
        self.feature_map = feature_map
        self.qkvu_proj = nn.Linear(embed_dim, 4 * hidden_dim, bias=bias)
        self.out_proj = nn.Linear(hidden_dim, embed_dim, bias=bias)
        self.norm = SimpleRMSNorm()
        self.lrpe = Lrpe(num_heads, self.head_dim) if use_lrpe else None
        # The bits of the float64 table in an integer buffer: it follows the module to a device, and no cast
        # of the module to another float type rounds it. Not saved: the schedule and the layer's index say
        # what it is.
        self.table = table
        bits, device = self.decay_bits(), device_of_new()
        if bits is not None and device.type != "meta":  # from there nothing brings them back with `assign`
            bits = bits.to(device)
        self.register_buffer("log_decay_bits", bits, persistent=False)

    def decay_bits(self) -> torch.Tensor | None:
        """The table of log decays as the buffer holds it."""
        return None if self.table is None else torch.from_numpy(self.table.copy()).view(torch.int64)

    def as_scheduled(self) -> bool:
        """Whether the decays are still those of the schedule; those on the meta device are none yet."""
        bits, table = self.log_decay_bits, self.decay_bits()
        if bits is None or table is None:
            return bits is table
        return bits.is_meta or torch.equal(bits.cpu(), table)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """What moves the module. `to_empty` leaves anything in a new buffer: it gets what the old one had."""
        before = self.log_decay_bits
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and before is not self.log_decay_bits:
            self._fill(self.decay_bits() if before.is_meta else before)
        return self

    def reset_parameters(self) -> None:
        """Write the schedule's decays again. Weights and angles are those of the modules in here, and reset
        by them.
        """
        self._fill(self.decay_bits())

    def _fill(self, bits: torch.Tensor | None) -> None:
        now = self.log_decay_bits
        if now is not None and bits is not None and not now.is_meta and type(now) in PLAIN:
            self.log_decay_bits = bits.to(now.device, copy=True)

    @property
    def log_decay(self) -> Float[torch.Tensor, " h"] | None:
        """The log decay per head, float64 on the module's device, or None."""
        bits = self.log_decay_bits
        if isinstance(bits, torch.Tensor) and traced() and not torch.compiler.is_compiling():
            # torch.jit has no such view: a constant
            return torch.from_numpy(bits.cpu().numpy().view(np.float64)).to(bits.device)
        return bits.view(torch.float64) if isinstance(bits, torch.Tensor) else None

    def project(
        self, x: Float[torch.Tensor, "*b e"]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q, k, v [*b, H, D], before any activation, and the gate u [*b, hidden_dim]."""
        return self.split(self.qkvu_proj(x))

    def split(
        self, qkvu: Float[torch.Tensor, "*b f"]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the parts of a projected row, as `project` does."""
        parts: Any = qkvu.chunk(4, -1)
        q, k, v, u = parts
        heads = (self.num_heads, self.head_dim)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads), u

    def options(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Return this layer's keywords for `linattn.attention` and `linattn.decode_step` on such inputs."""
        reweight = None if self.lrpe is None else self.lrpe()
        return {"log_decay": self.decays(dtype), "reweight": reweight, "feature_map": self.feature_map}

    def decays(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The log decays, on a GPU rounded to float32 once for each stream and not in a kernel of each call.

        Without gradients the call that rounds them still gets the float64 ones: kernels that read tables
        early (`linattn.models.decoding`) must not meet them just written. With gradients it gets what later
        calls get, as checkpointing wants the same tensors when it computes a layer again.
        """
        bits = self.log_decay_bits
        if dtype == torch.float64 or torch.compiler.is_compiling() or bits is None or not _on_gpu(bits):
            return self.log_decay
        # what writes around torch's count of versions, into `bits.data`, is not seen
        known, now = self._rounded, (0 if bits.is_inference() else bits._version, bits.data_ptr())
        if known is None or known[0] is not bits or known[1] != now:
            known = bits, now, {}
        stream = _stream(bits)
        if (rounded := known[2].get(stream)) is not None:
            return rounded
        if type(bits) not in PLAIN:
            return self.log_decay
        if torch.cuda.is_current_stream_capturing():
            # A graph would fill what is kept only when it is replayed. What other streams filled is there, as
            # a capture begins when they have ended.
            return next(iter(known[2].values()), self.log_decay)
        with torch.inference_mode(False):
            known[2][stream] = rounded = bits.view(torch.float64).float()
        self._rounded = known
        return rounded if torch.is_grad_enabled() else self.log_decay

    def forward(
        self,
        x: Float[torch.Tensor, "b n e"],
        *,
        state: linattn.State | None = None,
        return_state: bool = False,
        lengths: Int[torch.Tensor, " b"] | None = None,
        key_mask: Bool[torch.Tensor, "b n"] | None = None,
        cu_seqlens: Int[torch.Tensor, " s1"] | None = None,
        backend: Any = "auto",
        prenorm: SimpleRMSNorm | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, linattn.State]:
        """Mix the positions of x; with `return_state`, also give the state to continue from.

        state, lengths, key_mask and cu_seqlens mean what they mean to `linattn.attention`: lengths for right
        padding (the state stops there, it is not decayed by the padding), key_mask for left padding.
        prenorm: return x + mixed(prenorm(x)) in place of mixed(x), a residual branch as a whole, which keeps
        less for its backward pass where the fused norm runs (`linattn.nn.fused`).
        Raises what `linattn.attention` raises.
        """
        if prenorm is None:
            q, k, v, u = self.project(x)
        else:
            x, qkvu = normed(prenorm, (self.qkvu_proj,), x)
            q, k, v, u = self.split(qkvu)
        out = linattn.attention(
            q, k, v, **self.options(q.dtype), lengths=lengths, key_mask=key_mask, cu_seqlens=cu_seqlens,
            initial_state=state, return_state=return_state, backend=backend,
        )  # fmt: skip
        o, after = out if return_state else (out, None)
        mixed = self._gated(o, u)
        if prenorm is not None:
            mixed = x + mixed
        return mixed if after is None else (mixed, after)

    def step(
        self, x: Float[torch.Tensor, "b e"], state: linattn.State, *, backend: Any = "auto"
    ) -> torch.Tensor:
        """Mix one more token per row; the state moves on in place. The numbers are those of `forward`."""
        q, k, v, u = self.project(x)
        o = linattn.decode_step(q, k, v, state, **self.options(q.dtype), backend=backend)
        return self._gated(o, u)

    def initial_state(self, sequences: int) -> linattn.State:
        """Return the state of `sequences` texts before their first token, on the module's device."""
        reweight = None if self.lrpe is None else self.lrpe()
        d = self.head_dim
        return linattn.State.zeros(
            self.out_proj.weight,
            sequences,
            self.num_heads,
            d,
            d,
            reweight=reweight,
            feature_map=self.feature_map,
        )

    def check_state(self, x: Float[torch.Tensor, "b *n e"], state: linattn.State) -> None:
        """Raise what `step` raises for a state that is not this layer's for rows x; nothing is computed."""
        check_state(
            state,
            x,
            (x.shape[0], self.num_heads, self.head_dim, self.head_dim),
            reweight=None if self.lrpe is None else "lrpe",
            feature_map=self.feature_map,
            normalize=False,
        )

    def _gated(self, o: Float[torch.Tensor, "*b h d"], u: Float[torch.Tensor, "*b e"]) -> torch.Tensor:
        return gated(self.norm, self.out_proj, o.flatten(-2), u)


def _on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda


def _stream(x: torch.Tensor) -> int:
    return int(torch._C._cuda_getCurrentRawStream(x.device.index))
