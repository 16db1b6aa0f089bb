"""Late fusion from the command line: logs equal direct certificates and survive cuts."""

import json
import sys

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.certify import CertificationJob, certify_multimodal, certify_to_log
from pyrobust.certify.job import certificate_of_log
from pyrobust.certify.job_data import ModalityData, load_job_data
from pyrobust.certify.job_methods import method_of
from pyrobust.certify.log import job_path
from pyrobust.data import load_digits
from pyrobust.evaluate import multimodal_pgd
from pyrobust.nn import LateFusion, OrthogonalFusion
from pyrobust_cli import main

DATA = ModalityData.of_halves(load_digits().head(10, 30))


def late_fusion(shapes, classes):
    encoders = [
        nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(s).numel(), 16), nn.ReLU()) for s in shapes
    ]
    return LateFusion(encoders, OrthogonalFusion([16] * len(shapes), classes))


def one_network(shapes, classes):
    return nn.Linear(4, classes)


def sound_and_sight():
    torch.manual_seed(3)
    return (torch.randn(9, 6), torch.randn(9, 2, 3)), torch.arange(9) % 4


def sound_alone():
    return torch.randn(9, 6), torch.arange(9)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fusions", sys.modules[__name__])
    for name, data in {
        "halves": DATA,
        "made": load_job_data("multimodal", "fusions:sound_and_sight"),
    }.items():
        torch.manual_seed(1)
        model = late_fusion(*data.made_from()).eval()
        with torch.no_grad():
            for scale in model.head.scale:
                scale.uniform_(0.2, 1.5)
        pyrobust.save(pyrobust.pack(model, bits=4, group_size=2).eval(), tmp_path / name)
    return tmp_path


def job_of(path, **options):
    method = method_of("multimodal", options)
    return CertificationJob(str(path), architecture="fusions:late_fusion", method=method)


def test_the_halves_are_the_images():
    images = load_digits().test_images[:30]
    assert torch.equal(torch.cat(DATA.inputs, -1), images)
    assert DATA.made_from() == (((1, 8, 4), (1, 8, 4)), 10)


@pytest.mark.parametrize("attacked", [None, 0, 1])
def test_the_log_holds_the_direct_certificates_and_no_attack_breaks_them(place, attacked):
    out = place / "log.tsv"
    job = job_of(place / "halves", attacked=attacked)
    assert certify_to_log(job, DATA, out)["images"] == 30
    model = pyrobust.load(place / "halves", late_fusion(*DATA.made_from())).eval()
    assert any(type(m).__name__ == "PackedLinear" for m in model.modules())
    expected = certify_multimodal(model, DATA.inputs, attacked=attacked)
    assert expected.certified
    found, labels = certificate_of_log(out)
    assert torch.equal(labels, DATA.labels)
    assert torch.equal(found.prediction, expected.prediction)
    # margins are bounded from below, by kernels that depend on how many samples come at once
    torch.testing.assert_close(found.radius, expected.radius, rtol=1e-5, atol=1e-5)
    assert float(found.radius.max()) > 0
    assert found.plot(labels=labels).get_xlabel() == "l2 radius"
    kept = found.radius > 1e-3
    radius = found.radius[kept].float()
    inputs = [x[kept] / radius.view(-1, 1, 1, 1) for x in DATA.inputs]

    def scaled(*moved):
        return model(*(x * radius.view(-1, 1, 1, 1) for x in moved)).logits

    which = None if attacked is None else [attacked]
    moved = multimodal_pgd(
        scaled, inputs, found.prediction[kept], eps=0.999, steps=20, restarts=1, modalities=which
    )
    assert torch.equal(scaled(*moved).argmax(1), found.prediction[kept])


@pytest.mark.parametrize("name", ["halves", "made"])
def test_a_cut_log_is_completed_to_the_same_bytes(place, name):
    data = DATA if name == "halves" else load_job_data("multimodal", "fusions:sound_and_sight")
    whole, cut = place / "whole.tsv", place / "cut.tsv"
    certify_to_log(job_of(place / name), data, whole)
    text = whole.read_bytes()
    assert text.count(b"\n") == len(data.labels) + 1
    for kept in (0.0, 0.3, 0.77):
        cut.write_bytes(text[: int(kept * len(text))])
        job_path(cut).write_bytes(job_path(whole).read_bytes())
        certify_to_log(job_of(place / name), data, cut, resume=True)
        assert cut.read_bytes() == text


def test_the_command_line_certifies_and_draws(place, capsys):
    words = ["certify", str(place / "halves"), "--method", "multimodal", "--attacked", "1"]
    words += ["--architecture", "fusions:late_fusion", "--limit", "5", "--json"]
    words += ["--out", str(place / "log.tsv")]
    assert main([*words, "--plot", str(place / "plot.png")]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 5
    assert (place / "plot.png").stat().st_size > 0
    assert main([*words, "--resume"]) == 0


def test_bad_input_is_refused(place):
    with pytest.raises(ValueError, match="certify: attacked must be at least 0"):
        method_of("multimodal", {"attacked": -1})
    with pytest.raises(ValueError, match="attacked must be below 2"):
        certify_to_log(job_of(place / "halves", attacked=2), DATA, place / "log.tsv")
    with pytest.raises(ValueError, match=r"must return an ImageSet or \(\(input"):
        load_job_data("multimodal", "fusions:sound_alone")
    with pytest.raises(ValueError, match="data must be module:function"):
        load_job_data("multimodal", "fusions:missing")
    pyrobust.save(pyrobust.pack(one_network(None, 10), bits=4, group_size=4), place / "one")
    job = CertificationJob(
        str(place / "one"), architecture="fusions:one_network", method=method_of("multimodal", {})
    )
    with pytest.raises(ValueError, match="LateFusion of 2 modalities"):
        certify_to_log(job, DATA, place / "log.tsv")
    job = CertificationJob(str(place / "halves"), method=method_of("multimodal", {}))
    with pytest.raises(ValueError, match="architecture must make a network for this method"):
        certify_to_log(job, DATA, place / "log.tsv")
    assert not (place / "log.tsv").exists()
