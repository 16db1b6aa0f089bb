"""Evaluates traced models in exact rationals, or in 60 decimal digits where they are not rational.

Numbers are ``fractions.Fraction`` or ``mpmath.mpf``, in numpy arrays of objects without a batch.
"""

import itertools
import math
import operator
from fractions import Fraction

import mpmath
import numpy as np
import torch
from torch import fx

__all__ = ["Exact", "as_numbers"]


def as_numbers(tensor, number):
    """The tensor as an array of exact numbers."""
    flat = [number(float(v)) for v in tensor.detach().flatten().tolist()]
    return np.array(flat, dtype=object).reshape(tuple(tensor.shape))


def each(function):
    return np.vectorize(function, otypes=[object])


relu = each(lambda v: max(v, 0 * v))
exp = each(mpmath.exp)
log = each(mpmath.log)


def root(v):
    """The exact root of a rational square, or one in many digits."""
    if not isinstance(v, Fraction):
        return mpmath.sqrt(v)
    found = Fraction(math.isqrt(v.numerator), math.isqrt(v.denominator))
    assert found * found == v
    return found


def sigmoid(x):
    return 1 / (1 + exp(-x))


def softmax(x, dim):
    e = exp(x)
    return e / e.sum(axis=dim, keepdims=True)


def windows(x, kernel, stride, padding, fill):
    """``(C, H, W, kernel * kernel)`` of a ``(C, H, W)`` image."""
    wide = np.pad(x, ((0, 0), (padding, padding), (padding, padding)), constant_values=fill)
    sizes = [(n - kernel) // stride + 1 for n in wide.shape[1:]]
    rows = [
        wide[:, i * stride : i * stride + kernel, j * stride : j * stride + kernel].reshape(
            len(x), -1
        )
        for i, j in itertools.product(*map(range, sizes))
    ]
    return np.stack(rows, 1).reshape(len(x), *sizes, -1)


class Exact(fx.Interpreter):
    """Runs a model on one point.

    Args:
        model: of the operations below.
        number: from a float to an exact number.
    """

    def __init__(self, model, number):
        super().__init__(fx.symbolic_trace(model))
        self.number = number

    def call_module(self, target, args, kwargs):
        module, (x,) = self.module.get_submodule(target), args
        return getattr(self, type(module).__name__)(module, x)

    def call_method(self, target, args, kwargs):
        return self.call_function(getattr(torch.Tensor, target), args, kwargs)

    def call_function(self, target, args, kwargs):
        if target in (operator.add, operator.mul, operator.sub, operator.truediv):
            return target(*[self.number(a) if isinstance(a, float) else a for a in args])
        return FUNCTIONS[target.__name__](*args, **kwargs)

    def get_attr(self, target):
        return as_numbers(super().get_attr(target), self.number)

    def Linear(self, layer, x):
        weight, bias = (as_numbers(p, self.number) for p in (layer.weight, layer.bias))
        return x @ weight.T + bias

    def Conv2d(self, layer, x):
        weight, bias = (as_numbers(p, self.number) for p in (layer.weight, layer.bias))
        kernel, stride, padding = layer.kernel_size[0], layer.stride[0], layer.padding[0]
        share = len(x) // layer.groups
        found = []
        for k, rows in enumerate(weight):
            first = k // (len(weight) // layer.groups) * share
            read = windows(x[first : first + share], kernel, stride, padding, self.number(0.0))
            found.append((read * rows.reshape(share, 1, 1, -1)).sum((0, 3)) + bias[k])
        return np.stack(found)

    def BatchNorm2d(self, layer, x):
        names = ("running_mean", "running_var", "weight", "bias")
        mean, variance, weight, bias = (
            as_numbers(getattr(layer, name), self.number)[:, None, None] for name in names
        )
        scale = each(root)(variance + self.number(layer.eps))
        return (x - mean) / scale * weight + bias

    def LayerNorm(self, layer, x):
        weight, bias = (as_numbers(p, self.number) for p in (layer.weight, layer.bias))
        d = x - x.sum(-1, keepdims=True) / x.shape[-1]
        variance = (d * d).sum(-1, keepdims=True) / x.shape[-1]
        return d / each(root)(variance + self.number(layer.eps)) * weight + bias

    def MaxPool2d(self, layer, x):
        read = windows(x, layer.kernel_size, layer.stride, layer.padding, -math.inf)
        return read.max(-1)

    def AvgPool2d(self, layer, x):
        size = layer.kernel_size
        return windows(x, size, layer.stride, 0, self.number(0.0)).sum(-1) / (size * size)

    def ReLU(self, layer, x):
        return relu(x)

    def LeakyReLU(self, layer, x):
        slope = self.number(layer.negative_slope)
        return relu(x) - slope * relu(-x)

    def Hardtanh(self, layer, x):
        least, most = self.number(layer.min_val), self.number(layer.max_val)
        return each(lambda v: min(max(v, least), most))(x)

    def GELU(self, layer, x):
        return each(lambda v: v * mpmath.ncdf(v))(x)

    def Tanh(self, layer, x):
        return each(mpmath.tanh)(x)

    def Sigmoid(self, layer, x):
        return sigmoid(x)

    def Softmax(self, layer, x):
        return softmax(x, layer.dim)

    def LogSoftmax(self, layer, x):
        return log(softmax(x, layer.dim))


def attention(q, k, v, **options):
    scores = q @ k.T / root(0 * q.flat[0] + q.shape[-1])
    return softmax(scores, -1) @ v


FUNCTIONS = {
    "relu": lambda x, inplace: relu(x),
    "abs": abs,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "matmul": operator.matmul,
    "square": lambda x: x * x,
    "flatten": lambda x, start: x.reshape(-1),
    "unflatten": lambda x, dim, sizes: x.reshape(*sizes),
    "amax": lambda x, dim: x.max(dim - 1),
    "cat": lambda parts, dim: np.concatenate(parts, dim - 1),
    "sigmoid": sigmoid,
    "exp": exp,
    "scaled_dot_product_attention": attention,
}
