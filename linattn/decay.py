"""Log decays per head: the schedules that go by one name, told apart.

Each returns float64 [H], natural logarithms of a factor per token, <= 0: pass them as `log_decay`.
"""

from __future__ import annotations

from linattn.reference.decay import alibi, fla, minimax, transnormer

__all__ = ["alibi", "fla", "minimax", "transnormer"]
