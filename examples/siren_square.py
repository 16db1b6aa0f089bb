"""Fit a high-frequency signal with a sine network, with and without the WINNER initialisation."""

from __future__ import annotations

import torch

from pyrobust.nn import SIREN, fit_signal, spectral_centroid, winner_init_, winner_scales


def band_limited(low: float, high: float, n: int = 2048) -> torch.Tensor:
    spectrum = torch.zeros(n // 2 + 1, dtype=torch.complex64)
    band = slice(int(low * n / 2), int(high * n / 2))
    spectrum[band] = torch.randn(spectrum[band].shape, dtype=torch.complex64)
    signal = torch.fft.irfft(spectrum, n)
    return (signal / signal.abs().max()).unsqueeze(1)


def main() -> None:
    torch.manual_seed(0)
    target = band_limited(0.4, 0.8)
    coords = torch.linspace(-1, 1, len(target)).unsqueeze(1)
    centroid = spectral_centroid(target, 1)
    print(f"spectral centroid {centroid:.3f} of Nyquist")
    scales = {
        "plain": (0.0, 0.0),
        "WINNER": winner_scales(centroid, 1),
        "WINNER, rescaled": winner_scales(centroid, 1, n_samples=len(target)),
    }
    print(f"{'initialisation':<18} {'s0':>8} {'s1':>6} {'PSNR, dB':>9}")
    for name, (s0, s1) in scales.items():
        net = winner_init_(SIREN(1, 64, 1), s0, s1)
        best = max(fit_signal(net, coords, target, steps=250, lr=5e-4, decay=1.0))
        print(f"{name:<18} {s0:8.1f} {s1:6.2f} {best:9.1f}")


if __name__ == "__main__":
    main()
