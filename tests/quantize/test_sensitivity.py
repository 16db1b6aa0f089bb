"""Sensitivity scores: against autograd by hand, streamed as one, and what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pyrobust.quantize import prediction_loss, sensitivity


class Tiny(nn.Module):
    """A causal model by construction: every position sees itself only."""

    def __init__(self, tied=False):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 8)
        self.second = self.first if tied else nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens):
        hidden = torch.tanh(self.first(self.table(tokens)))
        return self.head(torch.tanh(self.second(hidden)))


@pytest.fixture
def model():
    return Tiny().eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 11, (3, 9))


def gradients(model, batch):
    logits = model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    grads = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
    return dict(zip(layers, grads, strict=True))


def test_one_sequence_gives_the_magnitude_of_its_gradient(model, tokens):
    scores = sensitivity(model, tokens[:1])
    expected = gradients(model, tokens[:1])
    assert list(scores) == ["first", "second", "head"]
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name].abs())


@pytest.mark.parametrize("kind", ["grad", "grad*weight", "fisher"])
def test_several_sequences_average_magnitudes_not_gradients(model, tokens, kind):
    each = [gradients(model, row[None]) for row in tokens]
    for name, score in sensitivity(model, tokens, kind).items():
        weight = model.get_submodule(name).weight
        score_of = {
            "grad": lambda g: g.abs(),
            "grad*weight": lambda g, w=weight: (g * w).abs(),
            "fisher": lambda g: g * g,
        }[kind]
        expected = torch.stack([score_of(grads[name]) for grads in each]).mean(0)
        torch.testing.assert_close(score, expected)


def test_second_moments_cost_the_change_that_is_asked_for(model, tokens):
    with torch.no_grad():
        inputs = model.table(tokens[:, :-1]).flatten(0, 1)
    moment = inputs.square().mean(0)
    removal = sensitivity(model, tokens, "hessian-diag", layers=["first"])["first"]
    torch.testing.assert_close(removal, model.first.weight.square() * moment)
    asked = {}

    def change(name, weight):
        asked[name] = weight
        return torch.full_like(weight, 2.0)

    score = sensitivity(model, tokens, "hessian-diag", layers=["first"], change=change)["first"]
    torch.testing.assert_close(score, (4 * moment).expand(8, 8))
    assert torch.equal(asked["first"], model.first.weight)


def test_scores_without_data(model):
    scores = sensitivity(model, None, "magnitude")
    assert torch.equal(scores["head"], model.head.weight.abs())
    first, again = (sensitivity(model, None, "random", seed=5) for _ in range(2))
    other = sensitivity(model, None, "random", seed=6)
    assert torch.equal(first["head"], again["head"])
    assert not torch.equal(first["head"], other["head"])
    assert not torch.equal(first["first"], first["second"])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layers_at_once", [None, 1, 2])
def test_streaming_gives_the_same_and_holds_one_gradient_at_a_time(
    model, tokens, rows, layers_at_once
):
    kept = sensitivity(model, tokens[:rows])
    alive = []

    def consume(name, score):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        return score.flatten().topk(5).indices

    streamed = sensitivity(model, tokens[:rows], consume=consume, layers_at_once=layers_at_once)
    assert alive == [0, 0, 0]
    for name, score in kept.items():
        assert torch.equal(streamed[name], score.flatten().topk(5).indices)


def test_two_runs_are_identical(model, tokens):
    first, again = sensitivity(model, tokens), sensitivity(model, tokens)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_shared_weight_has_one_score_of_all_its_uses(tokens):
    model = Tiny(tied=True).eval()
    scores = sensitivity(model, tokens[:1], layers=["first", "second"])
    assert scores["first"] is scores["second"]
    logits = model(tokens[:1, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:1, 1:].flatten())
    (grad,) = torch.autograd.grad(loss, model.first.weight)
    torch.testing.assert_close(scores["first"], grad.abs())
    moments = sensitivity(model, tokens, "hessian-diag", layers=["second"])["second"]
    both = []
    handle = model.first.register_forward_pre_hook(lambda _, x: both.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        model(tokens[:, :-1])
    handle.remove()
    torch.testing.assert_close(
        moments, model.first.weight.square() * torch.cat(both).square().mean(0)
    )


def test_the_model_is_left_as_it_was(model, tokens):
    model.table.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones(11)
    sensitivity(model, tokens)
    assert not model.table.weight.requires_grad
    assert model.first.weight.requires_grad
    assert torch.equal(model.head.bias.grad, torch.ones(11))
    assert model.first.weight.grad is None
    with torch.no_grad():  # asks for gradients by itself
        sensitivity(model, tokens)


def test_checkpointed_blocks_stream_too(tokens):
    class Checkpointed(Tiny):
        reentrant = False

        def forward(self, batch):
            hidden = torch.tanh(self.first(self.table(batch))).requires_grad_()
            again = checkpoint(self.second, hidden, use_reentrant=self.reentrant)
            return self.head(torch.tanh(again))

    model = Checkpointed().eval()
    plain = Tiny().eval()
    plain.load_state_dict(model.state_dict())
    expected = sensitivity(plain, tokens[:1])
    for name, score in sensitivity(model, tokens[:1]).items():
        torch.testing.assert_close(score, expected[name])
    tied = Checkpointed(tied=True).eval()
    tied.reentrant = True
    with pytest.raises(RuntimeError, match="arrived in parts"):
        sensitivity(tied, tokens[:1], layers=["first"])


def test_losses_of_the_usual_batches(model, tokens):
    expected = prediction_loss(model, tokens)
    mapping = {"tokens": tokens}

    class Named(nn.Module):
        def forward(self, input_ids):
            return type("Output", (), {"logits": model(input_ids)})()

    torch.testing.assert_close(prediction_loss(Named(), {"input_ids": tokens}), expected)
    pair = (tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(prediction_loss(model, pair), expected)
    labels = tokens.clone()
    labels[:, :5] = -100
    answer = prediction_loss(Named(), {"input_ids": tokens, "labels": labels})
    logits = model(tokens)[:, 4:-1]
    torch.testing.assert_close(
        answer, F.cross_entropy(logits.flatten(0, 1), tokens[:, 5:].flatten())
    )
    classes = nn.Linear(4, 3)
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    torch.testing.assert_close(prediction_loss(classes, (x, y)), F.cross_entropy(classes(x), y))
    assert mapping["tokens"] is tokens


class ByName(nn.Module):
    """Returns an object with logits for keyword arguments, as Hugging Face models do."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x=None, input_ids=None):
        return type("Output", (), {"logits": self.head(x if input_ids is None else input_ids)})()


def test_labels_of_whole_rows_are_their_classes():
    torch.manual_seed(0)
    head = nn.Linear(4, 3)
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    expected = F.cross_entropy(head(x), y)
    torch.testing.assert_close(prediction_loss(ByName(head), {"x": x, "labels": y}), expected)
    answer = prediction_loss(ByName(head), {"input_ids": x, "labels": y})
    torch.testing.assert_close(answer, expected)


@pytest.mark.parametrize(
    ("batch", "seen"),
    [
        ({"x": torch.randn(2, 4)}, "a batch of x, without labels or input_ids"),
        (torch.randn(2, 4), "a tensor of torch.float32"),
        ((torch.randn(2, 4), torch.rand(2)), r"targets of torch\.float32 and shape \(2,\)"),
        ((torch.randn(2, 4), torch.ones(3).long()), r"shape \(3,\) for logits of shape \(1, 3\)"),
    ],
)
def test_batches_without_targets_ask_for_a_loss(batch, seen):
    model = ByName(nn.Linear(4, 3)).eval()
    with pytest.raises(ValueError, match=rf"prediction_loss: .*got .*{seen}.*give loss="):
        sensitivity(model, [batch])


def test_refusals(model, tokens):
    with pytest.raises(ValueError, match="kind must be one of"):
        sensitivity(model, tokens, "hessian")
    with pytest.raises(ValueError, match="at least one batch"):
        sensitivity(model, [])
    with pytest.raises(ValueError, match="at least one batch"):
        sensitivity(model, tokens[:0])
    with pytest.raises(ValueError, match=r"got 'table\.x'"):
        sensitivity(model, tokens, layers=["table.x"])
    with pytest.raises(ValueError, match="evaluation mode"):
        sensitivity(Tiny(), tokens)
    model.table.weight.data = torch.zeros(11, 7)
    with pytest.raises(ValueError, match="batch 0 must fit the model; 'first' raised Runtime"):
        sensitivity(model, tokens)
    model.table.weight.data = torch.randn(11, 8)
    with pytest.raises(ValueError, match="must be finite; it is nan on batch 0"):
        sensitivity(model, tokens, loss=lambda m, b: prediction_loss(m, b) * torch.nan)
    with pytest.raises(ValueError, match="must be a scalar"):
        sensitivity(model, tokens, loss=lambda m, b: m(b))
    with pytest.raises(ValueError, match="does not depend on 'second'"):
        sensitivity(model, tokens, loss=lambda m, b: m.first(m.table(b)).sum(), layers=["second"])
    with pytest.raises(ValueError, match="does not depend on 'second'"):
        sensitivity(
            model,
            tokens,
            "hessian-diag",
            loss=lambda m, b: m.first(m.table(b)).sum(),
            layers=["second"],
        )
    with pytest.raises(NotImplementedError, match="Embedding"):
        sensitivity(model, tokens, "hessian-diag", layers=["table"])
    with pytest.raises(ValueError, match=r"must have a torch\.nn\.Linear"):
        sensitivity(nn.ReLU(), tokens)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference mode"):
        sensitivity(model, tokens)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="the weight of 'first' is frozen"):
        sensitivity(model, tokens)
    assert all(p.grad is None for p in model.parameters())
