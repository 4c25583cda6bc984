"""What a training run on many devices will take, before there are any: memory, operations, bytes exchanged, time.

Everything is in closed form, from the configuration alone; no process group and no device is needed. The memory and the
operations are those of this package's code and are tested against it; the time is a roofline, of peak rates and of a
share of them that the caller assumes. `python -m megalodon_ops plan` prints a plan; docs/plan.md says what it assumes.
"""

from .cards import CARDS, Card
from .plan import Memory, Plan, Time, plan

__all__ = ["CARDS", "Card", "Memory", "Plan", "Time", "plan"]
