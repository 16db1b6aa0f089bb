"""Certificates as values: accuracy, text, JSON, picture."""

import dataclasses
import json

import pytest
import torch

from pyrobust.certify import ABSTAIN, Certificate, SmoothingCertificate


@pytest.fixture
def certificate():
    return SmoothingCertificate(
        prediction=torch.tensor([3, ABSTAIN, 1, 1]),
        radius=torch.tensor([0.5, 0.0, 0.25, 1.0], dtype=torch.float64),
        alpha=0.001,
        assumption="the noise is Gaussian",
        counts=torch.zeros(4, 5, dtype=torch.int64),
        sigma=0.5,
    )


def test_certified_accuracy_counts_right_predictions_with_enough_radius(certificate):
    labels = torch.tensor([3, 0, 1, 2])
    accuracy = certificate.certified_accuracy(labels, [0.0, 0.25, 0.3, 0.6])
    assert accuracy.tolist() == [0.5, 0.5, 0.25, 0.0]
    assert certificate.certified_accuracy(labels).item() == 0.5


def test_wrong_number_of_labels_is_refused(certificate):
    with pytest.raises(ValueError, match=r"labels must have shape \(4\); got \(3,\)"):
        certificate.certified_accuracy(torch.zeros(3, dtype=torch.int64))


def test_result_is_frozen(certificate):
    with pytest.raises(dataclasses.FrozenInstanceError):
        certificate.alpha = 0.5


def test_dictionary_survives_json(certificate):
    restored = json.loads(json.dumps(certificate.to_dict()))
    assert restored["prediction"] == [3, -1, 1, 1]
    assert restored["radius"] == [0.5, 0.0, 0.25, 1.0]
    assert restored["p_lower"] is None


def test_summary_says_what_is_guaranteed(certificate):
    text = certificate.summary()
    assert text.startswith("3 of 4 certified, mean l2 radius 0.5833 (guarantee; alpha = 0.001")
    estimate = Certificate(torch.tensor([ABSTAIN]), torch.zeros(1), 0.1, "none", certified=False)
    assert "0 of 1 certified, mean l2 radius 0 (estimate, no guarantee" in estimate.summary()


def test_plot_draws_the_share_of_certified_inputs(certificate):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = certificate.plot(labels=torch.tensor([3, 0, 1, 2]))
    assert axes.lines[0].get_xdata().tolist() == [0.0, 0.25, 0.5]
    assert axes.lines[0].get_ydata().tolist() == [0.5, 0.5, 0.25]


def test_an_abstention_is_never_right_and_radii_are_checked(certificate):
    labels = torch.tensor([-1, -1, -1, -1])
    assert certificate.certified_accuracy(labels).item() == 0.0
    for radii in (-0.1, [0.0, float("nan")]):
        with pytest.raises(ValueError, match="radii must be at least 0; got"):
            certificate.certified_accuracy(labels, radii)
