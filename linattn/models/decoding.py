"""One token through TransNormer layers: five kernels a layer on a GPU, the layers' own steps elsewhere.

A step of one text reads every weight once and has hardly any arithmetic: kernels' beginnings and ends cost
more than what they do. So the norm rides on the product that follows it, the gate and the residual on
theirs, and each product asks for its weights before the row exists (`linattn.backends.triton.rows`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import linattn
from linattn.nn import SGLU, GatedLinearAttention, Lrpe, SimpleRMSNorm
from linattn.nn.fused import unwatched
from linattn.nn.norm import any_hook, bare, bare_of, fuses, kernels
from linattn.state import State
from linattn.surroundings import lowers

if TYPE_CHECKING:
    from linattn.models.transnormer_lm import TransNormerLayer

Tensor = torch.Tensor

PROGRAMMATIC = (9, 0)  # compute capability from which kernels may start before those in front have ended
SMALL = 1 << 24  # bytes of states; larger ones, read early, are in the way of the product in front


def steps(layers: Iterable[TransNormerLayer], states: Sequence[State], x: Tensor) -> Iterator[Tensor]:
    """Yield what each layer makes of x [B, E], one token a row; the states move on in place.

    Where the kernels run, sums are formed in float32 and rounded to x's dtype once a product; the layers' own
    steps round the norm, the gate and the product of the channel mixer, too.
    """
    first, seen, done, now = True, set(), None, _now(x)
    for layer, state in zip(layers, states, strict=True):
        if now and _takes(layer, x):
            of = kernels("rows")
            if done is None and len(x) > of.FEW:
                done = of.counters(x)
            x = fused(layer, state, x, done, first or id(state.kv) in seen)
            first = False
            seen.add(id(state.kv))
        else:
            x, first = layer.step(x, state), True
            now = _now(x)
        yield x


def logits(head: nn.Module, x: Tensor) -> Tensor:
    """head(x) for x [..., E], by the kernels where x has few rows."""
    rows = x.flatten(0, -2)
    y: Tensor
    if torch.is_grad_enabled() or not fuses(rows) or lowered(rows) or not bare(head):
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
    return _now(x) and _takes(layer, x)


def _now(x: Tensor) -> bool:
    """What does not depend on the layer."""
    return not (torch.is_grad_enabled() or any_hook()) and fuses(x) and not lowered(x)


def _takes(layer: TransNormerLayer, x: Tensor) -> bool:
    """What does: nothing sees or replaces its parts' calls, and weights are as the kernels want them."""
    kind: Any = type(layer)
    if not (_usual(kind) and bare_of(layer, kind)):
        return False
    find: Any = layer._modules.get
    mixer, channels, norm = find("token_mixer"), find("channel_mixer"), find("norm")
    if not (bare_of(mixer, GatedLinearAttention) and bare_of(channels, SGLU)):
        return False
    if not all(bare_of(one, SimpleRMSNorm) and one.fused for one in (norm, mixer._modules.get("norm"))):
        return False
    linears: list[Any] = [mixer._modules.get(name) for name in ("qkvu_proj", "out_proj")]
    linears += [channels._modules.get(name) for name in ("l1", "l2", "l3")]
    if not all(bare_of(one, nn.Linear) and one.bias is None for one in linears):
        return False
    weights: list[Tensor] = [one._parameters.get("weight") for one in linears]
    return bool(kernels("rows").fits(x, *weights)) and _joined(weights, x.shape[1])


def _joined(weights: list[Tensor], width: int) -> bool:
    """Whether matrices follow each other, on rows of this width; where they do not, modules say so."""
    (f, e), out, l1, l2, l3 = (tuple(w.shape) for w in weights)
    return e == width and out == (e, f // 4) and l1 == l2 == (l1[0], e) and l3 == (e, l1[0])


def lowered(x: Tensor) -> bool:
    """Whether autocast gives linear maps of x another dtype than its own."""
    where = x.device.type
    return lowers(where) and torch.get_autocast_dtype(where) != x.dtype


def fused(layer: TransNormerLayer, state: State, x: Tensor, done: Tensor | None, first: bool) -> Tensor:
    """A layer's step in five kernels; the first one of all starts when everything before has ended.

    done: the products' counters, if they need any.
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
            options = mixer.options(x.dtype)
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
    wide = torch.promote_types(x.dtype, torch.float32)
    decays, angles = options["log_decay"], options["reweight"]
    if decays is not None and decays.dtype != wide:
        return False
    if angles is None or mixer.lrpe is None:
        return True
    return angles.theta.dtype == wide and unwatched(mixer.lrpe, Lrpe)


@functools.cache
def _usual(kind: Any) -> bool:
    """Whether a class of layers steps as TransNormerLayer does."""
    plain = importlib.import_module("linattn.models.transnormer_lm").TransNormerLayer
    return bool(kind.step is plain.step)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
