"""Task vectors, packed task vectors and patches: algebra, files, exact removal."""

import copy

import pytest
import torch
from torch import nn

from pyrobust import _native
from pyrobust.weights import PackedDelta, Patcher, TaskVector, quantize_delta, state_checksum


def network():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))


def pair():
    base, tuned = network(), network()
    tuned[1].running_mean.normal_()
    return base, tuned


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_base_plus_vector_is_the_tuned_model():
    base, tuned = pair()
    vector = TaskVector.from_modules(base, tuned)
    assert set(vector) == {name for name, _ in base.named_parameters()}
    vector.apply_to(base)
    for name, value in base.named_parameters():
        torch.testing.assert_close(value, tuned.state_dict()[name], rtol=0, atol=1e-6)


def test_algebra():
    a, b, c, d = (network().double().state_dict() for _ in range(4))
    x, y = TaskVector(a, b), TaskVector(c, d)
    for name in x:
        torch.testing.assert_close(((x + y) - y)[name], x[name])
        assert torch.equal(x.__neg__().__neg__()[name], x[name])
        assert torch.equal((2 * x)[name], (x * 2)[name])
    assert x.dot(y) == pytest.approx(sum(float((x[n] * y[n]).sum()) for n in x))
    assert x.cosine(x) == pytest.approx(1)
    assert x.cosine(-x) == pytest.approx(-1)
    assert x.cosine(0 * x) == 0
    assert (x.norm() ** 2) == pytest.approx(x.dot(x))


def test_buffers_are_a_choice():
    base, tuned = pair()
    states = base.state_dict(), tuned.state_dict()
    assert "1.running_mean" not in TaskVector(*states)
    kept = TaskVector(*states, include_buffers=True)
    assert torch.equal(kept["1.running_mean"], states[1]["1.running_mean"])
    assert "1.num_batches_tracked" not in kept


def test_scale_per_tensor():
    base, tuned = pair()
    vector, before = TaskVector.from_modules(base, tuned), snapshot(base)
    vector.apply_to(base, {name: float(i) for i, name in enumerate(vector)})
    for i, name in enumerate(vector):
        expected = before[name] + i * vector[name]
        torch.testing.assert_close(base.state_dict()[name], expected)
    packed, before = quantize_delta(vector, 8), snapshot(base)
    packed.apply_to(base, {name: float(i) for i, name in enumerate(vector)})
    for i, name in enumerate(vector):
        expected = before[name] + i * packed[name]
        torch.testing.assert_close(base.state_dict()[name], expected)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path, (base, tuned) = tmp_path / "v.safetensors", pair()
    TaskVector.from_modules(base, tuned).save(path)
    before = path.read_bytes()

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr("pyrobust._safetensors.os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        TaskVector.from_modules(tuned, base).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_files_keep_every_bit_and_the_base(tmp_path):
    base, tuned = pair()
    vector = TaskVector.from_modules(base, tuned)
    vector.save(tmp_path / "v.safetensors")
    again = TaskVector.load(tmp_path / "v.safetensors")
    assert same(vector, again)
    again.check_base(base.state_dict())
    with pytest.raises(ValueError, match="is not the base"):
        again.check_base(tuned.state_dict())
    assert state_checksum({"a": torch.ones(2)}) != state_checksum({"a": torch.ones(2, 1)})
    half = vector.astype(torch.bfloat16)
    half.save(tmp_path / "h.safetensors")
    assert same(half, TaskVector.load(tmp_path / "h.safetensors"))


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 8])
def test_packed_linear_error_is_half_a_step(bits, tmp_path):
    vector = TaskVector.from_modules(*pair())
    packed = quantize_delta(vector, bits, group_size=None)
    packed.save(tmp_path / "p.safetensors")
    again = PackedDelta.load(tmp_path / "p.safetensors")
    assert same(packed.unpack(), again.unpack())
    assert again.base_checksum == vector.base_checksum
    assert again.nbytes == packed.nbytes
    if bits >= 2:
        for name, value in vector.items():
            low, high = value.min().clamp(max=0), value.max().clamp(min=0)
            step = float(high - low) / (2**bits - 1)
            assert float((packed[name] - value).abs().max()) <= 0.5 * step * 1.002 + 1e-7


@pytest.mark.parametrize("scheme", ["log", "tanh"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_codebooks_take_the_nearest_level(scheme, bits, tmp_path):
    value = torch.randn(30, 7)
    value[0] = 0
    packed = quantize_delta(TaskVector.from_deltas({"w": value}), bits, scheme)
    packed.save(tmp_path / "p.safetensors")
    again = PackedDelta.load(tmp_path / "p.safetensors")["w"]
    assert torch.equal(again, packed["w"])
    assert len(again.unique()) <= 2**bits
    if scheme == "log":
        assert torch.equal(again[0], torch.zeros(7))
        assert torch.equal(again.sign(), value.sign()) or bits < 8
    if bits == 8:
        assert float((again - value).abs().max()) < 0.1
    # no code that is in use would serve an element better than its own
    levels = again.unique()
    best = (value[..., None] - levels).abs().amin(-1)
    torch.testing.assert_close((again - value).abs(), best)
    extreme = quantize_delta(TaskVector.from_deltas({"w": torch.tensor([-30.0, 30.0])}), 4, scheme)
    assert bool(torch.isfinite(extreme["w"]).all())


def test_removal_is_exact_in_any_order():
    base, tuned = pair()
    before = snapshot(base)
    first = TaskVector.from_modules(base, tuned)
    second = quantize_delta(TaskVector.from_modules(base, network()), 4)
    patcher = Patcher(base)
    patcher.apply(first, 0.3, "first")
    patcher.apply(second, 0.7, "second")
    patcher.remove("first")
    alone = copy.deepcopy(base)
    with Patcher(base) as unused:
        assert unused.active == ()
    assert patcher.active == ("second",)
    patcher.remove("second")
    assert same(before, base.state_dict())
    patcher.apply(second, 0.7)
    assert same(alone.state_dict(), base.state_dict())
    patcher.clear()
    assert same(before, base.state_dict())


@pytest.mark.parametrize("scheme", ["linear", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_vector_is_added_in_place(scheme, dtype):
    base, tuned = pair()
    packed = quantize_delta(TaskVector.from_modules(base, tuned), 4, scheme)
    base.to(dtype)[0].weight.data = base[0].weight.to(memory_format=torch.channels_last)
    before, floats = snapshot(base), packed.unpack()
    address = base[3].weight.data_ptr()
    assert packed.apply_to(base, 0.5) is base
    assert base[3].weight.data_ptr() == address
    for name, value in base.state_dict().items():
        if name in packed:
            expected = before[name] + 0.5 * floats[name].to(dtype)
            tolerance = 1e-6 if dtype == torch.float32 else 4e-3
            torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)
            assert not torch.equal(value, before[name]) or not floats[name].any()
        else:
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("scheme", ["linear", "tanh"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_packed_vector_on_halves_is_never_unpacked_and_is_undone(
    scheme, bits, dtype, monkeypatch
):
    base, tuned = pair()
    packed = quantize_delta(TaskVector.from_modules(base, tuned), bits, scheme)
    base.to(dtype)
    before, floats = snapshot(base), packed.unpack()

    def refuse(*_):
        raise AssertionError("the tensor was unpacked")

    monkeypatch.setattr(type(packed), "__getitem__", refuse)
    patcher = Patcher(base)
    patcher.apply(packed, 0.3, name="one")
    factor = float(torch.tensor(0.3, dtype=dtype))
    for name, delta in floats.items():
        expected = (before[name].float() + factor * delta.to(dtype).float()).to(dtype)
        assert torch.equal(base.state_dict()[name], expected)
    patcher.apply(packed, -0.7, name="two")
    patcher.remove("one")
    patcher.remove("two")
    assert same(before, base.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", ["float32", "as the model"])
def test_a_float_vector_on_halves_has_one_rounding_and_is_undone(dtype, stored):
    base, tuned = pair()
    vector = TaskVector.from_modules(base, tuned)
    vector = vector if stored == "float32" else vector.astype(dtype)
    base.to(dtype)
    before, patcher = snapshot(base), Patcher(base)
    versions = {name: value._version for name, value in base.named_parameters()}
    patcher.apply(vector, 0.3, "one")
    factor = float(torch.tensor(0.3, dtype=dtype))
    for name, delta in vector.items():
        expected = (before[name].float() + factor * delta.to(dtype).float()).to(dtype)
        assert torch.equal(base.state_dict()[name], expected)
        assert base.get_parameter(name)._version > versions[name]
    patcher.apply(vector, -0.7, "two")
    patcher.remove("one")
    patcher.remove("two")
    assert same(before, base.state_dict())
    with pytest.raises(ValueError, match="target must have shape"):
        vector.add_to_("3.bias", torch.zeros(4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_vector_is_added_to_rows_that_lie_apart(dtype):
    packed = quantize_delta(TaskVector.from_deltas({"weight": torch.randn(20, 30)}), 3)
    layer, whole = nn.Linear(30, 20), torch.randn(20, 40).to(dtype)
    layer.weight.data = whole[:, 5:35]
    before, dense = whole.clone(), whole[:, 5:35].contiguous()
    packed.add_to_("weight", dense, 0.3)
    packed.apply_to(layer, 0.3)
    assert torch.equal(layer.weight, dense)
    assert torch.equal(whole[:, :5], before[:, :5])
    assert torch.equal(whole[:, 35:], before[:, 35:])


def test_memory_of_originals_is_kept_between_patches_but_not_their_values():
    base, tuned = pair()
    vector = TaskVector.from_modules(base, tuned)
    patcher = Patcher(base)
    patcher.apply(vector, name="one")
    patcher.remove("one")
    with torch.no_grad():
        base[0].weight.add_(1.0)  # trained in between
    before = snapshot(base)
    patcher.apply(vector, name="one")
    patcher.remove("one")
    assert same(before, base.state_dict())
    base.double()
    before = snapshot(base)
    patcher.apply(vector, name="one")
    patcher.clear()
    assert same(before, base.state_dict())


def test_strength_is_linear_and_zero_is_nothing():
    base, tuned = pair()
    vector, before = TaskVector.from_modules(base, tuned), snapshot(base)
    with Patcher(base) as patcher:
        patcher.apply(vector, 0.0)
        assert same(before, base.state_dict())
        patcher.apply(vector, 0.25)
        patcher.apply(vector, 0.5)
        twice = snapshot(base)
    with Patcher(base) as patcher:
        patcher.apply(vector, 0.75)
        for name, value in base.state_dict().items():
            torch.testing.assert_close(value, twice[name], rtol=0, atol=1e-6)
    assert same(before, base.state_dict())


def test_two_patches_are_their_sum():
    base, tuned = pair()
    first, second = (TaskVector.from_modules(base, model) for model in (tuned, network()))
    with Patcher(base) as patcher:
        patcher.apply(first, 0.7)
        patcher.apply(second, -0.4)
        one_by_one = snapshot(base)
    with Patcher(base) as patcher:
        patcher.apply(0.7 * first - 0.4 * second)
        for name, value in base.state_dict().items():
            torch.testing.assert_close(value, one_by_one[name], rtol=0, atol=1e-6)


def test_an_exception_in_the_middle_changes_nothing():
    class Failing(TaskVector):
        def __getitem__(self, name):
            if name == self.last:
                raise KeyboardInterrupt
            return super().__getitem__(name)

    base, tuned = pair()
    vector = Failing(base.state_dict(), tuned.state_dict())
    before = snapshot(base)
    patcher = Patcher(base)
    vector.last = None
    whole = dict(vector)
    # fails after three tensors were changed, when shapes had been checked
    vector.items = lambda: whole.items()
    vector.last = list(vector)[3]
    with pytest.raises(KeyboardInterrupt):
        patcher.apply(vector)
    assert same(before, base.state_dict())
    assert patcher.active == ()
    with pytest.raises(ValueError, match="must be one of"):
        _fail_while_patched(base, TaskVector.from_modules(base, tuned))
    assert same(before, base.state_dict())


@pytest.mark.parametrize("place", ["_rooms", "_summand", "_add_apart_"])
def test_an_exception_while_saving_or_adding_a_packed_patch_changes_nothing(place, monkeypatch):
    base, tuned = (nn.Sequential(*network(), *(nn.Conv2d(3, 4, 3) for _ in range(3))) for _ in "ab")
    base.to(memory_format=torch.channels_last)  # kernels do not take the last three weights
    packed, before = quantize_delta(TaskVector.from_modules(base, tuned), 8), snapshot(base)
    first = TaskVector.from_modules(base, copy.deepcopy(tuned))
    owner, last = (Patcher, 1) if place == "_rooms" else (PackedDelta, 3)
    whole, calls = getattr(owner, place), []

    def failing(self, *rest):
        calls.append(rest)
        if len(calls) == last:
            # kernels have added to most of the others before one that they do not take
            assert (place == "_add_apart_") != torch.equal(base[3].weight, patched["3.weight"])
            raise KeyboardInterrupt
        return whole(self, *rest)

    patcher = Patcher(base)
    if place != "_rooms":  # beneath another patch that stays on
        patcher.apply(first, 0.5, "first")
    patched = snapshot(base)
    monkeypatch.setattr(owner, place, failing)
    with pytest.raises(KeyboardInterrupt):
        patcher.apply(packed)
    assert len(calls) == last
    assert same(patched, base.state_dict())
    monkeypatch.undo()
    patcher.apply(packed)
    patcher.clear()
    assert same(before, base.state_dict())


@pytest.mark.parametrize("scheme", ["linear", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interruption_right_after_the_sums_changes_nothing(scheme, dtype, monkeypatch):
    base, tuned = (model.to(dtype) for model in pair())
    packed = quantize_delta(TaskVector.from_modules(base, tuned), 4, scheme)
    before, patcher, whole, calls = snapshot(base), Patcher(base), _native.add_all, []

    def interrupted(additions, threads):
        whole(additions, threads)
        calls.append(len(additions))
        raise KeyboardInterrupt

    monkeypatch.setattr(_native, "add_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patcher.apply(packed)
    assert calls == [len(packed)]  # one call for all
    assert same(before, base.state_dict())
    monkeypatch.undo()
    with torch.no_grad():
        base[0].weight.add_(1.0)  # nothing of the interrupted patch is kept
    before = snapshot(base)
    patcher.apply(packed)
    assert not same(before, base.state_dict())
    patcher.clear()
    assert same(before, base.state_dict())


def _fail_while_patched(model, vector):
    with Patcher(model) as patcher:
        patcher.apply(vector)
        patcher.remove("an unknown patch")


def test_refusals():
    base, tuned = pair()
    states = base.state_dict(), tuned.state_dict()
    with pytest.raises(ValueError, match=r"missing 0\.bias"):
        TaskVector(states[0], {k: v for k, v in states[1].items() if k != "0.bias"})
    with pytest.raises(ValueError, match="unexpected more"):
        TaskVector(states[0], {**states[1], "more": torch.ones(1)})
    with pytest.raises(ValueError, match="must have one shape"):
        TaskVector(states[0], {**states[1], "0.bias": torch.ones(1)})
    with pytest.raises(TypeError, match="must have one dtype"):
        TaskVector(states[0], {**states[1], "0.bias": torch.ones(4).double()})
    with pytest.raises(ValueError, match="must be finite"):
        TaskVector(states[0], {**states[1], "0.bias": torch.full((4,), torch.nan)})
    vector = TaskVector(*states)
    with pytest.raises(ValueError, match="must hold every tensor"):
        vector.apply_to(nn.Linear(64, 3))
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="must not be tied"):
        TaskVector.from_modules(tied, tied)
    with pytest.raises(ValueError, match="must not be tied"):
        Patcher(tied).apply(TaskVector.from_deltas({"0.bias": torch.ones(2)}))
    for delta in (vector, quantize_delta(vector)):
        delta.check_base(states[0])
        with pytest.raises(ValueError, match="is not the base"):
            delta.check_base(states[1])
        with pytest.raises(ValueError, match=r"missing 0\.bias"):
            delta.check_base({k: v for k, v in states[0].items() if k != "0.bias"})
    with pytest.raises(ValueError, match="must hold every tensor"):
        quantize_delta(vector).apply_to(nn.Linear(64, 3))
    for delta in (vector, quantize_delta(vector)):
        with pytest.raises(ValueError, match=r"scale must be finite; got inf for '0\.weight'"):
            delta.apply_to(base, float("inf"))
        with pytest.raises(ValueError, match=r"missing 0\.bias"):
            delta.apply_to(base, {n: 1.0 for n in vector if n != "0.bias"})
    wide = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(64, 3))
    for apply in (vector.apply_to, Patcher(wide).apply):
        with pytest.raises(ValueError, match=r"'0\.weight' must have one shape"):
            apply(*([wide] if apply == vector.apply_to else [vector]))
    counted = copy.deepcopy(base)
    counted[1].running_mean = torch.zeros(4, dtype=torch.int64)
    step = TaskVector.from_deltas({"1.running_mean": torch.ones(4)})
    with pytest.raises(TypeError, match=r"'1\.running_mean' must be floating point"):
        step.apply_to(counted)
    with pytest.raises(TypeError, match=r"'1\.running_mean' must be floating point"):
        Patcher(counted).apply(quantize_delta(step))
    patcher = Patcher(base)
    patcher.apply(vector, name="one")
    with pytest.raises(ValueError, match="must be new"):
        patcher.apply(vector, name="one")
    with pytest.raises(ValueError, match="must be one of"):
        patcher.remove("two")
    with pytest.raises(ValueError, match="scheme must be one of"):
        quantize_delta(vector, 8, "cubic")


def test_between_takes_two_modules_or_two_states():
    torch.manual_seed(0)
    a, b = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))
    of_modules = TaskVector.between(a, b)
    of_states = TaskVector.between(a.state_dict(), b.state_dict())
    assert list(of_modules) == list(of_states) == ["0.weight", "0.bias"]
    for name, value in of_states.items():
        assert torch.equal(of_modules[name], value)
        assert torch.equal(value, b.state_dict()[name] - a.state_dict()[name])
    with pytest.raises(TypeError, match=r"between: b must be a state dict.*; got Sequential"):
        TaskVector.between(a.state_dict(), b)
    with pytest.raises(TypeError, match=r"Patcher: model must be a torch\.nn\.Module; got dict"):
        Patcher({})
