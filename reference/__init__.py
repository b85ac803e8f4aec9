"""What linear attention is, in NumPy, to be read: definition, two algorithms, gradients, decay schedules."""

from . import decay
from .attention import attention
from .blockwise import blockwise
from .gradients import gradients
from .recurrence import recurrent
from .weights import weights

__all__ = ["attention", "blockwise", "decay", "gradients", "recurrent", "weights"]
