import gzip
import struct

import numpy as np
import pytest
import torch

from pyrobust.data import load_idx

NAMES = {
    "train-images-idx3-ubyte": 3,
    "train-labels-idx1-ubyte": 1,
    "t10k-images-idx3-ubyte": 3,
    "t10k-labels-idx1-ubyte": 1,
}


def write_folder(folder, compress=False, train=6, test=4):
    """Write four valid files of 3 by 5 images; return the arrays by name."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, ndim in NAMES.items():
        count = train if name.startswith("train") else test
        shape = (count, 3, 5) if ndim == 3 else (count,)
        array = rng.integers(0, 256 if ndim == 3 else 4, shape, dtype=np.uint8)
        data = struct.pack(f">4B{ndim}I", 0, 0, 8, ndim, *shape) + array.tobytes()
        path = folder / (name + (".gz" if compress else ""))
        path.write_bytes(gzip.compress(data) if compress else data)
        arrays[name] = array
    return arrays


@pytest.mark.parametrize("compress", [False, True])
def test_reads_back_what_was_written(tmp_path, compress):
    arrays = write_folder(tmp_path, compress)
    images = load_idx(tmp_path)
    expected = arrays["train-images-idx3-ubyte"][:, None].astype(np.float32) / 255
    np.testing.assert_array_equal(images.train_images.numpy(), expected)
    np.testing.assert_array_equal(images.test_labels.numpy(), arrays["t10k-labels-idx1-ubyte"])
    assert images.train_labels.dtype == torch.int64
    labels = [a.max() for name, a in arrays.items() if "labels" in name]
    assert images.num_classes == max(labels) + 1


def test_a_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder must exist; got '.*nowhere'"):
        load_idx(tmp_path / "nowhere")
    write_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="must hold t10k-labels-idx1-ubyte or"):
        load_idx(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], r"must have 106 bytes for shape \(6, 3, 5\); got 105"),
        (lambda data: data + b"x", "must have 106 bytes"),
        (lambda data: data[:10], "is not an idx3 file"),
        (lambda data: b"", "is not an idx3 file"),
        (lambda data: b"\0\0\x0d" + data[3:], "is not an idx3 file of unsigned bytes"),
        (lambda data: data[:4] + b"\xff" * 12, "must have"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, message):
    write_folder(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_idx(tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"no" + data])
def test_a_damaged_gzip_file_is_refused(tmp_path, damage):
    write_folder(tmp_path, compress=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="is not a complete gzip file"):
        load_idx(tmp_path)


def test_counts_and_sizes_must_agree(tmp_path):
    write_folder(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 2) + b"\1\2")
    with pytest.raises(ValueError, match="got 6 images and 2 labels"):
        load_idx(tmp_path)
    write_folder(tmp_path)
    images = tmp_path / "t10k-images-idx3-ubyte"
    images.write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, 4, 2, 2) + bytes(16))
    with pytest.raises(ValueError, match=r"must have one size; got \(3, 5\) and \(2, 2\)"):
        load_idx(tmp_path)


def test_real_mnist(data_folder):
    mnist = load_idx(data_folder / "mnist")
    assert mnist.train_images.shape == (60000, 1, 28, 28)
    assert mnist.test_images.shape == (10000, 1, 28, 28)
    assert mnist.num_classes == 10
    assert abs(float(mnist.train_images.mean()) - 0.1307) < 1e-4
