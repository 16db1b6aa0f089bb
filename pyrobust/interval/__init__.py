"""The Interval type: call any torch model on a box of inputs and get a box of outputs."""

from pyrobust.interval.table import KINDS as _KINDS
from pyrobust.interval.table import RULES as _RULES
from pyrobust.interval.type import Interval, install

install(_RULES, _KINDS)

__all__ = ["Interval"]
