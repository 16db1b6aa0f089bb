"""Linear layers that hold their weight transposed: the ``Conv1D`` of Hugging Face's GPT-2 and kin.

Packing and loading treat them as ``torch.nn.Linear`` on the same numbers in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from pyrobust.nn._hooks import is_customised
from pyrobust.nn.twins import replace_layers

__all__ = ["as_linear"]

_HOMES = ("transformers.pytorch_utils", "transformers.modeling_utils")


@contextmanager
def as_linear(
    model: nn.Module, names: Collection[str] | None = None
) -> Iterator[dict[nn.Module, nn.Module]]:
    """Put ``Linear`` layers in the place of the ``Conv1D`` layers of ``model`` for a while.

    Weights are views and biases the same parameters, so nothing is copied. Those that are still in
    their places at the end give way to the old layers again.

    Args:
        model: searched below itself.
        names: of the layers to replace; None means all.

    Yields:
        The old layer of each new one.
    """
    linear: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        wanted = names is None or name in names
        if wanted and name and _is_transposed(module) and not is_customised(module):
            linear[module] = _view(module)
    originals = {new: old for old, new in linear.items()}
    replace_layers(model, linear)
    try:
        yield originals
    finally:
        replace_layers(model, originals)


def _is_transposed(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ in _HOMES


def _view(layer: nn.Module) -> nn.Linear:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, nn.Parameter)
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    linear.weight = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
    linear.bias = bias
    return linear.train(layer.training)
