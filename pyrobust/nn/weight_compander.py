"""Weight Compander (WC): train through the saturating map ``w = a * arctan(v / b)``.

The bounded odd map keeps single weights from dominating, and its slope is largest at zero, so small
weights are moved away from zero faster than large ones grow. Two positive scalars per layer are
learned jointly; after training the map is folded away and costs nothing. Use it as a regulariser on
small data; do not expect gains where weight decay already saturates.

Source: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for
Regularization", IJCNN 2023, arXiv 2306.16993; the map and its learned per-layer parameters.
Departures: ``a`` and ``b`` are kept positive by an exponential parametrisation, get their own
parameter group (no decay, a tenth of the learning rate) and start at four standard deviations of
the initial weight; the paper's initial values are not known to us.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyrobust._checks import check_choice, check_positive

__all__ = [
    "WeightCompander",
    "apply_weight_compander",
    "compander_param_groups",
    "fold_weight_compander",
    "weight_compander",
    "weight_statistics",
]

_LARGEST_ANGLE = 1.5  # below pi/2, where the inverse tan(w / a) still has a useful gradient
_DEFAULT_DEVIATIONS = 4.0


class WeightCompander(nn.Module):
    """Parametrization ``Psi(v) = a * arctan(v / b)`` with learnable positive ``a`` and ``b``.

    Register it with :func:`weight_compander`, or as any other parametrization with
    ``torch.nn.utils.parametrize.register_parametrization``. ``|Psi(v)| < a * pi / 2`` for every
    finite ``v``. The map is computed in float32 when ``v`` has a lower precision.

    Args:
        a: output scale, ``> 0``, in units of the weight; None: ``b``, or four standard deviations
            of the weight that it is registered over.
        b: input scale, ``> 0``, in units of ``v``; None: ``a``. ``a / b`` is the slope at zero.
        learnable: train ``a`` and ``b`` (through their logarithms).
        granularity: "layer", one pair of scales, as published; "channel", a pair for each entry
            of the weight's first axis, made when it is registered.

    Raises:
        ValueError: ``a`` or ``b`` is not positive and finite, or an option is not accepted.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> _ = parametrize.register_parametrization(layer, "weight", WeightCompander())
        >>> type(parametrize.remove_parametrizations(layer, "weight").weight).__name__
        'Parameter'
    """

    def __init__(
        self,
        a: float | None = None,
        b: float | None = None,
        *,
        learnable: bool = True,
        granularity: str = "layer",
    ) -> None:
        super().__init__()
        check_choice("WeightCompander", "granularity", granularity, ["layer", "channel"])
        self.granularity = granularity
        self._scale_by_weight = a is None and b is None
        a, b = (first if first is not None else second for first, second in ((a, b), (b, a)))
        a, b = 1.0 if a is None else a, 1.0 if b is None else b
        check_positive("WeightCompander", "a", a)
        check_positive("WeightCompander", "b", b)
        if not 0.5 <= a / b <= 2.0:
            warnings.warn(
                f"WeightCompander: the slope a/b at zero is {a / b:.3g}; outside [0.5, 2] training "
                "needs another learning rate.",
                stacklevel=2,
            )
        for name, value in (("log_a", a), ("log_b", b)):
            tensor = torch.tensor(math.log(value), dtype=torch.float32)
            if learnable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.log_a: Tensor
        self.log_b: Tensor

    @property
    def a(self) -> Tensor:
        """Output scale: a positive scalar, or one for each channel."""
        return self.log_a.exp()

    @property
    def b(self) -> Tensor:
        """Input scale: a positive scalar, or one for each channel."""
        return self.log_b.exp()

    def forward(self, v: Tensor) -> Tensor:
        """Companded weight, same shape and dtype as ``v``."""
        wide = v.float() if v.dtype in (torch.float16, torch.bfloat16) else v
        with torch.autocast(device_type=v.device.type, enabled=False):
            return (self.a.to(wide) * torch.atan(wide / self.b.to(wide))).to(v.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """``v = b * tan(w / a)``; weights beyond ``1.5 * a`` are clamped, with a warning.

        Raises:
            ValueError: the scales are to come from the weight and it has no spread.
        """
        if self.granularity == "channel" and self.log_a.ndim == 0:
            self._spread(weight)
        if self._scale_by_weight:
            self._take_scale(weight)
        a, b = self.a.detach().to(weight), self.b.detach().to(weight)
        angle = weight / a
        clamped = int((angle.abs() > _LARGEST_ANGLE).sum())
        if clamped:
            warnings.warn(
                f"WeightCompander: {clamped} of {weight.numel()} weights lie beyond "
                f"{_LARGEST_ANGLE} * a = {_LARGEST_ANGLE * float(a.min()):.3g} and were clamped.",
                stacklevel=2,
            )
        return b * torch.tan(angle.clamp(-_LARGEST_ANGLE, _LARGEST_ANGLE))

    @torch.no_grad()
    def _spread(self, weight: Tensor) -> None:
        """One pair of scales to one for each channel; a weight with one axis has one channel."""
        shape = (weight.shape[0] if weight.ndim > 1 else 1, *[1] * (weight.ndim - 1))
        for name in ("log_a", "log_b"):
            value = getattr(self, name)
            wide = value.detach().expand(shape).clone()
            setattr(self, name, nn.Parameter(wide) if isinstance(value, nn.Parameter) else wide)

    @torch.no_grad()
    def _take_scale(self, weight: Tensor) -> None:
        """Both scales from the first weight seen; later assignments keep them."""
        wide = weight.detach().float()
        rows = wide.reshape(max(1, self.log_a.numel()), -1)
        spread = rows.std(dim=1, unbiased=False)
        if not bool(((spread > 0) & (spread < math.inf)).all()):
            raise ValueError(
                f"WeightCompander: the weight has no spread (standard deviation "
                f"{float(spread.min())}); give a and b."
            )
        self.log_a.copy_((_DEFAULT_DEVIATIONS * spread).log().reshape(self.log_a.shape))
        self.log_b.copy_(self.log_a)
        self._scale_by_weight = False

    def extra_repr(self) -> str:
        """Current values of both scales."""
        if self.granularity == "channel":
            return f"granularity=channel, {self.log_a.numel()} pairs"
        return f"a={float(self.a):.4g}, b={float(self.b):.4g}"


def _chains(module: nn.Module) -> nn.ModuleDict:
    """The parametrization lists of a parametrized module, by tensor name."""
    return cast(nn.ModuleDict, module.parametrizations)


def _check_target(module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, name, None)
    subject = "weight_compander"
    if not isinstance(weight, Tensor):
        raise ValueError(f"{subject}: {type(module).__name__} has no tensor named {name!r}.")
    if parametrize.is_parametrized(module, name) and any(
        isinstance(p, WeightCompander) for p in cast(nn.ModuleList, _chains(module)[name])
    ):
        raise ValueError(f"{subject}: {name!r} of {type(module).__name__} is companded already.")
    if not weight.is_floating_point() or weight.layout is not torch.strided:
        raise TypeError(
            f"{subject}: {name!r} must be a dense floating-point tensor; got {weight.dtype}, "
            f"{weight.layout}."
        )
    return weight


def weight_compander(
    module: nn.Module,
    name: str = "weight",
    *,
    a: float | None = None,
    b: float | None = None,
    learnable: bool = True,
    granularity: str = "layer",
) -> nn.Module:
    """Compand one weight of ``module`` in place, keeping the function it computes.

    Args:
        module: any module that holds the floating-point tensor ``name``.
        name: attribute to compand.
        a: output scale; default four standard deviations of the present weight.
        b: input scale; default ``a``.
        learnable: train both scales.
        granularity: see :class:`WeightCompander`.

    Returns:
        ``module`` itself.

    Raises:
        ValueError: no such tensor, it is companded already, or ``a``/``b`` are not positive.
        TypeError: the tensor is not a dense floating-point one.

    Example:
        >>> layer = weight_compander(nn.Linear(4, 2))
        >>> layer.weight.shape
        torch.Size([2, 4])
    """
    weight = _check_target(module, name)
    compander = WeightCompander(a, b, learnable=learnable, granularity=granularity)
    parametrize.register_parametrization(module, name, compander.to(weight.device))
    return module


def apply_weight_compander(
    model: nn.Module,
    *,
    types: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    skip: Sequence[str] = (),
    a: float | None = None,
    b: float | None = None,
    learnable: bool = True,
    granularity: str = "layer",
) -> nn.Module:
    """Compand the weight of every module of the listed types, in place.

    Biases, normalisation layers and embeddings are left alone. A weight shared by several modules
    is refused: companding it twice would change the function.

    Args:
        model: the model.
        types: module classes to compand.
        skip: module names (as in ``named_modules``) to leave alone.
        a: see :func:`weight_compander`.
        b: see :func:`weight_compander`.
        learnable: train the scales.
        granularity: see :class:`WeightCompander`.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a name in ``skip`` does not exist, nothing matched, or a weight is shared.
    """
    modules = dict(model.named_modules())
    unknown = [name for name in skip if name not in modules]
    if unknown:
        raise ValueError(f"apply_weight_compander: skip names no module: {', '.join(unknown)}.")
    chosen = {n: m for n, m in modules.items() if isinstance(m, types) and n not in skip}
    if not chosen:
        raise ValueError("apply_weight_compander: the model has no module of the listed types.")
    owner: dict[int, str] = {}
    for name, module in chosen.items():
        first = owner.setdefault(id(_check_target(module, "weight")), name)
        if first != name:
            raise ValueError(
                f"apply_weight_compander: {first!r} and {name!r} share one weight; skip one."
            )
    for module in chosen.values():
        weight_compander(module, a=a, b=b, learnable=learnable, granularity=granularity)
    return model


def _companders(model: nn.Module) -> Iterable[tuple[nn.Module, str, WeightCompander]]:
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        for name, chain in _chains(module).items():
            for item in cast(nn.ModuleList, chain):
                if isinstance(item, WeightCompander):
                    yield module, name, item


def compander_param_groups(
    model: nn.Module, *, lr: float, weight_decay: float, compander_lr: float | None = None
) -> list[dict[str, Any]]:
    """Two optimizer groups: the weights with decay, the scales without and with their own rate.

    Args:
        model: a companded model.
        lr: learning rate of everything but the scales.
        weight_decay: decay of everything but the scales; it acts on ``v``.
        compander_lr: learning rate of ``log a`` and ``log b``; default ``0.1 * lr``.

    Returns:
        Groups for any ``torch.optim`` optimizer.
    """
    scales = [p for _, _, item in _companders(model) for p in item.parameters()]
    known = {id(p) for p in scales}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    scale_lr = 0.1 * lr if compander_lr is None else compander_lr
    return [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": scales, "lr": scale_lr, "weight_decay": 0.0},
    ]


def fold_weight_compander(model: nn.Module) -> nn.Module:
    """Bake every companded weight into a plain parameter, in place.

    Afterwards the ``state_dict`` keys are those of the model before companding.

    Raises:
        ValueError: a companded tensor carries further parametrizations, which would be lost.
    """
    found = list(_companders(model))
    for module, name, _ in found:
        if len(cast(nn.ModuleList, _chains(module)[name])) > 1:
            raise ValueError(
                f"fold_weight_compander: {name!r} of {type(module).__name__} carries other "
                "parametrizations as well; remove them first."
            )
    for module, name, _ in found:
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model


def weight_statistics(model: nn.Module) -> dict[str, dict[str, float]]:
    """Shape of the weight distribution per linear and convolution layer.

    Returns:
        Per module name: ``std``; ``peak`` = max |w| / std; ``kurtosis`` (3 for a Gaussian);
        ``near_zero`` = share of weights with |w| < 0.1 std.
    """
    table = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            w = module.weight.detach().double().flatten()
            std = w.std(unbiased=False)
            table[name] = {
                "std": float(std),
                "peak": float(w.abs().max() / std),
                "kurtosis": float(((w - w.mean()) / std).pow(4).mean()),
                "near_zero": float((w.abs() < 0.1 * std).double().mean()),
            }
    return table
