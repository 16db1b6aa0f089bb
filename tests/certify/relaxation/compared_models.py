"""Small models whose weights are sines, which other libraries can bound as well."""

import math

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["MODELS", "case"]


def filled(model):
    """The model with each parameter a sampled sine, scaled by its fan-in; norms' weights near 1."""
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            n = p.numel()
            wave = torch.sin(1.7 * torch.arange(n, dtype=torch.float64) * (k + 1) + k)
            fan = n // p.shape[0] if p.ndim > 1 else 4
            value = wave / math.sqrt(fan)
            if k in getattr(model, "near_one", ()):
                value = 1 + 0.2 * wave
            p.copy_(value.reshape(p.shape))
    return model.eval()


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.out(F.relu(x.flatten(1)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        w = torch.softmax(torch.matmul(q, k.transpose(1, 2)) / 2.0, dim=-1)
        return self.out(torch.matmul(w, v).flatten(1))


class Softmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.softmax(self.a(x), dim=-1))


class Norm(nn.Module):
    near_one = (2,)

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(F.relu(self.norm(self.a(x))))


class Two(nn.Module):
    """``function(a(x), b(x))`` before a linear layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a, self.b, self.out = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.function(self.a(x), self.b(x)))


def gate():
    return Two(lambda a, b: F.relu(a) * torch.sigmoid(b))


def quotient():
    return Two(lambda a, b: a / (torch.exp(b) + 0.5))


MODELS = {
    "max pooling": (Pooled, (1, 8, 8)),
    "attention": (Attention, (3, 4)),
    "softmax": (Softmax, (6,)),
    "layer norm": (Norm, (6,)),
    "gate": (gate, (6,)),
    "quotient": (quotient, (6,)),
}


def case(name):
    """The model and ``(2, ...)`` inputs."""
    make, shape = MODELS[name]
    count = 2 * math.prod(shape)
    x = torch.cos(2.3 * torch.arange(count, dtype=torch.float64)).reshape(2, *shape)
    return filled(make()), x.float()
