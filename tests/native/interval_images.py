"""Random boxes and their images in float64, for the tests of the CUDA interval kernels."""

import torch


def boxes(batch, terms, width=0.1):
    """Lower and upper ends of random boxes around normal centres."""
    centre = torch.randn(batch, terms)
    radius = torch.rand(batch, terms) * width
    return centre - radius, centre + radius


def exact_ends(lower, upper, weight, bias=None):
    """The image in float64, whose own error is 2^-29 of what the kernels add."""
    low, high, matrix = lower.double(), upper.double(), weight.double()
    middle, reach = (low + high) / 2 @ matrix.T, (high - low) / 2 @ matrix.abs().T
    shift = 0.0 if bias is None else bias.double()
    return middle + shift - reach, middle + shift + reach
