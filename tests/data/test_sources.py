"""Loaders of CIFAR pickles, image folders and Python functions, and what tells them apart."""

import pickle
import sys

import numpy as np
import pytest
import torch

from pyrobust.data import load_cifar, load_image_folder, load_images

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)


def write_batch(path, data=PIXELS, labels=(0, 1, 2, 3, 9, 0), key=b"labels"):
    path.write_bytes(pickle.dumps({b"data": data, key: list(labels)}, protocol=2))


@pytest.mark.parametrize(
    ("name", "key", "classes"), [("test_batch", b"labels", 10), ("test", b"fine_labels", 100)]
)
def test_cifar_batches_are_read(tmp_path, name, key, classes):
    write_batch(tmp_path / name, key=key)
    write_batch(
        tmp_path / ("data_batch_2" if classes == 10 else "train"), PIXELS[:, ::-1].copy(), key=key
    )
    data = load_images(str(tmp_path))
    assert data.num_classes == classes
    assert torch.equal(
        data.test_images * 255, torch.from_numpy(PIXELS.reshape(6, 3, 32, 32)).float()
    )
    assert data.test_labels.tolist() == [0, 1, 2, 3, 9, 0]
    assert data.train_images.shape == (6, 3, 32, 32)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("run",))

    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Trap(), b"labels": [0]}))
    with pytest.raises(
        ValueError, match=r"is not a CIFAR batch \(builtins.print is not an array\)"
    ):
        load_cifar(tmp_path)


@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        (PIXELS[:, :7], [0] * 6, "is not a CIFAR batch"),
        (PIXELS.astype(float), [0] * 6, "is not a CIFAR batch"),
        (PIXELS, [10] * 6, "labels must be below 10; got 10"),
    ],
)
def test_damaged_batches_are_refused(tmp_path, data, labels, message):
    write_batch(tmp_path / "test_batch", data, labels)
    with pytest.raises(ValueError, match=message):
        load_cifar(tmp_path)


def test_missing_folders_are_named(tmp_path):
    for load in (load_cifar, load_image_folder):
        with pytest.raises(FileNotFoundError, match="folder must exist; got 'nowhere'"):
            load("nowhere")
    with pytest.raises(FileNotFoundError, match="must hold test_batch or test"):
        load_cifar(tmp_path)
    with pytest.raises(FileNotFoundError, match="must hold CLASS/IMAGE files"):
        load_images(str(tmp_path))


def write_images(folder, mode="RGB", size=(5, 4), count=2):
    image_module = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(1)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            image_module.fromarray(pixels).save(folder / name / f"{i}.png")
            last = pixels
    return last


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_image_folder_is_a_test_set(tmp_path, mode):
    last = write_images(tmp_path, mode)
    data = load_images(str(tmp_path))
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    assert data.test_images.shape == (4, 3 if mode == "RGB" else 1, 4, 5)
    expected = last.transpose(2, 0, 1) if mode == "RGB" else last[None]
    assert torch.equal(data.test_images[-1] * 255, torch.from_numpy(expected.copy()).float())
    assert len(data.train_images) == 0


def test_an_image_folder_in_two_parts(tmp_path):
    write_images(tmp_path / "train", count=3)
    write_images(tmp_path / "test", "L")
    data = load_image_folder(tmp_path)
    assert data.train_images.shape == (6, 3, 4, 5)
    assert data.test_images.shape == (4, 3, 4, 5)
    (tmp_path / "test" / "bird").mkdir()
    with pytest.raises(ValueError, match="train and test must have the same classes"):
        load_image_folder(tmp_path)


def test_unequal_and_unreadable_images_are_named(tmp_path):
    write_images(tmp_path)
    (tmp_path / "dog" / "9.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"9\.png is not a readable image"):
        load_image_folder(tmp_path)
    (tmp_path / "dog" / "9.png").unlink()
    image_module = pytest.importorskip("PIL.Image")
    image_module.new("RGB", (7, 7)).save(tmp_path / "dog" / "8.png")
    with pytest.raises(ValueError, match=r"images must have one size; got \(4, 5\)"):
        load_image_folder(tmp_path)


def test_functions_make_image_sets(tmp_path, monkeypatch):
    (tmp_path / "my_images.py").write_text(
        "import torch\n"
        "from pyrobust.data import load_digits\n"
        "def pair(): return torch.rand(3, 1, 2, 2), torch.tensor([0, 2, 1])\n"
        "def wrong(): return torch.rand(3, 1, 2, 2), torch.rand(3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = load_images("my_images:pair")
    assert data.num_classes == 3
    assert data.name == "my_images:pair"
    assert load_images("my_images:load_digits").name == load_images("digits").name
    with pytest.raises(ValueError, match="must return an ImageSet or float images"):
        load_images("my_images:wrong")
    for source in ("my_images:none", "no_such_module:f", "my_images:"):
        with pytest.raises(ValueError, match="data must be module:function"):
            load_images(source)
    sys.modules.pop("my_images")
