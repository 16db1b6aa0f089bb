"""The memory that a bound takes, as torch's allocator counts it, against what it may take."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pyrobust import Interval, ops
from pyrobust.certify import bound
from pyrobust.certify.relaxation import elements, hidden


@pytest.fixture(autouse=True)
def ends_of_torch():
    """No ends in memory that torch's allocator does not count."""
    before = ops.set_kept_memory(0)
    yield
    ops.set_kept_memory(before)


def peak(call):
    """Bytes that torch's allocator held at most beyond the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held, most = 0, 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 64, 40), nn.ReLU(), nn.Linear(40, 10),
    ).eval()  # fmt: skip


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.second, self.third = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.last = nn.Linear(4 * 64, 10)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last((x + self.third(self.second(x).relu())).relu().flatten(1))


def residual():
    torch.manual_seed(0)
    return Residual().eval()


def dense():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(256, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(),
        nn.Linear(100, 10),
    ).eval()  # fmt: skip


# with limits in MiB
CASES = {
    "convolutions": (convolutions, (12, 6)),
    "residual": (residual, (8, 4)),
    "dense": (dense, (3, 2)),
}


@pytest.mark.parametrize("rounding", ["nearest", "real"])
@pytest.mark.parametrize("method", ["crown-ibp", "crown", "alpha-crown"])
@pytest.mark.parametrize("name", CASES)
def test_a_bound_keeps_within_its_memory(name, method, rounding):
    make, limits = CASES[name]
    model, x = make(), torch.rand(6, 1, 16, 16)
    box = Interval.ball(x, 0.05, rounding=rounding)
    with torch.no_grad():
        whole = bound(model, box, method=method, iterations=1)
        for mebibytes in limits:
            limit = int(mebibytes * 2**20)
            split = {}
            used = peak(
                lambda limit=limit, split=split: split.update(
                    bounds=bound(model, box, method=method, iterations=1, max_memory=limit)
                )
            )
            assert used <= 1.1 * limit
            torch.testing.assert_close(split["bounds"].lower, whole.lower, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(split["bounds"].upper, whole.upper, rtol=1e-3, atol=1e-3)
        if method == "alpha-crown" and name == "convolutions":
            free = peak(lambda: bound(model, box, method=method, iterations=1))
            assert free > 1.1 * limits[-1] * 2**20  # or the limit would have meant nothing


@pytest.mark.parametrize("rounding", ["nearest", "real"])
def test_intervals_keep_within_their_memory(rounding):
    between = nn.LeakyReLU(0.1)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), between, nn.Conv2d(8, 1, 3, padding=1))
    box = Interval.ball(torch.rand(96, 1, 16, 16), 0.05, rounding=rounding)
    with torch.no_grad():
        whole = model(box)
        free = peak(lambda: bound(model, box))
        for limit in (free // 2, free // 4):
            split = {}
            used = peak(
                lambda limit=limit, split=split: split.update(
                    bounds=bound(model, box, max_memory=limit)
                )
            )
            allowed = 1.1 * limit + 16 * whole.numel()  # the result itself, twice
            assert used <= allowed < free
            torch.testing.assert_close(split["bounds"].lower, whole.lower, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown", "alpha-crown"])
def test_a_limit_below_one_image_and_one_function_is_refused(method):
    model, box = dense(), Interval.ball(torch.rand(3, 1, 16, 16), 0.05)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"bound: max_memory must be at least \d+ bytes"):
            bound(model, box, method=method, max_memory=1000)
        with pytest.raises(ValueError) as refusal:
            bound(model, box, method=method, max_memory=1000)
        least = int(str(refusal.value).split("at least ")[1].split(" bytes")[0])
        used = peak(lambda: bound(model, box, method=method, iterations=1, max_memory=least))
        assert used <= 1.1 * least


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown", "alpha-crown"])
def test_with_gradients_a_limit_is_refused(method):
    model, box = dense(), Interval.ball(torch.rand(1, 1, 16, 16), 0.05, rounding="nearest")
    message = "bound: max_memory must not be given where gradients are recorded.* got 1000000"
    with pytest.raises(ValueError, match=message):
        bound(model, box, method=method, max_memory=10**6)
    frozen = dense().requires_grad_(False)
    graded = Interval.ball(torch.rand(1, 1, 16, 16), 0.05).requires_grad_()
    with pytest.raises(ValueError, match=message):
        bound(frozen, graded, method=method, max_memory=10**6)
    assert not bound(frozen, box, method=method, max_memory=1 << 28, iterations=1).requires_grad


def test_with_gradients_nothing_is_divided():
    model, box = dense(), Interval.ball(torch.rand(3, 1, 16, 16), 0.05, rounding="nearest")
    for method in ("ibp", "crown-ibp"):
        assert bound(model, box, method=method).lower.requires_grad


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(6, 16), nn.Linear(16, 3)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        x = torch.relu(self.embed(x))
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) * 0.25, -1)
        return self.out((weights @ self.v(x)).mean(1))


@pytest.mark.parametrize("mebibytes", [16, 4])
@torch.no_grad()
def test_attention_keeps_within_its_memory(mebibytes):
    torch.manual_seed(0)
    model, limit = Attention().eval(), mebibytes << 20
    box = Interval.ball(torch.randn(4, 12, 6), 0.01, rounding="nearest")
    used = peak(lambda: bound(model, box, method="crown", max_memory=limit))
    assert used <= 1.1 * limit


def test_a_model_that_mixes_images_is_not_divided():
    class Mixing(nn.Module):
        def forward(self, x):
            return x + x.flip(0)

    box = Interval.ball(torch.ones(4, 3), 0.1)  # the images are alike
    with pytest.raises(NotImplementedError, match="must keep the batch as its first axis"):
        bound(Mixing(), box, method="crown", max_memory=1 << 20)


def test_specifications_of_single_images_are_divided_with_them():
    model, x = convolutions(), torch.rand(5, 1, 16, 16)
    box = Interval.ball(x, 0.02)
    spec = torch.randn(5, 3, 10)
    with torch.no_grad():
        whole = bound(model, box, spec, "crown")
        parts = bound(model, box, spec, "crown", max_memory=3 << 20)
    torch.testing.assert_close(parts.lower, whole.lower, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.upper, whole.upper, rtol=1e-4, atol=1e-5)


def test_elements_of_sums_are_pulled_back_in_windows(monkeypatch):
    model, box = residual().double(), Interval.ball(torch.rand(2, 1, 16, 16).double(), 0.05)
    with torch.no_grad():
        windows = bound(model, box, method="crown")
        used = peak(lambda: bound(model, box, method="crown"))
        for module in (elements, hidden):
            monkeypatch.setattr(module, "starts_in_window", lambda problem, node: False)
        whole = bound(model, box, method="crown")
        assert used < 0.7 * peak(lambda: bound(model, box, method="crown"))
    torch.testing.assert_close(windows.lower, whole.lower, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(windows.upper, whole.upper, rtol=1e-9, atol=1e-9)
