"""trace_spec: permuted networks compute the same function, whatever they are made of."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from pyrobust.weights import (
    apply_permutation,
    invert_permutation,
    mlp_spec,
    resnet_spec,
    trace_spec,
)


class Block(nn.Module):
    def __init__(self, width, out, stride=1, groups=1, inner=None):
        super().__init__()
        inner = inner or out
        self.conv1 = nn.Conv2d(width, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, out, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if width != out or stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(8, 8, groups=min(groups, 8)), Block(8, 8))
        self.layer2 = nn.Sequential(Block(8, 16, 2, groups, 16), Block(16, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class ViT(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.kind, width = attention, 24
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if attention == "module":
            self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        else:
            self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))
        self.head = nn.Linear(width, 7)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        y = self.norm1(x)
        x = x + (self.attention(y, y, y)[0] if self.kind == "module" else self.heads(y))
        return self.head((x + self.mlp(self.norm2(x)))[:, 0])

    def heads(self, y):
        batch, tokens, width = y.shape
        split = self.attention(y).reshape(batch, tokens, 3, 4, width // 4)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q @ k.transpose(-2, -1)) * 0.3).softmax(dim=-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Concatenating(nn.Module):
    """Concatenation, a channel gate, a flatten and a sum over units."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.gate, self.c, self.d = nn.Linear(6, 6), nn.Linear(160, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        z = torch.cat([x, self.b(x)], 1)
        z = torch.relu(self.c(z.view(z.size(0), -1)))
        return self.d(z) + z.sum(1, keepdim=True)


def sequential(*layers):
    return nn.Sequential(*layers)


MODELS = {
    "mlp": (lambda: sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), (2, 6), 1),
    "vgg": (
        lambda: sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3), nn.PReLU(8), nn.Flatten(), nn.Linear(72, 10), nn.Tanh(),
            nn.Linear(10, 4),
        ),
        (2, 3, 12, 12),
        3,
    ),
    "groupnorm": (
        lambda: sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 2, 1)),
        (2, 3, 6, 6),
        1,
    ),
    "resnet": (ResNet, (2, 3, 8, 8), 6),
    "resnext": (lambda: ResNet(groups=4), (2, 3, 8, 8), 4),
    "depthwise": (lambda: ResNet(groups=8), (2, 3, 8, 8), 4),
    "vit-module": (lambda: ViT("module"), (2, 1, 8, 8), 3),
    "vit-fused": (lambda: ViT("fused"), (2, 1, 8, 8), 3),
    "vit-written-out": (lambda: ViT("plain"), (2, 1, 8, 8), 3),
    "concatenation": (Concatenating, (2, 1, 4, 4), 3),
}  # fmt: skip


def disturbed(model):
    """A model whose batch norms are not at their starting point."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_any_permutation_preserves_the_function(name):
    make, shape, count = MODELS[name]
    model, x = disturbed(make()).double(), torch.randn(shape, dtype=torch.float64)
    spec, state = trace_spec(model, x), model.state_dict()
    assert len(spec.sizes) == count, (spec.sizes, spec.notes)
    perm = {p: torch.randperm(size) for p, size in spec.sizes.items()}
    moved = apply_permutation(state, perm, spec)
    assert sum(not torch.equal(moved[key], state[key]) for key in state) >= len(state) // 2
    torch.testing.assert_close(functional_call(model, moved, (x,)), model(x), rtol=0, atol=1e-12)
    for key, value in state.items():
        if value.ndim > 1:
            svd = torch.linalg.svdvals
            torch.testing.assert_close(svd(moved[key].flatten(1)), svd(value.flatten(1)))
    back = apply_permutation(moved, invert_permutation(perm), spec)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_traced_and_written_specs_agree():
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))
    traced = trace_spec(model, torch.zeros(1, 6))
    written = mlp_spec(["0", "2", "4"], sizes=[9, 7])
    assert dict(traced.axes) == dict(written.axes)
    assert traced.sizes == written.sizes


def test_traced_and_read_resnet_specs_agree_up_to_names():
    model = ResNet()
    traced, read = trace_spec(model, torch.zeros(1, 3, 8, 8)), resnet_spec(model.state_dict())
    pairs = set()
    for key in traced.axes:
        pairs |= set(zip(traced.axes[key], read.axes[key], strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_unknown_operations_pin_and_say_so():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(torch.cumsum(self.a(x), dim=1))

    spec = trace_spec(Sorted(), torch.zeros(1, 4))
    assert spec.sizes == {}
    assert "no rule for cumsum" in spec.notes[0]


def test_a_layer_used_twice_closes():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.b(torch.relu(self.a(x)))))))

    spec = trace_spec(Twice(), torch.zeros(1, 4))
    assert spec.axes["b.weight"] == spec.axes["b.weight"][::-1] == ("P_a", "P_a")


def test_tracing_leaves_the_model_as_it_was():
    model = ResNet().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace_spec(model, torch.randn(2, 3, 8, 8))
    assert model.training
    assert model.bn1.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_refusals():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="must not be tied"):
        trace_spec(tied, torch.zeros(1, 4))

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TypeError, match="cannot trace Branching"):
        trace_spec(Branching(), torch.zeros(1, 4))

    spec = mlp_spec(["0", "1"], sizes=[4])
    state = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict()
    identity = {"P_0": torch.arange(4)}
    with pytest.raises(ValueError, match=r"cover every tensor; not extra"):
        apply_permutation({**state, "extra": torch.ones(1)}, identity, spec)
    with pytest.raises(ValueError, match=r"missing 1\.bias"):
        apply_permutation({k: v for k, v in state.items() if k != "1.bias"}, identity, spec)
    with pytest.raises(ValueError, match="does not close"):
        apply_permutation({**state, "1.weight": torch.ones(2, 5)}, identity, spec)
    with pytest.raises(ValueError, match="must be a permutation of 0"):
        apply_permutation(state, {"P_0": torch.tensor([0, 1, 1, 2])}, spec)
    with pytest.raises(ValueError, match="use trace_spec"):
        resnet_spec(state)
    grouped = ResNet(groups=4).state_dict()  # names do not tell groups; the sizes do
    with pytest.raises(ValueError, match=r"conv2\.weight'; its shape is .*does not close"):
        resnet_spec(grouped)
    attention = nn.Sequential(nn.Linear(3, 4), nn.MultiheadAttention(4, 2)).state_dict()
    with pytest.raises(ValueError, match=r"cover every tensor; not 1\.in_proj_weight"):
        mlp_spec(["0", "1.out_proj"], sizes=[4]).check(attention)
