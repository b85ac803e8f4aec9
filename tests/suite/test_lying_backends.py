"""Lies told through the Backend protocol and torch's autograd, and refusals that come too late."""

from __future__ import annotations

from typing import Any

import torch

from linattn import registry, testing
from linattn.errors import UnsupportedError


class Delegate:
    """A backend object of a third party: the NumPy backend under another name."""

    name = "delegate"
    arrays = {"numpy": False}  # noqa: RUF012

    def unavailable(self) -> None:
        return None

    def unsupported(self, problem: Any) -> str | None:
        return None

    def forward(self, problem: Any, *arguments: Any) -> Any:
        return registry.get("numpy").forward(problem, *arguments)


class ScaleMissing(Delegate):
    def forward(self, problem: Any, *arguments: Any) -> Any:
        o, state = super().forward(problem, *arguments)
        return o / problem.scale, state


class RefusesLate(Delegate):
    """Says yes when asked, and no in the middle of the work: a refusal after the question is a failure."""

    def forward(self, problem: Any, *arguments: Any) -> Any:
        if problem.n > 20:
            raise UnsupportedError(problem, {self.name: "is tired"})
        return super().forward(problem, *arguments)


class RefusesPacked(Delegate):
    def unsupported(self, problem: Any) -> str | None:
        return "does not pack" if problem.packed else None


class RefusesCrossAndLies(Delegate):
    """Takes as many keys as queries and no borders, and is wrong where it does not mask the future."""

    def unsupported(self, problem: Any) -> str | None:
        return "no" if problem.m != problem.n or problem.packed or problem.lengths else None

    def forward(self, problem: Any, *arguments: Any) -> Any:
        o, state = super().forward(problem, *arguments)
        return (o if problem.causal else o / 2), state


def test_what_refuses_other_keys_is_compared_without() -> None:
    report = testing.check_backend(RefusesCrossAndLies(), only=["matches_the_reference"], shrink=False)
    assert report.failures and "allowed" in report.failures[0].message


class TakesLittle(Delegate):
    """Most pairs of options have one that it refuses."""

    def unsupported(self, problem: Any) -> str | None:
        options = "reweight", "feature_map", "normalize", "key_mask", "lengths", "packed"
        return next((f"it has no {name}" for name in options if getattr(problem, name)), None)


def test_all_is_tried_that_is_offered_beside_what_is_refused() -> None:
    report = testing.check_backend(TakesLittle(), variant="gla", quick=True)
    assert report.ok
    untried = {finding.property for finding in report.findings if finding.status != "pass"}
    assert untried == {"packs_as_if_separate", "cuts_at_lengths", "takes_masked_keys_as_zero"}
    tried = {finding.property: finding.variants for finding in testing.check_backend(TakesLittle()).findings}
    assert tried["matches_the_reference"] > 5


def test_an_honest_object_passes() -> None:
    report = testing.check_backend(Delegate(), quick=True)
    assert report.ok, str(report)


def test_a_lying_object_is_caught() -> None:
    report = testing.check_backend(ScaleMissing(), only=["matches_the_reference"], shrink=False)
    assert not report.ok


def test_a_refusal_that_comes_after_the_question_is_a_failure() -> None:
    report = testing.check_backend(RefusesLate(), only=["matches_the_reference"], shrink=False)
    assert not report.ok
    assert "UnsupportedError" in report.failures[0].message


def test_a_refusal_in_words_is_reported_in_those_words() -> None:
    report = testing.check_backend(RefusesPacked(), only=["packs_as_if_separate", "matches_the_reference"])
    packed = {finding.property: finding for finding in report.findings}["packs_as_if_separate"]
    assert (packed.status, packed.refused) == ("not offered", ("does not pack",))
    assert report.ok


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
        ctx.save_for_backward(q, k, v)
        return (q @ k.mT).tril() @ v

    @staticmethod
    def backward(ctx: Any, do: Any) -> Any:
        q, k, v = ctx.saved_tensors
        w = (do @ v.mT).tril()
        return w @ k, w.mT @ q, (q @ k.mT).mT.triu(1) @ do  # v's own token is missing


def _right(q: Any, k: Any, v: Any) -> Any:
    return (q @ k.mT).tril() @ v


def test_a_torch_kernel_with_a_wrong_gradient_is_caught() -> None:
    only = ["matches_the_reference", "gradients_match_the_reference"]
    right = testing.check_kernel(testing.Kernel(_right, layout="bhnd"), only=only)
    assert right.ok, str(right)
    wrong = testing.check_kernel(testing.Kernel(WrongGradient.apply, layout="bhnd", name="wrong"), only=only)
    assert [finding.property for finding in wrong.failures] == ["gradients_match_the_reference"]
    assert "gradient of v" in wrong.failures[0].message


def test_reports_print(capsys: Any) -> None:
    report = testing.check_backend(ScaleMissing(), only=["matches_the_reference"], shrink=False)
    text = str(report)
    assert "matches_the_reference" in text
    assert "fail" in text
    assert report.as_dict()["ok"] is False
