"""Affine maps of intervals, rounded outward: the kernels behind ``pyrobust.Interval``.

Each takes the two ends of a box and returns the two ends of its image. ``rounding`` chooses the
promise, for the weights as stored (proof: ``csrc/interval/interval.h``):

- ``"real"``: the result contains the exact real-number image of the box.
- ``"deployed"``: it also contains what any float32 evaluation returns, in any summation order, with
  or without FMA, denormals kept or flushed.
- ``"nearest"``: plain floating point, unsound: an attained value may lie outside by rounding.

float32 on the CPU runs native kernels, on a CUDA device tensor-core kernels (their own proof:
``csrc/interval/cuda.h``; bounds are wider by about 1e-4 of ``sum |w| |x|``); float64 and other
devices run the same method in torch operations. float16 and bfloat16 are refused: convert with
``.float()``, which is exact. ``radius_precision("bfloat16")`` trades up to 1.6% of width a layer
for speed.

Where a bound overflows, or an operand is infinite or NaN, an error says so: OverflowError,
ValueError, or RuntimeError from compiled code. With ``allow_infinite=True`` the result there is
``[-inf, inf]``. On a GPU it always is, since looking would stop the device;
``torch.isfinite(upper).all()`` looks.

Source: S. M. Rump, "Fast and parallel interval arithmetic", BIT 39 (1999); N. Revol and
P. Theveny, "Numerical reproducibility and parallel computations: issues for interval algorithms",
IEEE Trans. Computers 63 (2014). Departures: the centre's rounding error joins the radius before
its product, so two sums suffice and no rounding mode is switched.
"""

from __future__ import annotations

from pyrobust.ops._interval_conv import interval_conv2d
from pyrobust.ops._interval_linear import interval_linear
from pyrobust.ops._interval_packed import interval_packed_conv2d, interval_packed_linear
from pyrobust.ops._interval_precision import radius_precision

__all__ = [
    "interval_conv2d",
    "interval_linear",
    "interval_packed_conv2d",
    "interval_packed_linear",
    "radius_precision",
]
