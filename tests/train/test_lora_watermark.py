"""EW-LoRA: controller, frozen parts, embedding on a small autoencoder, extractor training."""

import copy
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from pyrobust.data.distortions import gaussian_blur, jpeg_like, resize_and_back
from pyrobust.evaluate import bit_accuracy
from pyrobust.train import (
    DynamicLossWeights,
    HiddenExtractor,
    HiddenWatermark,
    LoRAWatermark,
    merge_adapters,
    whiten_extractor_,
)

MESSAGE = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0])


class FixedWeights(DynamicLossWeights):
    """Constant weights, the control."""

    def __init__(self, image, mark):
        super().__init__()
        self.image_weight, self.mark_weight = image, mark

    def update(self, psnr, bitacc):
        pass


class TileExtractor(nn.Module):
    """Projections on eight orthonormal zero-mean 4x4 tiles repeated over the image."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        tiles = torch.randn(16, 8, generator=generator)
        tiles = torch.linalg.qr(tiles - tiles.mean(0))[0]
        self.register_buffer("tiles", tiles.T.reshape(8, 1, 4, 4).repeat(1, 1, 4, 4))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("std", torch.ones(8))

    def raw(self, images):
        return (images * self.tiles.squeeze(1)[None]).sum((-2, -1))

    def standardise(self, images):
        values = self.raw(images)
        self.mean, self.std = values.mean(0), values.std(0)
        return self

    def forward(self, images):
        return (self.raw(images) - self.mean) / self.std


def autoencoder():
    encoder = nn.Sequential(
        nn.Conv2d(1, 24, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(24, 8, 3, 1, 1),
    )
    decoder = nn.Sequential(
        nn.Conv2d(8, 24, 3, 1, 1),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(24, 24, 3, 1, 1),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(24, 24, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(24, 1, 3, 1, 1),
        nn.Sigmoid(),
    )
    return encoder, decoder


@pytest.fixture(scope="module")
def trained():
    """Decoder, latents and standardised extractor on digits enlarged to 16 x 16."""
    torch.manual_seed(0)
    x = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    x = F.interpolate(x, size=16, mode="bilinear")
    encoder, decoder = autoencoder()
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 2e-3)
    for _ in range(12):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.mse_loss(decoder(encoder(x[batch])), x[batch]).backward()
            optimizer.step()
    decoder.eval()
    with torch.no_grad():
        latents = encoder(x)
        extractor = TileExtractor().eval().standardise(decoder(latents))
    return decoder, latents, extractor


def embed(trained, scheduler, steps, seed=0):
    decoder, latents, extractor = trained
    torch.manual_seed(seed)
    mark = LoRAWatermark(
        copy.deepcopy(decoder), ["6"], MESSAGE, copy.deepcopy(extractor), scheduler=scheduler
    )
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randint(len(latents), (16,), generator=generator) for _ in range(steps)]
    return mark, mark.fit(latents[i] for i in chosen)


def quality(mark, latents):
    with torch.no_grad():
        clean, marked = mark.clean(latents), mark.marked(latents)
        psnr = -10 * math.log10(F.mse_loss(marked, clean).item())
        return bit_accuracy(mark.extractor(marked), MESSAGE), psnr


def test_controller_trace():
    control = DynamicLossWeights(psnr=30, bitacc=0.9, patience=2)
    script = [(math.inf, 0.5), (31, 0.8), (25, 0.95), (25, 0.96), (31, 0.97), (32, 0.99)]
    trace = []
    for psnr, accuracy in script:
        control.update(psnr, accuracy)
        trace.append(
            (
                round(control.image_weight, 2),
                round(control.mark_weight, 2),
                control.psnr,
                round(control.bitacc, 2),
                control.image_count,
                control.mark_count,
            )
        )
    assert trace == [
        (1.0, 0.6, 30, 0.9, 1, 0),  # bits missed
        (1.0, 1.2, 32.5, 0.9, 0, 0),  # second good PSNR in a row raises its target
        (1.3, 1.2, 32.5, 0.9, 0, 1),
        (1.6, 1.2, 32.5, 0.98, 0, 0),  # second good bit accuracy raises its target
        (1.9, 1.8, 32.5, 0.98, 0, 0),  # both targets missed
        (2.2, 1.8, 32.5, 0.98, 0, 1),
    ]
    other = DynamicLossWeights()
    other.load_state_dict(control.state_dict())
    assert vars(other) == vars(control)
    assert sum(control.normalised) == pytest.approx(1)


def test_accuracy_target_stops_at_one():
    control = DynamicLossWeights(bitacc=0.98, patience=1)
    for _ in range(3):
        control.update(20.0, 1.0)
    assert control.bitacc == 1.0


def test_starts_at_the_clean_decoder_and_trains_nothing_else(trained):
    decoder, latents, extractor = trained
    mark = LoRAWatermark(copy.deepcopy(decoder), ["6"], MESSAGE, copy.deepcopy(extractor))
    assert torch.equal(mark.marked(latents[:9]), decoder(latents[:9]))
    assert sum(p.numel() for p in mark.decoder.parameters() if p.requires_grad) == 960
    mark.fit(latents[:16] for _ in range(3))
    assert not torch.equal(mark.marked(latents[:9]), decoder(latents[:9]))
    assert torch.equal(mark.clean(latents[:9]), decoder(latents[:9]))
    state = mark.decoder.state_dict()
    for name, value in decoder.state_dict().items():
        assert torch.equal(state[name.replace("6.", "6.base.")], value), name
    for name, value in extractor.state_dict().items():
        assert torch.equal(mark.extractor.state_dict()[name], value)


def test_running_statistics_of_the_extractor_stay(trained):
    """Unlike the tiles it has batch norms, which must neither train nor count batches."""
    decoder, latents, _ = trained
    extractor = HiddenExtractor(8, channels=1, width=8).eval()
    with torch.no_grad():
        whiten_extractor_(extractor, decoder(latents[:64]))
    before = copy.deepcopy(extractor.state_dict())
    assert any(name.endswith("running_mean") for name in before)
    mark = LoRAWatermark(copy.deepcopy(decoder), ["6"], MESSAGE, extractor)
    mark.fit(latents[:16] for _ in range(3))
    assert not torch.equal(mark.marked(latents[:9]), mark.clean(latents[:9]))
    assert all(torch.equal(value, before[name]) for name, value in extractor.state_dict().items())


def test_resumes_to_the_same_numbers(trained):
    _, latents, _ = trained
    whole, _ = embed(trained, DynamicLossWeights(psnr=25), 6)
    half, _ = embed(trained, DynamicLossWeights(psnr=25), 3)
    fresh, _ = embed(trained, DynamicLossWeights(psnr=25), 0)
    fresh.load_state_dict(half.state_dict())
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randint(len(latents), (16,), generator=generator) for _ in range(6)]
    fresh.fit(latents[i] for i in chosen[3:])
    assert torch.equal(fresh.marked(latents[:4]), whole.marked(latents[:4]))


def test_embeds_the_message(trained):
    _, latents, _ = trained
    mark, history = embed(trained, DynamicLossWeights(psnr=25), 200)
    assert quality(mark, latents[:400])[0] >= 0.98
    assert history[0].psnr == math.inf
    with torch.no_grad():
        before = bit_accuracy(mark.extractor(mark.clean(latents)), MESSAGE)
    assert 0.35 < before < 0.65
    table = mark.robustness(
        latents[:200],
        {
            "jpeg 80": lambda x: jpeg_like(x, quality=80),
            "blur": lambda x: gaussian_blur(x, sigma=0.5),
            "resize 0.7": lambda x: resize_and_back(x, factor=0.7),
        },
    )
    assert table["none"] >= 0.98
    assert all(0 <= value <= 1 for value in table.values())
    merged = merge_adapters(copy.deepcopy(mark.decoder))
    torch.testing.assert_close(merged(latents[:9]), mark.marked(latents[:9]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_dynamic_weights_against_fixed_ones(trained):
    _, latents, _ = trained
    rows = {}
    settings = {
        "dynamic": DynamicLossWeights(psnr=25),
        "(1, 1)": FixedWeights(1.0, 1.0),
        "(1, 0.1)": FixedWeights(1.0, 0.1),
        "(1, 10)": FixedWeights(1.0, 10.0),
    }
    for name, scheduler in settings.items():
        mark, history = embed(trained, scheduler, 400)
        smooth = [
            sum(s.bitacc for s in history[max(0, i - 9) : i + 1]) / min(i + 1, 10)
            for i in range(len(history))
        ]
        reached = next((i for i, value in enumerate(smooth) if value >= 0.95), len(history))
        rows[name] = (*quality(mark, latents), reached)
        print(f"{name}: accuracy {rows[name][0]:.3f}, PSNR {rows[name][1]:.1f} dB, step {reached}")
    assert rows["dynamic"][0] >= 0.98
    assert rows["dynamic"][1] >= rows["(1, 10)"][1] + 1.5


def test_hidden_pair_learns_to_read_and_is_whitened():
    torch.manual_seed(0)
    x = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    pair = HiddenWatermark(2, channels=1, width=16, strength=0.5)
    batches = [x[torch.randint(len(x), (32,))] for _ in range(200)]
    history = pair.fit(batches, lr=1e-2, image_weight=0.02, distort=False)
    assert sum(history[-10:]) / 10 > 0.9
    with torch.no_grad():
        whiten_extractor_(pair.extractor, x)
        logits = pair.extractor(x).double()
    centred = logits - logits.mean(0)
    torch.testing.assert_close(
        logits.mean(0), torch.zeros(2, dtype=torch.double), atol=1e-3, rtol=0
    )
    covariance = centred.T @ centred / (len(x) - 1)
    torch.testing.assert_close(covariance, torch.eye(2, dtype=torch.double), atol=1e-2, rtol=0)


def test_hidden_training_through_distortions_runs_and_differs_by_seed():
    x = torch.rand(8, 3, 32, 32)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(3)
        pair = HiddenWatermark(4, width=8)
        pair.fit([x] * 4, seed=seed)
        results.append(pair.extractor.linear.weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_diffusers_decoder():
    """The default layers of Stable Diffusion's decoder exist and train in a small AutoencoderKL."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 16),
        norm_num_groups=4,
        layers_per_block=2,
    ).eval()
    layers = [f"up_blocks.3.resnets.{i}.conv{j}" for i in range(3) for j in (1, 2)]
    extractor = HiddenExtractor(8, width=8).eval()
    mark = LoRAWatermark(
        vae,
        layers,
        MESSAGE,
        extractor,
        decode=lambda model, z: model.decode(z).sample,
        r=2,
    )
    latents = torch.randn(2, 4, 4, 4)
    read, drawn = copy.deepcopy(extractor.state_dict()), copy.deepcopy(vae.state_dict())
    assert any(name.endswith("num_batches_tracked") for name in read)
    steps = mark.fit([latents] * 2)
    assert all(torch.equal(value, read[name]) for name, value in extractor.state_dict().items())
    changed = [n for n, v in vae.state_dict().items() if not torch.equal(v, drawn[n])]
    assert len(changed) == 12
    assert all("conv" in name and ".base." not in name for name in changed)
    assert steps[0].psnr == math.inf  # the clean decoder is the reference
    assert math.isfinite(steps[1].psnr)
    moved = [n for n, p in vae.named_parameters() if p.requires_grad]
    assert len(moved) == 12


def test_published_parameter_count():
    """Six 3x3 convolutions, 256 -> 128 and five 128 -> 128, at r = 4 give 0.0353 M."""
    count = 256 * 9 * 4 + 4 * 128 + 5 * (128 * 9 * 4 + 4 * 128)
    assert count == 35_328
    from pyrobust.nn import ConvLoRA2d

    sizes = [(256, 128)] + [(128, 128)] * 5
    own = [ConvLoRA2d(nn.Conv2d(a, b, 3, padding=1), r=4).trainable_parameters() for a, b in sizes]
    assert sum(p.numel() for group in own for p in group) == count


def test_refusals(trained):
    decoder, latents, extractor = trained
    make = lambda **k: LoRAWatermark(  # noqa: E731
        copy.deepcopy(decoder),
        k.get("layers", ["6"]),
        k.get("message", MESSAGE),
        k.get("extractor", extractor),
        r=k.get("r", 4),
        alpha=k.get("alpha", 32.0),
        image_range=k.get("image_range"),
    )
    with pytest.raises(ValueError, match="match no module; linear and convolution layers are 0, 3"):
        make(layers=["up.conv"])
    with pytest.raises(ValueError, match="zeros and ones"):
        make(message=2 * MESSAGE)
    with pytest.raises(ValueError, match="training mode"):
        make(extractor=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="r must be below"):
        make(r=24)
    with pytest.raises(ValueError, match="alpha must be finite and positive"):
        make(alpha=0.0)
    make(image_range=(0.0, 1.0)).step(latents[:2])
    with pytest.raises(ValueError, match=r"images of the decoder must lie in \[0, 0\.1\]; got"):
        make(image_range=(0.0, 0.1)).step(latents[:2])
    with pytest.raises(ValueError, match=r"image_range must be \(low, high\)"):
        make(image_range=(1.0, 0.0)).step(latents[:2])
    with pytest.raises(ValueError, match="gives 8 bits, the message has 4"):
        make(message=MESSAGE[:4]).step(latents[:2])
    with pytest.raises(ValueError, match="more than 8; got 8"):
        whiten_extractor_(HiddenExtractor(8), torch.rand(8, 3, 16, 16))
