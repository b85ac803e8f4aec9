"""TransNormerLLM for Hugging Face transformers: released checkpoints, `generate`, `Trainer`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, initialization
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from linattn.errors import OptionError, ShapeError, ValueRangeError
from linattn.models import decoding
from linattn.models.huggingface.inputs import check_inputs, columns_of
from linattn.models.huggingface.labels import IGNORED, asked, check_labels
from linattn.models.huggingface.model import StateGeneration, StateModel, check_options, named
from linattn.models.huggingface.newer import CACHE, cache_given, cache_of
from linattn.models.huggingface.padding import padding_of
from linattn.models.ids import check_ids
from linattn.models.persistent import End
from linattn.models.transnormer.cache import TransNormerCache
from linattn.models.transnormer.configuration import TransNormerConfig
from linattn.models.transnormer.packing import check_apart, check_whole, packed_at
from linattn.models.transnormer_lm import TransNormerLayer, steppers
from linattn.nn import GatedLinearAttention, Lrpe, SimpleRMSNorm, linear_cross_entropy
from linattn.nn.norm import bare, only_matrix
from linattn.state import State

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["TransNormerForCausalLM", "TransNormerModel", "TransNormerPreTrainedModel"]


class TransNormerBlock(GradientCheckpointingLayer, TransNormerLayer):
    """A layer whose activations can be formed again in the backward pass."""


class TransNormerPreTrainedModel(StateModel):
    """What both models share: how weights begin, and how checkpoints are read."""

    config: TransNormerConfig
    config_class = TransNormerConfig
    cache_class = TransNormerCache
    _no_split_modules: ClassVar[list[str]] = ["TransNormerBlock"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["lrpe"]  # angles keep their bits

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Lrpe):
            initialization.copy_(module.theta, module.default())
        if isinstance(module, GatedLinearAttention) and module.log_decay_bits is not None:
            initialization.copy_(module.log_decay_bits, module.decay_bits())

    def check_saved(self) -> None:
        """Raise OptionError or ValueRangeError where what would be loaded is another model, or none.

        So it is where somebody changed decays, which are not saved.
        """
        super().check_saved()
        for name, module in self.named_modules():
            if isinstance(module, GatedLinearAttention) and not module.as_scheduled():
                raise OptionError(f"{name} has other decays than decay_schedule says: they are not saved")


class TransNormerModel(TransNormerPreTrainedModel):
    """Token ids in, the last layer's normed rows out; linear in the length, with a memory of constant size.

    x_0 = sqrt(d) Emb[ids]; per layer x += TM(SRMS(x)), x += CM(SRMS(x)); out = SRMS(x_L).

    graphs (an attribute, which may be changed): on a GPU, steps of one token that continue the same cache are
    a CUDA graph from the third one on, unless the kernels of `linattn.models.decoding` do not take them.
    one_kernel (an attribute, too): steps of one text go through all layers in one kernel, where there is one
    (`linattn.models.persistent`).
    Source: TransNormerLLM, arXiv:2307.14995, section 3; `TransnormerModel` of the released code.
    """

    graphs = one_kernel = True
    _left_out = (r"^lm_head\.weight$",)

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(config)
        parts = config.parts()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.decoder_embed_dim, config.pad_token_id)
        self.layers = nn.ModuleList(TransNormerBlock(parts, index) for index in range(config.decoder_layers))
        self.norm = SimpleRMSNorm()
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Int[torch.Tensor, "b n"] | None = None,
        attention_mask: Int[torch.Tensor, "b m"] | None = None,
        position_ids: Int[torch.Tensor, "b n"] | None = None,
        past_key_values: TransNormerCache | None = None,
        inputs_embeds: Float[torch.Tensor, "b n e"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Int[torch.Tensor, " s1"] | None = None,
        cache: TransNormerCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return BaseModelOutputWithPast, or a tuple without return_dict.

        attention_mask: 0 for padding, wherever it is: such a token leaves no trace, in decays and positions
        neither; as wide as the input, or as that and all that a cache has seen. A column of padding has the
        output of the last real token before it, zeros where there is none. past_key_values: continues a text,
        by any number of tokens. cu_seqlens (or transformers' cu_seq_lens_q): b is 1 and n holds texts
        back to back, which do not see each other; seq_idx [b or 1, n] that changes from one real token to the
        next, and position_ids [b or 1, n] that begin again there, say the same, without padding and before
        a cache has seen tokens. Otherwise position_ids say nothing here. inputs_embeds: instead of ids,
        before the factor sqrt(decoder_embed_dim). cache: past_key_values, as newer transformers calls them.

        Raises ArgumentTypeError, ShapeError, DtypeError or ValueRangeError for bad ids and masks, OptionError
        for output_attentions, which do not exist, and for keywords of `linattn.attention`, StateError for a
        cache of other texts or another model, and what `linattn.attention` raises.
        """
        past_key_values = cache_given(past_key_values, cache)
        check_options(kwargs, self.config)
        x = self._embedded(input_ids, inputs_embeds)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        batch, n = x.shape[:2]
        if "borders" in kwargs:  # a head has looked for them already
            borders = kwargs["borders"]
        else:
            borders = packed_at(kwargs, cu_seqlens, position_ids, attention_mask, past_key_values, x)
        if use_cache is None and borders is not None:
            use_cache = False  # it would have a row for each text
        cache, begun = self._cache(past_key_values, use_cache), None
        if cache is not None:
            cache.states_for(len(self.layers), batch if borders is None else borders.shape[0] - 1)
            begun = None if attention_mask is None else cache.begun()
        seen = 0 if cache is None else cache.columns
        padding = padding_of(attention_mask, batch, n, begun, seen)
        if attention_mask is not None and padding is not None and borders is not None:
            check_whole(attention_mask, n)
            padding = None  # compilers did not look
        if cache is not None:
            cache.check_seen(attention_mask, n)
        joined = borders is not None and batch > 1
        if joined:
            if cu_seqlens is not None or kwargs.get("cu_seq_lens_q") is not None:
                raise ShapeError(f"cu_seqlens packs texts in one row, so b must be 1, got {batch}")
            x = x.reshape(1, batch * n, x.shape[2])  # rows of packed texts, one row after the other
        x = x if padding is None else padding.to_front(x)
        lengths = None if padding is None else padding.lengths
        count = len(self.layers) + 1 if output_hidden_states else 1
        before = [None] * count if cache is None else cache.before(count, padding)
        seen = [x]
        wanted: decoding.Wanted | None = kwargs.get("wanted")  # by a head
        for row in self._layers(x, cache, lengths, borders, bool(output_hidden_states), wanted):
            seen = [*seen, row] if output_hidden_states else [row]
        if wanted is None or wanted.logits is None:
            seen[-1] = self.norm(seen[-1])
        # as they are wherever possible: a gradient that somebody retains is that of what a layer took
        if padding is not None:
            seen = [padding.after(row, old) for row, old in zip(seen, before, strict=True)]
        if cache is not None:
            cache.keep(seen, borders)
        if joined:
            seen = [row.reshape(batch, n, row.shape[2]) for row in seen]
        rows = tuple(seen)
        found = BaseModelOutputWithPast(
            last_hidden_state=rows[-1],
            **{CACHE: cache},
            hidden_states=rows if output_hidden_states else None,
        )
        return found if named(return_dict, self.config) else found.to_tuple()

    def _embedded(self, ids: torch.Tensor | None, embeds: torch.Tensor | None) -> torch.Tensor:
        check_inputs(ids, embeds, self.config.decoder_embed_dim, self.layers)
        x = embeds
        if ids is not None:
            check_ids(ids, self.embed_tokens, self.config.vocab_size)
            x = self.embed_tokens(ids)
        assert x is not None
        return x if self.config.no_scale_embedding else x * math.sqrt(self.config.decoder_embed_dim)

    def _layers(
        self,
        x: torch.Tensor,
        cache: TransNormerCache | None,
        lengths: torch.Tensor | None,
        borders: torch.Tensor | None,
        each: bool,
        wanted: decoding.Wanted | None,
    ) -> Iterator[torch.Tensor]:
        """Yield what each layer gives, or, unless each is wanted, the last one at least.

        The cache is brought up to date once all have. wanted: gets the logits of a step, if it is one that
        forms them; then the last row is yielded normed.
        """
        n = x.shape[1]
        states: list[State | None] = [None] * len(self.layers)
        if cache is not None and cache.states:
            states = [*cache.states]
        stepping = n == 1 and states[0] is not None and lengths is None and borders is None
        stepping = stepping and not torch.is_grad_enabled()
        after: list[State] = []
        blocks = steppers(self.layers) if stepping else None
        if blocks is not None:
            assert cache is not None
            if each:
                for row in decoding.steps(blocks, cache.states, x[:, 0]):
                    yield row[:, None]
            else:
                both = None
                if wanted is not None:
                    end = End(self.norm, wanted.head)
                    both = decoding.whole(blocks, cache.states, x[:, 0], end, graphs=self.graphs)
                if wanted is not None and both is not None:
                    row, wanted.logits = both
                else:
                    how = {"graphs": self.graphs, "one_kernel": self.one_kernel}
                    row = decoding.last(blocks, cache.states, x[:, 0], **how)
                yield row[:, None]
            cache.columns += n
            return
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, state, cache is not None, lengths, None, borders)
            if state is not None:
                after.append(state)
            yield x
        if cache is not None:
            cache.states, cache.columns = after, cache.columns + n


class TransNormerForCausalLM(TransNormerPreTrainedModel, StateGeneration, GenerationMixin):
    """A TransNormerModel and a head without bias: logits of the next token, a loss where labels are given.

    `generate` goes greedily, samples and keeps beams, with padding on either side, and continues a
    `TransNormerCache` by any number of tokens.

    loss_chunk: in training, the loss and its gradients are formed from the logits of so many tokens at a time
    (`linattn.nn.linear_cross_entropy`), and no logits are returned: their memory does not grow with the text.
    A head that somebody replaced or watches (adapters, quantisation, hooks) is called as it is, and its
    logits are formed again in the backward pass. None: all at once, as for a `loss_function` of one's own.
    Source: TransNormerLLM, arXiv:2307.14995; `TransnormerForCausalLM` of the released code.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(config)
        self.model = TransNormerModel(config)
        self.lm_head = nn.Linear(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.loss_chunk: int | None = None
        self.post_init()

    @property
    def graphs(self) -> bool:
        """Whether steps may become CUDA graphs: the attribute of the model inside, `TransNormerModel`."""
        return self.model.graphs

    @graphs.setter
    def graphs(self, on: bool) -> None:
        self.model.graphs = on

    @property
    def one_kernel(self) -> bool:
        """Whether steps of one text may be one kernel: the attribute of the model inside."""
        return self.model.one_kernel

    @one_kernel.setter
    def one_kernel(self, on: bool) -> None:
        self.model.one_kernel = on

    def forward(
        self,
        input_ids: Int[torch.Tensor, "b n"] | None = None,
        attention_mask: Int[torch.Tensor, "b m"] | None = None,
        position_ids: Int[torch.Tensor, "b n"] | None = None,
        past_key_values: TransNormerCache | None = None,
        inputs_embeds: Float[torch.Tensor, "b n e"] | None = None,
        labels: Int[torch.Tensor, "b n"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = 0,
        cu_seqlens: Int[torch.Tensor, " s1"] | None = None,
        cache: TransNormerCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return CausalLMOutputWithPast: logits [b, n, vocab_size], and what the model returns.

        labels: the ids themselves, shifted inside; -100 where nothing is asked. logits_to_keep: logits of the
        last so many columns only, or of these; 0 or None for all, which labels ask for. Everything else:
        `TransNormerModel.forward`.
        """
        past_key_values, columns = cache_given(past_key_values, cache), columns_of(logits_to_keep)
        labels = check_labels(
            labels, input_ids, inputs_embeds, self.config.vocab_size, kwargs, logits_to_keep
        )
        given = inputs_embeds if input_ids is None else input_ids
        borders = packed_at(kwargs, cu_seqlens, position_ids, attention_mask, past_key_values, given)
        wanted, inner = None, self.model
        # nobody else's rows may lie between the layers and the head
        plain = type(inner) is TransNormerModel and not torch.compiler.is_compiling()
        if labels is None and plain and inner.one_kernel and bare([inner]):
            kwargs["wanted"] = wanted = decoding.Wanted(self.lm_head)
        found = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
            output_hidden_states, True, cu_seqlens, borders=borders, **kwargs,
        )  # fmt: skip
        if labels is not None:
            labels, kwargs = asked(labels, attention_mask, borders, kwargs)
        logits = loss = None
        by_chunks = self.training and self.loss_chunk is not None and self.loss_function is ForCausalLMLoss
        if wanted is not None and wanted.logits is not None:
            logits = wanted.logits[:, None][:, columns]
        elif labels is None or not by_chunks:
            logits = decoding.logits(self.lm_head, found.last_hidden_state[:, columns])
        else:
            loss = self._loss_by_chunks(found.last_hidden_state, labels, **kwargs)
        if labels is not None and logits is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        answer = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=found.hidden_states, **{CACHE: cache_of(found)}
        )
        return answer if named(return_dict, self.config) else answer.to_tuple()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any
    ) -> None:
        check_apart(model_kwargs)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)

    def _loss_by_chunks(
        self,
        rows: torch.Tensor,
        labels: torch.Tensor,
        *,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        ignore_index: int = IGNORED,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The mean over what is asked, here or (num_items_in_batch) in all passes of a step."""
        if type(self.loss_chunk) is not int or self.loss_chunk < 0:
            raise ValueRangeError(
                f"loss_chunk must be None or a number of tokens, 0 for all, got {self.loss_chunk!r}"
            )
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:]
        x, wanted = rows.flatten(0, 1), shift_labels.flatten().to(rows.device)
        if only_matrix(self.lm_head):
            total = linear_cross_entropy(
                x, self.lm_head.weight, wanted, chunk=self.loss_chunk or None, ignore_index=ignore_index
            )
        else:
            total = x.new_zeros((), dtype=torch.float32)
            for start in range(0, len(x), self.loss_chunk or len(x)):
                part = slice(start, start + (self.loss_chunk or len(x)))
                total = total + checkpoint(
                    self._summed_loss, x[part], wanted[part], ignore_index, use_reentrant=False
                )
        if num_items_in_batch is None:
            num_items_in_batch = (wanted != ignore_index).sum()
        elif isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    def _summed_loss(self, x: torch.Tensor, wanted: torch.Tensor, ignore_index: int) -> torch.Tensor:
        logits = self.lm_head(x).float()
        return nn.functional.cross_entropy(logits, wanted, ignore_index=ignore_index, reduction="sum")
