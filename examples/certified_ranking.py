"""Certify the top document of a small search against synonym swaps.

    python examples/certified_ranking.py

ranks sentences for three queries by shared words, draws random synonyms, and prints for how many
swapped words the top rank is proven to stand.
"""

from __future__ import annotations

import torch

from pyrobust.certify import SmoothedRanker, SynonymTable

GROUPS = ["quick fast rapid", "house home dwelling", "begin start", "big large", "repair mend fix"]
DOCUMENTS = [
    "A quick guide: repair a large house before the rain.",
    "Fast cars begin to race in the big city tonight.",
    "Start the day with rapid music, and a large breakfast.",
    "The dwelling of the fox is a home under the hill.",
    "How to mend shoes, and begin a small workshop at home.",
]
QUERIES = ["quick repair house", "fast cars race city", "start day music breakfast"]


def main() -> None:
    groups = [group.split() for group in GROUPS]
    meaning = {word: group[0] for group in groups for word in group}
    near = {word: [w for w in group if w != word] for group in groups for word in group}
    # One word of each group of three is left out of its neighbour's draws, as happens in
    # vocabularies whose synonym chains are too long to draw from whole.
    draws = {w: [v for v in g if (w, v) != (g[0], g[-1]) or len(g) < 3] for g in groups for w in g}
    table = SynonymTable.from_dict(near, draws)

    def score(query: str, documents: list[list[str]]) -> torch.Tensor:
        wanted = query.split()
        values = []
        for words in documents:
            plain = [word.strip(".,:").lower() for word in words]
            same = sum(word in plain for word in wanted)
            like = {meaning.get(word, word) for word in plain}
            values.append(same + 2.0 * sum(meaning.get(word, word) in like for word in wanted))
        return torch.tensor(values)

    ranker = SmoothedRanker(score, table, n=2000).calibrate(QUERIES[:1], [DOCUMENTS], 1)
    print(f"{'query':28} {'swaps':>6} {'margin':>8}  top document")
    for query in QUERIES[1:]:
        for edits in (0, 1, 2, None):
            result = ranker.certify_top_k(query, DOCUMENTS, 1, max_edits=edits)
            top = DOCUMENTS[int(result.order[0])] if result.certified else "not certified"
            budget = "all" if edits is None else str(edits)
            print(f"{query:28} {budget:>6} {result.margin:8.3f}  {top}")


if __name__ == "__main__":
    main()
