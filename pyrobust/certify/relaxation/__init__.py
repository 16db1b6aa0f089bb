"""Linear relaxation: bounds of a network by lines instead of boxes (CROWN and its kin)."""

from pyrobust.certify.relaxation.crown import crown_bound

__all__ = ["crown_bound"]
