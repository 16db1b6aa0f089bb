"""Whole decisions of a small network against the textbook loop: one image, one radius, one process.

    OMP_NUM_THREADS=1 python bench/decision_time.py

The network has strided convolutions of 16, 32 and 64 channels on 3 x 32 x 32 inputs. Its last bias
is shifted so that the top class has the probabilities of a population of published logs; each
decision (selection, noise, forward passes, sequential test at radius ``sigma``) is timed alone and
averaged, in CPU time of one thread. The textbook loop draws 100 + 100,000 copies in batches of 400
and counts votes by numpy.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy import special
from torch import nn

from pyrobust import _native
from pyrobust.nn import SmoothedClassifier
from pyrobust.ops import gaussian_samples

sys.path.insert(0, str(Path(__file__).parent))
from smoothing_populations import POPULATIONS, draw

SIGMA, BATCH, SAMPLES = 0.5, 400, 100_100


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 9, 10),
    ).eval()  # fmt: skip


@torch.no_grad()
def textbook(base, x, samples):
    counts = np.zeros(10, dtype=int)
    while samples > 0:
        size = min(BATCH, samples)
        samples -= size
        batch = x.repeat((size, 1, 1, 1))
        predictions = base(batch + torch.randn_like(batch) * SIGMA).argmax(1)
        for index in predictions.numpy():
            counts[index] += 1
    return counts


def main():
    base, x = network(), torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = base(gaussian_samples(x, SIGMA, 4000, seed=99)[0])
        top = int(logits.mean(0).argmax())
        others = logits.index_fill(1, torch.tensor([top]), -torch.inf).amax(1)
        margins = (logits[:, top] - others).sort().values
        bias = float(base[-1].bias[top])
    smoothed = SmoothedClassifier(base, SIGMA, 10)
    smoothed.certify_at(x, SIGMA)  # the design is read or made once per process
    part = 10_010
    begun = time.process_time()
    textbook(base, x, part)
    loop = (time.process_time() - begun) * SAMPLES / part
    print(f"{_native.isa()}, {torch.get_num_threads()} thread(s); loop of {SAMPLES}: {loop:.2f} s")
    for name in POPULATIONS:
        times, samples = [], []
        for i, z in enumerate(draw(name, 41)):
            wanted = float(special.ndtr(z))
            at = min(int((1 - wanted) * len(margins)), len(margins) - 1)
            shift = 3.0 if wanted > 0.9995 else -float(margins[at])
            with torch.no_grad():
                base[-1].bias[top] = bias + shift
            begun = time.process_time()
            certificate = smoothed.certify_at(x, SIGMA, seed=i)
            times.append(time.process_time() - begun)
            samples.append(int(certificate.samples))
        mean, median = np.mean(times), np.median(times)
        print(
            f"{name:50} mean {1e3 * mean:6.1f} ms ({loop / mean:5.0f}x), median "
            f"{1e3 * median:5.1f} ms ({loop / median:5.0f}x), {np.mean(samples):5.0f} samples"
        )


if __name__ == "__main__":
    main()
