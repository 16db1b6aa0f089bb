"""rRCM: schedules, the contrastive loss on one and two processes, training steps, claims."""

import copy
import itertools
import math
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyrobust
from pyrobust.data import load_digits
from pyrobust.nn import (
    NoiseConditionedClassifier,
    NoiseConditionedEncoder,
    PackedLinear,
    PatchTransformer,
    SmoothedClassifier,
)
from pyrobust.train import (
    KarrasSchedule,
    NoiseConsistencyLoss,
    RRCMPretrainer,
    consistency_terms,
    fit_smoothed_classifier,
    improved_consistency_scales,
    info_nce,
    sigmoid_ema,
)

from ..two_processes import run_two_processes


class MLPEncoder(nn.Module):
    """A small encoder of 8 by 8 images that is told the noise level."""

    def __init__(self, width=128, out=64):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(66, width), nn.ReLU(), nn.Linear(width, width))
        self.projection = nn.Sequential(nn.ReLU(), nn.Linear(width, out))

    def forward(self, x, sigma):
        flat = x.flatten(1)
        scaled = flat / math.sqrt(sigma**2 + 0.25)
        told = flat.new_tensor([math.log(sigma), sigma / (1 + sigma)]).expand(len(flat), 2)
        feature = F.layer_norm(
            self.body(torch.cat([scaled, told], 1)), (self.body[0].out_features,)
        )
        return self.projection(feature), feature


def tiny_vit():
    vit = PatchTransformer(8, 4, 1, embed_dim=16, depth=2, num_heads=2)
    return NoiseConditionedEncoder(vit, projection=(32, 8))


def trainer(encoder, total=10, **options):
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    return RRCMPretrainer(encoder, optimizer, total_steps=total, **options)


def test_levels_have_exact_ends_and_fall():
    schedule = KarrasSchedule()
    for n in (2, 21, 41, 81):
        sigmas = schedule.sigmas(n)
        assert abs(sigmas[0] - 80) < 1e-9
        assert abs(sigmas[-1] - 0.002) < 1e-9
        assert bool((sigmas[1:] < sigmas[:-1]).all())
        assert [schedule.nearest(float(s), n) for s in sigmas] == list(range(n))
    middle = KarrasSchedule(0.5, 8.0, 2.0).sigmas(3)[1]
    assert float(middle) == pytest.approx(((0.5**0.5 + 8**0.5) / 2) ** 2)


def test_the_number_of_levels_doubles_in_stages():
    total = 100_000
    counts = [improved_consistency_scales(s, total) for s in (0, 1, 40_000, 44_000, total)]
    assert counts == [21, 41, 41, 81, 81]
    every = [improved_consistency_scales(s, 50) for s in range(51)]
    assert every == sorted(every)


def test_the_decay_rises_from_start_to_end():
    decays = [sigmoid_ema(s, 1000) for s in range(1001)]
    assert decays[0] == 0.99
    assert decays == sorted(decays)
    assert decays[-1] == pytest.approx(0.9999, abs=1e-7)
    half = math.sqrt(0.5 * (0.9999**2 - 0.99**2) + 0.99**2)
    share = 2 / (1 + math.exp(-15 * (half - 0.99) / 0.0099)) - 1
    assert decays[500] == pytest.approx(share * 0.9999 + (1 - share) * 0.99)


def test_the_contrast_is_a_cross_entropy_and_least_for_orthogonal_pairs():
    f, g = torch.randn(12, 7), torch.randn(12, 7)
    similarity = F.normalize(f, dim=1) @ F.normalize(g, dim=1).T
    expected = F.cross_entropy(similarity / 0.2, torch.arange(12))
    torch.testing.assert_close(info_nce(f, g), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(info_nce(5 * f, 0.1 * g), expected, atol=1e-5, rtol=0)
    best = info_nce(torch.eye(12), torch.eye(12))
    assert 0 <= float(best) < float(expected)
    assert float(best) == pytest.approx(math.log(1 + 11 * math.exp(-5)), rel=1e-4)


def one_of_two(rank):
    torch.manual_seed(0)
    f, g = torch.randn(8, 5), torch.randn(8, 5)
    mine = slice(4 * rank, 4 * rank + 4)
    loss = info_nce(f[mine], g[mine])
    torch.manual_seed(1)
    model = nn.parallel.DistributedDataParallel(MLPEncoder(16, 8), broadcast_buffers=False)
    state = trainer(model, seed=3)
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    steps = [state.step(x, x.roll(1, 2), x.roll(1, 3)) for _ in range(3)]
    with pytest.raises(ValueError, match=r"one noise level; got .* \[\(5, 21\), \(6, 21\)\]"):
        state.losses(x, x, x, 5 + rank, 21, torch.zeros_like(x))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    target = torch.cat([p.flatten() for p in state.target.parameters()])
    loader = [(torch.rand(6, 1, 8, 8), torch.arange(6) % 3)] * 2
    options = {"sigma": 0.5, "features": 16, "num_classes": 3, "epochs": 2}
    tuned = fit_smoothed_classifier(model.module, loader, **options)
    weights = torch.cat([weights, *(p.detach().flatten() for p in tuned.parameters())])
    return float(loss), [s.sigma for s in steps], weights, target


def test_two_processes_share_negatives_levels_and_weights(tmp_path):
    first, second = run_two_processes(one_of_two, tmp_path)
    torch.manual_seed(0)
    whole = float(info_nce(torch.randn(8, 5), torch.randn(8, 5)))
    assert (first[0] + second[0]) / 2 == pytest.approx(whole, abs=1e-6)
    assert first[1] == second[1]
    assert torch.equal(first[2], second[2])
    assert torch.equal(first[3], second[3])


def test_gradients_flow_where_they_should():
    encoder = tiny_vit()
    state = trainer(encoder)
    x, noise = torch.rand(6, 1, 8, 8) * 2 - 1, torch.randn(6, 1, 8, 8)
    contrast, consistency = state.losses(x, x.roll(1, 2), x.roll(1, 3), 5, 21, noise)
    grads = torch.autograd.grad(
        consistency, list(encoder.parameters()), retain_graph=True, allow_unused=True
    )
    used = dict(zip([n for n, _ in encoder.named_parameters()], grads, strict=True))
    assert all(g is None for n, g in used.items() if n.startswith("projection"))
    assert used["norm.weight"] is not None  # the feature, not the projection
    contrast.backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert all(p.grad is None for p in state.target.parameters())

    # the consistency loss by hand: only the noisier point carries a gradient
    sigmas = state.schedule.sigmas(21).tolist()
    here, aim = (encoder(x + s * noise, s)[1] for s in (sigmas[5], sigmas[6]))
    torch.testing.assert_close(info_nce(here, aim.detach()), consistency, atol=1e-5, rtol=1e-5)


def test_steps_train_and_move_the_target():
    torch.manual_seed(0)
    encoder = tiny_vit()
    state = trainer(encoder, total=100, clip_after=5)
    x = torch.rand(8, 1, 8, 8) * 2 - 1
    before = copy.deepcopy(state.target)
    result = state.step(x, x.roll(1, 2), x.roll(1, 3))
    assert result.loss == pytest.approx(result.contrast + result.consistency, rel=1e-5)
    assert (result.levels, result.decay) == (21, 0.99)
    for name, value in state.target.named_parameters():
        online = dict(encoder.named_parameters())[name]
        old = dict(before.named_parameters())[name]
        torch.testing.assert_close(value, 0.99 * old + 0.01 * online.detach())
    later = [state.step(x, x.roll(1, 2), x.roll(1, 3)) for _ in range(40)]
    assert sum(r.contrast for r in later[-5:]) < 5 * result.contrast
    assert later[0].levels == 41
    assert len({r.sigma for r in later}) > 10


def test_a_saved_state_goes_on_with_the_same_steps():
    x = torch.rand(4, 1, 8, 8) * 2 - 1

    def run(encoder, state, count):
        return [state.step(x, x.roll(1, 2), x.roll(1, 3)).loss for _ in range(count)]

    encoder = MLPEncoder(16, 8)
    state = trainer(encoder)
    run(encoder, state, 3)
    twin = MLPEncoder(16, 8)
    again = trainer(twin)
    twin.load_state_dict(encoder.state_dict())
    again.optimizer.load_state_dict(copy.deepcopy(state.optimizer.state_dict()))
    again.load_state_dict(copy.deepcopy(state.state_dict()))
    assert run(encoder, state, 3) == run(twin, again, 3)


def test_the_encoder_is_told_the_noise_level():
    encoder = tiny_vit().eval()
    x = torch.rand(3, 1, 8, 8)
    projection, feature = encoder(x, 0.5)
    assert projection.shape == (3, 8)
    assert feature.shape == (3, 16)
    assert not torch.allclose(encoder(x, 2.0)[1], feature, atol=1e-3)
    mixed = encoder(x, torch.tensor([0.5, 2.0, 0.5]))[1]
    torch.testing.assert_close(mixed[0], feature[0])
    assert encoder.pos_embed.shape == (1, 2 + 4, 16)
    frozen = NoiseConditionedEncoder(PatchTransformer(8, 4, 1, embed_dim=12), freeze_patches=True)
    assert not any(p.requires_grad for p in frozen.patch_embed.parameters())
    with pytest.raises(TypeError, match="Linear lacks patch_embed"):
        NoiseConditionedEncoder(nn.Linear(2, 2))


def test_layers_of_a_hugging_face_transformer_are_wrapped():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    images = {"image_size": 8, "patch_size": 4, "num_channels": 1, "intermediate_size": 32}
    vit = transformers.ViTModel(transformers.ViTConfig(**sizes, **images), add_pooling_layer=False)

    class Blocks(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, tokens):
            for layer in self.layers:
                out = layer(tokens)
                tokens = out[0] if isinstance(out, tuple) else out
            return tokens

    layers = next(m for m in vit.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    parts = types.SimpleNamespace(
        patch_embed=vit.embeddings.patch_embeddings,
        cls_token=vit.embeddings.cls_token,
        pos_embed=vit.embeddings.position_embeddings,
        blocks=Blocks(layers),
        norm=vit.layernorm,
        embed_dim=16,
    )
    encoder = NoiseConditionedEncoder(parts, projection=(32, 8))
    x = torch.rand(6, 1, 8, 8) * 2 - 1
    state = trainer(encoder)
    weights = [p for p in layers.parameters() if p.dim() > 1]
    before = [p.detach().clone() for p in weights]
    state.step(x, x.roll(1, 2), x.roll(1, 3))
    assert all(not torch.equal(p, b) for p, b in zip(weights, before, strict=True))
    assert encoder(x, 0.5)[1].shape == (6, 16)


def test_the_consistency_loss_follows_its_formula():
    loss, labels = NoiseConsistencyLoss(lam=10.0, eta=0.5), torch.tensor([0, 2, 1])
    logits = torch.randn(2, 3, 4)
    same = logits[:1].expand(2, -1, -1)
    divergence, entropy = consistency_terms(same)
    assert abs(float(divergence)) < 1e-7
    plain = F.cross_entropy(same[0], labels)
    torch.testing.assert_close(loss(same, labels), plain + 0.5 * entropy)
    p = logits.softmax(-1)
    mean = p.mean(0)
    kl = (mean * (mean.log() - p.log())).sum(-1).mean()
    h = -(mean * mean.log()).sum(-1).mean()
    ce = F.cross_entropy(logits.reshape(6, 4), labels.repeat(2))
    torch.testing.assert_close(loss(logits, labels), ce + 10 * kl + 0.5 * h)
    torch.testing.assert_close(loss(logits, labels, ramp=0.2), ce + 2 * kl + 0.5 * h)
    torch.testing.assert_close(NoiseConsistencyLoss(0.0, 0.0)(logits, labels), ce)


def test_fine_tuning_gives_a_base_that_is_certified_in_one_pass_per_copy():
    torch.manual_seed(0)
    data = load_digits()
    encoder = MLPEncoder(96)
    x, y = data.train_images, data.train_labels
    loader = [(x[i : i + 128], y[i : i + 128]) for i in range(0, len(x), 128)]
    options = {"sigma": 0.25, "features": 96, "num_classes": 10, "generator": torch.Generator()}
    before = [p.clone() for p in encoder.parameters()]
    model = fit_smoothed_classifier(encoder, loader, epochs=10, learning_rate=5e-3, **options)
    assert all(torch.equal(p, b) for p, b in zip(encoder.parameters(), before, strict=True))
    schedule = KarrasSchedule()
    assert model.level == float(schedule.sigmas(81)[schedule.nearest(0.5, 81)])
    x, y = data.test_images[:60], data.test_labels[:60]
    smoothed = SmoothedClassifier(model, 0.25, 10).eval()
    result = smoothed.certify(x, n=1000, batch_size=1000)
    print("certified", result.certified_accuracy(y, [0.0, 0.25, 0.5]).tolist())
    assert float(result.certified_accuracy(y, 0.25)) > 0.8
    packed = pyrobust.pack(model, bits=4, group_size=32)
    small = SmoothedClassifier(packed, 0.25, 10).eval().certify(x[:20], n=500, batch_size=500)
    assert float(small.certified_accuracy(y[:20], 0.25)) > 0.5
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) == 3


def test_layer_decay_gives_lower_rates_to_earlier_blocks():
    torch.manual_seed(0)
    encoder = tiny_vit()
    loader = [(torch.rand(6, 1, 8, 8), torch.arange(6) % 3)] * 2
    options = {"sigma": 0.5, "features": 16, "num_classes": 3}
    fit_smoothed_classifier(encoder, loader, epochs=1, layer_decay=0.75, **options)
    from pyrobust.train.smoothed_classifier import _groups

    classifier = NoiseConditionedClassifier(encoder, 16, 3, 1.0)
    rates = {round(g["peak"], 6): len(g["params"]) for g in _groups("t", classifier, 1.0, 0.75)}
    assert sorted(rates) == [round(0.75**k, 6) for k in (3, 2, 1, 0)]
    assert rates[1.0] == 4  # head and last norm
    with pytest.raises(ValueError, match="has none"):
        fit_smoothed_classifier(
            MLPEncoder(16), loader, layer_decay=0.5, sigma=0.5, features=16, num_classes=3
        )


def test_bad_input_is_refused():
    state = trainer(MLPEncoder(16, 8))
    x = torch.rand(4, 1, 8, 8)
    with pytest.raises(ValueError, match="at least 2 images"):
        state.step(x[:1], x[:1], x[:1])
    with pytest.raises(ValueError, match="view2 must have shape"):
        state.step(x, x, x[:2])
    with pytest.warns(UserWarning, match=r"\[-1, 1\]"):
        state.step(3 * x, x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state.step(x, x, x)
    with pytest.raises(ValueError, match=r"index must lie in \[0, 19\]; got 20 of 21"):
        state.losses(x, x, x, 20, 21, torch.zeros_like(x))
    with pytest.raises(ValueError, match="at least 2 rows"):
        info_nce(torch.rand(1, 3), torch.rand(1, 3))
    options = {"features": 16, "num_classes": 3}
    for sigma, message in [(0.0, "sigma"), (60.0, r"\[0.002, 80\]"), (0.0005, r"\[0.002, 80\]")]:
        with pytest.raises(ValueError, match=message):
            fit_smoothed_classifier(MLPEncoder(16), [], sigma=sigma, **options)
    with pytest.raises(ValueError, match="m must be"):
        NoiseConsistencyLoss(m=1)
    with pytest.raises(ValueError, match="logits must have shape"):
        NoiseConsistencyLoss()(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64))


# What the trajectory loss is for, against the same steps without it.


def views(x, generator):
    """A random shift by up to one pixel and a random contrast."""
    rows, columns = torch.randint(-1, 2, (2,), generator=generator).tolist()
    contrast = 0.7 + 0.6 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return ((x.roll((rows, columns), (2, 3)) + 1) * contrast - 1).clamp(-1, 1)


def probe(encoder, data, sigma):
    """Accuracy of a linear classifier of noisy features, from 200 labels."""
    generator = torch.Generator().manual_seed(5)

    def features(images):
        noisy = images * 2 - 1 + 2 * sigma * torch.randn(images.shape, generator=generator)
        with torch.no_grad():
            return encoder(noisy, 2 * sigma)[1]

    train = torch.cat([features(data.train_images[:200]) for _ in range(10)])
    labels = data.train_labels[:200].repeat(10)
    head = nn.Linear(train.shape[1], 10)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=60)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(train), labels) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    test = torch.cat([features(data.test_images) for _ in range(3)])
    return float((head(test).argmax(1) == data.test_labels.repeat(3)).float().mean())


class ContrastOnly(RRCMPretrainer):
    """The control: the same steps without the trajectory."""

    def losses(self, *arguments):
        contrast, consistency = super().losses(*arguments)
        return contrast, 0 * consistency


def trajectory_contrast(encoder, x):
    """Mean contrast between neighbouring levels of held-out trajectories."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    sigmas = KarrasSchedule().sigmas(21)[6:16].tolist()
    with torch.no_grad():
        features = [encoder(x + s * noise, s)[1] for s in sigmas]
    losses = [info_nce(a, b) for a, b in itertools.pairwise(features)]
    return float(torch.stack(losses).mean())


@pytest.mark.slow
def test_trajectories_map_to_one_representation():
    data = load_digits()
    x = data.train_images * 2 - 1
    apart, scores = {}, {}
    for kind in (ContrastOnly, RRCMPretrainer):
        torch.manual_seed(0)
        encoder = MLPEncoder(256)
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, weight_decay=0.0)
        state = kind(encoder, optimizer, total_steps=400)
        generator = torch.Generator().manual_seed(0)
        for _ in range(400):
            batch = x[torch.randint(len(x), (256,), generator=generator)]
            state.step(batch, views(batch, generator), views(batch, generator))
        apart[kind] = trajectory_contrast(encoder, data.test_images[:128] * 2 - 1)
        scores[kind] = {sigma: probe(encoder, data, sigma) for sigma in (0.25, 0.5)}
    print(apart, scores)  # the probe is not asserted: docs/methods.md has the figures
    assert apart[RRCMPretrainer] < 0.8 * apart[ContrastOnly]
