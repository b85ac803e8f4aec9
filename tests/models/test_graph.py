"""Recordings by the driver's calls: in what order, and what is left when something fails."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from linattn.models import graph, replay


class Driver:
    """What graph.py asks of the driver, and what it answers."""

    def __init__(self, **failing: int) -> None:
        self.said: list[str] = []
        self.failing = failing

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> int:
            self.said.append(name.removeprefix("cu"))
            return self.failing.get(name, 0)

        return call


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Graph(work) on a driver of the test's, and what the driver was asked."""
    for name in ("device", "stream", "use_mem_pool"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: contextlib.nullcontext())
    pool = SimpleNamespace(snapshot=lambda: ["a segment"])
    monkeypatch.setattr(torch.cuda, "MemPool", lambda: pool, raising=False)
    monkeypatch.setattr(graph, "_own_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 5, raising=False)

    def record(work: Any, driver: Driver) -> graph.Graph:
        monkeypatch.setattr(graph, "_driver", lambda: driver)
        return graph.Graph(work, torch.device("cuda", 0))

    return record


BEGIN, END, MAKE, DROP = (
    "StreamBeginCapture_v2",
    "StreamEndCapture",
    "GraphInstantiateWithFlags",
    "GraphDestroy",
)


def test_a_recording(recording: Any) -> None:
    driver = Driver()

    def work() -> torch.Tensor:
        assert not gc.isenabled()
        assert driver.said == [BEGIN] and graph._recording.locked()
        return torch.ones(2)

    made = recording(work, driver)
    assert gc.isenabled() and not graph._recording.locked()
    assert driver.said == [BEGIN, END, MAKE, DROP] and made.result.tolist() == [1, 1]
    made.replay()
    del made
    assert driver.said[4:] == ["GraphLaunch", "GraphExecDestroy"]


@pytest.mark.parametrize("status, number", [(0, 0), (1, 17)])
def test_what_is_being_recorded(monkeypatch: pytest.MonkeyPatch, status: int, number: int) -> None:
    def asked(stream: Any, to_status: Any, to_number: Any, *rest: Any) -> int:
        assert stream.value == 5 and [one.value for one in rest] == [None] * 3
        to_status._obj.value, to_number._obj.value = status, 17
        return 0

    monkeypatch.setattr(graph, "_driver", lambda: SimpleNamespace(cuStreamGetCaptureInfo_v2=asked))
    assert graph.capture_of(5) == number


def test_a_graph_starts_on_its_own_device(recording: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    current = [None]

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Any:
        current.append(wanted)
        yield
        current.pop()

    class Launching(Driver):
        def cuGraphLaunch(self, handle: Any, stream: Any) -> int:
            started.append((current[-1], stream.value))
            return 0

    started: list[Any] = []
    made = recording(lambda: torch.ones(2), Launching())
    monkeypatch.setattr(torch.cuda, "device", device)
    made.replay()
    assert started == [(torch.device("cuda", 0), 5)] and current == [None]


def fails(error: BaseException) -> Any:
    def work() -> torch.Tensor:
        raise error

    return work


@pytest.mark.parametrize("invalid", [0, 901])
@pytest.mark.parametrize("error", [ValueError("own"), KeyboardInterrupt(), RuntimeError("own")], ids=repr)
def test_work_that_raises(recording: Any, error: BaseException, invalid: int) -> None:
    driver = Driver(cuStreamEndCapture=invalid)
    with pytest.raises(type(error)) as raised:
        recording(fails(error), driver)
    assert raised.value is error
    assert driver.said == [BEGIN, END] + [DROP] * (not invalid)
    assert gc.isenabled() and not graph._recording.locked()


@pytest.mark.parametrize(
    "name, said",
    [(BEGIN, [BEGIN]), (END, [BEGIN, END]), (MAKE, [BEGIN, END, MAKE, DROP])],
)
def test_a_driver_that_refuses(recording: Any, name: str, said: list[str]) -> None:
    driver = Driver(**{f"cu{name}": 900})
    with pytest.raises(RuntimeError, match=f"cu{name} returned the CUDA error 900"):
        recording(lambda: torch.ones(1), driver)
    assert driver.said == said and gc.isenabled() and not graph._recording.locked()


def test_memory_of_somebody_elses_pool_is_not_taken(recording: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within `use_mem_pool` of one's own, that pool comes first: it would give the same memory out again."""
    monkeypatch.setattr(torch.cuda, "MemPool", lambda: SimpleNamespace(snapshot=list), raising=False)
    driver = Driver()
    with pytest.raises(RuntimeError, match="another pool"):
        recording(lambda: torch.ones(1), driver)
    assert driver.said == [BEGIN, END, DROP] and gc.isenabled() and not graph._recording.locked()


def test_what_a_recording_raises_is_no_matter(recording: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.ones(3)
    monkeypatch.setattr(replay, "Graph", lambda work, device: recording(lambda: work(), Driver()))
    made = replay.recorded(lambda x: 2 * x, torch.ones(3), kept)
    assert made is not None and made.kept is kept and not made.given.is_inference()
    assert made.graph.result.shape == (3,)
    for error in (RuntimeError("own"), OSError("no driver")):
        assert replay.recorded(lambda x, error=error: fails(error)(), torch.ones(3), None) is None
    with pytest.raises(ValueError, match="own"):
        replay.recorded(lambda x: fails(ValueError("own"))(), torch.ones(3), None)
