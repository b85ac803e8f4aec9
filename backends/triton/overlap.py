"""Launches that share the GPU: kernels that begin while those in front of them still run."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

EARLIEST = (9, 0)
"""Compute capability with programmatic dependent launches."""

# How a launch stands to the one in front of it. They end in order: who waits for one waits for all before.
ALONE = 0
FIRST = 1  # begins when everything before has ended, and lets the next one begin at once
BESIDE = 2  # reads nothing that the one in front writes: begins with it, ends after it
BEHIND = 3  # waits for what the one in front writes, then lets the next one begin

_ALONE, _BEHIND = tl.constexpr(ALONE), tl.constexpr(BEHIND)  # as kernels read them


@functools.cache
def possible(device: str) -> bool:
    """Whether a device starts kernels early."""
    return device.startswith("cuda") and torch.cuda.get_device_capability(device) >= EARLIEST


@triton.jit
def entered(OVERLAP: tl.constexpr):
    """What a kernel does first."""
    if OVERLAP == _BEHIND:
        gdc_wait()
    if OVERLAP != _ALONE:
        gdc_launch_dependents()


@triton.jit
def left(OVERLAP: tl.constexpr):
    """What it does last."""
    if (OVERLAP != _ALONE) & (OVERLAP != _BEHIND):
        gdc_wait()
