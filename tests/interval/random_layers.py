"""Operations of random graphs, continued: norms, softmax, attention, pooling, moves of elements."""

from __future__ import annotations

import math
import random
from typing import Any

import mpmath
import torch
import torch.nn.functional as F
from torch import Tensor

from pyrobust import Interval

from .random_operations import (
    Draw,
    Maker,
    arithmetic,
    convolution,
    curve,
    linear,
    matrix_product,
    numbers,
    packed_convolution,
    packed_linear,
    slopes,
    sums,
    with_itself,
)
from .random_orders import Operation, mp, summed

# -- norms -----------------------------------------------------------------------------------


def batch_norm(p: Draw, x: Interval) -> Operation | None:
    if x.ndim < 2 or x.shape[1] == 0:
        return None
    channels, eps = x.shape[1], p.rng.choice([1e-5, 1e-3, 1e-12])
    mean, variance = p.tensor(channels), p.tensor(channels, positive=True)
    drawn, bias = p.tensor(channels), p.tensor(channels)
    tiny = torch.finfo(p.dtype).tiny

    def weight(x: Any) -> Tensor:
        """Normal numbers: nothing covers weights of a batch norm that are flushed."""
        return torch.where(drawn(x).abs() < tiny, 0.0, drawn(x))

    form = [1, -1, *[1] * (x.ndim - 2)]

    def call(x: Any) -> Any:
        return F.batch_norm(x, mean(x), variance(x), weight(x), bias(x), False, 0.1, eps)

    def reordered(rng: random.Random, x: Tensor) -> Tensor:
        m, v, w, b = (t(x).reshape(form) for t in (mean, variance, weight, bias))
        scale = rng.choice([w * (v + eps).rsqrt(), w / (v + eps).sqrt()])
        ways = (
            (x - m) * scale + b,
            x * scale + (b - m * scale),
            torch.addcmul(b - m * scale, x, scale),
        )
        return rng.choice(ways)

    def exact(points: Any, index: int) -> Any:
        like = torch.zeros((), dtype=torch.float64)
        channel = index // math.prod(points.shape[2:]) % channels
        m, v, w, b = (mp(float(t(like)[channel])) for t in (mean, variance, weight, bias))
        return (points.reshape(-1)[index] - m) * w / mpmath.sqrt(v + mp(eps)) + b

    return Operation("batch_norm", call, reordered, exact)


def own_norm(p: Draw, x: Interval) -> Operation | None:
    kind = p.rng.choice(["layer_norm", "rms_norm", "group_norm", "instance_norm"])
    if 0 in x.shape or x.ndim == 0:
        return None
    eps = p.rng.choice([1e-5, 1e-3, 1e-12])
    if kind in ("layer_norm", "rms_norm"):
        size = x.shape[-1:]
        weight, bias = p.tensor(*size), p.tensor(*size)

        def call(x: Any) -> Any:
            if kind == "rms_norm":
                return F.rms_norm(x, size, weight(x), eps)
            return F.layer_norm(x, size, weight(x), bias(x), eps)

        def reordered(rng: random.Random, x: Tensor) -> Tensor:
            shift = bias(x) if kind == "layer_norm" else torch.zeros_like(weight(x))
            return normalized(rng, x, weight(x), shift, eps, kind == "layer_norm")

        def exact(points: Any, index: int) -> Any:
            like = torch.zeros((), dtype=torch.float64)
            row, column = divmod(index, size[0])
            values = points.reshape(-1, size[0])[row]
            mean = sum(values, mp(0)) / size[0] if kind == "layer_norm" else mp(0)
            square = sum(((v - mean) ** 2 for v in values), mp(0)) / size[0]
            scale = mp(float(weight(like)[column])) / mpmath.sqrt(square + mp(eps))
            shift = mp(float(bias(like)[column])) if kind == "layer_norm" else mp(0)
            return (values[column] - mean) * scale + shift

        return Operation(kind, call, reordered, exact)
    if x.ndim < 3 or math.prod(x.shape[2:]) < 2:
        return None
    weight, bias, channels = p.tensor(x.shape[1]), p.tensor(x.shape[1]), x.shape[1]
    own = kind == "instance_norm"
    groups = channels if own else p.rng.choice([g for g in (1, 2, 3) if channels % g == 0])

    def of_groups(points: Any, index: int) -> Any:
        like = torch.zeros((), dtype=torch.float64)
        channel = index // math.prod(points.shape[2:]) % channels
        size = math.prod(points.shape[1:]) // groups
        row, column = divmod(index, size)
        values = points.reshape(-1, size)[row]
        mean = sum(values, mp(0)) / size
        square = sum(((v - mean) ** 2 for v in values), mp(0)) / size
        scale = mp(float(weight(like)[channel])) / mpmath.sqrt(square + mp(eps))
        return (values[column] - mean) * scale + mp(float(bias(like)[channel]))

    if own:
        return Operation(
            kind,
            lambda x: F.instance_norm(x, None, None, weight(x), bias(x), eps=eps),
            exact=of_groups,
        )
    return Operation(
        kind, lambda x: F.group_norm(x, groups, weight(x), bias(x), eps), exact=of_groups
    )


def normalized(
    rng: random.Random, x: Tensor, weight: Tensor, bias: Tensor, eps: float, centred: bool
) -> Tensor:
    """A norm over the last dimension by one of several formulas."""
    count = x.shape[-1]
    zero = torch.zeros_like(x[..., :1])
    mean = summed(rng, x)[..., None] / count if centred else zero
    if centred and rng.random() < 0.4:
        square = summed(rng, x * x)[..., None] / count - mean * mean
        square = square.clamp(min=0.0)
    else:
        square = summed(rng, (x - mean) * (x - mean))[..., None] / count
    scale = rng.choice([(square + eps).rsqrt(), 1 / (square + eps).sqrt()])
    if rng.random() < 0.5:
        return (x - mean) * scale * weight + bias
    return x * (scale * weight) + (bias - mean * (scale * weight))


# -- attention -------------------------------------------------------------------------------


def softmax(p: Draw, x: Interval) -> Operation | None:
    if x.ndim == 0 or 0 in x.shape:
        return None
    dim = p.rng.randrange(x.ndim)
    name = p.rng.choice(["softmax", "log_softmax", "logsumexp", "softmin"])

    def reordered(rng: random.Random, x: Tensor) -> Tensor:
        moved = (-x if name == "softmin" else x).movedim(dim, -1)
        top = moved.amax(-1, keepdim=True)
        terms = (moved - top).exp()
        total = summed(rng, terms)[..., None]
        if name == "logsumexp":
            return (top + total.log()).squeeze(-1)
        if name == "log_softmax":
            way = rng.choice([(moved - top) - total.log(), moved - (top + total.log())])
            return way.movedim(-1, dim)
        return rng.choice([terms / total, terms * (1 / total)]).movedim(-1, dim)

    return Operation(
        name, lambda x: getattr(F if name != "logsumexp" else torch, name)(x, dim), reordered
    )


def attention(p: Draw, x: Interval) -> Operation | None:
    if x.ndim < 2 or 0 in x.shape or x.shape[-1] < 3:
        return None
    size = x.shape[-1] // 3
    causal = p.rng.random() < 0.3
    mask = None
    if not causal and p.rng.random() < 0.4:
        values = p.tensor(x.shape[-2], x.shape[-2])
        mask = values

    def parts(x: Any) -> list[Any]:
        return [x[..., i * size : (i + 1) * size] for i in range(3)]

    def call(x: Any) -> Any:
        kept = None if mask is None else mask(x)
        return F.scaled_dot_product_attention(*parts(x), attn_mask=kept, is_causal=causal)

    def reordered(rng: random.Random, x: Tensor) -> Tensor:
        q, k, v = parts(x)
        scores = summed(rng, q[..., :, None, :] * k[..., None, :, :]) * (1 / math.sqrt(size))
        if causal:
            lower = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            scores = scores.masked_fill(~lower, -math.inf)
        if mask is not None:
            scores = scores + mask(x)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = weights / summed(rng, weights)[..., None]
        return summed(rng, weights[..., :, None, :] * v.mT[..., None, :, :])

    return Operation("attention", call, reordered)


def heads(p: Draw, x: Interval) -> Operation | None:
    """Multi-head attention of ``(T, B, E)``."""
    if x.ndim != 3 or 0 in x.shape:
        return None
    size = x.shape[-1]
    count = p.rng.choice([n for n in (1, 2, 3) if size % n == 0])
    inner, outer = (
        (p.tensor(3 * size, size), p.tensor(3 * size)),
        (p.tensor(size, size), p.tensor(size)),
    )

    def call(x: Any) -> Any:
        parts = [t(x) for t in (*inner, *outer)]
        return F.multi_head_attention_forward(
            *(x, x, x, size, count, *parts[:2], None, None, False, 0.0, *parts[2:]),
            training=False,
            need_weights=False,
        )[0]

    return Operation("multi-head attention", call)


# -- pooling ---------------------------------------------------------------------------------


def pooling(p: Draw, x: Interval) -> Operation | None:
    n = x.ndim - 2
    if n not in (1, 2, 3) or 0 in x.shape:
        return None
    kind = p.rng.choice(["avg", "max", "adaptive_avg", "adaptive_max"])
    size = min(p.rng.choice([2, 3]), *x.shape[2:])
    options: dict[str, Any] = {}
    if not kind.startswith("adaptive"):
        options = {"stride": p.rng.choice([1, 2]), "padding": p.rng.choice([0, size // 2])}
    if kind == "avg":
        options["count_include_pad"] = p.rng.random() < 0.5
    function = getattr(F, f"{kind}_pool{n}d")
    return Operation(function.__name__, lambda x: function(x, size, **options))


def resizing(p: Draw, x: Interval) -> Operation | None:
    n = x.ndim - 2
    if n not in (1, 2, 3) or 0 in x.shape:
        return None
    linear_mode = ["linear", "bilinear", "trilinear"][n - 1]
    mode = p.rng.choice(["nearest", "area", linear_mode])
    size = [p.rng.choice([1, 2, 5]) for _ in range(n)]
    corners = p.rng.choice([True, False]) if mode == linear_mode else None
    if mode == "area" and any(s > have for s, have in zip(size, x.shape[2:], strict=True)):
        mode = "nearest"
    return Operation(
        f"interpolate {mode}", lambda x: F.interpolate(x, size, mode=mode, align_corners=corners)
    )


# -- moves -----------------------------------------------------------------------------------


def move(p: Draw, x: Interval) -> Operation | None:
    """Elements elsewhere: the shapes and strides that the operations after it meet."""
    last, rng = x.ndim - 1, p.rng
    ways: dict[str, Any] = {"unsqueeze": lambda x: x[None], "flatten": lambda x: x.reshape(-1)}
    if x.ndim:
        dim = rng.randrange(x.ndim)
        size = x.shape[dim]
        ways |= {
            "transpose": lambda x: x.transpose(dim, last),
            "flip": lambda x: x.flip(dim),
            "roll": lambda x: x.roll(1, dim),
            "cat": lambda x: torch.cat([x, 2 * x], dim),
            "stack": lambda x: torch.stack(
                [x, torch.zeros_like(x) if isinstance(x, Tensor) else x], dim
            ),
            "narrow": lambda x: x.narrow(dim, 0, max(size - 1, 0)),
            "step": lambda x: x[..., ::2],
            "repeat": lambda x: x.repeat_interleave(2, dim),
            "pad": lambda x: F.pad(x, (1, 0), value=0.5),
            "amax": lambda x: x.amax(dim, keepdim=True) if size else x,
            "squeeze": lambda x: x.squeeze(),
        }
        if size == 1:
            ways["expand"] = lambda x: x.expand(*[3 if d == dim else -1 for d in range(x.ndim)])
        if x.ndim > 1:
            condition = torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(size)) < 0.5
            ways["where"] = lambda x: torch.where(condition, x, 0.25)
            ways["masked_fill"] = lambda x: x.masked_fill(condition, 0.1)
            ways["tril"] = lambda x: x.tril()
            ways["gather"] = lambda x: (
                x.gather(-1, torch.zeros((*x.shape[:-1], 2), dtype=torch.int64)) if x.numel() else x
            )
            ways["unfold"] = lambda x: x.unfold(-1, 2, 1) if x.shape[-1] > 1 else x
            ways["embedding"] = lambda x: (
                F.embedding(torch.zeros(2, dtype=torch.int64), x) if x.ndim == 2 and len(x) else x
            )
            ways["diagonal"] = lambda x: x.diagonal()
        if x.ndim == 4:
            ways["image"] = lambda x: x.contiguous()
            ways["shuffle"] = lambda x: F.pixel_shuffle(x, 2) if x.shape[1] % 4 == 0 else x
        if last >= 1 and x.shape[-1] % 2 == 0:
            ways["unflatten"] = lambda x: x.unflatten(-1, (2, -1)) if x.shape[-1] else x
    del ways["stack" if "stack" in ways else "unsqueeze"]
    name = rng.choice([*ways])
    return Operation(name, ways[name])


MAKERS: list[Maker] = [
    *(
        linear,
        linear,
        packed_linear,
        packed_convolution,
        convolution,
        convolution,
        convolution,
        sums,
        matrix_product,
    ),
    *(arithmetic, arithmetic, numbers, with_itself, curve, curve, curve, slopes),
    *(
        batch_norm,
        own_norm,
        own_norm,
        softmax,
        softmax,
        attention,
        heads,
        pooling,
        pooling,
        resizing,
    ),
    *(move, move, move),
]
