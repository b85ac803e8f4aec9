"""Work that comes again and again on a GPU, kept as CUDA graphs: the host starts all kernels in one go.

One token through a model of 24 layers is 120 kernels, which take the GPU a fraction of a millisecond and
Python several. A graph is good for what it was recorded from: addresses, sizes, options. Whoever asks for one
names these facts, and gets it only for the same.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from linattn import registry
from linattn.models.graph import Graph

Tensor = torch.Tensor
Work = Callable[[Tensor], Tensor]

AFTER = 2  # times that work runs as it is: after these its kernels are compiled and its tables are made
MOST = 8  # graphs of one owner, as each has memory of its own; those not asked for longest go
OURS = ("auto", "triton", "torch")  # choices of a backend that ends in one whose steps can be recorded


class Recording(NamedTuple):
    """A graph, what it reads, and what must live as long as it does."""

    graph: Graph
    given: Tensor
    kept: Any


class Replays:
    """The graphs of one owner, by facts."""

    def __init__(self) -> None:
        self.found: OrderedDict[Hashable, int | Recording | None] = OrderedDict()
        self.lock = threading.Lock()

    def __call__(self, facts: Hashable, x: Tensor, work: Work, kept: Any = None) -> Tensor | None:
        """work(x), a new tensor, by a graph; None where there is none yet, and work is to be done as usual.

        facts: everything that work depends on but the numbers in memory; the same facts, the same launches.
        x: numbers without gaps, as those before. kept: tensors which work reads that nobody else may hold.
        Work whose recording fails stays as it is.
        """
        # the memory of one graph is for one stream at a time
        facts = facts, torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0
        with self.lock:
            known = self.found.get(facts, 0)
            if isinstance(known, int):
                self.found[facts] = known + 1
            self.found.move_to_end(facts)
            while len(self.found) > MOST:
                self.found.popitem(last=False)
        if isinstance(known, int):
            if known < AFTER:
                return None
            known = recorded(work, x, kept)
            with self.lock:
                self.found[facts] = known
        if known is None:
            return None
        known.given.copy_(x)
        known.graph.replay()
        return known.graph.result.clone()


_owned: WeakKeyDictionary[Any, Replays] = WeakKeyDictionary()


def of(owner: Any) -> Replays:
    """The graphs of an object, which go with it."""
    found = _owned.get(owner)
    if found is None:
        found = _owned.setdefault(owner, Replays())
    return found


def possible(x: Tensor) -> bool:
    """Whether work on x could be recorded, here and now."""
    if not x.is_cuda or registry.requested("auto") not in OURS:
        return False
    with torch.cuda.device(x.device):
        return not torch.cuda.is_current_stream_capturing()


def recorded(work: Work, x: Tensor, kept: Any) -> Recording | None:
    """A graph of work on numbers like x; None where something in it cannot be recorded."""
    with torch.inference_mode(False):
        given = torch.empty_like(x)
    try:
        graph = Graph(lambda: work(given), x.device)
    except (RuntimeError, OSError):  # no driver, say; what work raised, it raises again as usual
        return None
    return Recording(graph, given, kept)
