"""Names: of classes, which transformers asks for."""

from __future__ import annotations

from transformers.models.auto import modeling_auto

__all__ = ["tell"]


def tell(model_type: str, **names: str) -> None:
    """Add a model's classes to transformers' tables of names, which `AutoModel….register` leaves out.

    names: a class's name by its task, as in tell("transnormer", CAUSAL_LM="TransNormerForCausalLM"). Trainer
    shifts labels for label smoothing only where it finds a model among the causal ones.
    """
    for task, name in names.items():
        table = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", None)
        if table is not None:
            table.setdefault(model_type, name)
