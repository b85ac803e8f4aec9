"""What a bug report says of the machine."""

from __future__ import annotations

from linattn.environment import driver

SAYS = """NVRM version: NVIDIA UNIX {open} x86_64  {version}  Release Build  (builder@somewhere)  Tue May 13
GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)
"""


def test_the_driver_names_its_version() -> None:
    assert driver(SAYS.format(open="Open Kernel Module for", version="570.158.01")) == "570.158.01"
    assert driver(SAYS.format(open="Kernel Module", version="535.161.08")) == "535.161.08"
    assert driver("") is None
