"""The program of a worker, `python -m linattn.backends.triton.trial`: configurations tried on calls.

What the library's own configuration computes is what the others have to compute. A configuration that faults
ends the process, by intention: nothing that a device says after a fault can be trusted.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TextIO

import torch
from triton.runtime.errors import TritonError
from triton.runtime.jit import MockTensor

import linattn
from linattn.backends.triton import tuned
from linattn.backends.triton.plan import Blocks
from linattn.backends.triton.search import Sample, Target
from linattn.backends.triton.tuned import Family
from linattn.registry import BackendLike

# what a configuration is about; in the module, the kernel has the module's name
product: Any = importlib.import_module("linattn.backends.triton.product").product
Tensor = torch.Tensor
Outputs = dict[str, Tensor]
Work = Callable[[], Outputs]
Clock = Callable[[Work], float]

LIMITS = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 1e-4}
TF32 = 5e-3
ROWS = 5  # how many times as far a single row may be off as the whole
SUMS = 0.5  # of sums that mostly cancel: the gradients of decays and angles
COMPILERS = (TritonError, RuntimeError, AssertionError, ValueError)  # what a compilation may raise


def work(sample: Sample, device: str, backend: BackendLike) -> Work:
    """A call on random tensors; the same ones each time. What it returns has names."""
    random = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, sample.dtype)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float32, device=device).mul_(0.5).to(kind)

    b, h, n, d, e = sample.b, sample.h, sample.n, sample.d, sample.e
    leaves: dict[str, Any] = {"q": normal(b, n, h, d), "k": normal(b, n, h, d), "v": normal(b, n, h, e)}
    options: dict[str, Any] = {"causal": sample.causal, "normalize": sample.normalize, "backend": backend}
    options |= {"feature_map": sample.feature_map, "precision": sample.precision}
    if sample.decay == "head":
        leaves["log_decay"] = torch.tensor(linattn.decay.alibi(h), dtype=torch.float32, device=device)
    elif sample.decay == "token":
        leaves["log_decay"] = -0.1 * normal(b, n, h, kind=torch.float32).abs()
    if sample.reweight == "lrpe":
        table = linattn.LRPE.default_theta(h, d)
        leaves["theta"] = torch.tensor(table, dtype=torch.float32, device=device)
    if sample.masked:
        options["key_mask"] = normal(b, n, kind=torch.float32) > -0.5
    slope = normal(b, n, h, e)
    state = None
    if sample.state:
        like = leaves["q"]
        cosine = linattn.Cosine(n) if sample.reweight == "cosine" else None
        angles = cosine or (linattn.LRPE(leaves["theta"]) if sample.reweight == "lrpe" else None)
        state = linattn.State.zeros(like, b, h, d, e, reweight=angles, feature_map=sample.feature_map)
        state.kv.normal_(generator=random)
    late = sample.grad == "only"  # the recorded decays and angles would be timed with the gradients
    wanted = [x.requires_grad_() for name, x in leaves.items() if not late or name in "qkv"]
    if sample.grad == "no":
        wanted = [x.requires_grad_(False) for x in wanted]

    def forward() -> Outputs:
        given = dict(leaves)
        angle = given.pop("theta", None)
        if sample.reweight is not None:
            options["reweight"] = linattn.Cosine(n) if angle is None else linattn.LRPE(angle)
        found = linattn.attention(
            **given, **options, initial_state=state, return_state=state is not None
        )  # fmt: skip
        return {"o": found} if state is None else {"o": found[0], "state": found[1].kv}

    if sample.grad == "no":
        return forward
    names = [name for name, x in leaves.items() if x.requires_grad]

    def backward(outputs: Outputs, *, keep: bool) -> Outputs:
        slopes = [slope if name == "o" else torch.ones_like(x) for name, x in outputs.items()]
        found = torch.autograd.grad(list(outputs.values()), wanted, slopes, retain_graph=keep)
        return {f"d{name}": x for name, x in zip(names, found, strict=True)}

    if late:
        recorded = forward()
        return lambda: backward(recorded, keep=True)

    def both() -> Outputs:
        outputs = forward()
        gradients = backward(outputs, keep=False)
        return {name: x.detach() for name, x in outputs.items()} | gradients

    return both


def fault(found: Outputs, right: Outputs, sample: Sample) -> str | None:
    """Why results are not those of the shipped configuration, or None: as a whole, and in every row."""
    limit = TF32 if sample.precision == "tf32" else LIMITS[sample.dtype]
    for name, want in right.items():
        got = found[name]
        if not bool(torch.isfinite(got).all()):
            return f"{name} is not finite"
        allowed = SUMS if name in ("dlog_decay", "dtheta") else limit
        for x, y in zip(got, want, strict=True):  # one by one: float32 copies are large
            y = y.float()
            error, size = (x.float() - y).square().sum(-1), y.square().sum(-1)
            mean = size.mean() + 1e-30
            whole = float((error.mean() / mean).sqrt())
            row = float((error / (size + mean)).sqrt().max())
            if whole > allowed or row > ROWS * allowed:
                return f"{name} is off by {max(whole, row / ROWS):.2g} of its size"
    return None


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New arrays are full of NaN: what a kernel does not write is seen."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def launches(works: Sequence[Work]) -> list[Callable[[], Any]]:
    """What compiles every product that these calls launch; the calls are made without those."""
    found: dict[str, Callable[[], Any]] = {}

    def note(*given: Any, grid: Any, warmup: bool, **options: Any) -> None:
        args = [MockTensor(x.dtype) if isinstance(x, Tensor) else x for x in given]
        kinds = [str(x.dtype) if isinstance(x, MockTensor) else x for x in args]
        found[repr((kinds, options))] = lambda: product.warmup(*args, grid=grid, **options)

    real = product.run
    product.run = note  # what starts or compiles the kernel
    try:
        for one in works:
            one()
    finally:
        product.run = real
    return list(found.values())


class Trials:
    """What the requests of a worker do. clock: milliseconds of a call."""

    def __init__(self, target: Target, device: str, backend: BackendLike, clock: Clock) -> None:
        self.target, self.device, self.backend, self.clock = target, device, backend, clock
        tuned.use_table({})
        self.timed = [(sample, work(self._fitting(sample), device, backend)) for sample in target.timed]
        self._compile([one for _, one in self.timed])
        self.right = [one() for _, one in self.timed]
        self.shipped = self._times()
        self.checked: list[tuple[Sample, Work]] = []
        self.right_too: list[Outputs] = []

    def compile(self, tried: Sequence[Blocks], say: Callable[[dict[str, Any]], None]) -> None:
        """Compile configurations side by side; `say` is told what begins and what is done."""
        jobs = []
        for blocks in tried:
            self._force(blocks)
            jobs.append(launches([one for _, one in self.timed]))

        def compile_one(index: int) -> None:
            say({"begun": index})
            why = None
            try:
                for job in jobs[index]:
                    job()
            except COMPILERS as error:
                why = sentence(error)
            say({"done": index, "why": why})

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(compile_one, range(len(jobs))))

    def time(self, blocks: Blocks) -> dict[str, Any]:
        """Results of the timed calls, then their times."""
        self._force(blocks)
        try:
            why = self._first_fault(self.timed, self.right)
            return {"why": why, "ms": self._times() if why is None else [], "shipped": self.shipped}
        except TritonError as error:
            return {"why": sentence(error)}

    def check(self, blocks: Blocks) -> dict[str, Any]:
        """Results of all calls, then the times of both configurations, in turns."""
        if not self.checked:
            tuned.use_table({})
            self.checked = [(one, work(one, self.device, self.backend)) for one in self.target.checked]
            self._compile([one for _, one in self.checked])
            self.right_too = [one() for _, one in self.checked]
        self._force(blocks)
        try:
            self._compile([one for _, one in self.checked])
            why = self._first_fault(self.checked, self.right_too) or self._first_fault(self.timed, self.right)
            if why is not None:
                return {"why": why}
            rounds: list[tuple[list[float], list[float]]] = []
            for _ in range(3):
                tuned.use_table({})
                shipped = self._times()
                self._force(blocks)
                rounds.append((self._times(), shipped))
        except TritonError as error:
            return {"why": sentence(error)}
        ours, theirs = (
            [min(times) for times in zip(*side, strict=True)] for side in zip(*rounds, strict=True)
        )
        return {"why": None, "ms": ours, "shipped": theirs}

    def _force(self, blocks: Blocks) -> None:
        tuned.use_table({str(self.target.family): blocks})

    def _compile(self, works: Sequence[Work]) -> None:
        """Side by side; what does not compile says so when it is launched."""
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for future in [pool.submit(job) for job in launches(works)]:
                future.exception()

    def _first_fault(self, works: Sequence[tuple[Sample, Work]], right: Sequence[Outputs]) -> str | None:
        for (sample, one), want in zip(works, right, strict=True):
            with poisoned():
                found = one()
            if (why := fault(found, want, sample)) is not None:
                return f"{why} ({describe(sample)})"
        return None

    def _times(self) -> list[float]:
        return [self.clock(one) for _, one in self.timed]

    def _fitting(self, sample: Sample) -> Sample:
        """The sample at a length whose arrays fit into the device's memory."""
        if not self.device.startswith("cuda"):
            return sample
        room = torch.cuda.mem_get_info()[0] // len(self.target.timed)
        size = getattr(torch, sample.dtype).itemsize * sample.b * sample.h * max(sample.d, sample.e)
        while sample.n > 512 and 24 * size * sample.n > room:
            sample = replace(sample, n=sample.n // 2)
        return sample


def describe(sample: Sample) -> str:
    """A call in a few words."""
    said = (sample.dtype, sample.decay, sample.reweight, sample.feature_map)
    flags = {"normalize": sample.normalize, "not causal": not sample.causal, "state": sample.state}
    words = [word for word in said if word] + [word for word, held in flags.items() if held]
    return f"n={sample.n}, {', '.join(words)}"


def sentence(error: BaseException) -> str:
    """The first line of an error, with its class."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def milliseconds(one: Work) -> float:
    """The median of a call's time on the device, with a cold cache."""
    from triton.testing import do_bench

    return float(do_bench(one, warmup=5, rep=25, return_mode="median"))


def target_of(given: dict[str, Any]) -> Target:
    """A target as it came through JSON."""
    timed, checked = (tuple(Sample(**one) for one in given[name]) for name in ("timed", "checked"))
    return Target(Family(**given["family"]), tuple(given["cases"]), timed, checked)


def serve(requests: TextIO, answers: TextIO, device: str, backend: BackendLike, clock: Clock) -> None:
    """Answer requests until they end."""
    lock = threading.Lock()

    def say(what: dict[str, Any]) -> None:
        with lock:
            answers.write(json.dumps(what) + "\n")
            answers.flush()

    trials = Trials(target_of(json.loads(requests.readline())["target"]), device, backend, clock)
    say({"shipped": trials.shipped})
    for line in requests:
        request = json.loads(line)
        if request["do"] == "compile":
            trials.compile([Blocks(*of) for of in request["of"]], say)
            say({"end": True})
        else:
            try_it = trials.time if request["do"] == "time" else trials.check
            say(try_it(Blocks(*request["of"])))


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    serve(sys.stdin, channel, "cuda", "triton", milliseconds)
