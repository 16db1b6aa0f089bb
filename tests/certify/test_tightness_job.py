"""Tightness from the command line: logs equal direct measurements and survive cuts."""

import json
import sys

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.certify import CertificationJob, certify_to_log, propagation_tightness
from pyrobust.certify.job import certificate_of_log
from pyrobust.certify.job_methods import method_of
from pyrobust.certify.log import job_path, read_log
from pyrobust.certify.tightness_job import TightnessJob
from pyrobust.data import load_digits
from pyrobust_cli import main

DATA = load_digits().head(10, 12)


def small_network(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tight_networks", sys.modules[__name__])
    torch.manual_seed(1)
    packed = pyrobust.pack(small_network(None, 10), bits=4, group_size=16).eval()
    pyrobust.save(packed, tmp_path / "model")
    return tmp_path


def job_of(place, **options):
    method = method_of("tightness", options)
    return CertificationJob(
        str(place / "model"), architecture="tight_networks:small_network", method=method
    )


@pytest.mark.parametrize("relu", ["local", "center", "identity"])
def test_the_log_holds_the_direct_tightness_of_a_packed_network(place, relu):
    out = place / "log.tsv"
    result = certify_to_log(job_of(place, eps=0.0005, relu=relu), DATA, out)
    model = pyrobust.load(place / "model", small_network(None, 10)).eval()
    x = DATA.test_images
    top = model(x).argmax(1)
    expected = propagation_tightness(model, x, 0.0005, top, relu).detach().double().mean(1)
    rows = read_log(out, TightnessJob.columns)
    found = torch.tensor([float(row.extra[1]) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert result["mean_tightness"] == pytest.approx(float(found.mean()))
    assert 0 < result["mean_tightness"] < 1
    assert [row.predict for row in rows] == top.tolist()
    assert 0 < result["certified"] == sum(row.radius == 0.0005 for row in rows)
    certificate, labels = certificate_of_log(out)
    assert certificate.plot(labels=labels).get_xlabel() == "linf radius"


def test_the_certificate_of_a_log_abstains_where_nothing_is_proven(place):
    out = place / "log.tsv"
    result = certify_to_log(job_of(place, eps=0.04), DATA, out)
    certificate, labels = certificate_of_log(out)
    proven = [row.extra[0] == "1" for row in read_log(out, TightnessJob.columns)]
    assert (~certificate.abstained).tolist() == proven
    assert sum(proven) == result["certified"] < len(proven)
    share = certificate.certified_accuracy(labels).item()
    assert share == pytest.approx(result["certified_accuracy"])


def test_a_cut_log_is_completed_to_the_same_bytes(place):
    whole, cut = place / "whole.tsv", place / "cut.tsv"
    certify_to_log(job_of(place), DATA, whole)
    text = whole.read_bytes()
    for kept in (0.0, 0.3, 0.77):
        cut.write_bytes(text[: int(kept * len(text))])
        job_path(cut).write_bytes(job_path(whole).read_bytes())
        certify_to_log(job_of(place), DATA, cut, resume=True)
        assert cut.read_bytes() == text


def test_the_command_line_measures_and_draws(place, capsys):
    words = ["certify", str(place / "model"), "--method", "tightness", "--eps", "0.01"]
    words += ["--architecture", "tight_networks:small_network", "--limit", "5", "--json"]
    words += ["--out", str(place / "log.tsv")]
    assert main([*words, "--plot", str(place / "plot.png")]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["mean_tightness"] < 1
    assert (place / "plot.png").stat().st_size > 0
    assert main([*words, "--resume"]) == 0


def test_bad_input_is_refused():
    for option, value in [("eps", -1.0), ("relu", "global")]:
        with pytest.raises(ValueError, match=f"certify: {option} must"):
            method_of("tightness", {option: value})
