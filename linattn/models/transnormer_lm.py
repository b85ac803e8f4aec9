"""TransNormerLLM as a small language model in plain torch, with the released parameter names."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import linattn
from linattn import decay
from linattn.errors import OptionError, StateError
from linattn.models import decoding, parts
from linattn.models.config import PRESETS, TransNormerConfig
from linattn.models.ids import check_ids, check_tensor
from linattn.models.persistent import End
from linattn.nn import SGLU, GatedLinearAttention, SimpleRMSNorm
from linattn.nn.fused import unwatched
from linattn.nn.norm import unseen

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["PRESETS", "TransNormerConfig", "TransNormerLM", "TransNormerLayer"]


class TransNormerLayer(nn.Module):
    """x += token_mixer(SRMS(x)), then x += channel_mixer(SRMS(x)); `index` counts layers from 0."""

    def __init__(self, config: TransNormerConfig, index: int) -> None:
        super().__init__()
        self.norm = SimpleRMSNorm()
        self.token_mixer = GatedLinearAttention(
            config.embed_dim,
            config.hidden_dim,
            config.num_heads,
            log_decay=decay.transnormer(
                config.num_heads, index, config.num_layers, schedule=config.decay_schedule
            ),
            use_lrpe=config.uses_lrpe(index),
            bias=config.bias,
            feature_map=config.feature_map,
        )
        self.channel_mixer = SGLU(config.embed_dim, config.glu_dim, bias=config.bias)

    def forward(
        self,
        x: Float[torch.Tensor, "b n e"],
        state: linattn.State | None,
        return_state: bool,
        lengths: torch.Tensor | None,
        key_mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, linattn.State | None]:
        """Return the layer's output and, if asked for, its state after the last token."""
        out = self._branch(
            self.token_mixer,
            x,
            state=state,
            return_state=return_state,
            lengths=lengths,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
        )
        x, after = out if return_state else (out, None)
        return self._branch(self.channel_mixer, x), after

    def _branch(self, mixer: nn.Module, x: torch.Tensor, **options: Any) -> Any:
        """x + mixer(norm(x)), and what else the mixer returns; formed by the mixer unless hooks watch it."""
        if unwatched(mixer, GatedLinearAttention, SGLU):
            return mixer(x, prenorm=self.norm, **options)
        out = mixer(self.norm(x), **options)
        return (x + out[0], *out[1:]) if isinstance(out, tuple) else x + out

    def step(self, x: Float[torch.Tensor, "b e"], state: linattn.State) -> Float[torch.Tensor, "b e"]:
        """Take one more token per row; the state moves on in place."""
        x = x + self.token_mixer.step(self.norm(x), state)
        mixed: torch.Tensor = x + self.channel_mixer(self.norm(x))
        return mixed


parts.stands_for(TransNormerLayer, "step")


class TransNormerLM(nn.Module):
    """A causal language model of TransNormer layers: token ids in, logits out.

    Parameters: `embed_tokens`, `layers.N.token_mixer.{qkvu_proj, out_proj, lrpe.theta}`,
    `layers.N.channel_mixer.{l1, l2, l3}`, `lm_head`; the norms have none, the decays are no parameters.
    The memory of a text is one `State` per layer, of a size that does not depend on the text's length.

    graphs (an attribute, which may be changed): on a GPU, steps of the same states are a CUDA graph from the
    third one on, unless the kernels of `linattn.models.decoding` do not take them.
    one_kernel (an attribute, too): steps of one text go through all layers in one kernel, where there is one
    (`linattn.models.persistent`).

    Source: TransNormerLLM, arXiv:2307.14995; the order of residuals, the embedding's scale and the untied
    head are the released code's.
    """

    graphs = one_kernel = True

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embed_dim)
        self.layers = nn.ModuleList(TransNormerLayer(config, index) for index in range(config.num_layers))
        self.norm = SimpleRMSNorm()
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: residual rows of variance 1, to which each layer adds little at first."""
        config = self.config
        scale = 1.0 if config.no_scale_embedding else math.sqrt(config.embed_dim)
        nn.init.normal_(self.embed_tokens.weight, std=1.0 / scale)
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and not name.startswith("embed_tokens"):
                into_residual = name.endswith(("out_proj.weight", "l3.weight"))
                gain = 1.0 / math.sqrt(2 * config.num_layers) if into_residual else 1.0
                nn.init.normal_(weight, std=gain / math.sqrt(weight.shape[1]))
        nn.init.zeros_(self.lm_head.weight)

    def embed(self, ids: Int[torch.Tensor, "*b"]) -> Float[torch.Tensor, "*b e"]:
        """Return x_0 = sqrt(embed_dim) * Emb[ids], or without the factor if the configuration says so."""
        check_ids(ids, self.embed_tokens, self.config.vocab_size)
        x: torch.Tensor = self.embed_tokens(ids)
        return x if self.config.no_scale_embedding else x * math.sqrt(self.config.embed_dim)

    def forward(
        self,
        ids: Int[torch.Tensor, "b n"],
        states: Sequence[linattn.State] | None = None,
        lengths: Int[torch.Tensor, " b"] | None = None,
        cu_seqlens: Int[torch.Tensor, " s1"] | None = None,
        return_states: bool = False,
        key_mask: Bool[torch.Tensor, "b n"] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[linattn.State]]:
        """Return logits [b, n, vocab_size] and, with return_states, the states after the last tokens, one per
        layer.

        states: one per layer, from an earlier call, which this one continues; they are not changed.
        lengths: real tokens per row when rows are padded on the right; key_mask: False on left padding.
        cu_seqlens: b is 1 and n holds several texts back to back; then there is one state row per text.

        Raises ArgumentTypeError, ShapeError, DtypeError or ValueRangeError for bad ids (values only where
        they lie on the host), StateError for a wrong number of states, and what `linattn.attention` raises.
        """
        check_tensor("ids", ids, "b n")
        x = self.embed(ids)
        before = [None] * len(self.layers) if states is None else self._check_states(states)
        after = []
        for layer, state in zip(self.layers, before, strict=True):
            x, new = layer(x, state, return_states, lengths, key_mask, cu_seqlens)
            after.append(new)
        logits: torch.Tensor = self.lm_head(self.norm(x))
        return (logits, after) if return_states else logits

    def step(
        self, ids: Int[torch.Tensor, " b"], states: Sequence[linattn.State]
    ) -> Float[torch.Tensor, "b v"]:
        """Take one more token per row and return its logits; the states move on in place. No gradients.

        Time and memory do not depend on how much text came before. `initial_states` starts from nothing.
        Raises OptionError for layers, and token mixers, of a class with a `forward` of its own and no `step`,
        and for ids and states what a call raises.
        """
        check_tensor("ids", ids, "b")
        with torch.no_grad():
            x = self.embed(ids)
            layers = self._layers()
            other = next((layer for layer in layers if not _steps_as_called(layer)), None)
            if other is not None:
                names = f"{type(other).__name__} with a {type(compiled_of(other.token_mixer)).__name__}"
                raise OptionError(
                    f"a class with a forward of its own needs a step to it, one of a {names} has none"
                )
            how = {"graphs": self.graphs, "one_kernel": self.one_kernel}
            end = End(self.norm, self.lm_head)
            return decoding.ended(layers, self._check_states(states), x, end, **how)[1]

    def initial_states(self, sequences: int) -> list[linattn.State]:
        """Return the states of `sequences` texts before their first token."""
        return [layer.token_mixer.initial_state(sequences) for layer in self._layers()]

    def _layers(self) -> list[TransNormerLayer]:
        layers = [compiled_of(layer) for layer in self.layers]
        found = [layer for layer in layers if isinstance(layer, TransNormerLayer)]
        if len(found) < len(layers):
            other = next(layer for layer in layers if not isinstance(layer, TransNormerLayer))
            raise OptionError(
                f"layers that take steps must be TransNormerLayers, got a {type(other).__name__}"
            )
        return found

    def _check_states(self, states: Sequence[linattn.State]) -> list[linattn.State]:
        if len(states) != len(self.layers):
            raise StateError(
                f"states must hold one State for each of {len(self.layers)} layers, got {len(states)}"
            )
        return list(states)


def compiled_of(layer: nn.Module) -> nn.Module:
    """The module that torch.compile made a module of, or the module itself."""
    inner = layer._modules.get("_orig_mod")
    return layer if inner is None else inner


def steppers(layers: Iterable[nn.Module]) -> list[TransNormerLayer] | None:
    """The layers whose `step` does what calling `layers` with one token would, out of compilers' wrappings.

    None where a call of one, or of its token mixer, which takes steps, too, may be something else: of another
    module, of a class with a `forward` of its own and no `step`, or where hooks see or replace it.
    """
    found = []
    for layer in layers:
        inner = compiled_of(layer)
        if not isinstance(inner, TransNormerLayer) or not _steps_as_called(inner):
            return None
        hooked = inner is not layer and (layer._forward_hooks or layer._forward_pre_hooks)
        if hooked and not torch.compiler.is_compiling():
            return None
        found.append(inner)
    if not unseen(*found, *(layer.token_mixer for layer in found)):  # whose step is called, too
        return None
    return found


def _steps_as_called(layer: TransNormerLayer) -> bool:
    """Whether the classes of a layer and its token mixer have steps that know of their `forward`."""
    mixer = compiled_of(layer.token_mixer)
    return _knows(type(layer), TransNormerLayer) and _knows(type(mixer), GatedLinearAttention)


def _knows(kind: type, own: Any) -> bool:
    """Whether a class, if it replaced the `forward` of the one that it comes from, has a `step` to it."""
    if not issubclass(kind, own):
        return hasattr(kind, "step")
    for one in kind.__mro__:  # what comes first counts
        if one is own or "step" in one.__dict__:
            return True
        if inspect.unwrap(one.__dict__.get("forward", own.forward)) is not inspect.unwrap(own.forward):
            return False
    return True
