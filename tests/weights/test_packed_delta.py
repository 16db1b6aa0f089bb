"""Storage of task vectors: the published schemes, exact zeros, files, signatures of VGG-16."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.data import corrupt, load_digits
from pyrobust.train import GaussianCrossEntropy, fit
from pyrobust.weights import PackedDelta, Patcher, TaskVector, quantize_delta


def packed_values(value, bits, scheme, **options):
    return quantize_delta(TaskVector.from_deltas({"w": value}), bits, scheme, **options)["w"]


def published(value, bits, scheme):
    """The published rounding of one tensor, in float64; zeros are set aside under ``log``."""
    x = value.double().numpy()

    def linear(y, levels):
        low, high = y.min(), y.max()
        return np.round((y - low) / (high - low) * (levels - 1)) / (levels - 1) * (high - low) + low

    if scheme == "linear":
        return linear(x, 2**bits)
    if scheme == "tanh":
        return np.arctanh(linear(np.tanh(x), 2**bits))
    result = np.zeros_like(x)
    used = x != 0
    result[used] = np.sign(x[used]) * np.exp2(linear(np.log2(np.abs(x[used])), 2 ** (bits - 1) - 1))
    return result


def published_levels(value, bits, scheme):
    x = value.double()
    if scheme == "tanh":
        return torch.atanh(torch.linspace(torch.tanh(x.min()), torch.tanh(x.max()), 2**bits))
    size = x[x != 0].abs().log2()
    powers = torch.linspace(float(size.min()), float(size.max()), 2 ** (bits - 1) - 1).exp2()
    return torch.cat([-powers, torch.zeros(1), powers])


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("scheme", ["log", "tanh"])
def test_levels_are_the_published_ones_and_errors_no_larger(scheme, bits):
    value = 0.3 * torch.randn(40, 30)
    value[:3] = 0
    ours = packed_values(value, bits, scheme)
    levels = published_levels(value, bits, scheme)
    assert float((ours.flatten()[:, None] - levels).abs().amin(1).max()) < 1e-5
    theirs = torch.from_numpy(published(value, bits, scheme))
    error, published_error = ((v.double() - value.double()).abs() for v in (ours, theirs))
    assert bool((error <= published_error + 1e-6).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_linear_without_groups_errs_as_the_published_rounding(bits):
    value = torch.randn(40, 30)
    error = (packed_values(value, bits, "linear", group_size=None) - value).abs()
    step = float(value.max() - value.min()) / (2**bits - 1)
    assert float(error.max()) <= 0.5 * step * 1.002
    theirs = np.abs(published(value, bits, "linear") - value.double().numpy())
    assert float(error.double().square().mean()) <= 1.2 * float((theirs**2).mean())


@pytest.mark.parametrize("scheme", ["linear", "log"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_exact_zeros_stay_exact(scheme, bits):
    value = torch.randn(20, 30) + 0.5
    value[value.abs() < 0.4] = 0
    packed = packed_values(value, bits, scheme)
    assert bool((packed[value == 0] == 0).all())
    nothing = packed_values(torch.zeros(5, 6), bits, scheme)
    assert torch.equal(nothing, torch.zeros(5, 6))


@pytest.mark.parametrize("scheme", ["linear", "log", "tanh"])
def test_constant_and_tiny_tensors_survive(scheme):
    for value in (torch.full((4, 5), 0.25), torch.tensor([[-0.25]]), torch.zeros(3)):
        packed = packed_values(value, 8, scheme)
        torch.testing.assert_close(packed, value, rtol=2e-3, atol=1e-6)
    tiny = 1e-6 * torch.randn(10, 10)
    error = (packed_values(tiny, 8, scheme) - tiny).abs().max()
    assert float(error) <= 0.05 * float(tiny.abs().max())


def vgg16_state():
    """Shapes of VGG-16 with batch norm and one classifier layer, the smaller of its usual forms."""
    state, width, place = {}, 3, 0
    for size in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if size == 0:
            place += 1  # pooling
            continue
        state[f"features.{place}.weight"] = torch.empty(size, width, 3, 3)
        state[f"features.{place}.bias"] = torch.empty(size)
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"features.{place + 1}.{name}"] = torch.empty(size)
        width, place = size, place + 3
    state["classifier.weight"], state["classifier.bias"] = torch.empty(10, 512), torch.empty(10)
    return {name: value.normal_() for name, value in state.items()}


@pytest.mark.parametrize("scheme", ["linear", "log", "tanh"])
def test_a_shallow_signature_of_vgg16_is_ten_times_smaller(scheme, tmp_path):
    state = vgg16_state()
    whole = sum(4 * value.numel() for value in state.values())
    assert whole == pytest.approx(4 * 14.73e6, rel=0.01)
    convolutions = [n[: -len("weight")] for n in state if state[n].ndim == 4][:7]
    names = [f"{name}{leaf}" for name in convolutions for leaf in ("weight", "bias")]
    signature = TaskVector.from_deltas({name: 1e-3 * state[name] for name in names})
    packed = quantize_delta(signature, 8, scheme)
    path = tmp_path / "signature.safetensors"
    packed.save(path)
    size = path.stat().st_size
    assert 10 * size <= whole
    assert size == pytest.approx(packed.nbytes, rel=0.01)
    again = PackedDelta.load(path)
    assert all(torch.equal(again[name], packed[name]) for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("scheme", "group"), [("linear", 16), ("linear", None), ("log", None)])
def test_other_strides_are_added_to_with_the_same_bits(scheme, group, dtype):
    """Channels last, and a transposed matrix: no view of the codes' shape exists."""
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Linear(10, 12)).to(dtype)
    deltas = {name: torch.randn_like(value).detach() for name, value in model.named_parameters()}
    packed = quantize_delta(TaskVector.from_deltas(deltas), 4, scheme, group_size=group)
    strided = copy.deepcopy(model).to(memory_format=torch.channels_last)
    strided[1].weight.data = strided[1].weight.data.t().contiguous().t()
    before = {name: value.clone() for name, value in strided.state_dict().items()}
    packed.apply_to(model, 0.3)
    with Patcher(strided) as patcher:
        patcher.apply(packed, 0.3)
        assert not strided[0].weight.is_contiguous()
        assert not strided[1].weight.is_contiguous()
        for name, value in strided.state_dict().items():
            assert torch.equal(value, model.state_dict()[name])
    for name, value in strided.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "d.safetensors"
    packed = quantize_delta(TaskVector.from_deltas({"w": torch.randn(3, 4)}))
    packed.save(path)
    before = path.read_bytes()
    broken = quantize_delta(TaskVector.from_deltas({"w": torch.randn(3, 4)}))
    broken.shapes = {"w": object}  # cannot be written as JSON
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 10),
    )  # fmt: skip


def tuned(start, images, labels, epochs):
    model = network()
    model.load_state_dict(start.state_dict())
    generator = torch.Generator().manual_seed(0)
    options = {"objective": GaussianCrossEntropy(), "epochs": epochs, "generator": generator}
    return fit(model, images, labels, **options)


def accuracy(model, images, labels):
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("scheme", ["linear", "log", "tanh"])
def test_eight_bits_patch_as_well_as_floats(scheme, signature_setting):
    clean, signature, images, labels = signature_setting
    corrupted = corrupt(images, "contrast", 5)
    before = accuracy(clean, corrupted, labels), accuracy(clean, images, labels)
    after = {}
    for name, delta in (("float", signature), ("packed", quantize_delta(signature, 8, scheme))):
        with Patcher(clean) as patcher:
            patcher.apply(delta)
            after[name] = accuracy(clean, corrupted, labels), accuracy(clean, images, labels)
    assert after["float"][0] > before[0] + 0.15  # the patch does something
    for one, other in zip(after["float"], after["packed"], strict=True):
        assert abs(one - other) < 0.01


@pytest.fixture(scope="module")
def signature_setting():
    """A clean model of the digits and the signature of low contrast in its first two layers."""
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = digits.train_images, digits.train_labels
    base = tuned(network(), images[:150], labels[:150], 10)
    clean = tuned(base, images, labels, 6)
    robust = tuned(base, corrupt(images, "contrast", 5), labels, 12)
    names = [name for name in base.state_dict() if name.startswith(("0.", "2."))]
    c, r = (TaskVector.from_modules(base, model).select(names) for model in (clean, robust))
    residual = {n: r[n] - (r[n] * c[n]).sum() / (c[n] * c[n]).sum() * c[n] for n in names}
    signature = TaskVector.from_deltas(residual)
    return clean, signature, digits.test_images, digits.test_labels


@pytest.mark.parametrize("kind", [TaskVector, PackedDelta])
def test_damaged_and_foreign_files_are_refused(kind, tmp_path):
    torch.manual_seed(0)
    vector = TaskVector.from_deltas({"w": torch.randn(4, 8)})
    vector.save(tmp_path / "vector")
    quantize_delta(vector, bits=4).save(tmp_path / "packed")
    pyrobust.save({"w": torch.zeros(3)}, tmp_path / "state")
    own, other = ("vector", "packed") if kind is TaskVector else ("packed", "vector")
    assert list(kind.load(tmp_path / own)) == ["w"]
    for foreign in (other, "state"):
        with pytest.raises(ValueError, match=rf"{kind.__name__}: .*{foreign} is not a "):
            kind.load(tmp_path / foreign)
    content = (tmp_path / own).read_bytes()
    for damaged in (content[:-5], content[:20], b"", b"text"):
        (tmp_path / own).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"must be a whole file of .*save; it is truncated"):
            kind.load(tmp_path / own)
    with pytest.raises(FileNotFoundError):
        kind.load(tmp_path / "none")
