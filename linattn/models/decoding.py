"""One token through TransNormer layers: few kernels on a GPU, the layers' own steps elsewhere.

A step of one text reads every weight once and has hardly any arithmetic: kernels' beginnings and ends cost
more than what they do. So there are five kernels a layer: the norm rides on the product that follows it, the
gate and the residual on theirs, and each product asks for its weights before the row exists
(`linattn.backends.triton.rows`). For one size of layers there is one kernel for all of them
(`linattn.models.persistent`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import linattn
from linattn.arrays import traced, written
from linattn.models import persistent, replay
from linattn.models.parts import facts_of, kind_of_state, numbers, steps_as_written, taken, wide
from linattn.nn import GatedLinearAttention, Lrpe
from linattn.nn.fused import unwatched
from linattn.nn.norm import any_hook, fuses, kernels, only_matrix
from linattn.state import State
from linattn.surroundings import lowers

if TYPE_CHECKING:
    from linattn.models.transnormer_lm import TransNormerLayer

Tensor = torch.Tensor

PROGRAMMATIC = (9, 0)  # compute capability from which kernels may start before those in front have ended
SMALL = 1 << 24  # bytes of states; larger ones, read early, are in the way of the product in front


@dataclass
class Wanted:
    """A head whose outputs for a step are wanted, and once a step has formed them, what they are: [B, N]."""

    head: nn.Module
    logits: Tensor | None = None


def last(
    layers: Sequence[TransNormerLayer],
    states: Sequence[State],
    x: Tensor,
    *,
    graphs: bool = True,
    one_kernel: bool = False,
) -> Tensor:
    """What the last of `steps` yields. The third time on the same states, kernels become a CUDA graph.

    graphs: whether they may. The graph is used for as long as nothing has changed but numbers in memory.
    one_kernel: whether one may take all layers, where it does (`linattn.models.persistent`): then nothing but
    the result is rounded to x's dtype.
    """
    _cut(layers, states, x)
    one_kernel = one_kernel and bool(layers) and _now(x) and persistent.possible(x)
    y = _replayed(layers, states, x, one_kernel, None) if graphs else None
    return _last(layers, states, x, one_kernel) if y is None else y


def ended(
    layers: Sequence[TransNormerLayer],
    states: Sequence[State],
    x: Tensor,
    end: persistent.End,
    *,
    graphs: bool = True,
    one_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """The norm of what `last` yields, and the head's outputs: by the one kernel, where it takes layers."""
    both = whole(layers, states, x, end, graphs=graphs) if one_kernel else None
    if both is not None:
        return both
    row = end.norm(last(layers, states, x, graphs=graphs, one_kernel=one_kernel))
    return row, logits(end.head, row)


def whole(
    layers: Sequence[TransNormerLayer],
    states: Sequence[State],
    x: Tensor,
    end: persistent.End,
    *,
    graphs: bool = True,
) -> tuple[Tensor, Tensor] | None:
    """What `ended` returns, by the one kernel alone; None, and no state has moved, where it does not run."""
    if not (layers and _now(x) and persistent.ends(end, layers, x)):
        return None
    _cut(layers, states, x)
    y = _replayed(layers, states, x, True, end) if graphs else None
    y = persistent.step(layers, states, x, end=end) if y is None else y
    return None if y is None else (y[:, : x.shape[1]], y[:, x.shape[1] :])


def _replayed(
    layers: Sequence[TransNormerLayer],
    states: Sequence[State],
    x: Tensor,
    one_kernel: bool,
    end: persistent.End | None,
) -> Tensor | None:
    """The step by a graph, which is there for as long as nothing has changed but numbers in memory."""
    if not (layers and _now(x) and replay.possible(x)):
        return None
    known = facts_of(layers, states, x)
    if known is None:
        return None
    facts, decays = known
    if x.stride() != (x.shape[1], 1):
        x = x.contiguous().flatten().view(x.shape)  # numbers of one row may be said to be apart
    exchange = persistent.exchange_of(layers, x) if one_kernel else None

    def work(x: Tensor) -> Tensor:
        if end is None:
            return _last(layers, states, x, one_kernel, decays, exchange)
        y = persistent.step(layers, states, x, decays, exchange, end)
        if y is None:
            raise RuntimeError("the kernel does not take these layers")
        return y

    facts = one_kernel, facts, None if end is None else end.facts()
    y = replay.of(layers[0])(facts, x, work, (decays, exchange))
    if y is not None:
        written(*numbers(states))
    return y


def _last(
    layers: Sequence[TransNormerLayer],
    states: Sequence[State],
    x: Tensor,
    one_kernel: bool,
    decays: Sequence[Tensor | None] | None = None,
    exchange: Tensor | None = None,
) -> Tensor:
    if one_kernel and layers and _now(x):
        y = persistent.step(layers, states, x, decays, exchange)
        if y is not None:
            return y
    for row in steps(layers, states, x, decays):
        x = row
    return x


def steps(
    layers: Sequence[TransNormerLayer],
    states: Sequence[State],
    x: Tensor,
    decays: Sequence[Tensor | None] | None = None,
) -> Iterator[Tensor]:
    """Yield what each layer makes of x [B, E], one token a row; the states move on in place.

    decays: the layers' log decays, where they are at hand, in the dtype of sums. Where the kernels run,
    sums are formed in float32 and rounded to x's dtype once a product; the layers' own steps round the norm,
    the gate and the product of the channel mixer, too.
    """
    check_states(layers, states, x)
    _cut(layers, states, x)
    first, done, now = True, None, _now(x)
    seen: set[int] = set()  # where states are that kernels of this step write
    every = now and taken(layers, x) is not None
    for i, (layer, state) in enumerate(zip(layers, states, strict=True)):
        if every or (now and taken([layer], x) is not None):
            of = kernels("rows")
            if done is None and len(x) > of.FEW:
                done = of.counters(x)
            options = layer.token_mixer.options(x.dtype)
            if decays is not None:
                options["log_decay"] = decays[i]
            memory = {part.data_ptr() for part in (state.kv, state.length) if isinstance(part, Tensor)}
            x = fused(layer, state, x, options, done, first or not memory.isdisjoint(seen))
            first = False
            seen |= memory
        else:
            x, first = layer.step(x, state), True
            now = _now(x)
        yield x


def _recorded(state: Any) -> bool:
    return getattr(getattr(state, "kv", None), "requires_grad", False)


def _cut(layers: Sequence[TransNormerLayer], states: Sequence[State], x: Tensor) -> None:
    """What is to change in place has no gradients, unless somebody wants those, which layers refuse."""
    if not torch.is_grad_enabled() and any(map(_recorded, states)):
        check_states(layers, states, x)
        for state in states:
            state.cut()


def check_states(layers: Sequence[TransNormerLayer], states: Sequence[State], x: Tensor) -> None:
    """Raise what the layers' steps would for states that are not theirs, while none has moved yet."""
    if traced():
        return
    known: set[Any] = set()
    for layer, state in zip(layers, states, strict=True):
        mixer = layer.token_mixer
        if not (isinstance(mixer, GatedLinearAttention) and steps_as_written(layer, mixer)):
            continue
        facts = (mixer.num_heads, mixer.head_dim, mixer.feature_map, mixer.lrpe is None)
        facts += kind_of_state(state) if isinstance(state, State) else ()
        if facts not in known:
            mixer.check_state(x, state)
            known.add(facts)


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


def _now(x: Tensor) -> bool:
    """What does not depend on the layer."""
    return not (torch.is_grad_enabled() or any_hook()) and fuses(x) and not lowered(x)


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
    early = persistent.capability(x.device) >= PROGRAMMATIC
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
    log_decay, angles = options["log_decay"], options["reweight"]
    if log_decay is not None and log_decay.dtype != wide(x):
        return False
    if angles is None or mixer.lrpe is None:
        return True
    return angles.theta.dtype == wide(x) and unwatched(mixer.lrpe, Lrpe)
