"""Fields of configurations that transformers checks itself, or does not know: refused as all others are."""

from __future__ import annotations

import dataclasses
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError

from linattn.errors import OptionError
from linattn.models.names import check_field

__all__ = ["StrictFields"]


FLAGS = ("output_hidden_states", "is_encoder_decoder")


class StrictFields:
    """Before PreTrainedConfig among the bases of a configuration: its own checks raise OptionError.

    So do fields that a configuration has not, but for a slip of the hand: transformers keeps what it does not
    know. Fields may be changed one by one, so they are looked at again before they are saved.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Read what `to_dict` gave, as transformers does; a class derived from a model's reads that model's.

        Raises OptionError for another model's fields.
        """
        own, found = cls.model_type, config_dict.get("model_type")  # type: ignore[attr-defined]
        if found is not None and found not in {getattr(one, "model_type", None) for one in cls.__mro__}:
            raise OptionError(f"the configuration is of a model of type {found!r}, not {own!r}")
        return super().from_dict(config_dict, **options)  # type: ignore[misc]

    def check_saved(self) -> None:
        """Raise OptionError or ValueRangeError where loading would, for what saving would write now."""
        type(self).from_dict(self.to_dict())  # type: ignore[attr-defined]

    def save_pretrained(self, *arguments: Any, **options: Any) -> Any:
        """Write the configuration, as transformers does; nothing where `check_saved` raises."""
        self.check_saved()
        return super().save_pretrained(*arguments, **options)  # type: ignore[misc]

    @property
    def auto_map(self) -> dict[str, Any]:
        """Which remote code a checkpoint names. TRL asks configurations that are not transformers' own."""
        return self.__dict__.get("auto_map", {})  # type: ignore[no-any-return]

    @auto_map.setter
    def auto_map(self, value: dict[str, Any]) -> None:
        self.__dict__["auto_map"] = value

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(self, name):
            known = (*(field.name for field in dataclasses.fields(self)), *self.attribute_map)  # type: ignore[arg-type, attr-defined]
            check_field(type(self).__name__, name, known)
        if name in FLAGS and type(value) is not bool:  # newer transformers takes anything
            raise OptionError(f"{name} must be True or False, got {value!r}")
        try:
            super().__setattr__(name, value)
        except StrictDataclassFieldValidationError as error:
            raise OptionError(str(error.__cause__)) from error
