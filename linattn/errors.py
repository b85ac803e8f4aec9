"""Every refusal of the library: which argument, what was expected, what came, and what to do."""

from __future__ import annotations

from collections.abc import Mapping


class LinattnError(Exception):
    """The base of every error that linattn raises on purpose."""


class ArgumentTypeError(LinattnError, TypeError):
    """An argument is the wrong kind of object, or a keyword does not exist."""


class DtypeError(LinattnError, TypeError):
    """Arrays of a dtype that is not taken, or of dtypes that do not go together."""


class ShapeError(LinattnError, ValueError):
    """A rank or a length that disagrees with the other arguments."""


class DeviceError(LinattnError, ValueError):
    """Arrays that live on different devices."""


class ValueRangeError(LinattnError, ValueError):
    """A value outside its domain: a positive decay, a slot that does not exist, a NaN."""


class OptionError(LinattnError, ValueError):
    """Options that exclude each other, or an option that does not exist."""


class StateError(LinattnError, ValueError):
    """A state that belongs to another problem."""


class GradientError(LinattnError, RuntimeError):
    """A derivative that is not offered: double backward, forward mode, vmap, or through an in-place step."""


class UnknownBackendError(LinattnError, ValueError):
    """No backend has this name."""


class UnsupportedError(LinattnError, NotImplementedError):
    """The arguments are valid, but no requested backend can run them.

    `reasons` maps each backend that was asked to its own sentence.
    """

    def __init__(self, call: object, reasons: Mapping[str, str]) -> None:
        width = max(map(len, reasons), default=0)
        lines = [f"  {name:<{width}}  {reason}" for name, reason in reasons.items()]
        super().__init__("\n".join(["no requested backend can run this call.", f"  call: {call}", *lines]))
        self.reasons = dict(reasons)


class CheckpointError(LinattnError, ValueError):
    """A checkpoint that is missing, damaged, of another model, or could not be written."""


class DataError(LinattnError, ValueError):
    """Training text that is missing, empty, too short or not text."""
