"""WINNER / SIREN²: sine networks whose first two layers start with noise matched to the signal.

A sine network whose initial activations hold only low frequencies cannot start fitting a target
made of high ones: the loss stays at the energy of the signal ("spectral bottleneck"). WINNER adds
Gaussian noise to the first two weight matrices, with scales set from the target's spectral
centroid; no parameters are added. Use it for audio and textured images; a smooth target is fitted
as well or better by the plain initialisation.

Source: Chandravamsi, Shenoy, Zinn, Pisnoy, Frankel, "Spectral Bottleneck in Deep Neural Networks:
Noise is All You Need", 2025, arXiv 2509.09719; initialisation, centroid and scale laws.
Departures: the centroid of a C-channel signal enters the scale law as psi / C, as the paper has it
(its released code divides twice: ``compat="repo"``); ``n_samples`` rescales the first scale, whose
audio constants assume about 150,000 samples on [-1, 1]; the default is the paper's value.
"""

from __future__ import annotations

import itertools
import math
import warnings

import torch
from torch import Tensor, nn

from pyrobust._checks import check_at_least, check_choice, check_integer, check_positive

__all__ = [
    "SIREN",
    "Sine",
    "siren_uniform_",
    "spectral_centroid",
    "winner_init_",
    "winner_normal_",
    "winner_scales",
]

_AUDIO_SAMPLES = 150_000  # the signal length that the audio scale law was fitted on


class Sine(nn.Module):
    """``sin(omega * x)``; the product is formed in float32 or wider.

    Args:
        omega: angular frequency, ``> 0``.
    """

    def __init__(self, omega: float) -> None:
        super().__init__()
        check_positive("Sine", "omega", omega)
        self.omega = omega

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise sine, shape and dtype of ``x``."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return torch.sin(self.omega * wide).to(x.dtype)

    def extra_repr(self) -> str:
        """The angular frequency."""
        return f"omega={self.omega:g}"


class SIREN(nn.Module):
    """Sine network: ``hidden_layers`` sine layers and a linear output.

    Args:
        in_features: number of coordinates.
        hidden_features: width ``H``.
        out_features: number of channels.
        hidden_layers: number of sine layers, ``>= 2`` (the first one included).
        first_omega: frequency of the first layer, ``> 0``.
        omega: frequency of the others, ``> 0``.
    Shape:
        ``(..., in_features)`` to ``(..., out_features)``.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        hidden_layers: int = 4,
        first_omega: float = 30.0,
        omega: float = 30.0,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "hidden_features": hidden_features}
        for name, value in {**sizes, "out_features": out_features}.items():
            check_integer("SIREN", name, value, 1)
        check_integer("SIREN", "hidden_layers", hidden_layers, 2)
        widths = [in_features] + [hidden_features] * hidden_layers
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.sines = nn.ModuleList(
            Sine(first_omega if i == 0 else omega) for i in range(hidden_layers)
        )
        self.output = nn.Linear(hidden_features, out_features)
        self.omega = omega
        self.register_buffer("winner_applied", torch.tensor(False))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Base SIREN initialisation of the weights; biases keep torch's default range."""
        for i, layer in enumerate([*self.linears, self.output]):
            assert isinstance(layer, nn.Linear)
            fan_in = layer.in_features
            siren_uniform_(layer.weight, self.omega, first=i == 0, generator=generator)
            layer.bias.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        self.winner_applied: Tensor = torch.zeros_like(self.get_buffer("winner_applied"))

    def hidden(self, coords: Tensor, layer: int) -> Tensor:
        """Activations after sine layer ``layer`` (1-based), ``(..., hidden_features)``."""
        check_integer("SIREN.hidden", "layer", layer, 1)
        if layer > len(self.linears):
            raise ValueError(
                f"SIREN.hidden: layer must be at most {len(self.linears)}; got {layer}."
            )
        h = coords
        for linear, sine in zip(self.linears[:layer], self.sines[:layer], strict=True):
            h = sine(linear(h))
        return h

    def forward(self, coords: Tensor) -> Tensor:
        """Signal at ``coords``."""
        value: Tensor = self.output(self.hidden(coords, len(self.linears)))
        return value

    @classmethod
    def for_signal(
        cls,
        signal: Tensor,
        *,
        sample_dims: int,
        hidden_features: int = 256,
        hidden_layers: int = 4,
        omega: float = 30.0,
        n_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> SIREN:
        """A network initialised for ``signal``: centroid, then scales, then noise.

        Args:
            signal: ``(N,)`` or ``(N, C)`` for one sample dimension, ``(H, W)`` or ``(H, W, C)`` for
                two; real, finite.
            sample_dims: 1 (audio) or 2 (image).
            hidden_features: width.
            hidden_layers: number of sine layers.
            omega: frequency of every layer.
            n_samples: see :func:`winner_scales`.
            generator: source of all initial values.

        Returns:
            A :class:`SIREN` with ``sample_dims`` inputs and ``C`` outputs.
        """
        channels = signal.shape[-1] if signal.ndim > sample_dims else 1
        s0, s1 = winner_scales(
            spectral_centroid(signal, sample_dims),
            sample_dims,
            channels=channels,
            n_samples=n_samples,
        )
        net = cls(
            sample_dims,
            hidden_features,
            channels,
            hidden_layers=hidden_layers,
            first_omega=omega,
            omega=omega,
        )
        net.reset_parameters(generator)
        return winner_init_(net, s0, s1, generator=generator)


def spectral_centroid(signal: Tensor, sample_dims: int) -> float:
    """Mean frequency of the magnitude spectrum along the last sample axis; Nyquist is 1.

    Each row (and channel) gives ``sum f |S| / sum |S|``; rows of zeros count 0; the rows, then the
    channels, are averaged.

    Args:
        signal: ``sample_dims`` sample axes, then optionally one channel axis (channels last).
        sample_dims: number of sample axes, ``>= 1``.

    Returns:
        A number in ``[0, 1]``; 0 with a warning for a zero signal.

    Raises:
        ValueError: too few axes, fewer than 2 samples on the transform axis, NaN or infinity.
        TypeError: a complex signal.
    """
    subject = "spectral_centroid"
    check_integer(subject, "sample_dims", sample_dims, 1)
    if signal.is_complex():
        raise TypeError(f"{subject}: signal must be real; got {signal.dtype}.")
    if signal.ndim not in (sample_dims, sample_dims + 1):
        raise ValueError(
            f"{subject}: signal must have {sample_dims} sample axes and at most one channel axis; "
            f"got shape {tuple(signal.shape)}."
        )
    if signal.shape[sample_dims - 1] < 2:
        raise ValueError(
            f"{subject}: the transform axis needs at least 2 samples; got shape "
            f"{tuple(signal.shape)}."
        )
    wide = signal.double()
    if not bool(torch.isfinite(wide).all()):
        raise ValueError(f"{subject}: signal must be finite; it holds NaN or infinite values.")
    if not bool(wide.any()):
        warnings.warn("spectral_centroid: the signal is zero everywhere.", stacklevel=2)
    if signal.ndim == sample_dims:
        wide = wide.unsqueeze(-1)
    magnitude = torch.fft.rfft(wide, dim=-2).abs()
    frequency = torch.fft.rfftfreq(wide.shape[-2], dtype=torch.float64).to(wide.device)
    total = magnitude.sum(-2)
    weighted = (frequency.unsqueeze(-1) * magnitude).sum(-2)
    rows = torch.where(total > 0, weighted / total.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return 2 * float(rows.mean())


def winner_scales(
    centroid: float,
    in_features: int,
    *,
    channels: int = 1,
    preset: str | None = None,
    n_samples: int | None = None,
    compat: str | None = None,
) -> tuple[float, float]:
    """Noise scales ``(s0, s1)`` of the first two layers from the spectral centroid.

    Audio: ``s0 = 3500 (1 - exp(-7 psi))``, ``s1 = 3 psi``; image: ``s0 = 50 (1 - exp(-5 psi))``,
    ``s1 = 0.4 psi``; both increase with the centroid and vanish at 0.

    Args:
        centroid: in ``[0, 1]``, of :func:`spectral_centroid`.
        in_features: number of coordinates; 1 means audio, 2 image.
        channels: number of output channels; the law is applied to ``centroid / channels``.
        preset: "audio" or "image", overriding the choice by ``in_features``.
        n_samples: number of samples of a 1-D signal on [-1, 1]; rescales ``s0`` by
            ``n_samples / 150000`` (not in the paper). None keeps the paper's value.
        compat: "repo" divides by ``channels`` twice, as the released code does.

    Returns:
        ``(s0, s1)``, both ``>= 0``.

    Raises:
        ValueError: centroid outside [0, 1], or no law for ``in_features`` and no preset.
    """
    subject = "winner_scales"
    if not 0 <= centroid <= 1:
        raise ValueError(f"{subject}: centroid must lie in [0, 1]; got {centroid}.")
    check_integer(subject, "channels", channels, 1)
    check_choice(subject, "compat", compat, [None, "repo"])
    check_choice(subject, "preset", preset, [None, "audio", "image"])
    kind = preset or {1: "audio", 2: "image"}.get(in_features)
    if kind is None:
        raise ValueError(
            f"{subject}: there is no scale law for in_features={in_features}; give the scales "
            "yourself or a preset."
        )
    psi = centroid / (channels**2 if compat == "repo" else channels)
    if kind == "image":
        return 50 * -math.expm1(-5 * psi), 0.4 * psi
    density = 1.0
    if n_samples is not None:
        check_integer(subject, "n_samples", n_samples, 2)
        density = n_samples / _AUDIO_SAMPLES
    return 3500 * -math.expm1(-7 * psi) * density, 3 * psi


@torch.no_grad()
def siren_uniform_(
    tensor: Tensor,
    omega: float = 30.0,
    *,
    first: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a weight as a layer of a sine network, as the functions of ``torch.nn.init`` do.

    Args:
        tensor: ``(out, in)`` weight of a linear layer, changed in place.
        omega: angular frequency of the sine behind the layer, ``> 0``.
        first: bounds of ``1 / in``, for the coordinates; else ``sqrt(6 / in) / omega``.
        generator: source of the values.

    Returns:
        ``tensor``.

    Raises:
        ValueError: not two axes, or ``omega`` out of range.
    """
    _check_matrix("siren_uniform_", tensor, omega)
    fan_in = tensor.shape[1]
    bound = 1 / fan_in if first else math.sqrt(6 / fan_in) / omega
    return tensor.uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def winner_normal_(
    tensor: Tensor, scale: float, omega: float = 30.0, *, generator: torch.Generator | None = None
) -> Tensor:
    """Add the WINNER noise ``N(0, (scale / omega)^2)`` to one weight of any sine network.

    Args:
        tensor: ``(out, in)`` weight after its base initialisation, changed in place.
        scale: ``s0`` for the first layer, ``s1`` for the second (:func:`winner_scales`), ``>= 0``.
        omega: angular frequency of the sine behind the layer, ``> 0``.
        generator: source of the noise.

    Returns:
        ``tensor``.

    Raises:
        ValueError: not two axes, or ``scale`` or ``omega`` out of range.

    Example:
        >>> layers = [nn.Linear(1, 64), nn.Linear(64, 64)]
        >>> for layer, scale in zip(layers, winner_scales(0.6, in_features=1), strict=True):
        ...     _ = siren_uniform_(layer.weight, first=layer is layers[0])
        ...     _ = winner_normal_(layer.weight, scale)
    """
    _check_matrix("winner_normal_", tensor, omega)
    check_at_least("winner_normal_", "scale", scale, 0.0)
    noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=tensor.device)
    return tensor.add_(noise, alpha=scale / omega)


def _check_matrix(subject: str, tensor: Tensor, omega: float) -> None:
    check_positive(subject, "omega", omega)
    if tensor.ndim != 2:
        raise ValueError(f"{subject}: tensor must have two axes; got shape {tuple(tensor.shape)}.")


@torch.no_grad()
def winner_init_(
    siren: SIREN, s0: float, s1: float, *, generator: torch.Generator | None = None
) -> SIREN:
    """Add the WINNER noise to the first two weight matrices, in place, once.

    ``W0 += N(0, (s0 / omega)^2)``, ``W1 += N(0, (s1 / omega)^2)``; nothing else changes.

    Args:
        siren: a network after its base initialisation.
        s0: scale of the first layer, ``>= 0``.
        s1: scale of the second layer, ``>= 0``.
        generator: source of the noise; the global generator is used (and advanced) without one.

    Returns:
        ``siren`` itself.

    Raises:
        ValueError: negative scales, or the noise was added before.
    """
    check_at_least("winner_init_", "s0", s0, 0.0)
    check_at_least("winner_init_", "s1", s1, 0.0)
    if bool(siren.winner_applied):
        raise ValueError("winner_init_: this network has its noise already; reset_parameters().")
    for layer, scale in zip(siren.linears[:2], (s0, s1), strict=True):
        winner_normal_(layer.get_parameter("weight"), scale, siren.omega, generator=generator)
    siren.winner_applied.fill_(True)
    return siren
