"""One token through TransNormer layers: five kernels a layer on a GPU, the layers' own steps elsewhere.

A step of one text reads every weight once and has hardly any arithmetic: kernels' beginnings and ends cost
more than what they do. So the norm rides on the product that follows it, the gate and the residual on
theirs, and each product asks for its weights before the row exists (`linattn.backends.triton.rows`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

import linattn
from linattn import registry
from linattn.arrays import written
from linattn.models import replay
from linattn.nn import SGLU, GatedLinearAttention, Lrpe, SimpleRMSNorm
from linattn.nn.fused import unwatched
from linattn.nn.norm import any_hook, bare_of, fuses, kernels, only_matrix
from linattn.state import State
from linattn.surroundings import lowers

if TYPE_CHECKING:
    from linattn.models.transnormer_lm import TransNormerLayer

Tensor = torch.Tensor

PROGRAMMATIC = (9, 0)  # compute capability from which kernels may start before those in front have ended
OVERRIDES = {"options", "split", "decays"}  # of a mixer, by which a step may be another one
SMALL = 1 << 24  # bytes of states; larger ones, read early, are in the way of the product in front


def last(
    layers: Sequence[TransNormerLayer], states: Sequence[State], x: Tensor, *, graphs: bool = True
) -> Tensor:
    """What the last of `steps` yields. The third time on the same states, kernels become a CUDA graph.

    graphs: whether they may. The graph is used for as long as nothing has changed but numbers in memory.
    """
    if graphs and layers and _now(x) and replay.possible(x):
        known = _facts(layers, states, x)
        if known is not None:
            facts, decays = known
            if x.stride() != (x.shape[1], 1):
                x = x.contiguous().flatten().view(x.shape)  # numbers of one row may be said to be apart
            y = replay.of(layers[0])(facts, x, lambda x: _last(x, steps(layers, states, x, decays)), decays)
            if y is not None:
                written(*(part for state in states for part in (state.kv, state.z, state.length)))
                return y
    return _last(x, steps(layers, states, x))


def _last(x: Tensor, rows: Iterator[Tensor]) -> Tensor:
    for row in rows:
        x = row
    return x


def steps(
    layers: Iterable[TransNormerLayer],
    states: Sequence[State],
    x: Tensor,
    decays: Sequence[Tensor | None] | None = None,
) -> Iterator[Tensor]:
    """Yield what each layer makes of x [B, E], one token a row; the states move on in place.

    decays: the layers' log decays, where they are at hand, in the dtype of sums. Where the kernels run,
    sums are formed in float32 and rounded to x's dtype once a product; the layers' own steps round the norm,
    the gate and the product of the channel mixer, too.
    """
    first, seen, done, now = True, set(), None, _now(x)
    for i, (layer, state) in enumerate(zip(layers, states, strict=True)):
        if now and _taken(layer, x) is not None:
            of = kernels("rows")
            if done is None and len(x) > of.FEW:
                done = of.counters(x)
            options = layer.token_mixer.options(x.dtype)
            if decays is not None:
                options["log_decay"] = decays[i]
            x = fused(layer, state, x, options, done, first or id(state.kv) in seen)
            first = False
            seen.add(id(state.kv))
        else:
            x, first = layer.step(x, state), True
            now = _now(x)
        yield x


def _facts(
    layers: Sequence[TransNormerLayer], states: Sequence[State], x: Tensor
) -> tuple[tuple[Any, ...], list[Tensor | None]] | None:
    """What decides about the launches of a step, and the layers' decays; None where modules have to run."""
    choice, inference = registry.requested("auto"), torch.is_inference_mode_enabled()
    facts: list[Any] = [x.shape, x.dtype, x.device, choice, inference]
    decays = []
    for layer, state in zip(layers, states, strict=True):
        parts = _taken(layer, x)
        if parts is None:
            return None
        mixer: Any = parts.mixer
        find = mixer._modules.get
        if not OVERRIDES.isdisjoint(mixer.__dict__):
            return None
        log_decay, lrpe = mixer.decays(x.dtype), find("lrpe")
        if not (_keeps_decays(log_decay, x) and (lrpe is None or unwatched(lrpe, Lrpe))):
            return None
        for w in parts.weights:
            facts += w.data_ptr(), w.shape
        facts += (
            float(parts.eps), float(find("norm").eps), mixer.num_heads, mixer.feature_map,
            _place(log_decay), None if lrpe is None else _place(lrpe.theta),
            _place(state.kv), _place(state.z), _place(state.length),
            state.feature_map, state.reweight, state.d, state.kv.is_inference(), state.kv.is_neg(),
        )  # fmt: skip
        decays.append(log_decay)
    return tuple(facts), decays


def _place(x: Tensor | None) -> Any:
    return None if x is None else (x.data_ptr(), x.dtype, x.shape, x.stride())


def logits(head: nn.Module, x: Tensor) -> Tensor:
    """head(x) for x [..., E], by the kernels where x has few rows."""
    rows = x.flatten(0, -2)
    y: Tensor
    if torch.is_grad_enabled() or not fuses(rows) or lowered(rows) or not only_matrix(head):
        y = head(x)
        return y
    of = kernels("rows")
    weight: Any = head.weight
    if weight.shape[1] != rows.shape[1] or not of.fits(rows, weight) or len(rows) > of.FEW:
        y = head(x)
        return y
    with kernels("norm").on(x.device):
        return of.products(rows, (weight,)).view(*x.shape[:-1], -1)  # type: ignore[no-any-return]


def runs(layer: TransNormerLayer, x: Tensor) -> bool:
    """Whether the kernels take this layer and these rows, here and now."""
    return _now(x) and _taken(layer, x) is not None


def _now(x: Tensor) -> bool:
    """What does not depend on the layer."""
    return not (torch.is_grad_enabled() or any_hook()) and fuses(x) and not lowered(x)


class Parts(NamedTuple):
    """What the kernels take of a layer."""

    mixer: GatedLinearAttention
    eps: float  # of the norm in front of both branches
    weights: list[Tensor]  # qkvu, out, l1, l2, l3


def _taken(layer: TransNormerLayer, x: Tensor) -> Parts | None:
    """What does: its parts, if nothing sees or replaces their calls and the kernels take the weights."""
    kind: Any = type(layer)
    if not (_usual(kind) and bare_of(layer, kind)):
        return None
    # asking modules for their parts by attribute would cost the host more than the rest
    find: Any = layer._modules.get
    mixer, channels, norm = find("token_mixer"), find("channel_mixer"), find("norm")
    if not (bare_of(mixer, GatedLinearAttention) and bare_of(channels, SGLU)):
        return None
    inner, outer = mixer._modules.get, channels._modules.get
    for one in (norm, inner("norm")):
        if not (bare_of(one, SimpleRMSNorm) and one.fused):
            return None
    weights = []
    for one in (inner("qkvu_proj"), inner("out_proj"), outer("l1"), outer("l2"), outer("l3")):
        if not (bare_of(one, nn.Linear) and one._parameters.get("bias", one) is None):
            return None
        weights.append(one._parameters.get("weight"))
    if not (kernels("rows").fits(x, *weights) and _joined(weights, x.shape[1])):
        return None
    return Parts(mixer, norm.eps, weights)


def _joined(weights: list[Tensor], width: int) -> bool:
    """Whether matrices follow each other, on rows of this width; where they do not, modules say so."""
    (f, e), out, l1, l2, l3 = (w.shape for w in weights)
    return e == width and out == (e, f // 4) and l1 == l2 == (l1[0], e) and l3 == (e, l1[0])


def lowered(x: Tensor) -> bool:
    """Whether autocast gives linear maps of x another dtype than its own."""
    where = x.device.type
    return lowers(where) and torch.get_autocast_dtype(where) != x.dtype


def fused(
    layer: TransNormerLayer,
    state: State,
    x: Tensor,
    options: dict[str, Any],
    done: Tensor | None,
    first: bool,
) -> Tensor:
    """A layer's step in five kernels; the first one of all starts when everything before has ended.

    options: the layer's for `linattn.decode_step`. done: the products' counters, if they need any.
    """
    chain = kernels("launcher").chain
    products = functools.partial(kernels("rows").products, done=done)
    mixer, channels, eps = layer.token_mixer, layer.channel_mixer, float(layer.norm.eps)
    early = _capability(x.device) >= PROGRAMMATIC
    with kernels("norm").on(x.device):
        # A chained step of attention reads the state before its wait. What wrote it has ended, as a kernel
        # that starts in the usual way lies between: the first one here.
        with chain(early and not first):
            qkvu = products(x, (mixer.qkvu_proj.weight,), eps=eps)
        with chain(early):
            q, k, v, u = mixer.split(qkvu)
            ahead = early and state.kv.nbytes <= SMALL and keeps(mixer, options, x)
            with chain(ahead):
                o = linattn.decode_step(q, k, v, state, **options, backend="auto").flatten(1)
            x = products(o, (mixer.out_proj.weight,), eps=float(mixer.norm.eps), gate=u, residual=x)
            p = products(x, (channels.l1.weight, channels.l2.weight), eps=eps)
            y: Tensor = products(p, (channels.l3.weight,), residual=x)
            return y


def keeps(mixer: GatedLinearAttention, options: dict[str, Any], x: Tensor) -> bool:
    """Whether decays and angles lie there for good, in the dtype of sums.

    Others are made right in front of the kernel of attention, which chained would read them before its wait.
    """
    angles = options["reweight"]
    if not _keeps_decays(options["log_decay"], x):
        return False
    if angles is None or mixer.lrpe is None:
        return True
    return angles.theta.dtype == _wide(x) and unwatched(mixer.lrpe, Lrpe)


def _keeps_decays(log_decay: Tensor | None, x: Tensor) -> bool:
    return log_decay is None or log_decay.dtype == _wide(x)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of sums."""
    return torch.promote_types(x.dtype, torch.float32)


@functools.cache
def _usual(kind: Any) -> bool:
    """Whether a class of layers steps as TransNormerLayer does."""
    plain = importlib.import_module("linattn.models.transnormer_lm").TransNormerLayer
    return bool(kind.step is plain.step)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
