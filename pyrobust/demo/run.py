"""The demo: train twice, pack, bound, smooth, report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from pyrobust.data import ImageSet
from pyrobust.demo.evaluation import evaluate_variant
from pyrobust.demo.network import convolutional_network
from pyrobust.demo.settings import DemoSettings
from pyrobust.info import info
from pyrobust.io import save
from pyrobust.pack import pack
from pyrobust.report import write_report
from pyrobust.train import GaussianCrossEntropy, IntervalTraining, fit

__all__ = ["run_demo", "train_networks"]

_SMALL_PIXELS = 256

_ASSUMPTIONS = {
    "linf": (
        "deterministic; the exact real function of the stored weights on valid images "
        "(pixels in [0, 1]); bounds rounded outward"
    ),
    "l2": (
        "holds with probability at least 1 - alpha per image over the noise; "
        "takes the noise to be exactly Gaussian and the base network to be deterministic"
    ),
}


def train_networks(
    data: ImageSet, settings: DemoSettings, *, progress: bool = False
) -> dict[str, nn.Module]:
    """The plain and the interval-trained network, from equal initial weights."""
    shape = tuple(data.train_images.shape[1:])
    networks: dict[str, nn.Module] = {}
    for name in ("plain", "interval"):
        generator = torch.Generator().manual_seed(settings.seed)
        clean = GaussianCrossEntropy(settings.sigma, generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            network = convolutional_network(shape, data.num_classes)  # type: ignore[arg-type]
        networks[name] = fit(
            network,
            data.train_images,
            data.train_labels,
            objective=clean if name == "plain" else IntervalTraining(settings.eps, clean=clean),
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            generator=generator,
            progress=progress,
            description=f"train {name}",
        )
    return networks


def run_demo(
    data: ImageSet, out: str | Path, *, settings: DemoSettings, progress: bool = False
) -> dict[str, Any]:
    """Train, pack to every width, certify in both norms, and write report and models.

    Images of up to 256 pixels are handled on one thread: a second one made the run on digits 1.7
    times longer, and the figures then do not depend on the number of threads.

    Args:
        data: the images.
        out: folder for ``report.json``, ``report.html`` and a ``.safetensors`` file per variant;
            made where missing.
        settings: see :class:`DemoSettings`.
        progress: show progress bars.

    Returns:
        What ``report.json`` holds.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with _suitable_threads(data):
        report = _make_report(data, out, settings, progress)
    write_report(report, out)
    return report


@contextmanager
def _suitable_threads(data: ImageSet) -> Iterator[None]:
    """One thread inside the block for small images, torch's number otherwise."""
    before = torch.get_num_threads()
    if data.train_images[0, 0].numel() <= _SMALL_PIXELS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _make_report(
    data: ImageSet, out: Path, settings: DemoSettings, progress: bool
) -> dict[str, Any]:
    """Train and evaluate; models go to ``out``."""
    networks = train_networks(data, settings, progress=progress)
    jobs = [(name, bits) for name in networks for bits in settings.bits]
    variants = []
    for training, bits in tqdm(jobs, desc="variants", disable=not progress):
        model = _variant(networks[training], bits, settings)
        name = f"{training}-{bits}bit"
        save(model, out / f"{name}.safetensors")
        variants.append(evaluate_variant(model, name, bits, data, settings, progress))
    return {
        "title": f"pyrobust demo: {data.name}",
        "data": {
            "name": data.name,
            "train_images": len(data.train_images),
            "test_images": len(data.test_images),
        },
        "settings": {
            k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()
        },
        "assumptions": _ASSUMPTIONS,
        "machine": info().to_dict(),
        "variants": variants,
    }


def _variant(network: nn.Module, bits: int, settings: DemoSettings) -> nn.Module:
    """The float network itself at 32 bits, else its packed twin."""
    if bits == 32:
        return network
    return pack(network, bits=bits, group_size=settings.group_size).eval()
