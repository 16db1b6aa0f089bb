"""Composed models: exact ends, gradients, parts, the linear oracle, memory of restricted pools."""

import copy

import pytest
import torch
from torch import nn

from pyrobust.weights import AnisotropicComposition, TaskVector


def mlp(dtype=torch.float32):
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


def family(count=3, dtype=torch.float32):
    """A frozen base, models near it, and their task vectors."""
    base = mlp(dtype)
    tuned = [copy.deepcopy(base) for _ in range(count)]
    with torch.no_grad():
        for model in tuned:
            for value in model.parameters():
                value += 0.3 * torch.randn_like(value)
    base.requires_grad_(False)
    return base, tuned, [TaskVector.from_modules(base, model) for model in tuned]


def composed(base, vectors, **options):
    options.setdefault("storage_dtype", torch.float32)
    return AnisotropicComposition(base, vectors, **options)


def test_zero_coefficients_are_the_base_and_one_hot_rows_the_tuned_models():
    base, tuned, vectors = family()
    x = torch.randn(11, 5)
    for storage, tolerance in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
        model = AnisotropicComposition(base, vectors, storage_dtype=storage)
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["coefficients"]
        assert torch.equal(model(x), base(x))
        for i, own in enumerate(tuned):
            with torch.no_grad():
                model.coefficients.zero_()[i] = 1
            torch.testing.assert_close(model(x), own(x), rtol=0, atol=tolerance)


def test_one_coefficient_a_vector_is_plain_task_arithmetic():
    base, _, vectors = family()
    model = composed(base, vectors, granularity="vector")
    with torch.no_grad():
        model.coefficients.copy_(torch.tensor([0.5, -0.2, 0.1]))
    plain = copy.deepcopy(base)
    for vector, scale in zip(vectors, (0.5, -0.2, 0.1), strict=True):
        vector.apply_to(plain, scale)
    x = torch.randn(4, 5)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-6)
    assert torch.equal(model.coefficient_table()["3.bias"], model.coefficients.detach())


@pytest.mark.parametrize("granularity", ["block", "vector", "partition"])
def test_gradient_is_the_inner_product_with_the_vector(granularity):
    base, _, vectors = family(dtype=torch.float64)
    parts = 4 if granularity == "partition" else None
    options = {"granularity": granularity, "partitions": parts, "storage_dtype": torch.float64}
    model = composed(base, vectors, **options)
    with torch.no_grad():
        model.coefficients.normal_(std=0.1)
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.randint(3, (9,))
    nn.functional.cross_entropy(model(x), y).backward()
    dense = model.merge().requires_grad_(True)
    nn.functional.cross_entropy(dense(x), y).backward()
    slopes = {name: value.grad for name, value in dense.named_parameters()}
    for i, vector in enumerate(vectors):
        if granularity == "vector":
            expected = sum((slopes[n] * v).sum() for n, v in vector.items())
            assert float(model.coefficients.grad[i] - expected) == pytest.approx(0, abs=1e-8)
            continue
        for j, name in enumerate(model.names):
            product = slopes[name] * vector[name]
            got = model.coefficients.grad[i, j]
            if granularity == "block" or name not in model._parts:
                got = got if granularity == "block" else got[0]
                assert float(got - product.sum()) == pytest.approx(0, abs=1e-8)
                continue
            labels = getattr(model, model._parts[name])
            for k in range(4):
                assert float(got[k] - product[labels == k].sum()) == pytest.approx(0, abs=1e-8)


def test_merging_bakes_the_composition_in():
    base, _, vectors = family()
    model = composed(base, vectors)
    with torch.no_grad():
        model.coefficients.normal_()
    x = torch.randn(6, 5)
    merged = model.merge()
    torch.testing.assert_close(merged(x), model(x), rtol=0, atol=1e-6)
    assert type(merged) is nn.Sequential
    assert merged[0].weight is not base[0].weight


def test_parts_hold_every_entry_once_and_one_part_is_a_block():
    base, _, vectors = family()
    model = composed(base, vectors, granularity="partition", partitions=3, seed=5)
    for name in model.names:
        if base.get_parameter(name).ndim != 2:
            assert name not in model._parts
            continue
        labels = getattr(model, model._parts[name])
        assert labels.shape == base.get_parameter(name).shape
        counts = torch.bincount(labels.flatten(), minlength=3)
        assert int(counts.sum()) == labels.numel()
        assert int(counts.max() - counts.min()) <= 1
    again = composed(base, vectors, granularity="partition", partitions=3, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), again.buffers(), strict=True))
    one = composed(base, vectors, granularity="partition", partitions=1)
    block = composed(base, vectors)
    with torch.no_grad():
        block.coefficients.normal_()
        one.coefficients.copy_(block.coefficients[..., None])
    x = torch.randn(3, 5)
    assert torch.equal(one(x), block(x))
    assert one.coefficient_table()["0.weight"].shape == (3, 1)


def test_least_squares_is_found():
    """One linear layer under squared loss: coefficients solve the design of T columns."""
    base = nn.Linear(6, 1, bias=False).double().requires_grad_(False)
    vectors = [
        TaskVector.from_deltas({"weight": torch.randn(1, 6, dtype=torch.float64)}) for _ in range(4)
    ]
    x, y = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 1, dtype=torch.float64)
    model = composed(base, vectors, storage_dtype=torch.float64)
    optimizer = torch.optim.LBFGS([model.coefficients], max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    design = torch.cat([x @ v["weight"].T for v in vectors], 1)
    best = torch.linalg.lstsq(design, y - base(x)).solution
    torch.testing.assert_close(model.coefficients.detach(), best, rtol=0, atol=1e-4)


def test_the_linearised_model_is_the_tangent():
    base, _, vectors = family(dtype=torch.float64)
    model = composed(base, vectors, linearized=True, storage_dtype=torch.float64)
    curved = composed(base, vectors, storage_dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    direction = torch.randn_like(model.coefficients)
    with torch.no_grad():
        model.coefficients.copy_(direction)
        values = []
        for step in (1e-5, -1e-5):
            curved.coefficients.copy_(step * direction)
            values.append(curved(x))
    slope = (values[0] - values[1]) / 2e-5
    torch.testing.assert_close(model(x).detach(), base(x) + slope, rtol=1e-6, atol=1e-7)
    model(x).sum().backward()
    assert bool(model.coefficients.grad.abs().sum() > 0)
    with pytest.raises(ValueError, match="linearized must be False"):
        model.merge()


def test_a_restricted_pool_drops_the_other_vectors():
    base, _, vectors = family()
    model = composed(base, vectors)
    members = torch.randint(3, (1, len(model.names)))
    small = model.restrict(members)
    assert small.coefficients.shape == (1, len(model.names))
    stored = [b.shape[0] for n, b in small.named_buffers() if n.startswith("vectors_")]
    assert stored == [1] * len(model.names)
    with torch.no_grad():
        small.coefficients.normal_()
        model.coefficients.zero_().scatter_(0, members, small.coefficients)
    x = torch.randn(3, 5)
    torch.testing.assert_close(small(x), model(x))
    for name, row in model.coefficient_table().items():
        assert torch.equal(small.coefficient_table()[name], row)
    left = model.without(1)
    assert left.members[:, 0].tolist() == [0, 2]
    for bad in (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1, 1]), torch.tensor([5])):
        with pytest.raises(ValueError, match="members must"):
            model.restrict(bad)
    with pytest.raises(ValueError, match="index must be one of 0 to 2"):
        model.without(3)
    single = composed(base, vectors, granularity="vector")
    assert single.without(0).coefficients.shape == (2,)
    with pytest.raises(ValueError, match="same for every block"):
        single.restrict(torch.tensor([[0, 1, 0, 0, 0, 0]]))


def test_the_backward_pass_keeps_no_copy_of_the_vectors():
    base, _, vectors = family()
    model = AnisotropicComposition(base, vectors)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model.deltas()
    stacks = {b.data_ptr() for b in model.buffers()}
    large = [t for t in saved if t.numel() > model.coefficients.numel()]
    assert large
    assert all(t.data_ptr() in stacks for t in large)


def test_penalty():
    base, _, vectors = family()
    model = composed(base, vectors)
    with torch.no_grad():
        model.coefficients.normal_()
    table = model.coefficients.detach()
    assert float(model.penalty(1)) == pytest.approx(0.5 * float(table.abs().sum(0).mean()))
    assert float(model.penalty(2)) == pytest.approx(
        0.5 * float(table.square().sum(0).sqrt().mean())
    )
    with pytest.raises(ValueError, match="p must be one of"):
        model.penalty(3)


def test_state_dict_and_device_moves_keep_working():
    base, _, vectors = family()
    model = composed(base, vectors)
    with torch.no_grad():
        model.coefficients.normal_()
    assert not any(name.startswith("vectors") for name in model.state_dict())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.coefficients.zero_()
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 5)
    assert torch.equal(other(x), model(x))


def test_refusals():
    base, tuned, vectors = family()
    with pytest.raises(ValueError, match="at least one; got 0"):
        AnisotropicComposition(base, [])
    with pytest.raises(ValueError, match=r"unexpected|missing 0\.weight"):
        AnisotropicComposition(base, [vectors[0], vectors[1].select(["0.bias"])])
    wide = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 3))
    with pytest.raises(ValueError, match=r"'0\.weight' must have one shape on both sides"):
        AnisotropicComposition(base, [TaskVector.from_modules(wide, copy.deepcopy(wide))])
    with pytest.raises(ValueError, match=r"must hold every tensor; missing 0\.weight"):
        AnisotropicComposition(nn.Linear(5, 3).requires_grad_(False), vectors)
    with pytest.raises(ValueError, match="is not the base of this vector"):
        AnisotropicComposition(tuned[0].requires_grad_(False), vectors)
    with pytest.raises(ValueError, match="partitions must be at least 1"):
        composed(base, vectors, granularity="partition", partitions=0)
    for options in ({"granularity": "partition"}, {"partitions": 2}):
        with pytest.raises(ValueError, match="partitions must be given"):
            composed(base, vectors, **options)
    with pytest.raises(ValueError, match="blocks must name parameters"):
        composed(base, vectors, blocks=["9.weight"])
    with pytest.raises(ValueError, match="base must be frozen"):
        AnisotropicComposition(copy.deepcopy(base).requires_grad_(True), vectors)
    huge = TaskVector.from_deltas({"0.bias": torch.full((7,), 1e6)})
    with pytest.raises(ValueError, match=r"'0\.bias' overflows torch\.float16"):
        AnisotropicComposition(base, [huge])
    broken = copy.deepcopy(base)
    broken[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'0\.weight' must be finite"):
        AnisotropicComposition(broken, [huge])
    with pytest.raises(ValueError, match="must be finite"):
        TaskVector.from_deltas({"0.bias": torch.full((7,), torch.nan)})
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="must not be tied"):
        AnisotropicComposition(tied, [TaskVector.from_deltas({"0.bias": torch.ones(2)})])
    with pytest.raises(TypeError, match="storage_dtype must be floating"):
        AnisotropicComposition(base, vectors, storage_dtype=torch.int8)
