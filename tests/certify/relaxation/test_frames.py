"""Windows of coefficients: the same bounds as with coefficients of whole values."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrobust import Interval
from pyrobust.certify.relaxation import crown
from pyrobust.certify.relaxation.elements import element_bounds, pair_bounds
from pyrobust.certify.relaxation.frames import WHOLE, Frame, Part, Window, cleaned, joined, spread
from pyrobust.certify.relaxation.graph import trace_graph


class Branches(nn.Module):
    """Two paths with windows of different sizes, that meet again."""

    def __init__(self, stride):
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, stride=stride, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.wide = nn.Conv2d(3, 3, 5, padding=2)
        self.narrow = nn.Conv2d(3, 3, (1, 3), padding=(0, 1))
        self.last = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x):
        y = F.relu(self.norm(self.first(x)))
        z = F.relu(self.wide(y)) + self.narrow(y)
        return self.last(torch.relu(z + y))


def chain(*layers):
    return nn.Sequential(*layers)


NETWORKS = {
    "branches": lambda: Branches(1),
    "branches, stride 2": lambda: Branches(2),
    "strides": lambda: chain(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 4, 2, 1), nn.Tanh(),
        nn.Conv2d(4, 2, 3, 2, 1),
    ),
    "convolutions alone": lambda: chain(
        nn.Conv2d(1, 3, 3, padding=2), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(),
        nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1),
    ),
    "groups and gaps": lambda: chain(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2, dilation=2),
        nn.ReLU(), nn.Conv2d(4, 2, 3, padding=2, dilation=2),
    ),
    "pooling": lambda: chain(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(3, 2, 3, padding=1)
    ),
    "one place": lambda: chain(
        nn.Conv2d(1, 3, 4, 4), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(),
        nn.Conv2d(3, 2, 3, 2, 1),
    ),
}  # fmt: skip


def problem_of(name, rounding, batch=3):
    torch.manual_seed(0)
    size = (4, 4) if name == "one place" else (12, 11)
    model = NETWORKS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    box = Interval.ball(torch.randn(batch, 1, *size).double(), 0.3, rounding=rounding)
    graph, root = trace_graph(model.double(), "test")
    work = crown.Work("crown", 1 << 28, 1, 0, 0.5, intersect=True, lower_only=True, plain=None)
    return crown._forward(graph, root, box, True, work)[:2]


@pytest.mark.parametrize("rounding", ["nearest", "real"])
@pytest.mark.parametrize("name", NETWORKS)
def test_windows_give_the_bounds_of_whole_values(name, rounding):
    problem, output = problem_of(name, rounding)
    count = problem.shape(output).numel()
    elements = torch.arange(count)
    whole = element_bounds(problem, output, elements, WHOLE).unflatten(0, (2, -1))
    images = torch.arange(3).repeat_interleave(count)
    pairs = pair_bounds(problem, output, images, elements.repeat(3)).unflatten(1, (3, -1))
    torch.testing.assert_close(pairs.transpose(1, 2), whole, rtol=1e-9, atol=1e-9)
    # any subset of pairs, as of the elements that intervals leave undecided
    some = torch.randperm(3 * count)[:7].sort().values
    few = pair_bounds(problem, output, some // count, some % count)
    torch.testing.assert_close(few, pairs.flatten(1)[:, some], rtol=1e-9, atol=1e-9)


def test_a_window_over_the_border_meets_zeros():
    value = torch.arange(12.0).reshape(1, 1, 3, 4) + 1
    places = torch.tensor([[0, 2], [0, 3]])
    window = Window.at(places).before((1, 1), (1, 1))
    frame = Frame(torch.tensor([0, 0]), window)
    met = frame.take(value, torch.Size([3, 3]))[:, 0]
    assert met[0].tolist() == [[0, 0, 0], [0, 1, 2], [0, 5, 6]]
    assert met[1].tolist() == [[7, 8, 0], [11, 12, 0], [0, 0, 0]]
    part = Part(torch.ones(2, 2, 1, 3, 3), frame, clean=False)
    inside = cleaned(part, torch.Size([1, 3, 4])).a[0, :, 0]
    assert torch.equal(inside, (met > 0).float())
    whole = spread(part, torch.Size([1, 3, 4]))
    assert torch.equal(whole.a[1, 1, 0], torch.tensor([[0.0] * 4, [0, 0, 1, 1], [0, 0, 1, 1]]))


@pytest.mark.parametrize("same_stride", [True, False])
def test_parts_add_up(same_stride):
    torch.manual_seed(0)
    places = torch.tensor([[1, 3, 4], [2, 2, 0]])
    images = torch.tensor([0, 0, 1])
    base = Window.at(places)
    other = base.before((1, 1), (2, 1)) if same_stride else base.before((2, 2), (1, 1))
    shape = torch.Size([2, 10, 9])
    one = Part(torch.randn(2, 3, 2, 2, 3), Frame(images, base.before((1, 1), (1, 0))), clean=False)
    two = Part(torch.randn(2, 3, 2, 5, 4), Frame(images, other), clean=False)
    total = spread(joined(one, two, shape), shape).a
    torch.testing.assert_close(total, spread(one, shape).a + spread(two, shape).a)
