"""Synonym tables against exact rational arithmetic over every substitution and every draw."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from pyrobust.certify import SynonymTable

WORDS = list("abcdef")


def random_table(rng):
    """Six words, a random symmetric graph, random draw sets of unequal size."""
    graph = {w: set() for w in WORDS}
    for a, b in itertools.combinations(WORDS, 2):
        if rng.random() < 0.3:
            graph[a].add(b)
            graph[b].add(a)
    sets = {
        w: {str(v) for v in rng.choice(WORDS, size=rng.integers(1, 5), replace=False)} | {w}
        for w in WORDS
    }
    return SynonymTable.from_dict(graph, sets), sets


def exact_mean(document, sets, score):
    total, count = Fraction(0), 0
    for draw in itertools.product(*(sorted(sets[w]) for w in document)):
        total += score[draw]
        count += 1
    return total / count


def published_bound(table, sets, document):
    """The denominator of the published code: the size of the word's own draw set."""
    kept = 1.0
    for word in document:
        others = table.substitutes(word)
        kept *= min(len(sets[word] & sets[v]) / len(sets[word]) for v in others)
    return 1.0 - kept


def test_the_bound_holds_in_every_case_and_the_published_one_does_not():
    rng = np.random.default_rng(0)
    cases = violations = 0
    for _ in range(12):
        table, sets = random_table(rng)
        score = {d: int(rng.integers(0, 2)) for d in itertools.product(WORDS, repeat=3)}
        cache = {d: exact_mean(d, sets, score) for d in score}
        for _ in range(25):
            document = tuple(rng.choice(WORDS, size=3).tolist())
            bound = Fraction(table.document_bound(document))
            published = published_bound(table, sets, document)
            for swap in itertools.product(*(table.substitutes(w) for w in document)):
                change = abs(cache[swap] - cache[document])
                assert change <= bound
                violations += float(change) > published + 1e-9
                cases += 1
    print(violations, "of", cases, "exceed the published bound")
    assert cases > 3000
    assert violations > 0  # the published denominator is refuted


def test_the_bound_of_few_edits_holds_in_every_case():
    rng = np.random.default_rng(1)
    for _ in range(6):
        table, sets = random_table(rng)
        score = {d: int(rng.integers(0, 2)) for d in itertools.product(WORDS, repeat=3)}
        for _ in range(5):
            document = tuple(rng.choice(WORDS, size=3).tolist())
            clean = exact_mean(document, sets, score)
            for swap in itertools.product(*(table.substitutes(w) for w in document)):
                edits = sum(a != b for a, b in zip(swap, document, strict=True))
                change = abs(exact_mean(swap, sets, score) - clean)
                assert change <= Fraction(table.document_bound(document, max_edits=edits))


def test_limits_of_the_bound():
    isolated = SynonymTable.from_dict({"a": [], "b": []})
    assert isolated.document_bound("a b c") == 0.0
    chain = {"a": ["b"], "b": ["a", "c"], "c": ["b"]}
    assert SynonymTable.from_dict(chain).document_bound("a b c a") == 0.0  # whole components
    table = SynonymTable.from_dict(chain, {"a": ["a", "b"], "b": ["a", "b", "c"], "c": ["c"]})
    assert table.overlap("a") == 2 / 3
    assert table.overlap("b") == 1 / 3
    bounds = [table.document_bound("a b c a", max_edits=r) for r in range(6)]
    assert bounds[0] == 0.0
    assert bounds == sorted(bounds)
    assert bounds[4] == bounds[5] == table.document_bound("a b c a")


def test_components_and_the_nearest_members():
    chain = {w: [v for v in WORDS if abs(ord(v) - ord(w)) == 1] for w in WORDS}
    table = SynonymTable.from_dict(chain, max_set=3)
    drawn = {d[0] for d in table.sample(["a"], 200, torch.Generator().manual_seed(0))}
    assert drawn == {"a", "b", "c"}
    assert SynonymTable.from_dict(chain, max_set=6).overlap("a") == 1.0


def test_embeddings_give_the_neighbours_of_a_plain_double_loop():
    torch.manual_seed(0)
    centres = torch.randn(10, 16)
    vectors = centres.repeat_interleave(5, 0) + 0.2 * torch.randn(50, 16)
    words = [f"w{i:02d}" for i in range(50)]
    table = SynonymTable.from_embeddings(words, vectors, threshold=0.5, remove_top=2)
    v = (vectors / vectors.norm(dim=1, keepdim=True)).double()
    v = v - v.mean(0)
    u, s, w = torch.linalg.svd(v, full_matrices=False)
    v = u[:, 2:] * s[2:] @ w[2:]
    for i, word in enumerate(words):
        near = {words[j] for j in range(50) if j == i or float(v[i] @ v[j]) > 0.5}
        assert set(table.substitutes(word)) == near
    counts = dict.fromkeys(words, 1)
    rare = SynonymTable.from_embeddings(words, vectors, threshold=0.5, remove_top=2, counts=counts)
    assert all(rare.substitutes(word) == [word] for word in words)


def test_large_components_keep_their_closest_members():
    angles = torch.arange(40) * (2 * torch.pi / 40)
    vectors = torch.stack([angles.cos(), angles.sin()], 1)
    words = [f"w{i:02d}" for i in range(40)]
    table = SynonymTable.from_embeddings(words, vectors, threshold=0.95, remove_top=0, max_set=7)
    drawn = {d[0] for d in table.sample(["w20"], 500, torch.Generator().manual_seed(0))}
    assert drawn == {f"w{i}" for i in range(17, 24)}
    assert 0 < table.overlap("w20") < 1


def test_punctuation_stays_and_case_folds():
    table = SynonymTable.from_dict({"big": ["large"], "large": ["big"]})
    assert table.substitutes('"Big,') == ['"Big,', '"large,']
    drawn = {d[0] for d in table.sample(['"Big,'], 50, torch.Generator().manual_seed(0))}
    assert drawn == {'"big,', '"large,'}
    assert table.sample("Other words!", 2) == [["Other", "words!"]] * 2
    assert table.overlap("unseen") == 1.0


def test_draws_are_uniform():
    table = SynonymTable.from_dict({w: [v for v in WORDS if v != w] for w in WORDS})
    drawn = [d[0] for d in table.sample(["a"], 6000, torch.Generator().manual_seed(0))]
    counts = np.array([drawn.count(w) for w in WORDS])
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5  # chi-square, 5 degrees, p = 0.001


def test_draws_depend_on_seed_row_and_column_only():
    table = SynonymTable.from_dict({w: [v for v in WORDS if v != w] for w in WORDS})
    words = [*WORDS, "unseen"] * 30
    whole = table.draw(words, 50, 7)
    assert (table.draw(words, 20, 7) == whole[:20]).all()
    assert (table.draw(words[:64], 50, 7) == whole[:, :64]).all()
    assert (table.draw(words, 50, 8) != whole).any()
    assert (whole[:, 6::7] == -1).all()
    assert (whole[:, :6] >= 0).all()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="symmetric; 'b' may replace 'a'"):
        SynonymTable.from_dict({"a": ["b"]})
    completed = SynonymTable.from_dict({"a": ["b"]}, symmetrize=True)
    assert completed.substitutes("b") == ["b", "a"]
    with pytest.raises(ValueError, match="padding"):
        completed.document_bound(["a", "[PAD]"])
    with pytest.raises(ValueError, match="lower case"):
        SynonymTable.from_dict({"Big": []})
    with pytest.raises(ValueError, match="non-empty"):
        SynonymTable.from_dict({"a": []}, {"a": []})
    with pytest.raises(ValueError, match="remove_top"):
        SynonymTable.from_embeddings(["a", "b"], torch.randn(2, 4))
    with pytest.raises(ValueError, match="shape"):
        SynonymTable.from_embeddings(["a"], torch.randn(2, 9))
