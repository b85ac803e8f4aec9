"""A process that tries configurations: what it does wrong ends it, and no more."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import linattn
from linattn.backends.triton.plan import Blocks
from linattn.backends.triton.search import Answer, Died, Target
from linattn.errors import LinattnError

# seconds without a word after which a process counts as hanging
START, COMPILE, TIME, CHECK = 300.0, 240.0, 60.0, 300.0
PROGRAM = (sys.executable, "-m", "linattn.backends.triton.trial")


class Process:
    """One worker process, a search.Worker. Requests and answers are lines of JSON.

    limits: seconds for its start, between two compiled configurations, for timing and for checking one.

    Raises LinattnError when the process does not get as far as timing the shipped configuration.
    """

    def __init__(
        self,
        target: Target,
        *,
        program: Sequence[str] = PROGRAM,
        limits: tuple[float, float, float, float] = (START, COMPILE, TIME, CHECK),
    ) -> None:
        self.limits = limits
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed by close)
        root = Path(linattn.__file__).parent.parent  # `-m` looks there first: the process runs this linattn
        self.process = subprocess.Popen(
            program,
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        with contextlib.ExitStack() as unless_it_starts:  # an interrupt leaves no process behind either
            unless_it_starts.callback(self.close)
            try:
                self._send({"target": asdict(target)})
                self._next(limits[0])
            except Died as death:
                raise LinattnError(
                    f"the shipped configuration of {target.family} did not run: {death}"
                ) from death
            unless_it_starts.pop_all()

    def compile(self, blocks: Sequence[Blocks]) -> dict[Blocks, str | None]:
        done: dict[Blocks, str | None] = {}
        begun: set[int] = set()
        try:
            self._send({"do": "compile", "of": [_numbers(one) for one in blocks]})
            while "end" not in (said := self._next(self.limits[1])):
                begun.add(said["begun"]) if "begun" in said else begun.discard(said["done"])
                if "done" in said:
                    done[blocks[said["done"]]] = said["why"]
        except Died as death:
            raise Died(str(death), done, [blocks[i] for i in sorted(begun)]) from death
        return done

    def time(self, blocks: Blocks) -> Answer:
        return self._ask("time", blocks, self.limits[2])

    def check(self, blocks: Blocks) -> Answer:
        return self._ask("check", blocks, self.limits[3])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was still to be sent to it
                    stream.close()

    def _ask(self, what: str, blocks: Blocks, limit: float) -> Answer:
        self._send({"do": what, "of": _numbers(blocks)})
        said = self._next(limit)
        if said["why"] is not None:
            return Answer(why=said["why"])
        return Answer(tuple(said["ms"]), tuple(said["shipped"]))

    def _send(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise Died(self._last_words(), {}, ()) from error

    def _next(self, limit: float) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=limit)
        except queue.Empty:
            self.process.kill()
            raise Died(f"no answer in {limit:g} seconds", {}, ()) from None
        if line is None:
            raise Died(self._last_words(), {}, ())
        found: dict[str, Any] = json.loads(line)
        return found

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _last_words(self) -> str:
        """The last line that a process left, which is its error's, or the signal that ended it."""
        try:
            status = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            status = None
        self.errors.seek(0)
        said = [line for line in self.errors.read().splitlines() if line.strip()]
        ended = (
            "the process stopped answering" if status is None else f"the process ended with status {status}"
        )
        return said[-1].strip()[:300] if said and status != 0 else ended


def _numbers(blocks: Blocks) -> list[int | bool]:
    return [blocks.c, blocks.block_e, blocks.warps, blocks.stages, blocks.across]
