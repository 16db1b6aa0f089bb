"""Rankings from the command line: logs equal direct certificates, survive cuts, on real text."""

import gzip
import json
import math
import sys

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.certify import (
    BiEncoder,
    CertificationJob,
    SmoothedRanker,
    SynonymTable,
    certify_to_log,
    load_synonyms,
)
from pyrobust.certify.job import certificate_of_log
from pyrobust.certify.job_data import load_job_data
from pyrobust.certify.job_methods import method_of
from pyrobust.certify.log import job_path, read_log
from pyrobust.certify.ranking_job import RankingJob
from pyrobust.data import load_texts
from pyrobust.evaluate import word_substitution_attack
from pyrobust_cli import main

TOPICS = ["wing lift drag", "heat slab flux", "shock wave tube", "beam load crack", "jet noise ear"]
# the draws of "large" and "huge" overlap by 2/3, those of the others with themselves wholly
TABLE = {
    "neighbours": {"big": ["large"], "large": ["big", "huge"], "huge": ["large"], "a": []},
    "perturbation_sets": {
        "big": ["big", "large", "huge"],
        "large": ["big", "large", "huge"],
        "huge": ["large", "huge"],
    },
}


class WordEncoder(nn.Module):
    """Word counts through one linear layer, compared by cosine."""

    def __init__(self, texts, width=16):
        super().__init__()
        words = sorted({w for t in (*texts.documents, *texts.queries) for w in t.split()})
        self.place = {w: i for i, w in enumerate(words)}
        size = -(-len(words) // 16) * 16
        self.linear = nn.Linear(size, width, bias=False)
        holders = torch.zeros(size)
        for text in texts.documents:
            holders[[self.place[w] for w in set(text.split())]] += 1
        self.rarity = ((len(texts.documents) + 1) / (holders + 1)).log()

    def encode_documents(self, documents):
        rows = torch.zeros(len(documents), self.linear.in_features)
        for row, words in zip(rows, documents, strict=True):
            index = torch.tensor(
                [self.place[w] for w in words if w in self.place], dtype=torch.long
            )
            row.index_add_(0, index, torch.ones(len(index)))
        return nn.functional.normalize(self.linear(rows.log1p() * self.rarity), dim=1)

    def compare(self, query, vectors):
        return vectors @ self.encode_documents([query.split()])[0]


def word_encoder(texts):
    torch.manual_seed(0)
    return WordEncoder(texts, 64)


def overlap_scorer(texts):
    """No network: the share of the query's words that a document holds."""

    def score(query, documents):
        wanted = set(query.split())
        return torch.tensor([len(wanted & set(d)) / len(wanted) for d in documents])

    return score


def small_texts():
    queries = [*TOPICS, "wing drag", "flux heat"]
    documents = [f"a big note on {t} and {t}" for t in TOPICS]
    documents += [f"large {t.split()[0]} words of huge size" for t in TOPICS]
    return queries, documents, [[i % 5] if i < 5 else [] for i in range(7)]


def write_smart(folder):
    queries, documents, _ = small_texts()
    folder.mkdir()
    entries = [f".I {10 + i}\n.T\ntitle\n.A\nme\n.W\n{d}\n" for i, d in enumerate(documents)]
    entries.insert(2, ".I 99\n.T\n\n.W\n\n")
    (folder / "small.all.gz").write_bytes(gzip.compress("".join(entries).encode()))
    text = "".join(f".I {3 * i + 1:03}\n.W\n{q}\n" for i, q in enumerate(queries))
    (folder / "small.qry").write_text(text)
    (folder / "smallqrel").write_text("".join(f"{i + 1} {10 + i} 2\n" for i in range(5)))
    (folder / "smallqrel.readme").write_text("about them")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rankers", sys.modules[__name__])
    write_smart(tmp_path / "texts")
    (tmp_path / "table.json").write_text(json.dumps(TABLE))
    texts = load_texts(str(tmp_path / "texts"))
    packed = pyrobust.pack(word_encoder(texts), bits=8, group_size=16).eval()
    pyrobust.save(packed, tmp_path / "model.safetensors")
    return tmp_path


OPTIONS = {"top": 1, "held_out": 2, "samples": 300, "alpha": 0.05}


def job_of(place, model=None, **options):
    method = method_of("ranking", {**OPTIONS, "synonyms": str(place / "table.json"), **options})
    model = model or str(place / "model.safetensors")
    return CertificationJob(model, architecture="rankers:word_encoder", method=method)


def test_a_smart_folder_and_a_function_give_the_same_texts(place):
    texts, made = load_texts(str(place / "texts")), load_texts("rankers:small_texts")
    assert texts.name == "texts"
    assert (texts.queries, texts.documents) == (made.queries, made.documents)
    assert texts.relevant == made.relevant


def test_the_log_holds_the_direct_certificates_of_a_packed_scorer(place):
    out = place / "log.tsv"
    data = load_job_data("ranking", str(place / "texts"))
    result = certify_to_log(job_of(place, max_edits=1), data, out)
    assert result["images"] == 5  # two of seven calibrate
    texts = load_texts(str(place / "texts"))
    model = pyrobust.load(place / "model.safetensors", word_encoder(texts)).eval()
    assert type(model.linear).__name__ == "PackedLinear"
    score = BiEncoder(model.encode_documents, model.compare)
    table = SynonymTable.from_dict(TABLE["neighbours"], TABLE["perturbation_sets"])
    ranker = SmoothedRanker(score, table, n=300).calibrate(
        texts.queries[5:], [texts.documents] * 2, 1
    )
    rows = read_log(out, RankingJob.columns)
    for row, query in zip(rows, texts.queries, strict=False):
        expected = ranker.certify_top_k(query, texts.documents, 1, max_edits=1)
        assert row.extra[0] == str(int(expected.certified))
        assert float(row.extra[1]) == expected.margin
        assert row.extra[2] == str(int(expected.order[0]))
        margins = [
            ranker.certify_top_k(query, texts.documents, 1, max_edits=e).margin for e in range(8)
        ]
        assert ranker.certified_edits(expected, texts.documents) == sum(
            m > 0 for m in margins
        ) - 1 or (all(m > 0 for m in margins))
    assert result["certified"] == sum(r.extra[0] == "1" for r in rows) > 0
    assert result["correct"] == 5
    certificate, labels = certificate_of_log(out)
    assert certificate.norm == "words"
    assert certificate.plot(labels=labels).get_xlabel() == "words radius"


def test_the_radius_counts_words_until_the_margin_is_gone():
    table = SynonymTable.from_dict({"a": ["b"], "b": ["a"]}, {"a": ["a", "b"], "b": ["b", "c"]})
    ranker = SmoothedRanker(
        lambda q, docs: torch.tensor([0.99 if "top" in d else 0.01 for d in docs]),
        table,
        n=20000,
        squash="identity",
    )
    error = math.sqrt(math.log(2 * 2 / 0.05) / 40000)
    for count, gap in [(1, 1), (2, 2), (5, 4)]:  # 1 - 2**-e passes 0.98 - 2 errors beyond 4
        docs = ["top", " ".join(["a"] * count)]
        result = ranker.certify_top_k("", docs, 1, alpha=0.05)
        proven = [e for e in range(count + 1) if 0.98 - 2 * error - (1 - 0.5**e) > 0]
        assert ranker.certified_edits(result, docs) == proven[-1] == gap
    tied = ["a x", "a y"]
    result = ranker.certify_top_k("", tied, 1)
    assert ranker.certified_edits(result, tied) == -1


def test_a_cut_log_is_completed_to_the_same_bytes(place):
    data = load_job_data("ranking", str(place / "texts"))
    for name, job in {
        "file": job_of(place),
        "function": job_of(place, "rankers:overlap_scorer", candidates=6, squash="sigmoid"),
    }.items():
        whole, cut = place / f"{name}.tsv", place / f"{name}-cut.tsv"
        certify_to_log(job, data, whole)
        text = whole.read_bytes()
        for kept in (0.0, 0.4, 0.8):
            cut.write_bytes(text[: int(kept * len(text))])
            job_path(cut).write_bytes(job_path(whole).read_bytes())
            certify_to_log(job, data, cut, resume=True)
            assert cut.read_bytes() == text


def test_another_table_is_another_job(place):
    data, out = load_job_data("ranking", str(place / "texts")), place / "log.tsv"
    certify_to_log(job_of(place), data, out)
    (place / "other.txt").write_text("big large huge\n\nwords notes\n")
    assert load_synonyms(place / "other.txt").substitutes("big") == ["big", "huge", "large"]
    with pytest.raises(ValueError, match="synonyms_sha256 differ"):
        certify_to_log(job_of(place, synonyms=str(place / "other.txt")), data, out, resume=True)


def test_the_command_line_ranks_and_draws(place, capsys):
    words = ["certify", str(place / "model.safetensors"), "--method", "ranking", "--json"]
    words += ["--architecture", "rankers:word_encoder", "--data", str(place / "texts")]
    words += ["--synonyms", str(place / "table.json"), "--top", "1", "--held-out", "2"]
    words += ["--samples", "200", "--out", str(place / "log.tsv")]
    picture = place / "plot.png"
    assert main([*words, "--plot", str(picture)]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 5
    assert picture.stat().st_size > 0
    assert main([*words, "--resume"]) == 0
    assert main([*words, "--resume", "--top", "2"]) == 2
    assert "top differ" in capsys.readouterr().err


def test_bad_input_is_refused(place):
    for option, value in [
        ("synonyms", "nowhere"),
        ("top", 0),
        ("samples", 99),
        ("held_out", 0),
        ("candidates", 1),
        ("max_edits", -1),
        ("squash", "tanh"),
        ("alpha", 0.0),
    ]:
        with pytest.raises(ValueError, match=f"certify: {option} must"):
            job_of(place, **{option: value})
    with pytest.raises(FileNotFoundError, match="folder of texts or module:function"):
        load_texts("nowhere")
    with pytest.raises(FileNotFoundError, match=r"must hold a file \*\.all\*"):
        load_texts(str(place))
    with pytest.raises(ValueError, match="must return a TextCollection"):
        load_texts("rankers:write_nothing")
    with pytest.raises(ValueError, match="data must be module:function"):
        load_texts("rankers:missing")
    (place / "texts" / "smallqrel").write_text("1 12345 2\n")
    with pytest.raises(ValueError, match="known queries and documents; got '1 12345 2'"):
        load_texts(str(place / "texts"))
    data = load_job_data("ranking", "rankers:small_texts")
    with pytest.raises(ValueError, match="more than the 7 held out; got 7"):
        certify_to_log(job_of(place, held_out=7), data, place / "log.tsv")
    (place / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold neighbours"):
        load_synonyms(place / "broken.json")
    (place / "twice.txt").write_text("a b\nb c\n")
    with pytest.raises(ValueError, match="each word in one line"):
        load_synonyms(place / "twice.txt")


def write_nothing():
    return 1


def test_cranfield_is_ranked_and_what_is_certified_withstands_attack(data_folder, place):
    folder = data_folder / "cranfield"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    texts = load_texts(str(folder))
    assert len(texts.queries) == 225
    assert len(texts.documents) == 1398  # two of 1400 are empty
    assert sum(map(len, texts.relevant)) > 1800
    table = {
        "neighbours": {"large": ["big"], "big": ["large"], "flow": ["stream"], "stream": ["flow"]},
        "perturbation_sets": {
            "large": ["large", "big"],
            "flow": ["flow", "stream"],
            "stream": ["flow", "stream"],
            "big": ["large", "big", "huge"],
        },
    }
    path = place / "words.json"
    path.write_text(json.dumps(table))
    packed = pyrobust.pack(word_encoder(texts), bits=8, group_size=16).eval()
    pyrobust.save(packed, place / "cranfield.safetensors")
    options = {"synonyms": str(path), "candidates": 12, "held_out": 4, "samples": 600}
    job = job_of(place, str(place / "cranfield.safetensors"), **options)
    job = CertificationJob(job.model, architecture=job.architecture, method=job.method, limit=5)
    out = place / "cranfield.tsv"
    assert certify_to_log(job, load_job_data("ranking", str(folder)), out)["images"] == 5
    rows = read_log(out, RankingJob.columns)
    proven = [row for row in rows if row.extra[0] == "1"]
    assert proven
    ready = job.method.prepare(packed, load_job_data("ranking", str(folder)))
    for row in proven[:1]:
        query, best = texts.queries[row.idx], int(row.extra[2])
        kept = float(ready.ranker.scores(query, [texts.documents[best]]))
        chosen = job.method._candidates(ready, query)
        for i in [i for i in chosen if i != best][:2]:
            found = word_substitution_attack(
                ready.ranker.scores,
                ready.ranker.table,
                query,
                texts.documents[i],
                max_edits=1,
            )
            assert found.score < kept
