"""MiniMax of Hugging Face transformers, its lightning attention computed by linattn; nothing else changes."""

from __future__ import annotations

import functools
import inspect
import weakref
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.modules.module import _global_forward_hooks
from transformers.cache_utils import DynamicLayer
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

import linattn
from linattn import registry
from linattn.decay import minimax
from linattn.errors import ArgumentTypeError, StateError, UnsupportedError
from linattn.models.huggingface.newer import cache_given
from linattn.prepared import PLAIN
from linattn.registry import BackendLike
from linattn.state import State

__all__ = ["Patch", "patch_minimax"]

Tensor = torch.Tensor


def patch_minimax(model_or_class: Any = None, *, backend: BackendLike = "auto") -> Patch:
    """Let linattn compute `MiniMaxLightningAttention`: in one model; with a class or None in all of them.

        patch_minimax(model)                 # from now on; .undo() goes back
        with patch_minimax(model): ...       # inside only

    Weights, configuration and the cache's interface stay as they are. What changes: the state of a cached
    sequence is float32 whatever the weights are, and so are the decays, which casting a model rounds (a
    layer's `slope_rate` counts where rounding alone does not make it of the formula's slopes); several
    tokens after a cache are one call instead of a loop over tokens; a causal mask by position, where the
    original compares slope · lag with 0. Masked positions add nothing to a state, give 0, and count as tokens
    for the decay, as in the original. A step without gradients changes the cached state in place; hooks, such
    as transformers records attentions by, are given a copy.

    Three mistakes of the original's cache are not repeated: where layer 0 is a lightning layer it counts no
    tokens, so that full attention hides the wrong ones where texts are padded or go on by several tokens;
    beams leave their states behind; and so does `reset`.

    Patches may be nested and undone in any order: the newest one that is left computes, a model's own before
    one of the class.

    model_or_class: a module that has MiniMax's lightning layers, a class of MiniMax's, or None. backend: as
    in `linattn.attention`.

    Raises ArgumentTypeError for anything without such layers, and for a layer whose class has a `forward` of
    its own, which the class's patch leaves alone; for a backend, at once, what `linattn.attention` raises:
    UnknownBackendError, ArgumentTypeError, or UnsupportedError where none that it names takes torch tensors.
    Source: `transformers.models.minimax.modeling_minimax.MiniMaxLightningAttention.forward`.
    """
    _check_backend(backend)
    if model_or_class is None or isinstance(model_or_class, type):
        if model_or_class is not None and not model_or_class.__module__.startswith(
            "transformers.models.minimax."
        ):
            raise ArgumentTypeError(
                f"patch_minimax takes a MiniMax model or class, got class {model_or_class.__name__}"
            )
        return Patch([MiniMaxLightningAttention], backend)
    layers = []
    if isinstance(model_or_class, torch.nn.Module):
        layers = [part for part in model_or_class.modules() if isinstance(part, MiniMaxLightningAttention)]
    if not layers:
        raise ArgumentTypeError(
            f"patch_minimax: {type(model_or_class).__name__} has no MiniMaxLightningAttention layer"
        )
    for layer in layers:
        if _forward_of(type(layer)) is not MiniMaxLightningAttention:
            raise ArgumentTypeError(
                f"patch_minimax: a layer's class, {type(layer).__name__}, has a forward of its own, which "
                "would not be called; patch_minimax() leaves such layers theirs, and computes what they call"
            )
    return Patch(layers, backend)


def _forward_of(kind: type) -> type:
    """The class that a class has its `forward` from, whatever lies there now."""
    return next(one for one in kind.__mro__ if "forward" in vars(one))


def _check_backend(backend: BackendLike) -> None:
    """Refuse what no call could take, on no device: unknown names, backends of other arrays."""
    names = registry.names_of(registry.key_of(backend), "torch")
    arrays = {name: registry.get(name).arrays for name in names}
    if not any("torch" in kinds for kinds in arrays.values()):
        reasons = {name: f"takes {' or '.join(kinds)} arrays, got torch" for name, kinds in arrays.items()}
        raise UnsupportedError("patch_minimax", reasons)


class Patch:
    """Layers, or their class, with another `forward`; `undo`, or the end of `with`, puts theirs back.

    Of several patches the newest that is not undone computes, in whatever order they are undone; a layer's
    own before its class's. `with` raises StateError for one that is undone.
    """

    def __init__(self, places: list[Any], backend: BackendLike) -> None:
        self._forwards = [_Forward(place, backend) for place in places]
        for forward in self._forwards:
            _set(forward.__self__, forward)

    def undo(self) -> None:
        """Put back what was there before; a second time does nothing."""
        for forward in self._forwards:
            forward.undone = True
            place = forward.__self__
            top = vars(place).get("forward")
            while isinstance(top, _Forward) and top.undone:
                top = top.before
            _set(place, top)

    def __enter__(self) -> Patch:
        if all(forward.undone for forward in self._forwards):
            raise StateError("this patch was undone and computes nothing: call patch_minimax again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _of_method(function: Any) -> inspect.Signature:
    """The signature that a function has as a method: without self."""
    whole = inspect.signature(function)
    return whole.replace(parameters=[*whole.parameters.values()][1:])


class _Forward:
    """`_forward` in place of a layer's or a class's own; once undone, what it replaced.

    Something else may lie over it, and call it after it is undone. It is copied and pickled with its layer,
    as no bound method would be.
    """

    __signature__ = _of_method(MiniMaxLightningAttention.forward)

    __code__ = MiniMaxLightningAttention.forward.__code__  # torch.export names its place

    def __init__(self, place: Any, backend: BackendLike) -> None:
        self.__self__, self.backend = place, backend
        self.before = vars(place).get("forward")
        self.undone = False

    def __get__(self, layer: Any, kind: type | None = None) -> Any:
        return self._of if layer is None else functools.partial(self._of, layer)  # only where a class has it

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._of(self.__self__, *arguments, **keywords)

    def _of(self, layer: Any, *arguments: Any, **keywords: Any) -> Any:
        if not self.undone:
            return _forward(layer, *arguments, backend=self.backend, **keywords)
        if self.before is None:
            return type(layer).forward(layer, *arguments, **keywords)
        of_class = isinstance(self.__self__, type)
        before = self.before.__get__(layer, type(layer)) if of_class else self.before
        return before(*arguments, **keywords)


def _set(place: Any, forward: Any) -> None:
    """Put a `forward` on a class or a module, not among its parameters; None: go back to the class's."""
    if isinstance(place, type):
        setattr(place, "forward", forward)  # noqa: B010 (a type has no such attribute, this one does)
    elif forward is None:
        vars(place).pop("forward", None)
    else:
        vars(place)["forward"] = forward


def _forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    *,
    cache: Any = None,
    backend: BackendLike = "auto",
    **keywords: Any,
) -> tuple[Tensor, Tensor]:
    """`MiniMaxLightningAttention.forward`: [B, N, hidden] -> the same, and the state [B, H, D, D] float32.

    attention_mask [B, N or more], 1 for tokens; of a longer one the end counts.
    """
    past_key_values = cache_given(past_key_values, cache)
    batch, n, _ = hidden_states.shape
    heads, d = self.num_attention_heads, self.head_dim
    qkv = self.act_fn(self.qkv_proj(hidden_states)).view(batch, n, heads, 3 * d)
    q, k, v = qkv.split(d, dim=3)
    mask = None if attention_mask is None else attention_mask[:, attention_mask.shape[1] - n :].bool()
    wide = torch.promote_types(q.dtype, torch.float32)
    compiling = torch.compiler.is_compiling()  # compilers see through caches, and say so
    decay = (_own_decay if compiling else _log_decay)(self, wide, q.device)
    kv = _cached(past_key_values, self.layer_idx, q, wide)
    state = None
    if kv is not None:
        counted = kv.new_zeros(batch, dtype=torch.int64) if compiling else _tokens(batch, q.device)
        state = State(kv, None, counted, d=d)
    if state is not None and n == 1 and mask is None and not _recorded(qkv, state.kv):
        o = linattn.decode_step(q[:, 0], k[:, 0], v[:, 0], state, log_decay=decay, backend=backend)
    else:
        o, state = linattn.attention(
            q, k, v, log_decay=decay, key_mask=mask, initial_state=state, return_state=True, backend=backend
        )  # fmt: skip
    o = o.reshape(batch, n, heads * d)
    if mask is not None:
        o = o.masked_fill(~mask[..., None], 0)
    o = self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * self.norm(o))
    kv = state.kv
    if past_key_values is not None:
        past_key_values.set_linear_cache(self.layer_idx, kv)
        _place(past_key_values, self.layer_idx, self.num_hidden_layers).seen += n
        if _watched(self):  # what a hook keeps is this token's, and later steps change the cache's in place
            kv = kv.clone()
    return o, kv


def _watched(layer: Any) -> bool:
    """Whether hooks are given what a layer returns: transformers records attentions by such."""
    return bool(layer._forward_hooks or _global_forward_hooks)


class _NoKeys(DynamicLayer):
    """A lightning layer's place among a cache's layers: it has seen as many tokens as those with keys.

    Where none has keys its own count, `seen`, is theirs.
    """

    def __init__(self, cache: Any, layer: int) -> None:
        super().__init__()
        self.layer, self.seen = layer, 0
        self.belongs_to(cache)

    def belongs_to(self, cache: Any) -> None:
        """Know a cache, without keeping it: what nobody else has goes at once, and keys with it."""
        self.known: list[Any] = cache.linear_cache  # for when the cache is gone, and a copy has this place
        self.cache: weakref.ref[Any] | None = weakref.ref(cache)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "cache": self.cache and self.cache()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        cache = state["cache"]
        self.__dict__ = {**state, "cache": None if cache is None else weakref.ref(cache)}

    def _states(self) -> list[Any]:
        return getattr(self.cache and self.cache(), "linear_cache", self.known)

    def get_seq_length(self) -> int:
        """Tokens seen, padding too."""
        layers = getattr(self.cache and self.cache(), "layers", ())
        others = (one for one in layers if not isinstance(one, _NoKeys))
        return max((one.get_seq_length() for one in others), default=self.seen)

    def reset(self) -> None:
        """Forget what was seen: zeros, in which the original, too, finds nothing."""
        self.seen, known = 0, self._states()
        known[self.layer] = torch.zeros_like(known[self.layer])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b goes on from what row beam_idx[b] has seen."""
        known = self._states()
        known[self.layer] = known[self.layer].index_select(0, beam_idx.to(known[self.layer].device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Nothing: the cache repeats states itself."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Nothing: the cache selects states itself."""


def _place(cache: Any, layer: int, count: int) -> _NoKeys:
    """A lightning layer's place in a cache, which asks there for its number of tokens.

    When it repeats and selects rows, it looks for states at all `count` layers, and keeps no place for the
    last ones of full attention.
    """
    cache.linear_cache += [[] for _ in range(len(cache.linear_cache), count)]
    layers = cache.layers
    while len(layers) <= layer:
        layers.append(DynamicLayer())
    place = layers[layer]
    if not isinstance(place, _NoKeys):
        layers[layer] = place = _NoKeys(cache, layer)
    elif place.cache is None or place.cache() is not cache:  # which is a copy
        place.belongs_to(cache)
    return place


def _recorded(*given: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in given)


def _cached(cache: Any, layer: int, q: Tensor, wide: torch.dtype) -> Tensor | None:
    """The state that a cache holds for a layer; None before the first token."""
    known: list[Any] = [] if cache is None else cache.linear_cache
    kv = known[layer] if layer < len(known) else None
    if not isinstance(kv, Tensor):
        return None  # a cache fills layers that it skips with empty lists
    shape = (q.shape[0], q.shape[2], q.shape[3], q.shape[3])
    if tuple(kv.shape) != shape:
        raise StateError(f"the cache of layer {layer} must have shape {shape}, got {tuple(kv.shape)}")
    return kv.to(wide)


def _log_decay(layer: Any, wide: torch.dtype, device: torch.device) -> Tensor:
    """A layer's log decays [H], read from its buffer once, which a device would wait for in every call.

    What writes around torch's count of versions, into `slope_rate.data`, is not seen.
    """
    slopes = layer.slope_rate
    if (
        type(slopes) not in PLAIN
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.is_functorch_wrapped_tensor(slopes)
        or slopes.is_inference()  # of which nobody counts versions
    ):
        return _own_decay(layer, wide, device)  # somebody watches, or may write unseen: keep nothing
    now = slopes._version, slopes.data_ptr(), wide, device
    known = _decays.get(layer)
    if known is None or known[0] is not slopes or known[1] != now:
        with torch.inference_mode(False):
            decay = _own_decay(layer, wide, torch.device("cpu")).to(device)
        _decays[layer] = known = slopes, now, decay
    found: Tensor = known[2]
    return found


_decays: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
HALVES = (torch.float16, torch.bfloat16)


def _own_decay(layer: Any, wide: torch.dtype, device: torch.device) -> Tensor:
    """The formula's log decays [H], unless a layer's slopes are others than rounding makes of those.

    Slopes were rounded to a dtype, some time, if it has them all: to halves when a model was cast, or before,
    when one was built: transformers raises a base of that dtype to powers. Out of plain numbers, as to a
    compiler NumPy's arrays are tensors.
    """
    heads, slopes = layer.num_attention_heads, layer.slope_rate
    rates = _rates(heads, layer.layer_idx, layer.num_hidden_layers)
    known = torch.tensor(rates, dtype=wide, device=device)
    decay = known[0]
    if slopes.is_meta:  # its values are elsewhere, as accelerate may keep them
        return decay
    own = -slopes.detach().flatten().to(device=device, dtype=wide)
    powers, limits, half = heads * torch.finfo(torch.float32).eps, torch.finfo(wide), torch.finfo(torch.half)
    formula = ((own - decay).abs() <= (limits.eps + powers) * (limits.tiny - decay)).all()
    for dtype in HALVES:
        off = (torch.finfo(dtype).eps + powers) * known.abs() + half.eps * half.tiny
        near = ((own - known).abs() <= off).all(-1).any()
        formula = formula | (near & (own.to(dtype).to(wide) == own).all())
    return torch.where(formula, decay, own)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _rates(heads: int, layer: int, layers: int) -> list[list[float]]:
    """The formula's log decays, and those of a layer that transformers builds in each of the halves."""
    found: list[list[float]] = [minimax(heads, layer, layers).tolist()]
    with torch._C._DisableTorchDispatch():  # under a FakeTensorMode, numbers are numbers here
        for dtype in HALVES:
            base = torch.tensor(2 ** (-8 / heads), dtype=dtype)
            slopes = base ** torch.arange(1, heads + 1) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)
            found.append((-slopes).tolist())
    return found


@functools.lru_cache(maxsize=64)
def _tokens(batch: int, device: torch.device) -> Tensor:
    """Lengths of states [B], which nothing reads without angles; steps count in it, whatever the sequence."""
    with torch.inference_mode(False):
        return torch.zeros(batch, dtype=torch.int64, device=device)
