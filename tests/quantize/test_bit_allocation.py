import itertools

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

import pyrobust
from pyrobust.quantize import PowerQuantizer, StudyTable, allocate_bits, bit_costs, knapsack, study

from .small_models import trained_digits_cnn


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_net():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).eval()


def random_problem(seed, layers=5, choices=(2, 3, 4, 8)):
    generator = torch.Generator().manual_seed(seed)
    sizes = {str(i): int(torch.randint(1, 60, (), generator=generator)) for i in range(layers)}
    values = torch.rand(len(sizes), len(choices), generator=generator).tolist()
    costs = {
        name: dict(zip(choices, row, strict=True)) for name, row in zip(sizes, values, strict=True)
    }
    return costs, sizes


def brute_force(costs, sizes, budget):
    best = (float("inf"), None)
    for bits in itertools.product(*costs.values()):
        chosen = dict(zip(costs, bits, strict=True))
        if sum(chosen[n] * sizes[n] for n in sizes) <= budget * sum(sizes.values()):
            best = min(best, (sum(costs[n][chosen[n]] for n in sizes), tuple(bits)))
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("budget", [2.0, 2.7, 4.4, 8.0])
def test_exact_search_finds_the_best_of_all_allocations(seed, budget):
    costs, sizes = random_problem(seed)
    chosen = knapsack(costs, sizes, budget)
    used = sum(chosen[name] * sizes[name] for name in sizes)
    assert used <= budget * sum(sizes.values())
    total = sum(costs[name][chosen[name]] for name in sizes)
    assert total == pytest.approx(brute_force(costs, sizes, budget)[0])
    greedy = knapsack(costs, sizes, budget, method="greedy")
    assert sum(greedy[name] * sizes[name] for name in sizes) <= budget * sum(sizes.values())
    assert sum(costs[name][greedy[name]] for name in sizes) >= total - 1e-12


def test_many_equal_layers_stay_small_enough_for_the_exact_search():
    costs, _ = random_problem(3, layers=200)
    sizes = dict.fromkeys(costs, 4096)
    chosen = knapsack(costs, sizes, 3.5)
    assert sum(chosen.values()) <= 3.5 * 200


def test_fisher_costs_are_the_sum_of_squared_gradients_times_squared_changes():
    net, x = small_net(), randn(20, 6)
    table = bit_costs(net, [x[:12], x[12:]], (2, 4))
    squares = {name: torch.zeros_like(net[int(name)].weight) for name in table}
    for row in x:
        logits = net(row[None])
        net.zero_grad()
        F.cross_entropy(logits, logits.argmax(1)).backward()
        for name in table:
            squares[name] += net[int(name)].weight.grad ** 2 / len(x)
    net.zero_grad()
    for name, costs in table.items():
        for bits, cost in costs.items():
            packed = PowerQuantizer(1.0)(net[int(name)].weight, bits=bits, group_size=100)
            change = packed.dequantize() - net[int(name)].weight.detach()
            assert cost == pytest.approx(float((squares[name] * change**2).sum()), rel=1e-3)
    assert all(p.grad is None for p in net.parameters())


def test_other_importances_have_their_formulas():
    net, x = small_net(), randn(20, 6)
    table = bit_costs(net, None, (2, 3), "weight-mse")
    weight = net[0].weight.detach()
    change = PowerQuantizer(1.0)(weight, bits=3, group_size=6).dequantize() - weight
    assert table["0"][3] == pytest.approx(float(change.square().sum()), rel=1e-3)
    table = bit_costs(net, [x], (2, 3), "attribution", samples=5)
    assert table["2"][2] == pytest.approx(4 * table["2"][3])


def test_more_budget_never_costs_more_and_all_of_it_gives_the_most_bits():
    net, x = small_net(), randn(20, 6)
    assert set(allocate_bits(net, [x], 8.0).values()) == {8}
    assert set(allocate_bits(net, [x], 2.0).values()) == {2}
    table = bit_costs(net, [x])
    totals = []
    for budget in (2.0, 2.5, 3.0, 4.0, 6.0, 8.0):
        chosen = allocate_bits(net, [x], budget)
        totals.append(sum(table[name][chosen[name]] for name in chosen))
    assert totals == sorted(totals, reverse=True)


def test_allocation_packs_with_the_budget_as_asked():
    net, x = small_net(), randn(20, 6)
    bits = allocate_bits(net, [x], 3.0, skip=["4"])
    assert set(bits) == {"0", "2"}
    packed = pyrobust.pack(net, bits_for=bits, skip=["4"])
    assert {name: packed[int(name)].bits for name in bits} == bits
    assert type(packed[4]) is nn.Linear
    used = sum(bits[name] * net[int(name)].weight.numel() for name in bits)
    assert used <= 3.0 * (60 + 80)


def test_bad_arguments_are_refused():
    net, x = small_net(), randn(20, 6)
    with pytest.raises(ValueError, match="budget must be at least the smallest choice, 2 bits"):
        allocate_bits(net, [x], 1.9)
    with pytest.raises(ValueError, match="budget must be"):
        allocate_bits(net, [x], float("nan"))
    for choices in ((1, 2), (2, 9), (2.5,), (4, 6, 8)):  # 6 bits could not be packed
        with pytest.raises(ValueError, match="each of choices must be one of 2, 3, 4, 8; got"):
            allocate_bits(net, [x], 4.0, choices)
    for choices in ((), (1, 2), (2, 9), (2.5,)):
        with pytest.raises(ValueError, match="choices must be bits from 2 to 8"):
            bit_costs(net, [x], choices)
    with pytest.raises(ValueError, match="importance must be one of"):
        allocate_bits(net, [x], 4.0, importance="magic")
    with pytest.raises(ValueError, match="at least one batch"):
        allocate_bits(net, [], 4.0)
    with pytest.raises(ValueError, match="must name layers"):
        allocate_bits(net, [x], 4.0, skip=["nothing"])
    with pytest.raises(ValueError, match="evaluation mode"):
        allocate_bits(small_net().train(), [x], 4.0)
    with pytest.raises(ValueError, match="it has none"):
        allocate_bits(nn.Sequential(nn.ReLU()), [x], 4.0)


# -- the study -----------------------------------------------------------------------------------


def test_study_runs_every_level_and_tells_the_spread_of_each_factor():
    net, x = small_net(), randn(32, 6)
    seen = []

    def evaluate(packed):
        seen.append(packed)
        return -float((packed(x) - net(x)).square().mean().detach())

    grid = {"loss": ["l1"], "bits": [3, 4], "calibration_share": [0.5]}
    table = study(net, [x], grid, evaluate=evaluate, bits=2, iterations=3)
    assert isinstance(table, StudyTable)
    assert [changed for changed, _ in table.rows] == [
        {}, {"loss": "l1"}, {"bits": 3}, {"bits": 4}, {"calibration_share": 0.5},
    ]  # fmt: skip
    assert [packed[0].bits for packed in seen] == [2, 2, 3, 4, 2]
    spread = table.spread()
    results = [result for _, result in table.rows]
    levels = [results[0], *results[2:4]]
    assert spread["bits"] == pytest.approx(max(levels) - min(levels))
    assert "bits=4" in table.summary()
    assert table.to_dict()["rows"][1]["changed"] == {"loss": "l1"}
    full = study(
        net, [x], {"loss": ["l1", "mse"], "freedom": [1, 2]}, evaluate=evaluate, full=True,
        bits=2, iterations=2,
    )  # fmt: skip
    assert len(full.rows) == 4


def test_study_refuses_bad_grids():
    net, x = small_net(), randn(32, 6)
    with pytest.raises(ValueError, match="at least one factor"):
        study(net, [x], {}, evaluate=lambda _: 0.0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        study(net, [x], {"colour": [1]}, evaluate=lambda _: 0.0, iterations=1)
    with pytest.raises(ValueError, match="calibration_share must lie in"):
        study(net, [x], {"calibration_share": [2.0]}, evaluate=lambda _: 0.0, iterations=1)


# -- the claim -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_fisher_costs_rank_all_allocations_of_the_digits_network():
    net, data = trained_digits_cnn()
    table = bit_costs(net, [data.train_images[:256]], (2, 3, 4))
    names, quantize = list(table), PowerQuantizer(1.0)
    sizes = {name: net[int(name)].weight.numel() for name in names}
    rounded = {
        (name, bits): quantize(net[int(name)].weight.flatten(1), bits=bits, group_size=10**6)
        .dequantize()
        .reshape(net[int(name)].weight.shape)
        for name in names
        for bits in (2, 3, 4)
    }
    losses = {}
    for bits in itertools.product((2, 3, 4), repeat=4):
        chosen = dict(zip(names, bits, strict=True))
        weights = {f"{name}.weight": rounded[name, chosen[name]] for name in names}
        with torch.no_grad():
            logits = torch.func.functional_call(net, weights, data.test_images)
        losses[bits] = float(F.cross_entropy(logits, data.test_labels))
    costs = [sum(table[n][b] for n, b in zip(names, bits, strict=True)) for bits in losses]
    assert spearmanr(costs, list(losses.values())).statistic >= 0.8
    best = tuple(knapsack(table, sizes, 2.5)[name] for name in names)
    total = sum(sizes.values())
    used = {bits: sum(b * sizes[n] for n, b in zip(names, bits, strict=True)) for bits in losses}
    fitting = [bits for bits in losses if 2.3 * total <= used[bits] <= 2.5 * total]
    assert used[best] <= 2.5 * total
    assert losses[best] <= 0.8 * max(losses[bits] for bits in fitting)
