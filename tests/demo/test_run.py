"""The demo end to end on few images, and its figures again from the saved files by numpy alone."""

import json
import re
import struct

import numpy as np
import pytest
import torch
from scipy import stats

from pyrobust.data import load_digits
from pyrobust.demo import DemoSettings, run_demo
from pyrobust.ops import gaussian_samples
from pyrobust.report import report_table

SETTINGS = DemoSettings(
    epochs=5,
    batch_size=16,
    eps=0.03,
    bits=(32, 4, 2),
    eps_grid=(0.0, 0.02, 0.05, 0.1),
    radius_grid=(0.0, 0.1, 0.25),
    samples=200,
    selection_samples=20,
)
DTYPES = {"F32": "<f4", "F16": "<f2", "U8": "u1", "I64": "<i8"}


@pytest.fixture(scope="module")
def images():
    return load_digits().head(500, 40)


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    run_demo(images, out, settings=SETTINGS)
    return out


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "report.json").read_text())


def variant(report, name):
    return next(v for v in report["variants"] if v["name"] == name)


def read_tensors(path):
    """The tensors of a safetensors file, without its library."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    head, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    head.pop("__metadata__")
    return {
        name: np.frombuffer(data[slice(*t["data_offsets"])], DTYPES[t["dtype"]]).reshape(t["shape"])
        for name, t in head.items()
    }


def read_weight(tensors, layer, bits, columns, group=32):
    """The float64 weight matrix ``(rows, columns)`` of a layer, codes unpacked bit by bit."""
    if bits == 32:
        weight = tensors[f"{layer}.weight"]
        return weight.reshape(len(weight), -1).astype(np.float64)
    stream = np.unpackbits(tensors[f"{layer}.codes"], axis=1, bitorder="little")
    digits = stream[:, : columns * bits].reshape(-1, columns, bits)
    codes = (digits * (1 << np.arange(bits))).sum(-1).astype(np.float64)
    spread = np.arange(columns) // group
    scale = tensors[f"{layer}.scale"].astype(np.float64)[:, spread]
    return scale * (codes - tensors[f"{layer}.zero"].astype(np.float64)[:, spread])


def patches(x, stride):
    """3 by 3 patches of ``(N, C, H, W)`` with a border of zeros: ``(N, H', W', C * 9)``."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    windows = windows[:, :, ::stride, ::stride]
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(*windows.shape[0:1], *windows.shape[2:4], -1)


class NumpyNetwork:
    """The demo's network in float64 numpy, on points and on boxes (centre and radius)."""

    def __init__(self, folder, name, bits):
        tensors = read_tensors(folder / f"{name}.safetensors")
        columns = {0: 9, 2: 72, 5: 256, 7: 64}
        self.weights = {i: read_weight(tensors, i, bits, c) for i, c in columns.items()}
        self.biases = {i: tensors[f"{i}.bias"].astype(np.float64) for i in columns}
        self.nbytes = sum(t.nbytes for n, t in tensors.items() if not n.endswith("_extra_state"))

    def affine(self, i, low, high):
        centre, radius, w = (low + high) / 2, (high - low) / 2, self.weights[i]
        centre, radius = centre @ w.T + self.biases[i], radius @ np.abs(w).T
        return centre - radius, centre + radius

    def box(self, low, high):
        for i, stride in ((0, 1), (2, 2)):
            low, high = self.affine(i, patches(low, stride), patches(high, stride))
            low, high = (np.maximum(e, 0).transpose(0, 3, 1, 2) for e in (low, high))
        low, high = self.affine(5, low.reshape(len(low), -1), high.reshape(len(high), -1))
        return self.affine(7, np.maximum(low, 0), np.maximum(high, 0))

    def __call__(self, x):
        return self.box(x, x)[0]


@pytest.mark.parametrize(("name", "bits"), [("plain-32bit", 32), ("interval-4bit", 4)])
def test_bytes_and_clean_accuracy_follow_from_the_file(folder, report, images, name, bits):
    network = NumpyNetwork(folder, name, bits)
    entry = variant(report, name)
    assert entry["bytes"] == network.nbytes
    logits = network(images.test_images.numpy().astype(np.float64))
    assert entry["clean_accuracy"] == (logits.argmax(1) == images.test_labels.numpy()).mean()


@pytest.mark.parametrize(("name", "bits"), [("interval-4bit", 4), ("interval-2bit", 2)])
def test_interval_figures_follow_from_the_file(folder, report, images, name, bits):
    network = NumpyNetwork(folder, name, bits)
    x = images.test_images.numpy().astype(np.float64)
    labels = images.test_labels.numpy()
    for point in variant(report, name)["linf"]:
        low, high = network.box(np.clip(x - point["eps"], 0, 1), np.clip(x + point["eps"], 0, 1))
        mine = low[np.arange(len(x)), labels]
        high[np.arange(len(x)), labels] = -np.inf
        margin = mine - high.max(1)
        # outward rounding may cost an image whose margin is at rounding level, never add one
        assert (margin > 1e-4).mean() <= point["certified_accuracy"] <= (margin > 0).mean()


def test_smoothing_figures_follow_from_the_file(folder, report, images):
    network, settings = NumpyNetwork(folder, "plain-2bit", 2), SETTINGS
    n0, n = settings.selection_samples, settings.samples
    noisy = gaussian_samples(images.test_images, settings.sigma, n0 + n, seed=settings.seed)
    votes = network(noisy.flatten(0, 1).numpy().astype(np.float64)).argmax(1).reshape(-1, n0 + n)
    radius = []
    for row, label in zip(votes, images.test_labels.tolist(), strict=True):
        top = np.bincount(row[:n0], minlength=10).argmax()
        k = (row[n0:] == top).sum()
        p = stats.beta.ppf(settings.alpha, k, n - k + 1) if k else 0.0
        radius.append(settings.sigma * stats.norm.ppf(p) if top == label and p > 0.5 else -1.0)
    for point in variant(report, "plain-2bit")["l2"]:
        expected = (np.array(radius) >= point["radius"]).mean()
        # float32 and float64 may disagree about a vote, hence by an image at the edge
        assert abs(point["certified_accuracy"] - expected) <= 1 / len(radius) + 1e-12


def test_the_report_has_the_promised_shape(report, images):
    names = [f"{t}-{b}bit" for t in ("plain", "interval") for b in SETTINGS.bits]
    assert [v["name"] for v in report["variants"]] == names
    keys = ["name", "bits", "bytes", "seconds_per_1000", "clean_accuracy", "linf", "l2"]
    for entry in report["variants"]:
        assert list(entry) == keys
        assert [list(p) for p in entry["linf"]] == [["eps", "certified_accuracy"]] * 4
        assert [list(p) for p in entry["l2"]] == [["radius", "certified_accuracy"]] * 3
        for curve in (entry["linf"], entry["l2"]):
            shares = [p["certified_accuracy"] for p in curve]
            assert shares == sorted(shares, reverse=True)
        assert entry["linf"][0]["certified_accuracy"] <= entry["clean_accuracy"]
    assert report["data"]["test_images"] == len(images.test_images)


def test_interval_training_shows_in_the_bounds(report):
    share = {
        name: variant(report, name)["linf"][1]["certified_accuracy"]
        for name in ("plain-4bit", "interval-4bit")
    }
    assert share["interval-4bit"] > share["plain-4bit"] + 0.3


def test_table_and_page_hold_the_figures_and_stand_alone(folder, report):
    table = report_table(report)
    page = (folder / "report.html").read_text()
    for entry in report["variants"]:
        line = next(row for row in table.splitlines() if entry["name"] in row)
        for cell in (f"{entry['bytes']:,}", f"{100 * entry['clean_accuracy']:.1f}%"):
            assert cell in line
            assert cell in page
    assert not re.search(r"https?://|src=|href=|url\(|@import|<script|<link", page)
    assert page.count("<figure>") == 4


def test_a_run_repeats_to_the_bit(images, report, tmp_path):
    again = run_demo(images, tmp_path, settings=SETTINGS)
    for first, second in zip(report["variants"], again["variants"], strict=True):
        first, second = dict(first, seconds_per_1000=0), dict(second, seconds_per_1000=0)
        assert first == json.loads(json.dumps(second))


def test_the_global_generator_is_left_alone(images, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    small = DemoSettings(epochs=1, bits=(4,), samples=5, selection_samples=5)
    run_demo(images.head(70, 4), tmp_path, settings=small)
    assert torch.equal(torch.rand(3), expected)


def test_settings_shrink_for_larger_sets_and_refuse_nonsense(images):
    large = images.head(500, 40)
    fitted = DemoSettings().fitted_to(large)
    assert (fitted.epochs, fitted.samples) == (60, 1000)
    with pytest.raises(ValueError, match="DemoSettings: samples must be at least 1; got 0"):
        DemoSettings(samples=0)
