"""PackedEmbedding: the rows asked for, exactly as the whole decoded table has them."""

import pytest
import torch
from torch import nn

from pyrobust import nn as rnn
from pyrobust.quantize import round_to_nearest


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 8])
def test_rows_equal_those_of_the_decoded_table(bits, group_dim, symmetric):
    layer = rnn.PackedEmbedding(
        11, 7, bits=bits, group_size=4, group_dim=group_dim, symmetric=symmetric
    )
    indices = torch.tensor([[0, 10, 3], [3, 3, 7]])
    assert torch.equal(layer(indices), layer.dequantize()[indices])
    assert torch.equal(layer(indices.int()), layer(indices))


def test_from_embedding_keeps_the_options_and_the_zero_of_the_padding_row():
    embedding = nn.Embedding(11, 7, padding_idx=-1)
    layer = rnn.PackedEmbedding.from_embedding(embedding, bits=2, group_size=4)
    assert layer.padding_idx == 10
    assert torch.equal(layer(torch.tensor(10)), torch.zeros(7))
    expected = round_to_nearest(embedding.weight, bits=2, group_size=4)
    assert torch.equal(layer.dequantize(), expected.dequantize())


def test_from_qtensor_shares_the_codes():
    qtensor = round_to_nearest(torch.randn(5, 6), bits=4, group_size=3)
    layer = rnn.PackedEmbedding.from_qtensor(qtensor, dtype=torch.bfloat16)
    assert layer.codes is qtensor.codes
    assert layer(torch.tensor([1])).dtype == torch.bfloat16


def test_a_changing_table_is_refused():
    with pytest.raises(ValueError, match="max_norm must be None"):
        rnn.PackedEmbedding.from_embedding(nn.Embedding(3, 4, max_norm=1.0))


def test_the_printed_form_tells_sizes_and_format():
    text = repr(rnn.PackedEmbedding(11, 7, 0, bits=4))
    assert text == "PackedEmbedding(11, 7, padding_idx=0, bits=4, group_size=128)"
