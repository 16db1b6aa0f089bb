"""Interval-bound training on MNIST with networks of the literature, certified by intervals.

Two recipes: ``fast``, the start, ramp and regulariser of Shi et al. (arXiv 2103.17268), and
``ibp``, half of the clean loss kept, of Gowal et al. (arXiv 1810.12715). Prints one line: time,
clean and certified accuracy. Run ``python examples/certified_training_mnist.py FOLDER --eps 0.1``
with the folder of MNIST's idx files; ``--network cnn7 --width 64`` is the published network, which
wants a GPU, ``--network medium`` trains on a CPU in half an hour.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from torch import distributed, nn

from pyrobust.certify import verified
from pyrobust.data import load_idx
from pyrobust.train import (
    FastRegularizer,
    IBPLoss,
    SmoothEpsSchedule,
    fit,
    ibp_init_,
    step_decay,
)


def cnn7(width: int) -> nn.Sequential:
    """Five convolutions and two linear layers (CNN7 of Shi et al.), without batch norm."""
    double = 2 * width
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, double, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(double, double, 3, padding=1), nn.ReLU(),
        nn.Conv2d(double, double, 3, padding=1), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(double * 14 * 14, 512), nn.ReLU(),
        nn.Linear(512, 10),
    )  # fmt: skip


def medium() -> nn.Sequential:
    """Four convolutions and three linear layers (the medium network of Gowal et al.)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(),
        nn.Conv2d(32, 32, 4, stride=2), nn.ReLU(),
        nn.Conv2d(32, 64, 3), nn.ReLU(),
        nn.Conv2d(64, 64, 4, stride=2), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 512), nn.ReLU(),
        nn.Linear(512, 512), nn.ReLU(),
        nn.Linear(512, 10),
    )  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--eps", type=float, default=0.1, help="radius certified")
    parser.add_argument("--train-eps", type=float, help="radius trained; by default 1.2 eps")
    parser.add_argument("--network", choices=("cnn7", "medium"), default="cnn7")
    parser.add_argument("--width", type=int, default=8, help="of cnn7")
    parser.add_argument("--recipe", choices=("fast", "ibp"), default="fast")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--ramp",
        type=float,
        nargs=2,
        metavar="EPOCH",
        help="begin and end; by default 2%% and 60%%",
    )
    parser.add_argument(
        "--decay",
        type=float,
        nargs="+",
        metavar="EPOCH",
        help="where the learning rate falls; by default at 70%% and 90%%",
    )
    parser.add_argument("--decay-factor", type=float, default=0.2, help="what it falls to there")
    parser.add_argument("--max-norm", type=float, help="of the gradients of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for GPUs")
    parser.add_argument("--tf32", action="store_true", help="let matrix products on a GPU use TF32")
    parser.add_argument("--distributed", action="store_true", help="under torchrun")
    parser.add_argument("--train", type=int, help="training images used; by default all")
    parser.add_argument("--test", type=int, default=10000, help="test images certified")
    parser.add_argument("--save", type=Path, help="file for the trained weights")
    return parser.parse_args()


def device_of(options: argparse.Namespace) -> torch.device:
    """The device of this process, which joins the others' group where it is one of several."""
    device = torch.device(options.device)
    if device.type == "cuda" and options.distributed:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if options.distributed:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    torch.backends.cudnn.allow_tf32 = options.tf32
    return device


def train(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    options: argparse.Namespace,
    generator: torch.Generator,
) -> None:
    """Interval training by the schedule of the options."""
    epochs = options.epochs
    begin, end = (epoch / epochs for epoch in options.ramp or (0.02 * epochs, 0.6 * epochs))
    drops = tuple(epoch / epochs for epoch in options.decay or (0.7 * epochs, 0.9 * epochs))
    radius = options.train_eps or 1.2 * options.eps
    if options.recipe == "fast":
        objective = IBPLoss(SmoothEpsSchedule(begin, end, eps=radius), FastRegularizer())
    else:  # a straight ramp
        objective = IBPLoss(
            SmoothEpsSchedule(begin, end, eps=radius, exponent=1.0), None, kappa=0.5
        )
    fit(
        model,
        images,
        labels,
        objective=objective,
        epochs=epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        schedule=lambda done: step_decay(done, steps=drops, factor=options.decay_factor),
        max_norm=options.max_norm,
        generator=generator,
        distributed=options.distributed,
        progress=True,
    )


def main() -> None:
    options = arguments()
    device = device_of(options)
    data = load_idx(options.folder)
    images, labels, test, truth = (
        part.to(device)
        for part in (data.train_images[: options.train], data.train_labels[: options.train].long(),
                     data.test_images[: options.test], data.test_labels[: options.test].long())
    )  # fmt: skip
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = medium() if options.network == "medium" else cnn7(options.width)
    if options.recipe == "fast":
        ibp_init_(model, generator=generator)
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model.to(device=device, memory_format=layout)
    cpu, wall = time.process_time(), time.perf_counter()
    train(model, images, labels, options, generator)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if options.save is not None:
        torch.save(model.state_dict(), options.save)
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in test.split(500)])
    certificate = verified(
        model, test, truth, options.eps, batch_size=250, distributed=options.distributed
    )
    proven = certificate.prediction >= 0
    if not options.distributed or distributed.get_rank() == 0:
        name = f"cnn7 of width {options.width}" if options.network == "cnn7" else options.network
        took = f"{cpu:.0f} CPU seconds" if device.type == "cpu" else f"{wall:.0f} seconds"
        print(
            f"eps {options.eps:g}: {name}, {options.epochs} epochs in {took}; clean "
            f"{100 * (found == truth).double().mean():.2f}%, certified "
            f"{100 * proven.double().mean():.2f}% of {len(truth)} test images"
        )
    if options.distributed:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
