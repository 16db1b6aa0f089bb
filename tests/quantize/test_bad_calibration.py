"""Bad calibration data are refused by every quantizer, with the name of the layer at fault."""

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.quantize import GWQ, LearnedRounding

from .small_models import BlockNet


def squared_output(model, batch):
    return model(batch).square().mean()


class Overflowing(BlockNet):
    """Finite data, but the head is given infinite values."""

    def __init__(self):
        super().__init__()
        self.blocks[2].down.bias.data.fill_(torch.inf)


class Idle(BlockNet):
    """With a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.blocks[1].spare = nn.Linear(4, 4)


MAKES = {
    "gptq": lambda: "gptq",
    "adadim": lambda: "adadim",
    "learned_rounding": lambda: LearnedRounding(iterations=1, batch_size=2),
    "gwq": lambda: GWQ(0.05, loss=squared_output),
}
GOOD = [torch.zeros(3, 6)]
CASES = {
    "empty": (BlockNet, [], "must hold at least one batch; got none"),
    "nan": (BlockNet, [torch.full((3, 6), torch.nan)], "batch 0"),
    "wrong shape": (BlockNet, [torch.zeros(3, 5)], "batch 0 must fit the model; 'stem' raised"),
    "idle layer": (Idle, GOOD, "'blocks.1.spare'"),
    "not finite inside": (Overflowing, GOOD, "'head'"),
}


@pytest.mark.parametrize("quantizer", MAKES)
@pytest.mark.parametrize("case", CASES)
def test_bad_data_are_refused(case, quantizer):
    make, data, message = CASES[case]
    model = make().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        pyrobust.pack(model, bits=2, quantizer=MAKES[quantizer](), calibration=data)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("quantizer", MAKES)
def test_a_model_in_training_mode_is_refused(quantizer):
    model = BlockNet().eval()
    model.blocks[1].norm.train()
    with pytest.raises(ValueError, match=r"blocks\.1\.norm"):
        pyrobust.pack(model, bits=2, quantizer=MAKES[quantizer](), calibration=GOOD)
