"""What the quantizers cost a trained language model, on the mean of three seeds (minutes: slow).

``PYROBUST_MODEL_CACHE`` names a folder that keeps the trained models between runs.
"""

import importlib
import os
import sys
from pathlib import Path
from statistics import mean

import pytest

pytest.importorskip("transformers")
BENCH = Path(__file__).resolve().parents[2] / "bench"
SEEDS = (0, 1, 2)
NOISE = 0.005  # models trained on another number of threads move differences of means by as much
ADADIM, LEARNED = "adadim (gptq, judged so)", "learned_rounding (gptq)"


@pytest.fixture(scope="module")
def quality():
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("quality")
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def models(quality):
    folder = os.environ.get("PYROBUST_MODEL_CACHE")
    cache = None if folder is None else Path(folder)
    return [quality.trained_language_model(seed, cache=cache) for seed in SEEDS]


@pytest.fixture(scope="module")
def perplexities(quality, models):
    """Mean over the seeds, by label and bits."""
    text = quality.docstrings()
    data = [{"input_ids": part} for part in text.calibration[:64].split(32)]
    makers = quality.quantizers(["rtn", "gptq", "adadim (rtn)", ADADIM, LEARNED])
    found = {}
    for bits in (4, 3, 2):
        for label, make in makers.items():
            figures = []
            for model in models:
                packed, _, _ = quality.convert(model, "language", make, bits, data)
                figures.append(quality.perplexity(packed, text.test[:128]))
            found[label, bits] = mean(figures)
    return found


@pytest.mark.slow
def test_groups_chosen_by_layer_are_no_worse_than_one_direction(perplexities):
    for bits in (3, 2):
        assert perplexities["adadim (rtn)", bits] <= perplexities["rtn", bits] + NOISE
        assert perplexities[ADADIM, bits] <= perplexities["gptq", bits] + NOISE


@pytest.mark.slow
def test_learned_rounding_is_no_worse_than_gptq(perplexities):
    for bits in (4, 3, 2):
        assert perplexities[LEARNED, bits] <= perplexities["gptq", bits] + NOISE
    assert perplexities[LEARNED, 2] < perplexities["gptq", 2]


@pytest.mark.slow
def test_gptq_is_no_worse_than_rounding(perplexities):
    for bits in (4, 3, 2):
        assert perplexities["gptq", bits] <= perplexities["rtn", bits]
