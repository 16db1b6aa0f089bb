"""LeNet on MNIST under smoothing: published certified accuracy, and an attack inside the radii."""

from pathlib import Path

import pytest

from pyrobust.data import load_idx

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.slow
def test_lenet_reaches_published_accuracy_and_attacks_change_no_certified_image(
    monkeypatch, data_folder
):
    """About 10 minutes on one core: training, 500 images, 10 attacks of 100 steps."""
    monkeypatch.syspath_prepend(str(BENCH))
    import mnist_smoothing as bench

    folder = data_folder / "mnist"
    if not folder.is_dir():
        pytest.skip(f"MNIST is absent: {folder}")
    data = load_idx(folder)
    network = bench.train(data.train_images, data.train_labels)
    images, labels, certificate, smoothed = bench.certify(network, data, 20)
    accuracy = (100 * certificate.certified_accuracy(labels, bench.RADII)).tolist()
    print("certified accuracy", accuracy)
    assert len(images) == 500
    assert all(a >= p - 1 for a, p in zip(accuracy, bench.PUBLISHED, strict=True))
    assert bench.flipped(images, certificate, smoothed, 10) == (10, 0)
