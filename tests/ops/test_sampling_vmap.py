"""``torch.func.vmap`` over the sampling operators gives what a loop over the slices gives."""

import pytest
import torch

from pyrobust.ops import (
    count_votes,
    gaussian_samples,
    grid_samples,
    laplace_samples,
    masked_samples,
    split_gaussian_samples,
    substituted_tokens,
    uniform_samples,
)

MASK = torch.tensor([True, False, True, False, True])
OFFSETS, CANDIDATES = torch.tensor([0, 2, 5]), torch.tensor([7, 8, 9, 10, 11])
FLOATS = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0))
TOKENS = (FLOATS * 3).long() - 1

CASES = {
    "gaussian": (lambda x: gaussian_samples(x, 0.5, 4, seed=1, first_index=2), FLOATS),
    "uniform": (lambda x: uniform_samples(x, 0.5, 4, seed=1), FLOATS),
    "laplace": (lambda x: laplace_samples(x, 0.5, 4, seed=1), FLOATS),
    "bfloat16": (lambda x: gaussian_samples(x, 0.5, 4, seed=1, dtype=torch.bfloat16), FLOATS),
    "grid": (lambda x: grid_samples(x, 0.5, 4, seed=1), (FLOATS * 255).to(torch.uint8)),
    "masked": (lambda x: masked_samples(x, 0.5, 4, seed=1, fill=-1.0), FLOATS),
    "split": (lambda x: split_gaussian_samples(x, MASK, (0.5, 1.0), 4, seed=1), FLOATS),
    "tokens": (lambda x: substituted_tokens(x, OFFSETS, CANDIDATES, 4, seed=1), TOKENS),
    "votes": (lambda x: count_votes(x), FLOATS),
}


def parts(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize(("call", "x"), CASES.values(), ids=CASES)
def test_mapping_is_looping(call, x, axis):
    mapped = parts(torch.func.vmap(call, in_dims=axis)(x.movedim(0, axis)))
    looped = [parts(call(each)) for each in x]
    for one, many in zip(mapped, zip(*looped, strict=True), strict=True):
        assert torch.equal(one, torch.stack(many))


def test_scales_and_masks_are_mapped_too():
    sigmas = torch.tensor([0.1, 1.0, 7.0])
    mapped = torch.func.vmap(lambda s: gaussian_samples(FLOATS[0], s, 4, seed=1))(sigmas)
    looped = [gaussian_samples(FLOATS[0], float(s), 4, seed=1) for s in sigmas]
    assert torch.equal(mapped, torch.stack(looped))
    masks = torch.stack([MASK, ~MASK])
    left, right = torch.func.vmap(lambda m: split_gaussian_samples(FLOATS[0], m, 0.5, 4, seed=1))(
        masks
    )
    assert torch.equal(left[1], right[0])
    assert torch.equal(left[0], right[1])


@pytest.mark.parametrize("noise", [gaussian_samples, uniform_samples, laplace_samples])
def test_gradients_per_slice_are_those_of_a_loop(noise):
    weight = torch.rand(4, 5)

    def loss(x, sigma):
        return (noise(x, sigma, 4, seed=1) * weight).square().sum()

    x, sigmas = FLOATS, torch.tensor([[0.1, 0.2], [1.0, 2.0], [3.0, 4.0]])
    mapped = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(x, sigmas)
    for i in range(3):
        alone = torch.func.grad(loss, argnums=(0, 1))(x[i], sigmas[i])
        torch.testing.assert_close(mapped[0][i], alone[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(mapped[1][i], alone[1], rtol=1e-6, atol=0)
    hidden = torch.func.vmap(
        torch.func.grad(lambda x: masked_samples(x, 0.5, 4, seed=1).square().sum())
    )(x)
    kept = masked_samples(torch.ones(2, 5), 0.5, 4, seed=1).sum(1)
    torch.testing.assert_close(hidden, 2 * x * kept)


def test_a_nan_in_a_slice_is_reported():
    logits = FLOATS.clone()
    logits[1, 0, 2] = torch.nan
    with pytest.raises(ValueError, match="logits must not be NaN"):
        torch.func.vmap(count_votes)(logits)


def test_tangents_pass_through_noise():
    x, tangent = FLOATS[0], torch.rand(2, 5)
    sigma, by = torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0])
    out, moved = torch.func.jvp(
        lambda v, s: gaussian_samples(v, s, 4, seed=1), (x, sigma), (tangent, by)
    )
    z = gaussian_samples(torch.zeros(2, 5), 1.0, 4, seed=1)
    assert torch.equal(out, gaussian_samples(x, sigma, 4, seed=1))
    torch.testing.assert_close(moved, tangent[:, None] + by.view(2, 1, 1) * z)
    for call in (CASES["masked"][0], CASES["split"][0]):
        out, moved = torch.func.jvp(lambda v, f=call: parts(f(v)), (x,), (tangent,))
        for one, two, moving in zip(out, parts(call(x)), moved, strict=True):
            assert torch.equal(one, two)
            given = tangent[:, None].expand_as(moving)
            assert torch.equal(moving, torch.where(moving != 0, given, 0.0))
            assert 0 < (moving != 0).float().mean() < 1


def test_the_operators_themselves_have_a_rule():
    for name in ("gaussian_samples", "uniform_samples", "laplace_samples"):
        operator = getattr(torch.ops.pyrobust, name)

        def call(x, operator=operator):
            return operator(x, torch.ones(2), 4, 1, 2, 3, torch.float32)

        assert torch.equal(torch.func.vmap(call)(FLOATS), torch.stack([call(x) for x in FLOATS]))
