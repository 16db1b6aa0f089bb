"""Types of the native module."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def supported_isas() -> list[str]: ...
def set_word_lookups(allowed: bool) -> bool: ...
def has_bfloat16_products() -> bool: ...
def has_bfloat16_tiles() -> bool: ...
def panel_memory() -> int: ...
def new_end(like: Tensor, shape: tuple[int, ...]) -> Tensor: ...
def lent_limit() -> int: ...
def lent_bytes() -> int: ...
def set_lent_limit(bytes: int) -> None: ...
def set_panels(product: int, elements: int) -> tuple[int, int]: ...
def read_words(data: Tensor, num_threads: int) -> int: ...
def multiply_bytes(rounds: int) -> int: ...
def look_words_up(rounds: int) -> int: ...
def set_interval_coarse_radius(allowed: bool) -> bool: ...
def interval_split_ends(
    lower: Tensor,
    upper: Tensor,
    rectified: bool,
    centre: Tensor,
    radius: Tensor,
    num_threads: int,
) -> None: ...
def interval_split_gradients(
    to_lower: Tensor,
    to_upper: Tensor,
    to_centre: Tensor,
    to_radius: Tensor,
    num_threads: int,
) -> None: ...
def interval_join_gradients(
    to_centre: Tensor,
    to_radius: Tensor,
    lower: Tensor | None,
    upper: Tensor | None,
    to_lower: Tensor,
    to_upper: Tensor,
    num_threads: int,
) -> None: ...
def interval_size_of_weight(weight: Tensor, size: Tensor, num_threads: int) -> None: ...
def interval_channel_affine(
    lower: Tensor,
    upper: Tensor,
    rectified: bool,
    map: Tensor,
    rounding: str,
    out_lower: Tensor,
    out_upper: Tensor,
    num_threads: int,
) -> bool: ...
def interval_channel_affine_backward(
    of_lower: Tensor,
    of_upper: Tensor,
    lower: Tensor,
    upper: Tensor,
    rectified: bool,
    map: Tensor,
    to_lower: Tensor | None,
    to_upper: Tensor | None,
    to_map: Tensor | None,
    num_threads: int,
) -> None: ...
def interval_batch_norm_map(
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    map: Tensor,
) -> None: ...
def interval_add(
    low_x: Tensor,
    high_x: Tensor,
    rectified_x: bool,
    low_y: Tensor,
    high_y: Tensor,
    rectified_y: bool,
    rounding: str,
    out_lower: Tensor,
    out_upper: Tensor,
    num_threads: int,
) -> bool: ...
def interval_curve(
    lower: Tensor,
    upper: Tensor,
    curve: str,
    numbers: Sequence[float],
    deployed: Sequence[float],
    rounding: str,
    out_lower: Tensor,
    out_upper: Tensor,
    num_threads: int,
) -> bool: ...
def interval_curve_backward(
    of_lower: Tensor,
    of_upper: Tensor,
    lower: Tensor,
    upper: Tensor,
    curve: str,
    numbers: Sequence[float],
    to_lower: Tensor,
    to_upper: Tensor,
    num_threads: int,
) -> None: ...
def interval_curve_values(x: Tensor, curve: str, numbers: Sequence[float], out: Tensor) -> None: ...
def interval_pair(
    low_x: Tensor,
    high_x: Tensor,
    low_y: Tensor,
    high_y: Tensor,
    operation: str,
    rounding: str,
    out_lower: Tensor,
    out_upper: Tensor,
    num_threads: int,
) -> bool: ...
def interval_pair_backward(
    of_lower: Tensor,
    of_upper: Tensor,
    low_x: Tensor,
    high_x: Tensor,
    low_y: Tensor,
    high_y: Tensor,
    operation: str,
    to: Sequence[Tensor],
    num_threads: int,
) -> None: ...
def interval_constant(
    lower: Tensor,
    upper: Tensor,
    first: float,
    last: float,
    operation: str,
    reversed: bool,
    rounding: str,
    out_lower: Tensor,
    out_upper: Tensor,
    num_threads: int,
) -> bool: ...
def interval_constant_backward(
    of_lower: Tensor,
    of_upper: Tensor,
    lower: Tensor,
    upper: Tensor,
    first: float,
    last: float,
    operation: str,
    reversed: bool,
    to_lower: Tensor,
    to_upper: Tensor,
    num_threads: int,
) -> None: ...
def interval_add_weight_gradient(
    from_centre: Tensor, from_radius: Tensor, weight: Tensor, num_threads: int
) -> None: ...
def eager_interval_linear(
    lower: Tensor | bytearray,
    upper: Tensor | tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None,
    rounding: str,
    rectified: bool,
    num_threads: int,
    grad_enabled: bool,
    keeps: bool,
) -> tuple[Any, Any, bool] | None: ...
def eager_interval_packed(
    lower: Tensor | bytearray,
    upper: Tensor | tuple[int, ...],
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    bits: float,
    group_size: int,
    group_dim: int,
    activations: str | None,
    extras: tuple[Tensor | None, ...] | None,
    rounding: str,
    rectified: bool,
    num_threads: int,
    grad_enabled: bool,
    keeps: bool,
) -> tuple[Any, Any, bool] | None: ...
def set_box_type(type: type) -> None: ...
def add_settled_ends(
    type: type, settle: Callable[[Any], None], reader_watches: Callable[[], bool]
) -> None: ...
def box_linear(box: Any, weight: Any, bias: Any, num_threads: int, grad_enabled: bool) -> Any: ...
def box_packed_linear(
    box: Any,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    bits: float,
    group_size: int,
    group_dim: int,
    activations: str | None,
    extras: tuple[Tensor | None, ...] | None,
    num_threads: int,
    grad_enabled: bool,
) -> Any: ...
def set_chain_types(
    packed_linear: type, relu: type, global_hooks: Sequence[Mapping[Any, Any]]
) -> None: ...
def box_chain(
    box: Any, modules: Mapping[str, Any], start: int, num_threads: int, grad_enabled: bool
) -> tuple[Any, int] | None: ...
def hold_ends(box: Any, lower: Any, upper: Any, rounding: Any) -> bool | None: ...
def ball(
    x: Any, eps: Any, clamp: Any, rounding: str, num_threads: int, grad_enabled: bool
) -> Any: ...
def tensors_of_kept(memory: bytearray, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None: ...
def box_relu(box: Any, grad_enabled: bool) -> Any: ...
def box_ends_in_denormals(lower: Tensor, upper: Tensor) -> bool | None: ...
def box_is_finite(lower: Tensor, upper: Tensor) -> bool | None: ...
def interval_linear(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rounding: str,
    rectified: bool,
    out_lower: Tensor,
    out_upper: Tensor,
    num_threads: int,
) -> bool: ...
def interval_conv2d(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    pad: list[int],
    dilation: list[int],
    groups: int,
    rounding: str,
    rectified: bool,
    out_lower: Tensor,
    out_upper: Tensor,
    num_threads: int,
    epilogue: tuple[Any, Any] | None,
) -> bool: ...
def interval_packed_linear(
    lower: Tensor,
    upper: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    format: list[int],
    extras: tuple[Tensor | None, ...] | None,
    int8: bool,
    rounding: str,
    rectified: bool,
    out_lower: Tensor,
    out_upper: Tensor,
    num_threads: int,
) -> bool: ...
def interval_packed_conv2d(
    lower: Tensor,
    upper: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    format: list[int],
    extras: tuple[Tensor | None, ...] | None,
    int8: bool,
    kernel: list[int],
    stride: list[int],
    pad: list[int],
    dilation: list[int],
    groups: int,
    rounding: str,
    rectified: bool,
    out_lower: Tensor,
    out_upper: Tensor,
    num_threads: int,
    epilogue: tuple[Any, Any] | None,
) -> bool: ...
def packed_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    in_features: int,
    levels: int,
    group_size: int,
    group_dim: int,
    int8: bool,
    extras: tuple[Tensor | None, ...] | None,
    first_row: int,
    num_threads: int,
) -> None: ...
def eager_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    bits: float,
    group_size: int,
    group_dim: int,
    activations: str | None,
    extras: tuple[Tensor | None, ...] | None,
    num_threads: int,
    grad_enabled: bool,
    /,
) -> Tensor | None: ...
def packed_linear_transpose(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    out: Tensor,
    in_features: int,
    levels: int,
    group_size: int,
    group_dim: int,
    extras: tuple[Tensor | None, ...] | None,
    first_row: int,
    num_threads: int,
) -> None: ...
def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    out: Tensor,
    in_features: int,
    levels: int,
    group_size: int,
    group_dim: int,
    extras: tuple[Tensor | None, ...] | None,
    first_row: int,
    num_threads: int,
) -> None: ...

class _SavedCopy(Protocol):
    values: Tensor
    filled: bool

class Summand: ...

def weight_summand(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    in_features: int,
    levels: int,
    group_size: int,
    group_dim: int,
    extras: tuple[Tensor | None, ...] | None,
) -> Summand: ...
def levels_summand(codes: Tensor, levels: Tensor, cols: int) -> Summand: ...
def values_summand(values: Tensor, rows: int, cols: int) -> Summand: ...
def add_all(
    additions: Sequence[tuple[Summand, Tensor, float, _SavedCopy | None]], num_threads: int
) -> None: ...
def use_large_pages(tensor: Tensor) -> None: ...
def gather_rows(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    out: Tensor,
    in_features: int,
    levels: int,
    group_size: int,
    group_dim: int,
    extras: tuple[Tensor | None, ...] | None,
    num_threads: int,
) -> None: ...
def complex_sums(
    x_real: Tensor, x_imag: Tensor, codes: Tensor, out: Tensor, in_features: int, num_threads: int
) -> None: ...
def complex_linear(
    x_real: Tensor,
    x_imag: Tensor,
    codes: Tensor,
    scale_real: float,
    scale_imag: float,
    step_real: Tensor,
    step_imag: Tensor,
    y_real: Tensor,
    y_imag: Tensor,
    in_features: int,
    num_threads: int,
) -> None: ...
def unpack_codes(packed: Tensor, codes: Tensor, levels: int, num_threads: int) -> None: ...
def pack_codes(codes: Tensor, packed: Tensor, levels: int, num_threads: int) -> None: ...
def gaussian_samples(
    x: Tensor,
    scale: Tensor,
    out: Tensor,
    seed: int,
    first_sample: int,
    first_index: int,
    num_threads: int,
) -> None: ...
def uniform_samples(
    x: Tensor,
    scale: Tensor,
    out: Tensor,
    seed: int,
    first_sample: int,
    first_index: int,
    num_threads: int,
) -> None: ...
def laplace_samples(
    x: Tensor,
    scale: Tensor,
    out: Tensor,
    seed: int,
    first_sample: int,
    first_index: int,
    num_threads: int,
) -> None: ...
def split_gaussian_samples(
    x: Tensor,
    mask: Tensor,
    sigma_left: float,
    sigma_right: float,
    left: Tensor,
    right: Tensor,
    seed: int,
    first_sample: int,
    first_index: int,
    num_threads: int,
) -> None: ...
def masked_samples(
    x: Tensor,
    keep: int,
    fill: float,
    out: Tensor,
    seed: int,
    first_sample: int,
    first_index: int,
    num_threads: int,
) -> None: ...
def grid_samples(
    x: Tensor,
    thresholds: Tensor,
    scale: float,
    levels: float,
    out: Tensor,
    seed: int,
    first_sample: int,
    first_index: int,
    num_threads: int,
) -> None: ...
def substituted_tokens(
    tokens: Tensor,
    offsets: Tensor,
    candidates: Tensor,
    out: Tensor,
    seed: int,
    first_sample: int,
    first_index: int,
    num_threads: int,
) -> None: ...
def find_votes(logits: Tensor, votes: Tensor, num_threads: int) -> int: ...
def philox_words(counter: list[int], key: int) -> tuple[int, int, int, int]: ...
def normal_values(first: int, out: Tensor) -> None: ...
def normal_value_refined(bits: int, extra: int) -> float: ...
def laplace_values(first: int, out: Tensor) -> None: ...
def laplace_value_refined(bits: int, extra: int) -> float: ...
def fused_values(a: Tensor, b: Tensor, c: Tensor, out: Tensor) -> None: ...
def grid_value(u: list[int], thresholds: Tensor, guess: int) -> tuple[int, int]: ...
def choice_value(count: int, bits: int, extra: int) -> tuple[int, int]: ...
def keep_value(threshold: int, bits: int, extra: int) -> tuple[int, int]: ...

# The rest belongs to the linear relaxations.
Lines = tuple[Tensor, Tensor, Tensor, Tensor]

def relaxation_bend(
    a: Tensor,
    lines: Lines,
    bias: Tensor | None,
    pulled: Tensor,
    value: Tensor | None,
    num_threads: int,
) -> None: ...
def relaxation_unbend(
    a: Tensor,
    lines: Lines,
    bias: Tensor | None,
    by_pulled: Tensor,
    by_value: Tensor,
    by_a: Tensor | None,
    by_lines: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    by_bias: Tensor | None,
    num_threads: int,
) -> None: ...

# The rest belongs to the bounds of transformers.
def box_row_norm(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    count: int,
    eps: float,
    centred: bool,
    rounding: str,
    out_lower: Tensor,
    out_upper: Tensor,
    num_threads: int,
) -> bool: ...
def box_product(
    low_a: Tensor,
    high_a: Tensor,
    low_b: Tensor,
    high_b: Tensor,
    transposed: bool,
    gain: float,
    out_lower: Tensor,
    out_upper: Tensor,
    num_threads: int,
) -> bool: ...
def box_softmax(
    lower: Tensor,
    upper: Tensor,
    count: int,
    rounding: str,
    out_lower: Tensor,
    out_upper: Tensor,
    num_threads: int,
) -> bool: ...
def box_scale(
    lower: Tensor,
    upper: Tensor,
    first: Tensor,
    last: Tensor,
    bend: bool,
    rounding: str,
    out_lower: Tensor,
    out_upper: Tensor,
    num_threads: int,
) -> bool: ...
