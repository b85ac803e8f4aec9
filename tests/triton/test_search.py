"""How a search for launch configurations chooses, and what it survives, without a GPU."""

import sys
from pathlib import Path

import pytest

from linattn.backends.triton import plan, search, tuned, worker
from linattn.backends.triton.plan import Blocks
from linattn.backends.triton.search import Answer, Died, Search
from linattn.backends.triton.tuned import Family
from linattn.errors import LinattnError, OptionError

GPU = tuned.key("NVIDIA H100", (9, 0), "3.6.0")
A, B, C, D = (Blocks(64, 64, warps, stages) for warps in (4, 8) for stages in (3, 4))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home folder."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    tuned.use_default()
    yield tmp_path
    monkeypatch.undo()
    tuned.use_default()


def test_every_default_case_is_a_family_of_its_own():
    targets = search.targets()
    assert [case for target in targets for case in target.cases] == list(search.DEFAULT)
    assert [str(target.family) for target in targets[:3]] == [
        "bfloat16 128 128 plain value",
        "bfloat16 64 64 plain value",
        "bfloat16 64 64 angles value",
    ]


def test_cases_of_one_family_are_timed_together_and_gradients_swap_the_sizes():
    (target,) = search.targets(["cosformer-64", "lrpe 64"])
    assert [sample.reweight for sample in target.timed] == ["cosine", "lrpe"]
    (back,) = search.targets(["backward 128 64"], "float16", quick=True)
    assert back.family == Family("float32", 64, 128, False, True)
    assert (back.timed[0].d, back.timed[0].e, back.timed[0].n) == (128, 64, 1024)
    assert {sample.dtype for sample in back.checked} == {"float16", "float32"}


@pytest.mark.parametrize("name", ["", "forward", "forward 100", "forward 64 64 64", "nope 64", "64 forward"])
def test_a_case_that_does_not_exist_is_refused_with_those_that_do(name):
    with pytest.raises(OptionError, match=r"no case named .* forward, cosformer, lrpe, backward, "):
        search.targets([name])


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("dtype", search.DTYPES)
def test_what_is_tried_may_be_written(home, dtype, quick):
    for case in ("forward 16", "lrpe 64", "backward 128", "cosformer-backward 256"):
        (target,) = search.targets([case], dtype)
        tried = search.candidates(target.family, quick=quick)
        assert len(tried) == len(set(tried)) > 0
        for blocks in tried:
            tuned.save(home / "x.json", GPU, {target.family: vars(blocks)})


class Scripted:
    """A worker that answers from tables: why one does not compile, its share of the time, or its death."""

    def __init__(self, *, compiles=None, shares=None, checks=None):
        self.compiles, self.shares, self.checks = compiles or {}, shares or {}, checks or {}
        self.started = self.closed = 0

    def start(self, target):
        self.started += 1
        return self

    def compile(self, blocks):
        done = {}
        for one in blocks:
            if self.compiles.get(one) == "dies":
                raise Died("killed", done, blocks[len(done) : len(done) + 2])
            done[one] = self.compiles.get(one)
        return done

    def time(self, blocks):
        return self._answer(self.shares.get(blocks, 1.0))

    def check(self, blocks):
        return self._answer(self.checks.get(blocks, self.shares.get(blocks, 1.0)))

    def _answer(self, said):
        if said == "dies":
            raise Died("an illegal memory access", {}, ())
        return Answer(why=said) if isinstance(said, str) else Answer((said * 2.0,), (2.0,))

    def close(self):
        self.closed += 1


def searched(scripted, tried=(A, B, C, D)):
    (target,) = search.targets(["forward 128"])
    outcome = Search(target, scripted.start).run(tried)
    assert scripted.started == scripted.closed
    return outcome


def test_the_fastest_that_is_right_is_kept():
    outcome = searched(Scripted(shares={A: 0.9, B: 0.5, C: 0.6, D: 1.3}, checks={B: "o is not finite"}))
    assert outcome.best == C
    assert outcome.skipped == {B: "o is not finite"}
    assert outcome.entry() == {
        "c": 64, "block_e": 64, "warps": 8, "stages": 3, "across": True, "ms": [1.2], "shipped_ms": [2.0],
    }  # fmt: skip


@pytest.mark.parametrize("shares", [{A: 0.98}, {}, {A: 0.5, B: 0.5}])
def test_the_shipped_one_stays_unless_another_is_faster_by_3_percent_twice(shares):
    outcome = searched(Scripted(shares=shares, checks=dict.fromkeys(shares, 0.98)))
    assert outcome.best is None
    assert outcome.entry() is None
    assert outcome.why is None


def test_what_kills_a_worker_is_skipped_and_the_rest_goes_on_in_a_new_one():
    scripted = Scripted(compiles={A: "dies"}, shares={B: "dies", C: "OutOfResources: ...", D: 0.8})
    outcome = searched(scripted)
    assert outcome.best == D
    reasons = {A: "killed", B: "an illegal memory access", C: "OutOfResources: ..."}
    assert outcome.skipped == reasons
    assert scripted.started == 4  # at first, after A among others, after A alone, after B


def test_all_may_fail():
    outcome = searched(Scripted(compiles=dict.fromkeys((A, B, C, D), "dies")))
    assert outcome.best is None
    assert len(outcome.skipped) == 4
    assert outcome.why is None


def test_where_the_shipped_one_fails_there_is_a_reason_and_no_entry():
    def start(target):
        raise LinattnError("the shipped configuration did not run")

    (target,) = search.targets(["forward 128"])
    outcome = Search(target, start).run([A])
    assert outcome.why == "the shipped configuration did not run"
    assert outcome.entry() is None


def test_the_shipped_one_is_the_library_s_whatever_file_is_there(home):
    (target,) = search.targets(["forward 128"])
    tuned.save(tuned.default_path(), GPU, {target.family: vars(Blocks(64, 16, 4, 3))})
    assert target.shipped == plan.blocks("bfloat16", 128, 128, False, False)
    assert target.shipped.block_e != 16


WORKER = """
import json, os, sys, time
print("noise", file=sys.stderr, flush=True)
assert json.loads(sys.stdin.readline())["target"]["family"]["d"] == 128
START
print(json.dumps({"shipped": [2.0]}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "compile":
        for i, of in enumerate(request["of"]):
            print(json.dumps({"begun": i}), flush=True)
            if of[2] == 8:
                os.abort()
            print(json.dumps({"done": i, "why": "no" if of[0] == 32 else None}), flush=True)
        print(json.dumps({"end": True}), flush=True)
    elif request["of"][0] == 128:
        time.sleep(600)
    elif request["of"][0] == 32:
        sys.exit("RuntimeError: CUDA error: an illegal memory access was encountered")
    elif request["of"][0] == 16:
        print(json.dumps({"why": "o is not finite"}), flush=True)
    else:
        print(json.dumps({"why": None, "ms": [1.0], "shipped": [2.0]}), flush=True)
"""


def process(start: str = "", limit: float = 60.0) -> worker.Process:
    (target,) = search.targets(["forward 128"])
    program = (sys.executable, "-c", WORKER.replace("START", start))
    return worker.Process(target, program=program, limits=(60.0, 60.0, limit, limit))


def test_a_process_answers():
    one = process()
    try:
        assert one.compile([A, Blocks(32, 64, 4, 2)]) == {A: None, Blocks(32, 64, 4, 2): "no"}
        assert one.time(A) == Answer((1.0,), (2.0,))
        assert one.check(Blocks(16, 64, 4, 2)).why == "o is not finite"
    finally:
        one.close()


def test_a_process_that_faults_leaves_its_last_words():
    one = process()
    with pytest.raises(Died, match=r"^RuntimeError: CUDA error: an illegal memory access"):
        one.time(Blocks(32, 64, 4, 2))
    with pytest.raises(Died):
        one.time(A)
    one.close()


def test_a_process_that_hangs_is_killed():
    one = process(limit=0.5)
    with pytest.raises(Died, match=r"^no answer in 0\.5 seconds$"):
        one.check(Blocks(128, 64, 4, 2))
    one.close()
    assert one.process.returncode is not None


def test_a_process_that_dies_compiling_says_what_it_was_at():
    one = process()
    with pytest.raises(Died) as death:
        one.compile([A, C, B])
    one.close()
    assert death.value.done == {A: None}
    assert death.value.begun == (C,)


def test_a_process_that_does_not_start_is_one_sentence():
    with pytest.raises(LinattnError, match=r"^the shipped configuration of bfloat16 128 .* did not run: oh$"):
        process(start="sys.exit('oh')")
