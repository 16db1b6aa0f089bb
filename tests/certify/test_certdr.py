"""CertDR: coverage on an enumerable case, a toy collection, real text."""

import gzip
import itertools
import math
import re
import warnings

import numpy as np
import pytest
import torch

from pyrobust.certify import BiEncoder, SmoothedRanker, SynonymTable, certified_robust_query
from pyrobust.evaluate import word_substitution_attack
from pyrobust.nn import PackedLinear
from pyrobust.train import noise_augmented_ranking_loss

WORDS = list("abcdef")
COMPLETE = SynonymTable.from_dict({w: [v for v in WORDS if v != w] for w in WORDS})
ISOLATED = SynonymTable.from_dict({w: [] for w in WORDS})


def letter_score(query, documents):
    """A smooth function of the letters; the query sets which letters count."""
    values = [sum(math.sin(ord(w[0]) * query + j) for j, w in enumerate(d)) for d in documents]
    return torch.tensor(values, dtype=torch.float64)


def test_without_synonyms_the_smoothed_score_is_the_score():
    ranker = SmoothedRanker(letter_score, ISOLATED, n=100, squash="sigmoid")
    docs = ["a b c", "c c c", "f e"]
    expected = letter_score(1.0, [d.split() for d in docs]).sigmoid()
    assert torch.equal(ranker.scores(1.0, docs), expected)


def test_sampling_error_stays_within_hoeffding():
    exact = np.mean(
        [float(letter_score(1.0, [d]).sigmoid()) for d in itertools.product(WORDS, repeat=3)]
    )
    bound = math.sqrt(math.log(2 / 0.05) / (2 * 100))
    misses = 0
    for seed in range(2000):
        ranker = SmoothedRanker(letter_score, COMPLETE, n=100, squash="sigmoid", seed=seed)
        misses += abs(float(ranker.scores(1.0, ["a b c"])) - exact) > bound
    assert misses <= 0.05 * 2000


def test_tied_documents_are_not_certified_more_often_than_alpha():
    def coin(query, documents):
        return torch.tensor([float(d[0] in "abc") for d in documents])

    docs = ["a x", "b y", "c z", "d u"]  # exact scores all 1/2: any certificate would be false
    false = 0
    for seed in range(2000):
        ranker = SmoothedRanker(coin, COMPLETE, n=100, squash="identity", seed=seed)
        result = ranker.certify_top_k(0, docs, 2, alpha=0.1)
        false += result.certified
    assert false <= 0.1 * 2000
    assert result.sound
    assert not ranker.certify_top_k(0, docs, 2, criterion="paper").sound


def test_scores_do_not_depend_on_batches_or_company():
    a = SmoothedRanker(letter_score, COMPLETE, n=120, squash="sigmoid", batch_size=7)
    b = SmoothedRanker(letter_score, COMPLETE, n=120, squash="sigmoid", batch_size=512)
    docs = ["a b c", "c d", "f f f"]
    assert torch.equal(a.scores(2.0, docs), b.scores(2.0, docs))
    assert torch.equal(a.scores(2.0, docs[::-1]).flip(0), b.scores(2.0, docs))
    other = SmoothedRanker(letter_score, COMPLETE, n=120, squash="sigmoid", seed=1)
    assert not torch.equal(other.scores(2.0, docs), b.scores(2.0, docs))


def test_a_bi_encoder_encodes_each_draw_once():
    calls = []

    def encode(documents):
        calls.append(len(documents))
        return torch.tensor([[float(ord(w[0])) for w in d] for d in documents])

    pair = BiEncoder(encode, lambda query, vectors: (vectors * query).sum(1).sin())
    squash = lambda s: (s + 1) / 2  # noqa: E731
    ranker = SmoothedRanker(pair, COMPLETE, n=100, squash=squash)
    plain = SmoothedRanker(lambda q, d: pair(q, d), COMPLETE, n=100, squash=squash)
    docs = ["a b c", "c d e", "f f f"]
    for query in (0.5, 1.5):
        torch.testing.assert_close(ranker.scores(query, docs), plain.scores(query, docs))
    first = sum(calls[: len(calls) // 2])
    assert first < 2 * 300  # distinct draws only
    for name, value in (("n", 150), ("seed", 5)):  # what was encoded for others is not used
        setattr(ranker, name, value)
        setattr(plain, name, value)
        torch.testing.assert_close(ranker.scores(0.5, docs), plain.scores(0.5, docs))


def test_a_packed_encoder_is_certified():
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 16, bias=False)
    packed = PackedLinear.from_linear(linear, bits=4, group_size=16)

    def encode(documents):
        rows = torch.zeros(len(documents), 32)
        for row, words in zip(rows, documents, strict=True):
            for word in words:
                row[ord(word[0]) - 97] += 1
        with torch.no_grad():
            return torch.nn.functional.normalize(packed(rows), dim=1)

    pair = BiEncoder(encode, lambda query, vectors: vectors @ encode([query.split()])[0])
    table = SynonymTable.from_dict({"a": ["b"], "b": ["a"], **{w: [] for w in "cdefgh"}})
    ranker = SmoothedRanker(pair, table, n=400, squash=lambda s: (s + 1) / 2)
    docs = ["a b c", "d e f", "g h d"]
    result = ranker.certify_top_k("a b c", docs, 1)
    assert result.order.tolist()[0] == 0
    assert result.certified
    attacked = word_substitution_attack(ranker.scores, table, "a b c", docs[1])
    assert attacked.score < float(result.scores[0])


def test_the_margin_is_the_stated_one():
    table = SynonymTable.from_dict({"a": ["b"], "b": ["a"]}, {"a": ["a", "b"], "b": ["b", "c"]})
    ranker = SmoothedRanker(
        lambda q, docs: torch.tensor([0.9 if "top" in d else 0.1 for d in docs]),
        table,
        n=1000,
        squash="identity",
    )
    result = ranker.certify_top_k("", ["a x", "top", "x y"], 1, alpha=0.05)
    error = math.sqrt(math.log(2 * 3 / 0.05) / 2000)
    assert result.order.tolist()[0] == 1
    assert result.margin == pytest.approx(0.8 - 2 * error - 0.5, abs=1e-6)
    assert result.certified
    assert result.to_dict()["k"] == 1
    assert "top 1 of 3 certified" in result.summary()
    assert certified_robust_query([result]) == 1.0


def test_words_past_a_models_limit_still_count():
    table = SynonymTable.from_dict({"a": ["b"], "b": ["a"]}, {"a": ["a", "b"], "b": ["b", "c"]})

    def first_two(query, documents):
        return torch.tensor([0.9 if "top" in d[:2] else 0.1 for d in documents])

    ranker = SmoothedRanker(first_two, table, n=100, squash="identity")
    result = ranker.certify_top_k("", ["top x", "x y z a"], 1)
    assert result.total_variation[1] == pytest.approx(0.5)


# The toy collection: 60 groups of 8 words with noisy 8-d vectors, documents of 12
# words, 30 documents a query of which 10 are relevant, a MaxSim ranker.


class Toy:
    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        centres = rng.normal(size=(60, 8))
        self.vectors = torch.from_numpy(
            (centres[:, None] + 0.35 * rng.normal(size=(60, 8, 8))).reshape(480, 8)
        ).float()
        self.words = [f"g{i // 8:02d}w{i % 8}" for i in range(480)]
        self.position = {w: i for i, w in enumerate(self.words)}
        self.scale = torch.nn.Parameter(torch.eye(8))
        self.rng = rng

    def table(self, cap):
        groups = [range(8 * (i // 8), 8 * (i // 8) + 8) for i in range(480)]
        near = {self.words[i]: [self.words[j] for j in g if j != i] for i, g in enumerate(groups)}
        sets = {}
        for i, group in enumerate(groups):
            distance = (self.vectors[list(group)] - self.vectors[i]).norm(dim=1)
            sets[self.words[i]] = [self.words[group[j]] for j in distance.argsort()[:cap].tolist()]
        return SynonymTable.from_dict(near, sets)

    def query(self):
        """A query of 3 words and 30 documents; the first 10 hold words of the query's groups."""
        groups = self.rng.choice(60, size=3, replace=False)
        others = np.setdiff1d(np.arange(60), groups)
        docs = []
        for i in range(30):
            chosen = list(self.rng.choice(others, size=12))
            if i < 10:
                chosen[:3] = list(groups)
            docs.append([self.words[8 * g + self.rng.integers(8)] for g in chosen])
        return [self.words[8 * g + self.rng.integers(8)] for g in groups], docs

    def score(self, query, documents):
        longest = max(map(len, documents))  # a repeated word leaves MaxSim as it is
        rows = [[*d, *[d[0]] * (longest - len(d))] for d in documents]
        index = torch.tensor([[self.position[w] for w in row] for row in rows])
        embedded = torch.nn.functional.normalize(self.vectors[index] @ self.scale, dim=-1)
        wanted = self.vectors[[self.position[w] for w in query]] @ self.scale
        wanted = torch.nn.functional.normalize(wanted, dim=-1)
        return 6 * (embedded @ wanted.T).max(1).values.sum(-1)

    def train(self, table, steps=40):
        optimizer = torch.optim.AdamW([self.scale], lr=1e-2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            query, docs = self.query()
            loss = noise_augmented_ranking_loss(
                self.score, table, query, docs[:10], docs[10:20], generator=generator
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())


def certified(toy, table, queries, held_out, **options):
    ranker = SmoothedRanker(toy.score, table, n=400, batch_size=4096)
    ranker.calibrate([q for q, _ in held_out], [d for _, d in held_out], 10)
    results = [ranker.certify_top_k(q, d, 10, **options) for q, d in queries]
    return ranker, results


def test_the_toy_collection():
    toy = Toy()
    whole = toy.table(8)
    toy.train(whole)
    queries, held_out = [toy.query() for _ in range(3)], [toy.query() for _ in range(3)]
    _, all_words = certified(toy, whole, queries, held_out)
    assert certified_robust_query(all_words) == 1.0
    plain = SmoothedRanker(toy.score, whole, n=400, squash="sigmoid", batch_size=4096)
    saturated = [plain.certify_top_k(q, d, 10) for q, d in queries]
    assert certified_robust_query(saturated) == 0.0  # why the squash is calibrated
    smaller = toy.table(7)
    ranker, one_edit = certified(toy, smaller, queries, held_out, max_edits=1)
    _, paper = certified(toy, smaller, queries, held_out, max_edits=1, criterion="paper")
    assert certified_robust_query(paper) <= certified_robust_query(one_edit)
    assert 0 < certified_robust_query(one_edit) <= 1.0
    attacked = 0
    for (query, docs), result in zip(queries, one_edit, strict=True):
        if result.certified and attacked < 1:
            attacked += 1
            kth = float(result.scores[result.order[9]])
            for i in result.order[10:12].tolist():
                found = word_substitution_attack(
                    ranker.scores, smaller, query, docs[i], max_edits=1
                )
                assert found.score < kth
    assert attacked > 0


class AttentionScore(torch.nn.Module):
    """A small ranker whose scores bend: attention of the query's mean over a document's words."""

    def __init__(self, toy):
        super().__init__()
        self.toy = toy
        self.key = torch.nn.Linear(8, 16)
        self.out = torch.nn.Sequential(
            torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1)
        )

    def forward(self, query, documents):
        embed = lambda d: self.toy.vectors[[self.toy.position[w] for w in d]]  # noqa: E731
        wanted = embed(query).mean(0)
        longest = max(map(len, documents))  # the attack leaves words out
        seen = torch.stack([embed([*d, *[d[0]] * (longest - len(d))]) for d in documents])
        share = (self.key(seen) @ self.key(wanted) / 4).softmax(1)
        pooled = (share[..., None] * seen).sum(1)
        return self.out(torch.cat([pooled, wanted.expand_as(pooled)], 1))[:, 0]


def test_greedy_edits_beat_an_unsmoothed_attention_ranker():
    """The attack has strength: it lifts the eleventh document over the tenth for every query."""
    torch.manual_seed(0)
    toy = Toy()
    table = toy.table(8)
    ranker = AttentionScore(toy)
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=3e-3)
    for _ in range(150):
        query, docs = toy.query()
        scores = ranker(query, docs)
        loss = (1 - scores[:10, None] + scores[None, 10:]).clamp(min=0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    beaten = 0
    for _ in range(12):
        query, docs = toy.query()
        with torch.no_grad():
            ranked = ranker(query, docs).sort(descending=True)
        kth, lower = float(ranked.values[9]), docs[ranked.indices[10]]
        beaten += word_substitution_attack(ranker, table, query, lower).score > kth
    assert beaten >= 11


@pytest.mark.slow
def test_twelve_queries_of_the_toy_collection():
    """The greedy attack on the smoothed ranker succeeds on none of the certified queries."""
    toy = Toy()
    toy.train(toy.table(8))
    queries, held_out = [toy.query() for _ in range(12)], [toy.query() for _ in range(12)]
    counts = {}
    for cap in (5, 7, 8):
        table = toy.table(cap)
        for name, options in {
            "one": {"max_edits": 1},
            "all": {},
            "paper": {"max_edits": 1, "criterion": "paper"},
        }.items():
            ranker, results = certified(toy, table, queries, held_out, **options)
            counts[cap, name] = sum(r.certified for r in results)
            if name == "paper":
                continue
            for (query, docs), result in zip(queries, results, strict=True):
                if not result.certified:
                    continue
                kth = float(result.scores[result.order[9]])
                for i in result.order[10:13].tolist():
                    found = word_substitution_attack(
                        ranker.scores, table, query, docs[i], max_edits=options.get("max_edits", 3)
                    )
                    assert found.score < kth
    print(counts)
    assert counts[8, "one"] == counts[8, "all"] == 12
    assert counts[5, "one"] <= counts[7, "one"] <= 12
    assert counts[7, "one"] >= 6
    assert counts[7, "paper"] <= counts[7, "one"]
    for cap in (5, 7):
        assert counts[cap, "all"] <= counts[cap, "one"]


# Real text: Cranfield abstracts, scores by latent semantic analysis, hand-listed synonyms.

GROUPS = """
flow stream|speed velocity|wing airfoil|large big considerable|small little slight
method technique procedure|show demonstrate|results findings|obtained derived found
theory analysis|problem question|high elevated|experimental empirical|body object
heat thermal|effect influence|surface face|given presented|calculated computed
increase rise growth|decrease reduction drop|region zone area|approximate rough
equation formula|solution answer|used employed utilized|discussed considered examined
near close|thin slender|measurements observations|test trial|shape form|various several
"""


def cranfield(folder):
    path = folder / "cranfield" / "cran.all.1400.gz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    text = gzip.decompress(path.read_bytes()).decode("latin-1")
    entries = re.findall(r"\.T\n(.*?)\n\.A.*?\.W\n(.*?)(?=\n\.I|\Z)", text, re.S)
    return [(t.split(), re.sub(r"[^a-z\s]", " ", b.lower()).split()[:80]) for t, b in entries]


def draws(group, word):
    """The whole group, but the first word of three never draws the last: overlap 2/3."""
    return group[:-1] if len(group) > 2 and word == group[0] else group


def test_real_text_is_attack_free_where_certified(data_folder):
    entries = [e for e in cranfield(data_folder) if len(e[1]) >= 30][:300]
    groups = [line.split() for line in GROUPS.replace("\n", "|").split("|") if line.strip()]
    table = SynonymTable.from_dict(
        {w: [v for v in g if v != w] for g in groups for w in g},
        {w: draws(g, w) for g in groups for w in g},
    )
    vocabulary = {w: i for i, w in enumerate(sorted({w for _, b in entries for w in b}))}

    def counts(documents):
        matrix = torch.zeros(len(documents), len(vocabulary))
        for row, words in enumerate(documents):
            index = torch.tensor([vocabulary[w] for w in words if w in vocabulary])
            matrix[row].index_add_(0, index, torch.ones(len(index)))
        return matrix.log1p()

    base = counts([b for _, b in entries])
    weight = (len(entries) / (base > 0).sum(0)).log()
    _, _, directions = torch.svd_lowrank(base * weight, q=60)

    def encode(documents):
        return torch.nn.functional.normalize(counts(documents) * weight @ directions, dim=1)

    pair = BiEncoder(encode, lambda query, vectors: vectors @ encode([query])[0])
    ranker = SmoothedRanker(pair, table, n=600, batch_size=600)
    docs = [b for _, b in entries[:40]]
    titles = [t for t, _ in entries[:24]]
    ranker.calibrate(titles[12:], [docs] * 12, 1)
    shares = {}
    for edits in (0, 1, 2, 3, None):
        results = [ranker.certify_top_k(t, docs, 1, max_edits=edits) for t in titles[:12]]
        shares[edits] = certified_robust_query(results)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert shares[0] > 0
    results = [ranker.certify_top_k(t, docs, 1, max_edits=3) for t in titles[:12]]
    proven = [(t, r) for t, r in zip(titles, results, strict=False) if r.certified]
    assert proven
    for title, result in proven[:2]:
        for i in result.order[1:3].tolist():
            found = word_substitution_attack(ranker.scores, table, title, docs[i], max_edits=3)
            assert found.score < float(result.scores[result.order[0]])


def test_bad_input_is_refused():
    with pytest.warns(UserWarning, match="at least 100"):
        SmoothedRanker(letter_score, COMPLETE, n=50)
    ranker = SmoothedRanker(letter_score, COMPLETE, n=100)
    with pytest.raises(RuntimeError, match="calibrate"):
        ranker.scores(1.0, ["a"])
    with pytest.raises(ValueError, match="k must be below the 2 documents; got 2"):
        ranker.certify_top_k(1.0, ["a", "b"], 2)
    wide = SmoothedRanker(letter_score, COMPLETE, n=100, squash="identity")
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        wide.scores(1.0, ["a b c"])
    with pytest.raises(ValueError, match="padding"):
        wide.scores(1.0, [["a", "[PAD]"]])
    with pytest.raises(ValueError, match="finite scores"):
        SmoothedRanker(lambda q, d: torch.zeros(1), COMPLETE, n=100, squash="sigmoid").scores(
            1.0, ["a b c"]
        )
    with pytest.raises(ValueError, match="not be empty"):
        certified_robust_query([])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SmoothedRanker(letter_score, COMPLETE, n=100)
