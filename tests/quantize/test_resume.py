"""A conversion that was killed ends in the same file as one that was not: for every quantizer."""

import os
from dataclasses import replace
from signal import SIGKILL

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.quantize import GWQ, AdaDim, LearnedRounding
from pyrobust.quantize.conversion_folder import ConversionFolder

from .small_models import BlockNet

MAKES = {
    "gptq": lambda: "gptq",
    "adadim": lambda: "adadim",
    "adadim on gptq": lambda: AdaDim("gptq", propagate="quantized"),
    "learned_rounding": lambda: LearnedRounding(iterations=5, batch_size=2, descent=1),
    "learned_rounding from gptq": lambda: LearnedRounding(start="gptq", iterations=0, descent=1),
    "learned_rounding of blocks": lambda: LearnedRounding(
        scope="block", iterations=5, batch_size=2, input="mix"
    ),
    "gwq": lambda: GWQ(0.05, loss=squared_output),
    "gwq random": lambda: GWQ(0.05, score="random", loss=squared_output),
    "gwq of all layers": lambda: GWQ(0.05, ranking="global", loss=squared_output),
}


def squared_output(model, batch):
    return model(batch).square().mean()


def convert(make, model, batches, resume=None):
    return pyrobust.pack(
        model,
        bits=2,
        group_size=8,
        quantizer=make(),
        calibration=batches,
        resume=resume,
        blocks="blocks",
    )


def killed_at_its_save(number, make, model, batches, folder, method="save"):
    """Run a conversion in a process of its own that dies when it would save once more."""
    child = os.fork()
    if child == 0:
        save, done = getattr(ConversionFolder, method), []

        def save_or_die(self, *what):
            if len(done) == number:
                os.kill(os.getpid(), SIGKILL)
            done.append(what[0])
            save(self, *what)

        setattr(ConversionFolder, method, save_or_die)
        convert(make, model, batches, folder)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("kind", MAKES)
def test_a_killed_conversion_resumes_to_the_same_bits(kind, tmp_path):
    make, model = MAKES[kind], BlockNet().eval()
    batches = [torch.randn(7, 6) for _ in range(3)]
    number = 2
    assert killed_at_its_save(number, make, model, batches, tmp_path / "kept") == SIGKILL
    finished = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").glob("block-*")}
    assert len(finished) == number
    pyrobust.save(convert(make, model, batches, tmp_path / "kept"), tmp_path / "resumed")
    assert all(file.stat().st_mtime_ns == when for file, when in finished.items())
    pyrobust.save(convert(make, model, batches), tmp_path / "whole")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_conversion_killed_while_it_scores_all_layers_resumes_to_the_same_bits(number, tmp_path):
    """Scores of the five blocks (stem, three blocks, head) are kept one by one."""
    make, model = MAKES["gwq of all layers"], BlockNet().eval()
    batches = [torch.randn(7, 6) for _ in range(2)]
    folder = tmp_path / "kept"
    assert killed_at_its_save(number, make, model, batches, folder, "save_tensors") == SIGKILL
    finished = {file: file.stat().st_mtime_ns for file in folder.glob("scores-*")}
    assert len(finished) == number
    assert not list(folder.glob("block-*"))
    swept = []

    def counted(model, batch):
        swept.append(1)
        return squared_output(model, batch)

    counted.__module__, counted.__qualname__ = __name__, squared_output.__qualname__
    resumed = convert(lambda: replace(make(), loss=counted), model, batches, folder)
    assert len(swept) == (5 - number) * len(batches)
    assert all(file.stat().st_mtime_ns == when for file, when in finished.items())
    pyrobust.save(resumed, tmp_path / "resumed")
    pyrobust.save(
        pyrobust.pack(model, bits=2, group_size=8, quantizer=make(), calibration=batches),
        tmp_path / "whole",
    )  # all layers in one sweep
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_gwq_refuses_the_folder_of_other_data_and_unknown_blocks(tmp_path):
    model, batches = BlockNet().eval(), [torch.randn(7, 6)]
    quantizer = GWQ(0.05, loss=squared_output)
    options = {"bits": 2, "group_size": 8, "quantizer": quantizer}
    pyrobust.pack(model, calibration=batches, resume=tmp_path, **options)
    with pytest.raises(ValueError, match=r"resume must be a new folder .* differs in calibration"):
        pyrobust.pack(model, calibration=[torch.randn(7, 6)], resume=tmp_path, **options)
    with pytest.raises(ValueError, match="blocks must name modules of the model; got 'layers'"):
        pyrobust.pack(model, calibration=batches, blocks="layers", **options)
    with pytest.raises(ValueError, match="blocks must hold layers to pack; got 'blocks'"):
        pyrobust.pack(model, calibration=batches, blocks="blocks", skip=["blocks"], **options)


def test_gwq_scores_one_block_at_a_time_when_it_may_be_resumed(tmp_path):
    """No more gradients than those of one block are alive when a score is taken."""
    model, alive = BlockNet().eval(), []

    def watched(model, batch):
        alive.append(sum(p.requires_grad for p in model.parameters()))
        return squared_output(model, batch)

    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    batches = [torch.randn(7, 6) for _ in range(2)]
    quantizer = GWQ(0.05, loss=watched)
    pyrobust.pack(model, bits=2, quantizer=quantizer, calibration=batches, resume=tmp_path)
    assert len(layers) == 11
    assert max(alive) == 3
