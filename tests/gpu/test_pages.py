"""Blocks of the documentation that are marked `python gpu` run; blocks without the mark run in tests/docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"^```python gpu\n(.*?)^```", re.S | re.M)
IMPORT = re.compile(r"^(?:import|from) (\w+)", re.M)
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "_build" not in page.parts and BLOCK.search(page.read_text())
]
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, names = page.read_text(), dict[str, Any]()
    for block in BLOCK.finditer(text):
        for package in IMPORT.findall(block[1]):
            pytest.importorskip(package, reason=f"{package} is not installed, which the page imports")
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), names)  # a traceback points into the page
