"""What the models share: reading checkpoints, choosing a cache, preparing calls of `generate`."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from linattn.errors import OptionError, ShapeError, StateError, ValueRangeError
from linattn.models.huggingface.cache import StateCache
from linattn.models.huggingface.loading import load_whole
from linattn.models.huggingface.newer import CACHE, CHECKPOINTS
from linattn.models.huggingface.saved import check_modules
from linattn.models.names import meant

__all__ = ["StateExpansion", "StateGeneration", "StateModel", "check_options", "named"]

# what functions and layers take under other names: ignored, it would be missed
INSTEAD = {
    "key_mask": "attention_mask, 0 for padding",
    "lengths": "attention_mask, 0 for padding",
    "states": "past_key_values",
    "initial_state": "past_key_values",
    "return_state": "use_cache",
    "return_states": "use_cache",
    "cu_seqlens_q": "cu_seqlens",
    "cu_seqlens_k": "cu_seqlens",
}


# keywords that a model or its loss looks at
TAKEN = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels", "use_cache",
    "output_attentions", "output_hidden_states", "return_dict", "logits_to_keep", "cu_seqlens", "seq_idx",
    "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "encoder_outputs",
    "encoder_hidden_states", "encoder_attention_mask", "shift_labels", "num_items_in_batch", "ignore_index",
)  # fmt: skip
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
OLD = {
    "past_key_value": "past_key_values",
    "cache_params": "past_key_values",
    "num_logits_to_keep": "logits_to_keep",
}


COMPILED = "_orig_mod."  # in the names of what torch.compile has wrapped


def _compiled(model: nn.Module) -> bool:
    return any("_orig_mod" in module._modules for module in model.modules())


class StateModel(PreTrainedModel):
    """A model whose memory is states. cache_class: what it takes and gives as past_key_values."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    cache_class: ClassVar[type[StateCache]] = StateCache
    _is_stateful = True  # no assisted generation: a state cannot be rolled back
    _new_heads: ClassVar[tuple[str, ...]] = ()  # what a checkpoint of another task need not have
    _unlike: ClassVar[tuple[str, ...]] = ()  # classes with the same tensors that compute otherwise
    _left_out: ClassVar[tuple[str, ...]] = ()  # patterns of what it may have more: another task's head

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own

    def post_init(self) -> None:
        """What transformers does last; tensors that a model inside would leave out count for a whole one."""
        # before those of a model inside come up
        own: Any = self._keys_to_ignore_on_load_unexpected or ()  # type: ignore[has-type]
        super().post_init()
        self._keys_to_ignore_on_load_unexpected = {*self._left_out, *own}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any = None, *arguments: Any, **options: Any
    ) -> Any:
        """Load a checkpoint of safetensors, as `PreTrainedModel.from_pretrained`, or nothing of it.

        A head of another task than the checkpoint's begins anew, where a class has such. Everything else:
        `linattn.models.huggingface.loading.load_whole`.
        """
        load, new = super().from_pretrained, (cls.__name__, cls._new_heads)
        prefix, path = f"{cls.base_model_prefix}.", pretrained_model_name_or_path
        return load_whole(load, path, *arguments, new=new, prefix=prefix, unlike=cls._unlike, **options)

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Any = None,
        *rest: Any,
        **options: Any,
    ) -> Any:
        """Write weights and configuration, as transformers does; of compiled modules by the names before.

        Raises OptionError or ValueRangeError for a configuration that loading would refuse, or that is not
        this model's any more; nothing is written then.
        """
        self.check_saved()
        if not getattr(self, "_hf_peft_config_loaded", False):  # peft asks by the names that modules have now
            own = self.state_dict() if state_dict is None and _compiled(self) else state_dict or {}
            if any(COMPILED in name for name in own):
                state_dict = {name.replace(COMPILED, ""): x for name, x in own.items()}
        return super().save_pretrained(save_directory, is_main_process, state_dict, *rest, **options)

    def load_state_dict(self, state_dict: Any, *arguments: Any, **options: Any) -> Any:
        """Take tensors, as `nn.Module.load_state_dict`, of compiled modules by either name."""
        if _compiled(self):
            own = {name.replace(COMPILED, ""): name for name in self.state_dict()}
            state_dict = {own.get(name.replace(COMPILED, ""), name): x for name, x in state_dict.items()}
        return super().load_state_dict(state_dict, *arguments, **options)

    def check_saved(self) -> None:
        """Raise OptionError or ValueRangeError where what would be loaded is another model, or none."""
        self.config.check_saved()
        check_modules(self)

    def train(self, mode: bool = True) -> Self:
        """Begin or end training, as `nn.Module.train`.

        Raises ValueRangeError for special tokens without an embedding: what is learned could not be saved.
        """
        if mode:
            check_special(self.config, self.config.vocab_size)
        super().train(mode)
        return self

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *rest: Any,
        **options: Any,
    ) -> nn.Embedding:
        """Give the embeddings so many rows, as transformers does.

        Raises ValueRangeError where there would be none, or none of a special token of the configuration.
        """
        if new_num_tokens is not None:
            rows = new_num_tokens + (-new_num_tokens) % (pad_to_multiple_of or 1)
            check_special(self.config, rows)
        made: nn.Embedding = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, *rest, **options
        )
        return made

    def _cache(self, given: Any, use_cache: bool | None) -> Any:
        """What to continue and to keep; None where nothing is to be kept."""
        if given is not None and not isinstance(given, self.cache_class):
            name = self.cache_class.__name__
            raise OptionError(
                f"past_key_values must be a {name}, got {type(given).__name__}: a state has no place for "
                "keys and values, those that prefix tuning prepends included"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if given is not None:
            how = getattr(getattr(self, "_gradient_checkpointing_func", None), "keywords", {})
            reentrant = bool(self._computes_again() and how.get("use_reentrant"))
            if torch.is_grad_enabled() and (given.severed or (reentrant and given.has_graph())):
                raise OptionError(
                    "past_key_values and use_reentrant=True: no gradient would reach the call that has "
                    "filled them, pass use_reentrant=False in gradient_checkpointing_kwargs, or, to cut "
                    "gradients there, a copy.deepcopy of them"
                )
            given.severs = reentrant
        if self._computes_again():
            use_cache = False  # the second forward pass would see the state of the first
        return self.cache_class() if given is None and use_cache else given

    def _computes_again(self) -> bool:
        """Whether activations of this call are computed once more for its gradients."""
        return self.training and getattr(self, CHECKPOINTS) and torch.is_grad_enabled()


class StateExpansion(GenerationMixin):
    """`generate` of several texts from each prompt: a given cache's rows are repeated as the prompts are."""

    def _prepare_model_inputs(self, *arguments: Any, **named: Any) -> Any:
        """What transformers prepares. Raises ShapeError for what are no rows of prompts with a token each."""
        found = super()._prepare_model_inputs(*arguments, **named)
        shape = found[0].shape
        if len(shape) != (3 if found[1] == "inputs_embeds" else 2) or shape[0] == 0:
            wanted = "[b, n, e]" if found[1] == "inputs_embeds" else "[b, n]"
            raise ShapeError(
                f"{found[1]} must have shape {wanted}, a row for each of at least one prompt, got "
                f"{tuple(shape)}"
            )
        if not self.config.is_encoder_decoder and shape[1] == 0:
            raise ShapeError(
                f"a prompt must have at least one token (such as bos_token_id), got {found[1]} of shape "
                f"{tuple(shape)}"
            )
        return found

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """What transformers repeats; of a cache that has a row a prompt, a copy with a row a text.

        One that has a row for every text already is continued as it is.
        """
        expanded: tuple[torch.Tensor, dict[str, Any]] = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        ids, given = expanded
        cache = given.get(CACHE)
        if expand_size == 1 or ids is None or not isinstance(cache, StateCache):
            return expanded
        if cache.rows * expand_size == len(ids):
            given[CACHE] = cache = copy.copy(cache)  # repeating gives the copy states of its own
            cache.batch_repeat_interleave(expand_size)
        return ids, given

    def generate_batch(self, *arguments: Any, **options: Any) -> Any:
        """Raise OptionError: continuous batching keeps pages of keys and values."""
        raise OptionError(
            "continuous batching keeps pages of keys and values, and a state has none: pad the prompts and "
            "call generate"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any
    ) -> None:
        """What transformers prepares.

        Raises OptionError for a cache that is given and not to be used, and for kinds of caches of keys.
        """
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise OptionError(
                f"cache_implementation={kind!r} is a way to keep keys and values: states have a constant "
                "size, leave it out"
            )
        if model_kwargs.get(CACHE) is not None and generation_config.use_cache is False:
            raise OptionError(
                "past_key_values with use_cache=False: each step would read the prompt into them again, pass "
                "use_cache=True or no cache"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)


class StateGeneration(StateExpansion):
    """`generate` of a decoder whose memory is states; transformers wants GenerationMixin named beside it."""

    cache_class: ClassVar[type[StateCache]]

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        is_first_iteration: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What transformers prepares; for a generated token no mask, as all that is new is real.

        Raises StateError for a prompt of which the cache has seen every token.
        """
        wanted = kwargs.get("next_sequence_length")
        check_unseen(kwargs.get(CACHE), wanted)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            is_first_iteration=bool(is_first_iteration),
            **kwargs,
        )
        if use_cache and wanted == 1 and not is_first_iteration:
            inputs["attention_mask"] = None
        if use_cache and not is_first_iteration:
            inputs.pop("seq_idx", None)  # of the prompt's tokens
        inputs.pop("position_ids", None)
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any
    ) -> None:
        piece = generation_config.prefill_chunk_size
        if piece is not None and (type(piece) is not int or piece < 1):
            raise OptionError(f"prefill_chunk_size must be a number of tokens, got {piece!r}")
        if piece is not None and model_kwargs.get("inputs_embeds") is not None:
            raise OptionError("prefill_chunk_size cuts ids into pieces: not with inputs_embeds")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)
        cache = model_kwargs.get(CACHE)
        if generation_config.use_cache and cache is None:
            model_kwargs[CACHE] = self.cache_class()
        elif cache is not None and cache.get_seq_length() and piece:
            raise OptionError("prefill_chunk_size reads a prompt from its beginning: not with a cache of it")


def check_unseen(cache: StateCache | None, columns: int | None) -> None:
    """Raise StateError where so many columns are left of a prompt that none is new to its cache."""
    if cache is not None and columns is not None and columns < 1:
        raise StateError(
            f"the cache has seen {cache.get_seq_length()} columns, all of the prompt: keep one of its "
            "beginning, without the last token"
        )


def check_special(config: Any, rows: int) -> None:
    """Raise ValueRangeError for embeddings of so many rows if a special token's is not among them."""
    if rows < 1:
        raise ValueRangeError(f"embeddings must have at least 1 row, got {rows}")
    for name in SPECIAL:
        ids = getattr(config, name, None)
        for one in ids if isinstance(ids, list | tuple) else [ids]:
            if one is not None and one >= rows:
                raise ValueRangeError(
                    f"{name} {one} is not among {rows} rows of embeddings: set config.{name} (and "
                    f"generation_config.{name}) to one that is, or to None"
                )


def named(return_dict: bool | None, config: Any) -> bool:
    """Whether to answer with names rather than with a tuple."""
    return bool(config.return_dict if return_dict is None else return_dict)


def check_options(given: dict[str, Any], config: Any) -> None:
    """Raise OptionError where a call's keywords ask for what `linattn.attention` takes, and models do not.

    So they do, as the configuration may, with weights of pairs, which nothing here forms, and with names that
    are nearly those of what is taken: models of transformers ignore keywords that they do not know.
    """
    weights = given.get("output_attentions")
    if config.output_attentions if weights is None else weights:
        raise OptionError("output_attentions: linear attention forms no matrix of weights to return")
    for name, instead in INSTEAD.items():
        if given.get(name) is not None:
            raise OptionError(f"{name} is not taken by models of transformers, pass {instead}")
    for name, value in given.items():
        if value is None:
            continue
        wanted = OLD.get(name) or meant(name, TAKEN)
        if wanted is not None:
            raise OptionError(f"{name} is not taken by models of transformers, did you mean {wanted}?")
