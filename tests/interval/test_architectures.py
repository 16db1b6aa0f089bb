"""Networks built as timm builds them, run unchanged on boxes; training steps in two processes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrobust import Interval

from ..two_processes import run_two_processes


class Bottleneck(nn.Module):
    """timm's: 1x1, 3x3 with the stride, 1x1, and average pooling before the shortcut's 1x1."""

    expansion = 4

    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        outplanes = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(planes), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(planes), nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(planes, outplanes, 1, bias=False)
        self.bn3, self.act3 = nn.BatchNorm2d(outplanes), nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inplanes != outplanes:
            pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
            self.downsample = nn.Sequential(
                pool if stride > 1 else nn.Identity(),
                nn.Conv2d(inplanes, outplanes, 1, bias=False),
                nn.BatchNorm2d(outplanes),
            )

    def forward(self, x):
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act3(x)


class ResNet(nn.Module):
    """Stem of 7x7 and max pooling, stages of bottlenecks, global pooling, dropout, linear."""

    def __init__(self, width=4, classes=5):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Bottleneck(width, width), Bottleneck(4 * width, width))
        self.layer2 = nn.Sequential(Bottleneck(4 * width, width, 2))
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
        self.drop_rate, self.fc = 0.1, nn.Linear(4 * width, classes)

    def forward(self, x):
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.global_pool(self.layer2(self.layer1(x)))
        return self.fc(F.dropout(x, p=self.drop_rate, training=self.training))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(0.1 * torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Attention(nn.Module):
    """timm's: one projection for query, key and value, fused or explicit attention."""

    def __init__(self, dim, num_heads, fused):
        super().__init__()
        self.num_heads, self.head_dim, self.fused = num_heads, dim // num_heads, fused
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.Identity()

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        else:
            x = (q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class VisionTransformer(nn.Module):
    """Patches by a convolution, class token, position, pre-norm blocks with LayerScale."""

    def __init__(self, dim=8, fused=True):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, dim) * 0.02)
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.attn, self.ls1 = Attention(dim, 2, fused), LayerScale(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * dim, dim)
        )
        self.ls2, self.head = LayerScale(dim), nn.Linear(dim, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.pos_embed
        x = x + self.ls1(self.attn(self.norm1(x)))
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return self.head(self.norm(x)[:, 0])


MODELS = {
    "resnet": ResNet,
    "vit, fused attention": VisionTransformer,
    "vit, explicit attention": lambda: VisionTransformer(fused=False),
}


@pytest.mark.parametrize("rounding", ["real", "deployed"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_they_run_unchanged_and_contain_what_they_compute(name, rounding):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.train()(torch.rand(8, 3, 32, 32))  # batch norm sees some data
    model.eval()
    exact = copy.deepcopy(model).double()
    x = torch.rand(2, 3, 32, 32)
    box = Interval.ball(x, 1e-4, clamp=(0, 1), rounding=rounding)
    bounds = model(box)
    assert float((bounds.upper - bounds.lower).max()) < 10
    for i in range(20):
        share = torch.rand_like(x) if i % 2 else torch.rand_like(x).round()
        point = torch.lerp(box.lower, box.upper, share)
        point = torch.minimum(torch.maximum(point, box.lower), box.upper)
        value = exact(point.double())
        slack = 1e-12 * (1 + value.abs())
        low, high = bounds.lower.double(), bounds.upper.double()
        assert bool(((low <= value + slack) & (value - slack <= high)).all())
        if rounding == "deployed":
            assert bool(bounds.contains(model(point)).all())


@pytest.mark.skipif(
    tuple(int(v) for v in torch.__version__.split(".")[:2]) < (2, 13),
    reason="older torch does not trace objects with __torch_function__",
)
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_they_compile(name):
    """Whole, but for torch.cat: dynamo does not look for boxes in its list and leaves the graph."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    box = Interval.ball(torch.rand(1, 3, 32, 32), 1e-4)
    expected = model(box)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=name == "resnet")(box)
    torch.testing.assert_close(compiled.lower, expected.lower, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled.upper, expected.upper, rtol=1e-4, atol=1e-5)


def test_autocast_is_refused_with_its_remedy():
    model, box = MODELS["resnet"]().eval(), Interval.ball(torch.rand(1, 3, 32, 32), 1e-3)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype), pytest.raises(RuntimeError, match="must be off"):
            model(box)
    with torch.autocast("cpu"), torch.autocast("cpu", enabled=False):
        assert model(box).shape == (1, 5)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def worst_case_step(model, x):
    bounds = model(Interval.ball(x, 0.1))
    (bounds.upper - bounds.lower).square().mean().backward()


def one_of_two(rank):
    model = nn.parallel.DistributedDataParallel(small())
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    worst_case_step(model, x[4 * rank : 4 * rank + 4])
    return [p.grad for p in model.module.parameters()]


def test_two_processes_have_the_gradients_of_one(tmp_path):
    first, second = run_two_processes(one_of_two, tmp_path)
    model = small()
    worst_case_step(model, torch.randn(8, 6, generator=torch.Generator().manual_seed(1)))
    for a, b, parameter in zip(first, second, model.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, parameter.grad, rtol=1e-4, atol=1e-6)
