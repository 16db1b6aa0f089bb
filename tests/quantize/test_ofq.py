import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.data import load_digits
from pyrobust.quantize import (
    ConfidenceGuidedAnnealing,
    OscillationTracker,
    QKReparamAttention,
    QuantLinear,
    train_ofq,
)
from pyrobust.train import GaussianCrossEntropy, fit


def batch(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_net(bits=2):
    torch.manual_seed(0)
    return nn.Sequential(QuantLinear(10, 60, bits), nn.ReLU(), QuantLinear(60, 4, bits))


def one_step(net, optimizer):
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(batch(32, 10)), torch.arange(32) % 4).backward()
    optimizer.step()


# -- confidence-guided annealing -----------------------------------------------------------------


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_only_weights_near_a_border_move_in_spite_of_decay_and_momentum(make):
    net = small_net()
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make(net.parameters(), lr=0.01, weight_decay=0.1, **options)
    for _ in range(3):  # momentum from before
        one_step(net, optimizer)
    with ConfidenceGuidedAnnealing(net, 0.03).attach(optimizer) as annealing:
        for _ in range(3):
            free = {layer: annealing.free(layer) for layer in annealing.layers.values()}
            before = {layer: layer.weight.detach().clone() for layer in free}
            one_step(net, optimizer)
            for layer, mask in free.items():
                assert torch.equal(layer.weight[~mask], before[layer][~mask])
                assert (layer.weight[mask] != before[layer][mask]).all()
                assert 0 < int(mask.sum()) < mask.numel() // 4
    before = net[0].weight.detach().clone()
    one_step(net, optimizer)
    assert (net[0].weight != before).all()  # nothing is held after the block


def test_strips_of_width_zero_and_half_free_none_and_all_inside():
    net = small_net(3)
    weight, quantizer = net[0].weight, net[0].weight_quantizer
    counts = []
    for boundary in (0.0, 0.005, 0.05, 0.5):
        annealing = ConfidenceGuidedAnnealing(net, boundary)
        counts.append(int(annealing.free(net[0]).sum()))
    assert counts == sorted(counts)
    u = quantizer.position(weight, quantizer.scale(weight, storable=True))
    assert counts[0] == 0
    assert counts[-1] == int(((u >= -4) & (u <= 3)).sum())


def test_gradients_of_frozen_weights_are_zero_and_others_stay():
    net = small_net()
    nn.functional.cross_entropy(net(batch(32, 10)), torch.arange(32) % 4).backward()
    grad = net[0].weight.grad.clone()
    bias = net[0].bias.grad.clone()
    annealing = ConfidenceGuidedAnnealing(net, 0.05)
    free = annealing.free(net[0])
    annealing.pre_step()
    assert torch.equal(net[0].weight.grad, torch.where(free, grad, 0))
    assert torch.equal(net[0].bias.grad, bias)
    annealing.post_step()


def test_query_key_matrices_are_masked_until_closed():
    torch.manual_seed(0)
    attention = QKReparamAttention(8, 2, w_bits=2)
    annealing = ConfidenceGuidedAnnealing(attention, 0.01)
    assert attention.boundary == 0.01
    annealing.close()
    assert attention.boundary is None


def test_bad_arguments_are_refused():
    net = small_net()
    for boundary in (-0.1, 0.6, float("nan")):
        with pytest.raises(ValueError, match="boundary must be"):
            ConfidenceGuidedAnnealing(net, boundary)
    with pytest.raises(ValueError, match="must have weights rounded by StatsQ"):
        ConfidenceGuidedAnnealing(nn.Sequential(QuantLinear(4, 4, 2, weight_quantizer="lsq")))
    with pytest.raises(TypeError, match="model must be a"):
        ConfidenceGuidedAnnealing(net.state_dict())
    x, y = batch(8, 10), torch.arange(8) % 4
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        train_ofq(net, x, y, epochs=0)
    unset = nn.Sequential(QuantLinear(10, 4, 2, 4, per_channel=-2))
    with pytest.raises(ValueError, match=r"activation scales set, but '0\.activation\.quantizer"):
        train_ofq(unset, x, y, epochs=1)
    teacher = nn.Linear(10, 4)
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        train_ofq(net, x, y, epochs=1, teacher=teacher)


# -- training ------------------------------------------------------------------------------------


def test_training_repeats_for_equal_seeds_and_leaves_global_randomness_alone():
    x, y = batch(64, 10), torch.arange(64) % 4

    def run(seed):
        net = nn.Sequential(small_net(), nn.Dropout(0.2))
        torch.manual_seed(123)
        train_ofq(net, x, y, epochs=1, annealing_epochs=1, batch_size=16, seed=seed)
        return net[0][0].weight.detach().clone(), torch.rand(1)

    (first, after), (again, _), (other, _) = run(3), run(3), run(4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(123)
    assert torch.equal(after, torch.rand(1))


def digits():
    data = load_digits()
    return (
        data.train_images.flatten(1),
        data.train_labels,
        data.test_images.flatten(1),
        data.test_labels,
    )


def float_mlp(seed, epochs=20):
    x, y, _, _ = digits()
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    generator = torch.Generator().manual_seed(seed)
    return fit(
        nn.Sequential(*layers),
        x,
        y,
        objective=GaussianCrossEntropy(),
        epochs=epochs,
        generator=generator,
    )


def quantized(net, kind="statsq"):
    return nn.Sequential(
        *(QuantLinear.from_float(m, 2, None, kind) if isinstance(m, nn.Linear) else m for m in net)
    )


def accuracy(net, x, y):
    with torch.no_grad():
        return float((net(x).argmax(1) == y).double().mean())


class LastEpochs(OscillationTracker):
    """Counts from step ``first`` on."""

    def __init__(self, first):
        super().__init__()
        self.left = first

    def update(self, source):
        super().update(source)
        self.left -= 1
        if self.left == 0:
            self.reset()


def reversal_rates(seed, runs, epochs=15, annealing=10, final_rate=5e-4):
    """Reversals per 1,000 weight-steps in the last 5 epochs, and accuracy, of each run."""
    x, y, test_x, test_y = digits()
    reference = float_mlp(seed)
    results = []
    for kind, boundary in runs:
        net, tracker = quantized(reference, kind), LastEpochs((epochs + annealing - 5) * 23)
        train_ofq(
            net, x, y, epochs=epochs, annealing_epochs=annealing, boundary=boundary,
            learning_rate=2e-3, final_rate=final_rate, weight_decay=0.01, label_smoothing=0.0,
            tracker=tracker, seed=seed,
        )  # fmt: skip
        results.append((tracker.rate(), accuracy(net, test_x, test_y)))
    return results


@pytest.mark.slow
def test_annealing_stops_oscillations_of_the_digits_mlp():
    runs = (("statsq", None), ("statsq", 0.005))
    results = torch.tensor([reversal_rates(seed, runs) for seed in range(3)])
    (plain, plain_accuracy), (annealed, accuracy_after) = results.mean(0).tolist()
    assert annealed <= 0.4 * plain
    assert accuracy_after >= plain_accuracy - 0.01


def test_two_bit_digits_stay_within_two_points_of_float_and_pack():
    x, y, test_x, test_y = digits()
    reference = float_mlp(0)
    net = quantized(reference)
    options = {"learning_rate": 2e-3, "final_rate": 2e-4, "weight_decay": 0.01}
    train_ofq(net, x, y, epochs=10, teacher=reference, **options)
    assert accuracy(net, test_x, test_y) >= accuracy(reference, test_x, test_y) - 0.02
    packed = pyrobust.pack(net)
    with torch.no_grad():
        out, expected = packed(test_x), net(test_x)
    assert float((out - expected).norm() / expected.norm()) <= 1e-5


def test_borders_are_those_of_the_scales_that_are_stored():
    """A weight exactly on a border of the stored grid is a hair off that of the rounded scale."""
    layer = QuantLinear(4, 1, 2, None, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.3, -0.7, 1.1, 0.0]]))
        for _ in range(20):  # the border between the upper two levels lies at half of the scale
            layer.weight[0, 3] = layer.weight_quantizer.scale(layer.weight, storable=True) / 2
    scales = [layer.weight_quantizer.scale(layer.weight, storable=s) for s in (False, True)]
    assert 1e-6 < float((scales[0] / scales[1] - 1).abs()) < 1e-4
    free = ConfidenceGuidedAnnealing(nn.Sequential(layer), 1e-7).free(layer)
    assert free.tolist() == [[False, False, False, True]]
