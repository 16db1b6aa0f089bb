"""Masks cover the image and nothing of the other half reaches a network."""

import pytest
import torch

from pyrobust.certify import SubImage, checkerboard_masks, partition_masks

FILLS = [("pool", "keep"), ("zero", "keep"), ("bilinear", "keep"), ("pool", "compact")]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 10), (5, 5), (1, 1, 2)])
def test_checkerboard_is_disjoint_covering_balanced_and_by_parity(shape):
    masks = checkerboard_masks(shape)
    assert masks.shape == (2, 1, *shape[-2:])
    assert (masks[0] ^ masks[1]).all()
    assert (masks[0].sum(-1) - masks[1].sum(-1)).abs().max() <= 1
    i, j = torch.meshgrid(*map(torch.arange, shape[-2:]), indexing="ij")
    assert torch.equal(masks[1, 0], (i + j) % 2 == 1)


def test_columns_and_own_scheme():
    columns = partition_masks((2, 6), scheme="columns")
    assert columns[0, 0, 1].tolist() == [True, False] * 3
    top = partition_masks((3, 4, 2), scheme=lambda row, column: row < 2)
    assert top[0, 0].sum(1).tolist() == [2, 2, 0, 0]
    assert (top[0] ^ top[1]).all()


@pytest.mark.parametrize(("fill", "reduce"), FILLS)
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("scheme", ["checkerboard", "columns"])
def test_the_other_half_never_leaks(fill, reduce, half, scheme):
    masks = partition_masks((3, 6, 8), scheme=scheme)
    part = SubImage(masks[half], fill=fill, reduce=reduce)
    x = torch.randn(2, 3, 6, 8)
    other = torch.where(masks[half], x, torch.full_like(x, float("nan")))
    assert torch.equal(part(x), part(other))
    assert torch.equal(part(x), part.expand(part.gather(x)))
    assert torch.equal(part(x), part.finish(x * masks[half]))
    x.requires_grad_()
    part(x).square().sum().backward()
    assert (x.grad[..., ~masks[half][0]] == 0).all()
    assert (x.grad[..., masks[half][0]] != 0).all()


def test_fills_on_a_worked_example():
    x = torch.tensor([[[[1.0, 9.0], [9.0, 3.0]]]])
    mask = checkerboard_masks((2, 2))[0]
    assert SubImage(mask, fill="zero")(x).flatten().tolist() == [1, 0, 0, 3]
    assert SubImage(mask, fill="pool")(x).flatten().tolist() == [4, 0, 0, 6]
    assert SubImage(mask, fill="bilinear")(x).flatten().tolist() == [1, 2, 2, 3]
    assert SubImage(mask, reduce="compact")(x).flatten().tolist() == [1, 3]
    assert SubImage(mask, reduce="compact")(x).shape == (1, 1, 2, 1)


def test_bilinear_keeps_a_constant_image_and_odd_sizes_work():
    mask = checkerboard_masks((5, 7))[1]
    for fill in ("pool", "bilinear"):
        assert SubImage(mask, fill=fill)(torch.ones(2, 3, 5, 7)).shape == (2, 3, 5, 7)
    filled = SubImage(mask, fill="bilinear")(torch.ones(2, 3, 5, 7))
    torch.testing.assert_close(filled, torch.ones_like(filled))


def test_other_data_takes_an_explicit_mask():
    mask = torch.tensor([True, False, False, True, True])
    x = torch.arange(10.0).view(2, 5)
    assert SubImage(mask, fill="zero")(x)[1].tolist() == [5, 0, 0, 8, 9]
    assert SubImage(mask, reduce="compact")(x)[1].tolist() == [5, 8, 9]
    with pytest.raises(ValueError, match="use fill='zero'"):
        SubImage(mask, fill="pool")


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="pass masks of your own"):
        partition_masks((5,))
    with pytest.raises(ValueError, match=r"one of \(3, 1\) is empty"):
        partition_masks((3, 1), scheme="columns")
    with pytest.raises(ValueError, match="scheme must be one of checkerboard, columns"):
        partition_masks((4, 4), scheme="rows")
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        SubImage(torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="it keeps none"):
        SubImage(torch.zeros(1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="fill must be one of"):
        SubImage(checkerboard_masks((2, 2))[0], fill="mean")
    with pytest.raises(ValueError, match="rows that keep equally many"):
        SubImage(checkerboard_masks((3, 3))[0], reduce="compact")
    with pytest.raises(ValueError, match=r"x must have shape \(\*, \*, 2, 2\)"):
        SubImage(checkerboard_masks((2, 2))[0])(torch.zeros(1, 1, 3, 2))
