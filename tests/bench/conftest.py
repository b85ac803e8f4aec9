"""Peers that are installed for other tests are no peers here: what they need is not on this machine."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
