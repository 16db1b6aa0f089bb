"""Adapter: the interface of trainable updates beside a frozen layer.

An adapter wraps one ``nn.Linear`` or ``nn.Conv2d``, starts at exactly the function of that layer,
trains only its own parameters, and can be merged into the weight and taken out again bit for bit.
Some wrap a :class:`~pyrobust.nn.PackedLinear` too, whose codes have no room for an update: it stays
beside them.
Its saved state carries a checksum of the weight it belongs to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import check_finite
from pyrobust.nn.packed_linear import PackedLinear
from pyrobust.nn.packed_module import PackedModule

__all__ = ["Adapter", "weight_checksum"]

_CHECKSUM_KEY = "base_checksum"


def weight_checksum(weight: Tensor) -> Tensor:
    """SHA-256 of a weight's shape, dtype and values.

    Args:
        weight: any dense tensor.

    Returns:
        ``(32,)`` uint8 on the CPU.
    """
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode())
    flat = weight.detach().cpu().contiguous().flatten()
    digest.update(flat.view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


class Adapter(nn.Module):
    """Base class of adapters over one frozen layer.

    Subclasses give :meth:`delta_weight` and, where it is cheaper than a second full product,
    :meth:`delta_forward`.

    Args:
        base: the layer to adapt, of one of ``layer_types`` (a subclass is refused: its forward
            may not use the weight as a plain product). Its parameters are frozen.

    Raises:
        TypeError: another kind of layer, or a weight that is not floating point.
        ValueError: the layer is adapted already, or its weight is not finite.
    """

    layer_types: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)

    def __init__(self, base: nn.Linear | nn.Conv2d | PackedLinear) -> None:
        super().__init__()
        subject = type(self).__name__
        if isinstance(base, Adapter):
            raise ValueError(f"{subject}: the layer is adapted already ({type(base).__name__}).")
        if type(base) not in self.layer_types:
            accepted = " or ".join(f"nn.{t.__name__}" for t in self.layer_types)
            raise TypeError(f"{subject}: base must be an {accepted}; got {type(base).__name__}.")
        if not base.weight.is_floating_point():
            raise TypeError(
                f"{subject}: base.weight must be floating point; got {base.weight.dtype}."
            )
        check_finite(subject, "base.weight", base.weight)
        self.base = base.requires_grad_(False)
        self.register_buffer(_CHECKSUM_KEY, weight_checksum(base.weight))
        self._unmerged: Tensor | None = None
        self.enabled = True

    @property
    def merged(self) -> bool:
        """Whether the update is part of ``base.weight`` at present."""
        return self._unmerged is not None

    def delta_weight(self) -> Tensor:
        """The update, in the shape of ``base.weight``."""
        raise NotImplementedError

    def delta_forward(self, x: Tensor) -> Tensor:
        """The update's share of the output."""
        return self.base_product(x, self.delta_weight().to(x.dtype))

    def base_product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's product with another weight of the same geometry, without bias."""
        if isinstance(self.base, nn.Conv2d):
            product: Tensor = self.base._conv_forward(x, weight, None)
            return product
        return F.linear(x, weight)

    def forward(self, x: Tensor) -> Tensor:
        """Output of the adapted layer."""
        output: Tensor = self.base(x)
        return output + self.delta_forward(x) if self.enabled and not self.merged else output

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to ``base.weight``; the unmerged weight is kept for :meth:`unmerge`.

        Raises:
            RuntimeError: the adapter is merged already.
            TypeError: the layer is a packed one.
        """
        if isinstance(self.base, PackedModule):
            raise TypeError(
                f"{type(self).__name__}: a {type(self.base).__name__} cannot take the update into "
                "its codes; leave the adapter beside it, or merge into the float model and pack "
                "that."
            )
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}: merge() was called before.")
        original = self.base.weight.detach().clone()
        wide = original.float() if original.dtype in (torch.float16, torch.bfloat16) else original
        self.base.weight.copy_(wide + self.delta_weight().to(wide))
        self._unmerged = original

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weight of before :meth:`merge` back, bit for bit.

        Raises:
            RuntimeError: the adapter is not merged.
        """
        if self._unmerged is None:
            raise RuntimeError(f"{type(self).__name__}: unmerge() needs a merge() before.")
        self.base.weight.copy_(self._unmerged)
        self._unmerged = None

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The adapter's own parameters."""
        return [p for n, p in self.named_parameters() if not n.startswith("base.")]

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """The adapter's own tensors and the checksum of the weight it belongs to."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("base.")}

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what :meth:`adapter_state_dict` gave, for the same base weight.

        Raises:
            ValueError: the state belongs to another base weight, or its keys or shapes differ.
        """
        subject = f"{type(self).__name__}.load_adapter_state_dict"
        own = self.adapter_state_dict()
        if set(state) != set(own):
            missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
            raise ValueError(f"{subject}: missing keys {missing}, unexpected keys {extra}.")
        if not torch.equal(state[_CHECKSUM_KEY].cpu(), own[_CHECKSUM_KEY].cpu()):
            raise ValueError(f"{subject}: the state belongs to another base weight.")
        for name, value in state.items():
            if value.shape != own[name].shape:
                raise ValueError(
                    f"{subject}: {name} must have shape {tuple(own[name].shape)}; got "
                    f"{tuple(value.shape)}."
                )
        self.load_state_dict({**self.state_dict(), **state})
