"""Starting a kernel that has been compiled before costs a table look-up, not Triton's own preparation."""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor


class Launcher:
    """A `@triton.jit` function that remembers what it was compiled to.

    Triton works out a kernel's variant from every argument of every call; here the caller says what the
    variant depends on. Pointers' alignment is looked at as well.
    """

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        self.ready: dict[Any, Any] = {}
        self.pointers: tuple[int, ...] = ()

    def __call__(
        self, programs: int, key: Any, arguments: tuple[Any, ...], constants: tuple[Any, ...], **options: int
    ) -> None:
        """Start `programs` programs on the current device and stream.

        key: the flags, dtypes and strides that decide about the variant. constants: the compile-time
        arguments, which follow the others. options: num_warps and num_stages, part of the key.
        """
        flat, odd = list(arguments), 0
        for i in self.pointers:
            flat[i] = address = arguments[i].data_ptr()
            if address & 15:
                odd |= 1 << i
        found = self.ready.get((key, odd))
        if found is not None:
            found[programs, 1, 1](*flat, *constants)
            return
        kernel = self.jit[(programs,)](*arguments, *constants, **options)
        if kernel is None:  # an interpreter compiles nothing
            return
        if not self.pointers:
            self.pointers = tuple(i for i, x in enumerate(arguments) if isinstance(x, Tensor))
            odd = sum(1 << i for i in self.pointers if arguments[i].data_ptr() & 15)
        self.ready[key, odd] = kernel
