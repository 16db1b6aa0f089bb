import json

import pytest
import torch

import pyrobust
from pyrobust.certify.log import CertificationJob, certify_to_log
from pyrobust.data import load_digits
from pyrobust.demo import convolutional_network, interval_certified

DATA = load_digits().head(10, 12)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(3)
    packed = pyrobust.pack(convolutional_network((1, 8, 8), 10), bits=4)
    path = tmp_path / "model.safetensors"
    pyrobust.save(packed, path)
    return str(path), packed.eval()


def job(model, **options):
    return CertificationJob(model=model[0], samples=50, selection=10, **options)


@pytest.mark.parametrize("method", ["ibp", "smoothing"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.93])
def test_a_killed_run_resumes_to_the_same_log(model, tmp_path, method, kept):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    result = certify_to_log(job(model, method=method, eps=0.001), DATA, whole)
    text = whole.read_bytes()
    cut.write_bytes(text[: int(kept * len(text))])
    again = certify_to_log(job(model, method=method, eps=0.001), DATA, cut, resume=True)
    assert cut.read_bytes() == text
    assert again == result | {"log": str(cut)}
    assert len(text.splitlines()) == 1 + 12


def test_ibp_lines_agree_with_the_batch(model, tmp_path):
    out = tmp_path / "log.jsonl"
    certify_to_log(job(model, eps=0.0002), DATA, out)
    rows = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    with torch.no_grad():
        classes = model[1](DATA.test_images).argmax(1)
    expected = interval_certified(model[1], DATA.test_images, classes, 0.0002)
    assert [row["prediction"] for row in rows] == classes.tolist()
    assert [row["certified"] for row in rows] == expected.tolist()
    assert any(expected)


def test_smoothing_lines_agree_with_one_certificate(model, tmp_path):
    out = tmp_path / "log.jsonl"
    certify_to_log(job(model, method="smoothing", limit=5), DATA, out)
    rows = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    smoothed = pyrobust.nn.SmoothedClassifier(model[1], 0.25, 10).eval()
    certificate = smoothed.certify(DATA.test_images[:5], n0=10, n=50, alpha=1e-3, seed=0)
    assert [row["prediction"] for row in rows] == certificate.prediction.tolist()
    assert [row["radius"] for row in rows] == pytest.approx(certificate.radius.tolist())


def test_an_existing_log_needs_resume_and_the_same_job(model, tmp_path):
    out = tmp_path / "log.jsonl"
    certify_to_log(job(model, limit=2), DATA, out)
    with pytest.raises(FileExistsError, match="use --resume"):
        certify_to_log(job(model, limit=2), DATA, out)
    with pytest.raises(ValueError, match="belongs to another job; eps differ"):
        certify_to_log(job(model, eps=0.2), DATA, out, resume=True)
    out.write_text("not json\n")
    with pytest.raises(ValueError, match="is not a certification log"):
        certify_to_log(job(model), DATA, out, resume=True)


def test_a_log_out_of_order_is_refused(model, tmp_path):
    out = tmp_path / "log.jsonl"
    certify_to_log(job(model, limit=3), DATA, out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join([lines[0], lines[2], lines[1]]))
    with pytest.raises(ValueError, match="its images are not in order"):
        certify_to_log(job(model, limit=3), DATA, out, resume=True)


def test_missing_models_and_architectures_are_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="model must be an existing file; got 'nowhere'"):
        certify_to_log(CertificationJob(model="nowhere"), DATA, tmp_path / "a")
    for name in ("nowhere:net", "pyrobust.demo:nothing", "pyrobust.demo", ":"):
        with pytest.raises(ValueError, match="architecture must be module:function"):
            certify_to_log(job(model, architecture=name), DATA, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "options", [{"sigma": 0.0}, {"alpha": 1.0}, {"limit": 0}, {"eps": -1.0}, {"method": "magic"}]
)
def test_bad_parameters_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"certify: {name} must"):
        CertificationJob(model="m", **options)
