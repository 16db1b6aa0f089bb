"""Bad input to smoothing is refused in words, by every public call and by the command line."""

import errno
import os

import pytest
import torch

import pyrobust
from pyrobust.demo import convolutional_network
from pyrobust.nn import SmoothedClassifier
from pyrobust_cli import main

X = torch.zeros(1, 1, 8, 8)
CALLS = {
    "predict": lambda smoothed, x, n=5, **options: smoothed.predict(x, n, **options),
    "certify": lambda smoothed, x, n=5, **options: smoothed.certify(x, 5, n, **options),
    "certify_at": lambda smoothed, x, n=5, **options: smoothed.certify_at(
        x, 0.1, budget=n, **options
    ),
}


def smoothed_network(*, sigma=0.25, num_classes=10, training=False):
    base = convolutional_network((1, 8, 8), 10).train(training)
    return SmoothedClassifier(base, sigma, num_classes)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("network", "options", "error", "message"),
    [
        ({"sigma": 0.0}, {}, ValueError, "sigma must be finite and positive; got 0"),
        ({"sigma": -1.0}, {}, ValueError, "sigma must be finite and positive; got -1"),
        ({}, {"alpha": 0.0}, ValueError, r"alpha must lie in the open interval \(0, 1\); got 0"),
        ({}, {"alpha": 1.0}, ValueError, r"alpha must lie in the open interval \(0, 1\); got 1"),
        ({}, {"n": 0}, ValueError, r"(n|budget) must be at least 1; got 0"),
        ({}, {"x": X.to(torch.uint8)}, TypeError, "keep them and give grid=255"),
        ({"num_classes": 9}, {}, ValueError, r"must return shape \(\d+, 9\) for num_classes=9"),
        ({"training": True}, {}, ValueError, "evaluation mode"),
    ],
)
def test_every_call_refuses(call, network, options, error, message):
    options = dict(options)
    with pytest.raises(error, match=message):
        call(smoothed_network(**network), options.pop("x", X), **options)


@pytest.fixture
def words(tmp_path):
    """A job of three images; options given later win."""

    def of(*more, classes=10):
        model = tmp_path / f"{classes}.safetensors"
        torch.manual_seed(0)
        network = convolutional_network((1, 8, 8), classes)
        pyrobust.save(pyrobust.pack(network, bits=4), model)
        options = ["--method", "smoothing", "--limit", "3", "--samples", "20", "--selection", "5"]
        return ["certify", str(model), "--out", str(tmp_path / "log.tsv"), *options, *more]

    return of


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sigma", "0"], "sigma must be finite and positive; got 0"),
        (["--sigma", "-1"], "sigma must be finite and positive; got -1"),
        (["--alpha", "0"], "alpha must lie in the open interval (0, 1); got 0"),
        (["--alpha", "1"], "alpha must lie in the open interval (0, 1); got 1"),
        (["--samples", "0"], "samples must be at least 1; got 0"),
        (["--grid", "255"], "images must be multiples of 1 / grid"),
    ],
)
def test_the_command_line_refuses(words, more, message, capsys, tmp_path):
    assert main(words(*more)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line
    log = tmp_path / "log.tsv"
    assert not log.exists() or log.read_text().count("\n") <= 1


def test_the_command_line_refuses_another_number_of_classes(words, capsys):
    assert main(words(classes=9)) == 2
    assert "weight_shape [9, 64] (model: [10, 64])" in capsys.readouterr().err


def test_the_command_line_leaves_the_log_of_another_job(words, capsys, tmp_path):
    assert main(words()) == 0
    log = tmp_path / "log.tsv"
    whole = log.read_bytes()
    capsys.readouterr()
    assert main(words("--sigma", "0.5", "--resume")) == 2
    assert "belongs to another job; sigma differ" in capsys.readouterr().err
    assert main(words("--sigma", "0.5")) == 2
    assert "use --resume" in capsys.readouterr().err
    assert log.read_bytes() == whole


def test_the_command_line_meets_a_full_disk_and_goes_on(words, capsys, tmp_path, monkeypatch):
    real, lines = os.write, []

    def full(descriptor, data):
        lines.extend([data] if b"\t" in data else [])
        if len(lines) == 3:  # the head and one image found room
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    assert main(words()) == 2
    assert "make room and go on with --resume" in capsys.readouterr().err
    monkeypatch.undo()
    log = tmp_path / "log.tsv"
    assert log.read_text().count("\n") == 2
    assert main(words("--resume")) == 0
    assert log.read_text().count("\n") == 4
