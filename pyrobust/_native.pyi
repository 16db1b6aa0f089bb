"""Types of the native module."""

from torch import Tensor

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def supported_isas() -> list[str]: ...
def interval_linear(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rounding: str,
    out_lower: Tensor,
    out_upper: Tensor,
    num_threads: int,
) -> None: ...
