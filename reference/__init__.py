"""What linear attention is, in NumPy and float64, to be read: the definition, two algorithms, the gradients."""

from . import decay
from .attention import attention
from .blockwise import blockwise
from .gradients import gradients
from .recurrence import recurrent
from .weights import weights

__all__ = ["attention", "blockwise", "decay", "gradients", "recurrent", "weights"]
