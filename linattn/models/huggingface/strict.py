"""Fields of configurations that transformers checks itself, refused as all others are."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError

from linattn.errors import OptionError

__all__ = ["StrictFields"]


class StrictFields:
    """Before PreTrainedConfig among the bases of a configuration: its own checks raise OptionError."""

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except StrictDataclassFieldValidationError as error:
            raise OptionError(str(error.__cause__)) from error
