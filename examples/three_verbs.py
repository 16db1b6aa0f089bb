"""Pack a network, bound it, smooth it: the library in one page, on scikit-learn's digits."""

import torch

import pyrobust
from pyrobust import Interval
from pyrobust.data import load_digits
from pyrobust.demo import convolutional_network
from pyrobust.nn import SmoothedClassifier
from pyrobust.train import GaussianCrossEntropy, IntervalTraining, fit


def main(epochs: int = 30) -> dict[str, float]:
    digits = load_digits()
    x, y = digits.test_images, digits.test_labels
    torch.manual_seed(0)
    model = fit(
        convolutional_network((1, 8, 8), 10),
        digits.train_images,
        digits.train_labels,
        objective=IntervalTraining(eps=0.06, clean=GaussianCrossEntropy(sigma=0.25)),
        epochs=epochs,
    )

    packed = pyrobust.pack(model, bits=4, group_size=32)
    print(pyrobust.pack_report(packed).summary())
    with torch.no_grad():
        accuracy = (packed(x).argmax(1) == y).float().mean().item()

        bounds = packed(Interval.ball(x, 0.05, clamp=(0, 1)))
    mine = bounds.lower.gather(1, y[:, None])
    others = bounds.upper.scatter(1, y[:, None], -torch.inf)
    bounded = (mine[:, 0] > others.amax(1)).float().mean().item()
    print(f"4 bits: accuracy {accuracy:.1%}, certified at l-infinity 0.05: {bounded:.1%}")

    smoothed = SmoothedClassifier(packed, sigma=0.25, num_classes=10)
    certificate = smoothed.certify(x[:20], n0=100, n=1000, alpha=1e-3, seed=0)
    print(certificate.summary())
    share = certificate.certified_accuracy(y[:20], 0.25).item()
    print(f"first 20 images, right and certified at l2 0.25: {share:.1%}")
    return {"accuracy": accuracy, "bounded": bounded, "smoothed": share}


if __name__ == "__main__":
    main()
