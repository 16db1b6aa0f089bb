"""Products by oneDNN: what torch.mm gives, with its gradients, under its transforms."""

import pytest
import torch

from pyrobust.ops import _dense_product
from pyrobust.ops._dense_product import product


def matrices(requires_grad=False):
    torch.manual_seed(0)
    a, b = torch.randn(70, 60), torch.randn(60, 50)
    return a.requires_grad_(requires_grad), b.requires_grad_(requires_grad)


def served(a, b):
    return _dense_product._suits(a, b)


@pytest.mark.skipif(_dense_product._linear is None, reason="torch was built without oneDNN")
def test_products_of_some_size_go_to_onednn():
    a, b = matrices()
    assert served(a, b)
    assert not served(a[:1, :1], b[:1])  # too small to pay
    assert not served(a.double(), b.double())
    assert not served(a.unsqueeze(0), b)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("available", [True, False])
def test_the_product_of_matrices(transposed, available, monkeypatch):
    a, b = matrices()
    if transposed:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    if not available:
        monkeypatch.setattr(_dense_product, "_linear", None)
    exact = a.double() @ b.double()
    torch.testing.assert_close(product(a, b).double(), exact, rtol=1e-5, atol=1e-5)


def test_gradients_of_both_and_of_themselves():
    a, b = matrices(requires_grad=True)
    torch.manual_seed(1)
    weights = torch.randn(70, 50)

    def gradients(multiply):
        loss = (multiply(a, b).tanh() * weights).sum()
        first = torch.autograd.grad(loss, (a, b), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), (a, b))
        return *first, *second

    for ours, theirs in zip(gradients(product), gradients(torch.mm), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_transforms_see_the_product():
    a, b = matrices()
    many = torch.stack([a, 2 * a])
    expected = torch.stack([a @ b, 2 * (a @ b)])
    torch.testing.assert_close(torch.func.vmap(product, (0, None))(many, b), expected)
    gradient = torch.func.grad(lambda x: product(x, b).sum())(a)
    torch.testing.assert_close(gradient, b.sum(1).expand(70, -1))
    _, tangent = torch.func.jvp(lambda x: product(x, b), (a,), (a,))
    torch.testing.assert_close(tangent, a @ b)
