"""Small models of one operation that is made of others, between two linear layers."""

import math

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["BROKEN_UP", "Around", "composed"]


class Around(nn.Module):
    """``head(function(*layers(x)))``, with a shape for what enters the function."""

    def __init__(self, function, sizes, shape, head, extra=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, n) for n in sizes)
        self.function, self.shape = function, shape
        self.extra = extra if isinstance(extra, nn.Module) else nn.Identity()
        self.head = nn.Linear(head, 2)

    def forward(self, x):
        values = [layer(x) for layer in self.layers]
        if self.shape:
            shapes = self.shape if isinstance(self.shape, list) else [self.shape] * len(values)
            values = [v.unflatten(-1, shape) for v, shape in zip(values, shapes, strict=True)]
        if not isinstance(self.extra, nn.Identity):
            values = [self.extra, *values]
        return self.head(self.function(*values).flatten(1))


def _module(module, sizes, shape, head):
    return lambda: Around(lambda m, x: m(x), sizes, shape, head, module())


def _span(x):
    return x.max(1)[0] - x.min(1).values + x.amin(1)


def _pieces(x):
    first, second, third = x.chunk(3, -1)
    return first * second + torch.minimum(second, third)


def _attend(m, x):
    return m(x, x, x, need_weights=False)[0]


def _encoder(**options):
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, **options)


KEEP = torch.tensor([[True, False, True], [True, True, True], [False, True, False]])
SHIFTS = torch.tensor([[0.5, -math.inf, -1.0], [0.0, 0.2, -0.3], [-math.inf, 1.0, -math.inf]])


class _Masked(nn.Module):
    """A module of attention, called with constant masks."""

    def __init__(self, inner, **masks):
        super().__init__()
        self.inner = inner
        self.names = list(masks)
        for name, mask in masks.items():
            self.register_buffer(name, mask)

    def forward(self, *x):
        result = self.inner(*x, **{name: getattr(self, name) for name in self.names})
        return result[0] if isinstance(result, tuple) else result


def _self_attention(m, x):
    masks = {name: getattr(m, name) for name in m.names}
    return m.inner(x, x, x, need_weights=False, **masks)[0]


def _masked_attention(mask):
    def function(m, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m.mask)

    return lambda: Around(function, [6, 6, 6], (3, 2), 6, _Masked(nn.Identity(), mask=mask))


def _masked_heads(**masks):
    inner = nn.MultiheadAttention(4, 2, batch_first=True)
    return Around(_self_attention, [12], (3, 4), 12, _Masked(inner, **masks))


def _masked_layer(**masks):
    inner = _encoder(norm_first=True, activation="gelu")
    return Around(lambda m, x: m(x), [12], (3, 4), 12, _Masked(inner, **masks))


def _grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


BROKEN_UP = {
    "softmax": lambda: Around(lambda x: torch.softmax(x, -1), [6], (), 6),
    "softmax module": _module(lambda: nn.Softmax(-1), [6], (), 6),
    "softmin": lambda: Around(lambda x: F.softmin(x, 1), [6], (3, 2), 6),
    "log_softmax": lambda: Around(lambda x: F.log_softmax(x, -1), [6], (), 6),
    "logsumexp": lambda: Around(lambda x: x.logsumexp(1), [6], (3, 2), 2),
    "product": lambda: Around(lambda x, y: x * y, [6, 6], (), 6),
    "square": lambda: Around(lambda x: x * x, [6], (), 6),
    "quotient": lambda: Around(lambda x, y: x / (torch.sigmoid(y) + 0.5), [6, 6], (), 6),
    "reciprocal": lambda: Around(lambda x: 2 / (torch.exp(x) + 0.5), [6], (), 6),
    "power 1.5": lambda: Around(lambda x: (torch.sigmoid(x) + 0.1) ** 1.5, [6], (), 6),
    "power -2": lambda: Around(lambda x: (torch.sigmoid(x) + 0.1) ** -2, [6], (), 6),
    "matmul": lambda: Around(lambda x, y: x @ y.mT, [6, 6], (2, 3), 4),
    "bmm": lambda: Around(lambda x, y: torch.bmm(x, y.transpose(1, 2)), [6, 6], (2, 3), 4),
    "layer_norm": _module(lambda: nn.LayerNorm(6), [6], (), 6),
    "layer_norm of matrices": _module(lambda: nn.LayerNorm((3, 2)), [6], (3, 2), 6),
    "group_norm": _module(lambda: nn.GroupNorm(2, 4), [8], (4, 2), 8),
    "rms_norm": _module(lambda: nn.RMSNorm(6), [6], (), 6),
    "instance_norm": _module(lambda: nn.InstanceNorm1d(2, affine=True), [8], (2, 4), 8),
    "maximum": lambda: Around(lambda x, y: torch.maximum(x, y) - torch.min(x, y), [6, 6], (), 6),
    "span": lambda: Around(_span, [12], (3, 4), 4),
    "pieces": lambda: Around(_pieces, [12], (), 4),
    "max_pool1d": _module(lambda: nn.MaxPool1d(3, 2, 1), [16], (2, 8), 8),
    "max_pool2d": _module(lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), [25], (1, 5, 5), 9),
    "max_pool3d": lambda: Around(lambda x: F.max_pool3d(x, 2), [64], (1, 4, 4, 4), 8),
    "adaptive_max_pool2d": _module(lambda: nn.AdaptiveMaxPool2d(3), [25], (1, 5, 5), 9),
    "attention": lambda: Around(F.scaled_dot_product_attention, [6, 6, 6], (3, 2), 6),
    "causal attention": lambda: Around(
        lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), [6, 6, 6], (3, 2), 6
    ),
    "multi-head attention": lambda: Around(
        _attend, [12], (3, 4), 12, nn.MultiheadAttention(4, 2, batch_first=True)
    ),
    "bool mask": _masked_attention(KEEP),
    "added mask": _masked_attention(SHIFTS),
    "mask of keys": _masked_attention(KEEP[:1]),
    "grouped queries": lambda: Around(
        _grouped, [24, 12, 12], [(4, 3, 2), (2, 3, 2), (2, 3, 2)], 24
    ),
    "multi-head attention, masks": lambda: _masked_heads(attn_mask=~KEEP),
    "multi-head attention, added mask": lambda: _masked_heads(attn_mask=SHIFTS),
    "encoder layer, masks": lambda: _masked_layer(src_mask=~KEEP),
    "logsumexp of two axes": lambda: Around(
        lambda x: torch.logsumexp(x, (1, -1), keepdim=True), [12], (2, 3, 2), 3
    ),
    "encoder layer": _module(lambda: _encoder(norm_first=True, activation="gelu"), [8], (2, 4), 8),
    "encoder": _module(
        lambda: nn.TransformerEncoder(
            _encoder(activation="gelu"), 2, nn.LayerNorm(4), enable_nested_tensor=False
        ),
        [8],
        (2, 4),
        8,
    ),
    "encoder layer, norm last": _module(_encoder, [8], (2, 4), 8),
}


def composed(name, seed=0):
    """The model ``name`` with random weights."""
    torch.manual_seed(seed)
    model = BROKEN_UP[name]().eval()
    with torch.no_grad():
        for parameter in model.extra.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
