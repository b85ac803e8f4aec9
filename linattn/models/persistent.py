"""All layers of a step of one text in one kernel, where there is one (`linattn.backends.cupy.persistent`).

Between the kernels of a step of one text, a GPU waits for longer than it takes to read the weights. The one
kernel has no such pauses. It is for layers of one published size, on GPUs of compute capability 9.0, and
needs CuPy.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from linattn import registry
from linattn.arrays import written
from linattn.models.graph import capture_of
from linattn.models.parts import Parts, numbers, taken
from linattn.nn import Lrpe, SimpleRMSNorm
from linattn.nn.norm import bare, kernels, only_matrix
from linattn.prepared import PLAIN
from linattn.state import State

if TYPE_CHECKING:
    from linattn.models.transnormer_lm import TransNormerLayer

Tensor = torch.Tensor

CAPABILITY = (9, 0)
PER_THREAD = 2  # cudaStreamPerThread
HAS_CUPY = importlib.util.find_spec("cupy") is not None


def possible(x: Tensor) -> bool:
    """Whether the kernel takes such rows, on this device; whether it takes the layers is another question."""
    return (
        HAS_CUPY
        and x.is_cuda
        and x.dtype == torch.bfloat16
        and x.ndim == 2
        and len(x) == 1
        and registry.requested("auto") == "auto"
        and capability(x.device) == CAPABILITY  # elsewhere CuPy need not be imported
        and _kernel().runs(x.device.index)
    )


class End(NamedTuple):
    """What comes behind the layers; where `ends` says so, the kernel does it as well."""

    norm: Any  # modules
    head: Any

    def facts(self) -> Hashable:
        """What decides about it but the numbers in memory."""
        return float(self.norm.eps), self.head.weight.data_ptr(), self.head.weight.shape


def ends(end: End, layers: Sequence[TransNormerLayer], x: Tensor) -> bool:
    """Whether the kernel takes a norm and a head, behind layers of such sizes."""
    norm, head = end
    if not (possible(x) and _inner(layers, x) is not None):
        return False
    if not (type(norm) is SimpleRMSNorm and norm.fused and bare([norm]) and only_matrix(head)):
        return False
    return bool(kernels("rows").fits(x, head.weight)) and head.weight.shape[1] == x.shape[1]


def step(
    layers: Sequence[TransNormerLayer],
    states: Sequence[State],
    x: Tensor,
    decays: Sequence[Tensor | None] | None = None,
    exchange: Tensor | None = None,
    end: End | None = None,
) -> Tensor | None:
    """What the layers make of x [1, E]; the states move on in place. None where the kernel does not take it.

    decays: the layers' log decays, where they are at hand. exchange: memory as `exchange_of` gives it. end:
    one that `ends` has seen; then the result is [1, E + N]: the row normed, and N outputs of the head.
    Sums are formed in float32, and nothing is rounded to x's dtype but the result.
    """
    if not possible(x):
        return None
    parts = taken(layers, x)
    if parts is None:
        return None
    told, of = _told(parts, states, x, decays), _kernel()
    if told is None or not of.compiles(parts.mixers[0].feature_map, told[0].l1.shape[0], x.device.index):
        return None
    if x.stride() != (x.shape[1], 1) or x.data_ptr() % 8 or x.is_neg():
        x = x.resolve_neg().clone(memory_format=torch.contiguous_format)
    memory = exchange_of(layers, x) if exchange is None else exchange
    if memory is None:
        return None
    size = x.shape[1]
    outputs = 0 if end is None else len(end.head.weight)
    y = torch.empty(1, size + outputs, dtype=x.dtype, device=x.device)
    behind = None if end is None else of.End(end.head.weight, y[:, size:], float(end.norm.eps))
    of.launch(x, y, told, parts.mixers[0].feature_map, memory, behind)
    written(*numbers(states))
    return y


def exchange_of(layers: Sequence[TransNormerLayer], x: Tensor) -> Tensor | None:
    """The memory that the kernel's blocks meet in, for the current stream; None for layers of other sizes.

    Kernels on one stream run one after the other, so they share it. A graph may be replayed on any stream, so
    what is captured has one of its own. None, too, for CUDA's streams of threads, which are many by one name.
    A stream that somebody destroys has to have done its work: the next one may have its address.
    """
    inner, index = _inner(layers, x), x.device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    if inner is None or stream == PER_THREAD:
        return None
    with torch.cuda.device(x.device):
        key = stream, capture_of(stream), inner
    with _lock:
        mine = _exchanges.setdefault(index, {})
        if key not in mine:
            over = [one for one in mine if one[1] not in (0, key[1])]  # captures, whose graphs have theirs
            for old in over:
                del mine[old]
            mine[key] = _zeros(_kernel().room(inner), x.device)
        return mine[key]


_lock = threading.Lock()
_exchanges: dict[int, dict[tuple[int, int, int], Tensor]] = {}  # of devices, by streams, captures and widths


def _inner(layers: Sequence[TransNormerLayer], x: Tensor) -> int | None:
    """The inner width of the first layer's channel mixer; None for layers of sizes that it does not take."""
    mixer, channels = (layers[0]._modules.get(name) for name in ("token_mixer", "channel_mixer"))
    weight = getattr(getattr(channels, "l3", None), "_parameters", {}).get("weight")
    heads, inner = getattr(mixer, "num_heads", 0), 0 if weight is None else weight.shape[-1]
    return inner if _kernel().refusal(x.shape[1], heads, inner, len(layers)) is None else None


def _zeros(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(size, dtype=torch.uint8, device=device)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The device's compute capability."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def _kernel() -> Any:
    return importlib.import_module("linattn.backends.cupy.persistent")


def _told(
    parts: Parts, states: Sequence[State], x: Tensor, decays: Sequence[Tensor | None] | None
) -> list[Any] | None:
    """What the kernel is told of each layer; None where it does not take one of them."""
    of, mixers = _kernel(), parts.mixers
    weights = [*zip(*parts.weights, strict=True)]
    kinds = {(mixer.num_heads, mixer.feature_map) for mixer in mixers}
    inner = {l3.shape[1] for *_, l3 in weights}
    if len(kinds) != 1 or len(inner) != 1 or len(states) != len(mixers):
        return None
    ((heads, _),) = kinds
    if of.refusal(x.shape[1], heads, *inner, len(mixers)) is not None:
        return None
    if {out.shape[1] for out in parts.weights[1]} != {of.WIDTH}:
        return None
    angles = [mixer.lrpe for mixer in mixers]
    some = [one for one in angles if one is not None]
    if not ({*map(type, some)} <= {Lrpe} and bare(some)):
        return None
    if decays is None:
        decays = [mixer.decays(x.dtype) for mixer in mixers]
    told = []
    for i, (mixer, state, decay, lrpe) in enumerate(zip(mixers, states, decays, angles, strict=True)):
        theta = None if lrpe is None else lrpe.theta
        decay = None if decay is None else decay.to(torch.float32)
        if not _fits(state, x, mixer.feature_map, turned=theta is not None):
            return None
        if not all(_dense(one, x, torch.float32) for one in (decay, theta) if one is not None):
            return None
        eps = float(parts.norms[i].eps), float(parts.gates[i].eps)
        told.append(of.Layer(*weights[i], state.kv, decay, theta, state.length, *eps))
    written_to = [one.kv for one in told] + [one.length for one in told]
    places = sorted((one.data_ptr(), one.nbytes) for one in written_to)
    if any(first + size > second for (first, size), (second, _) in pairwise(places)):
        return None  # layers that share a state
    return told


def _fits(state: State, x: Tensor, feature_map: str | None, *, turned: bool) -> bool:
    of = _kernel()
    features = 2 * of.D if turned else of.D
    return (
        isinstance(state, State)
        and state.z is None
        and (state.feature_map, state.reweight) == (feature_map, "lrpe" if turned else None)
        and _dense(state.kv, x, torch.float32)
        and state.kv.data_ptr() % 16 == 0
        and state.kv.shape == (1, of.HEADS, features, of.D)
        and _dense(state.length, x, torch.int64)
        and state.length.shape == (1,)
    )


def _dense(one: Any, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether something is a tensor as the kernel reads it, beside x."""
    return (
        type(one) in PLAIN
        and one.dtype == dtype
        and one.device == x.device
        and one.is_contiguous()
        and not one.is_neg()
    )
