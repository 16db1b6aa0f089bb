"""The Interval type: call any torch model on a box of inputs and get a box of outputs."""

from pyrobust import _native
from pyrobust.interval.application import install
from pyrobust.interval.dynamo import trace_matrix_products
from pyrobust.interval.reader_modes import reader_watches
from pyrobust.interval.table import KINDS as _KINDS
from pyrobust.interval.table import QUICK as _QUICK
from pyrobust.interval.table import RULES as _RULES
from pyrobust.interval.trees import register_with_torch
from pyrobust.interval.type import Interval, settle

install(_RULES, _KINDS, _QUICK)
_native.set_box_type(Interval)
_native.add_settled_ends(Interval, settle, reader_watches)
trace_matrix_products(Interval)
register_with_torch()

__all__ = ["Interval"]
