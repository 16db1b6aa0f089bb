"""Jobs beyond plain smoothing: logs equal direct certificates, survive cuts, hold packed parts."""

import json
import sys

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.certify import (
    CertificationJob,
    DualSmoothedClassifier,
    SmoothedMixture,
    certify_to_log,
    checkerboard_masks,
    smoothed_great_score,
)
from pyrobust.certify.job import certificate_of_log
from pyrobust.certify.job_methods import method_of
from pyrobust.certify.log import job_path
from pyrobust.data import load_digits
from pyrobust.nn import MixedClassifier
from pyrobust_cli import main

DATA = load_digits().head(10, 8)
SAMPLED = {"samples": 60, "selection": 10}


def parts(names):
    def small():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    return nn.ModuleDict({name: small() for name in names})


def two_halves(shape, classes):
    return parts(("left", "right"))


def standard_and_base(shape, classes):
    return parts(("standard", "base"))


def standard_and_robust(shape, classes):
    return parts(("standard", "robust"))


def one_network(shape, classes):
    return parts(("only",))["only"]


CASES = {
    "great": (one_network, {"sigma": 0.05, "samples": 80, "alpha": 0.01, "activation": "softmax"}),
    "dual": (two_halves, {"sigma": 0.2, "fill": "zero", **SAMPLED}),
    "adaptive": (standard_and_base, {"sigma": 0.2, "weight": 0.9, **SAMPLED}),
    "mixture": (standard_and_robust, {"eps": 0.001, "weight": 0.8, "robust_scale": 30.0}),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path, monkeypatch):
    make, options = CASES[request.param]
    torch.manual_seed(2)
    packed = pyrobust.pack(make(None, 10), bits=4, group_size=16).eval()
    path = tmp_path / "model.safetensors"
    pyrobust.save(packed, path)
    monkeypatch.setitem(sys.modules, "part_networks", sys.modules[__name__])
    architecture = f"part_networks:{make.__name__}"
    job = CertificationJob(
        str(path), architecture=architecture, method=method_of(request.param, options)
    )
    return request.param, job, packed


def direct(name, packed, job):
    method, images = job.method, DATA.test_images
    if name == "great":
        options = {k: v for k, v in CASES[name][1].items() if k != "samples"}
        labels = DATA.test_labels
        return smoothed_great_score(packed, images, labels, n=80, **options).certificate
    if name == "mixture":
        pair = [packed[k].requires_grad_(False) for k in ("standard", "robust")]
        return MixedClassifier(*pair, 0.8, 1.0, 30.0).eval().certify(images, 0.001)
    if name == "dual":
        masks = checkerboard_masks((1, 8, 8))
        smoothed = DualSmoothedClassifier(
            packed["left"], packed["right"], method.sigma, 10, masks, fill="zero"
        )
    else:
        smoothed = SmoothedMixture(packed["standard"], packed["base"], method.sigma, 10, 0.9)
    return smoothed.eval().certify(images, n0=10, n=60, alpha=method.alpha)


def test_the_log_holds_the_direct_certificates_of_packed_parts(case, tmp_path):
    name, job, packed = case
    out = tmp_path / "log.tsv"
    result = certify_to_log(job, DATA, out)
    assert result["images"] == 8
    found, labels = certificate_of_log(out)
    expected = direct(name, packed, job)
    assert torch.equal(found.radius, expected.radius)
    certain = ~expected.abstained
    assert torch.equal(found.prediction, expected.prediction)
    assert torch.equal(labels, DATA.test_labels)
    assert found.norm == expected.norm
    if name == "mixture":
        assert int(certain.sum()) > 0
    assert found.plot(labels=labels).get_xlabel() == f"{found.norm} radius"


def test_a_cut_log_is_completed_to_the_same_bytes(case, tmp_path):
    _, job, _ = case
    whole, cut = tmp_path / "whole.tsv", tmp_path / "cut.tsv"
    certify_to_log(job, DATA, whole)
    text = whole.read_bytes()
    for kept in (0.0, 0.3, 0.77):
        cut.write_bytes(text[: int(kept * len(text))])
        job_path(cut).write_bytes(job_path(whole).read_bytes())
        certify_to_log(job, DATA, cut, resume=True)
        assert cut.read_bytes() == text


def test_the_command_line_runs_each_method(case, tmp_path, capsys):
    name, job, _ = case
    options = [
        word
        for key, value in CASES[name][1].items()
        for word in (f"--{key.replace('_', '-')}", str(value))
    ]
    out = str(tmp_path / "log.tsv")
    words = ["certify", job.model, "--method", name, *options, "--limit", "3", "--json"]
    assert main([*words, "--architecture", job.architecture, "--out", out]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 3
    assert main([*words, "--architecture", job.architecture, "--out", out, "--resume"]) == 0


def test_bad_input_is_refused(case, tmp_path):
    name, job, _ = case
    wrong = "adaptive" if name != "adaptive" else "dual"
    other = CertificationJob(
        job.model, architecture=job.architecture, method=method_of(wrong, SAMPLED)
    )
    with pytest.raises(ValueError, match="submodules"):
        certify_to_log(other, DATA, tmp_path / "log.tsv")
    for option, value in [("sigma", 0.0), ("samples", 0), ("weight", 2.0), ("fill", "mean")]:
        if option in CASES[name][1] or (option == "fill" and name == "dual"):
            with pytest.raises(ValueError, match=option):
                method_of(name, {option: value})
