"""verified: against corners, and the same certificate after kills, by one process or two."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn

from pyrobust.certify import Certificate, verified

from ..two_processes import run_two_processes


def network(classes=4):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes)).eval()


def trained_network():
    torch.manual_seed(0)
    model = network(2)
    x = torch.rand(200, 6)
    labels = (x.sum(1) > 3).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model, x, labels


def test_verified_images_resist_corner_search_and_batches_do_not_matter():
    model, x, labels = trained_network()
    certificate = verified(model, x, labels, 0.02, batch_size=64)
    assert isinstance(certificate, Certificate)
    assert certificate.norm == "linf"
    assert certificate.certified
    assert certificate.alpha == 0.0
    holds = ~certificate.abstained
    assert 0 < int(holds.sum()) < len(x)
    for _ in range(100):
        point = (x + 0.02 * (torch.randint(0, 2, x.shape) * 2 - 1)).clamp(0, 1)
        assert bool((model(point).argmax(1) == labels)[holds].all())
    again = verified(model, x, labels, 0.02, batch_size=200)
    assert torch.equal(certificate.prediction, again.prediction)
    accuracy = certificate.certified_accuracy(labels, 0.02)
    assert float(accuracy) == pytest.approx(float(holds.double().mean()))
    assert not verified(model, x[:2], labels[:2], 0.02, rounding="nearest").certified
    assert len(verified(model, x[:0], labels[:0], 0.02)) == 0
    small = verified(model, x, labels.to(torch.uint8), 0.02)
    assert torch.equal(small.prediction, certificate.prediction)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown", "alpha-crown"])
def test_a_tie_is_not_proven(method):
    model = network(2)
    for parameter in model[2].parameters():
        parameter.data.zero_()  # both logits are 0, with no rounding at all
    x = torch.rand(3, 6)
    assert bool(verified(model, x, torch.tensor([0, 1, 0]), 0.01, method=method).abstained.all())


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"eps": -0.1}, ValueError, "eps must be finite and at least 0"),
        ({"images": torch.zeros(2, 6).long()}, TypeError, "images must be a floating-point"),
        ({"labels": torch.zeros(2)}, TypeError, "labels must be an integer tensor"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels must have shape \(2\)"),
        ({"labels": torch.tensor([0, 4])}, ValueError, r"labels must lie in \[0, 4\); got 4"),
        ({"labels": torch.tensor([-4, 0])}, ValueError, r"labels must lie in \[0, inf\); got -4"),
        ({"images": torch.full((2, 6), torch.nan)}, ValueError, "images must be finite"),
        ({"model": network(1), "labels": torch.zeros(2).long()}, ValueError, "num_classes must be"),
        ({"method": "magic"}, ValueError, "method must be one of ibp"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"model": network().train()}, ValueError, "evaluation mode"),
    ],
)
def test_bad_arguments_of_verified(change, kind, message):
    arguments = {
        "model": network(),
        "images": torch.rand(2, 6),
        "labels": torch.tensor([0, 1]),
        "eps": 0.1,
    } | change
    with pytest.raises(kind, match=message):
        verified(**arguments)


# images of the first 100 of CIFAR-10's test set that auto_LiRPA 0.7.1 (commit a050a3d, default
# options, box cut to [0, 1]) certifies, of 43 that the network classifies right
CIFAR_COUNTS = {0.001: (20, 38, 38), 0.004: (0, 25, 32)}


@pytest.mark.parametrize("eps", CIFAR_COUNTS)
def test_as_many_cifar_images_are_certified_as_by_a_reference(eps, data_folder):
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(3136, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    weights = np.load(data_folder / "models" / "cifar_2c2f.npz")
    pairs = zip(model.state_dict(), weights.values(), strict=True)
    model.load_state_dict({name: torch.tensor(value) for name, value in pairs})
    stored = np.load(data_folder / "cifar10" / "labels_and_test100.npz")
    images = torch.tensor(stored["test100_images"]).permute(0, 3, 1, 2).float() / 255
    labels = torch.tensor(stored["test_labels"][:100]).long()
    right = model(images).argmax(1) == labels
    assert int(right.sum()) == 43
    for method, count in zip(("ibp", "crown-ibp", "crown"), CIFAR_COUNTS[eps], strict=True):
        found = verified(model, images[right], labels[right], eps, method=method, batch_size=22)
        assert int((~found.abstained).sum()) >= count, method


class Slow(nn.Module):
    """A model that takes its time, so that a kill comes in the middle."""

    def __init__(self, model, seconds):
        super().__init__()
        self.model, self.seconds = model, seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return self.model(x)


def verify(resume=None, *, method="crown", distributed=False, seconds=0.0, count=200, **more):
    model, x, labels = trained_network()
    slow = Slow(model, seconds).eval()
    options = {"method": method, "batch_size": 7, "resume": resume, "distributed": distributed}
    return verified(slow, x[:count], labels[:count], 0.03, **options | more)


def same(first, second):
    return torch.equal(first.prediction, second.prediction) and torch.equal(
        first.radius, second.radius
    )


def test_a_file_gives_the_certificate_and_is_not_computed_again(tmp_path, monkeypatch):
    plain = verify()
    assert 0 < int(plain.abstained.sum()) < 200
    log = tmp_path / "log.tsv"
    assert same(verify(log), plain)
    lines = log.read_bytes().splitlines()
    assert len(lines) == 201
    cut = b"\n".join(lines[:60]) + b"\n" + lines[60][:3]
    log.write_bytes(cut)
    assert same(verify(log), plain)
    assert log.read_bytes().splitlines() == lines

    def refuse(self, x):
        raise AssertionError("computed again")

    monkeypatch.setattr(Slow, "forward", refuse)
    assert same(verify(log), plain)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"method": "ibp"}, "method"), ({"clamp": None}, "clamp"), ({"count": 199}, "images")],
)
def test_a_file_of_other_work_is_refused(tmp_path, change, named):
    log = tmp_path / "log.tsv"
    verify(log)
    with pytest.raises(ValueError, match=f"belongs to another job; .*{named}"):
        verify(log, **change)


def test_a_file_of_other_weights_or_a_missing_folder_is_refused(tmp_path):
    log = tmp_path / "log.tsv"
    model, x, labels = trained_network()
    verified(model, x, labels, 0.03, resume=log)
    with torch.no_grad():
        model[0].bias += 1e-3
    with pytest.raises(ValueError, match="another job; model_sha256 differ"):
        verified(model, x, labels, 0.03, resume=log)
    with pytest.raises(FileNotFoundError, match=r"the folder of .*missing"):
        verified(model, x, labels, 0.03, resume=tmp_path / "missing" / "log.tsv")


def verify_slowly(log):
    torch.set_num_threads(1)
    verify(log, seconds=0.02)


def rows_in(log):
    return log.read_bytes().count(b"\n") - 1 if log.exists() else 0


def test_a_killed_run_goes_on_to_the_same_certificate(tmp_path):
    log = tmp_path / "log.tsv"
    process = multiprocessing.get_context("spawn").Process(target=verify_slowly, args=(log,))
    process.start()
    latest = time.monotonic() + 120
    while rows_in(log) < 30:
        assert time.monotonic() < latest
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 30 <= rows_in(log) < 200
    before = json.loads((tmp_path / "log.tsv.job.json").read_text())
    # the pause between images is no part of the work: the seconds are no weights
    assert same(verify(log), verify())
    assert json.loads((tmp_path / "log.tsv.job.json").read_text()) == before
    verify(tmp_path / "whole.tsv")
    assert log.read_bytes() == (tmp_path / "whole.tsv").read_bytes()


def one_of_two(rank):
    """In memory, with a file of its own, and from a file that one process began."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    folder = os.environ["PYROBUST_TEST_FOLDER"]
    return [
        (found.prediction, found.radius)
        for found in (
            verify(distributed=True),
            verify(f"{folder}/two.tsv", distributed=True),
            verify(f"{folder}/begun.tsv", distributed=True),
            verify(method="ibp", count=3, distributed=True),  # fewer batches than processes
        )
    ]


def test_two_processes_give_the_certificate_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PYROBUST_TEST_FOLDER", str(tmp_path))
    plain = verify(tmp_path / "one.tsv")
    lines = (tmp_path / "one.tsv").read_bytes().splitlines(keepends=True)
    verify(tmp_path / "begun.tsv")
    (tmp_path / "begun.tsv").write_bytes(b"".join(lines[:80]))
    few = verify(method="ibp", count=3)
    for results in run_two_processes(one_of_two, tmp_path):
        for found, expected in zip(results, (plain, plain, plain, few), strict=True):
            assert torch.equal(found[0], expected.prediction)
            assert torch.equal(found[1], expected.radius)
    for name in ("two.tsv", "begun.tsv"):
        assert (tmp_path / name).read_bytes() == b"".join(lines)
    assert not list(tmp_path.glob("*.part*"))
