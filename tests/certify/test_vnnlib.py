"""Properties in the VNN-LIB format, and their verdicts."""

import gzip
from fractions import Fraction

import pytest
import torch
from torch import nn

from pyrobust.certify import decide_property, load_vnnlib, parse_vnnlib

HEAD = """
; a comment with (parentheses
(declare-const X_0 Real)
(declare-const X_1 Real)
(declare-const Y_0 Real) (declare-const Y_1 Real) (declare-const Y_2 Real)
(assert (>= X_0 0.1))
(assert (<= X_0 0.3))
(assert (and (>= X_1 -1) (<= X_1 1e0)))
"""


def test_boxes_hold_the_decimal_numbers():
    case = parse_vnnlib(HEAD + "(assert (<= Y_0 Y_1))").cases[0]
    assert Fraction(float(case.lower[0])) <= Fraction("0.1")
    assert Fraction(float(case.upper[0])) >= Fraction("0.3")
    assert (float(case.lower[1]), float(case.upper[1])) == (-1.0, 1.0)
    torch.testing.assert_close(case.lower, torch.tensor([0.1, -1.0]))
    assert case.matrix.tolist() == [[1.0, -1.0, 0.0]]
    assert case.limit.tolist() == [0.0]


def test_linear_terms():
    text = HEAD + "(assert (>= (+ Y_0 (* -2.5 Y_1) (- Y_2)) (- 3 (* Y_1 0.5))))"
    case = parse_vnnlib(text).cases[0]
    # 3 - 0.5 y1 <= y0 - 2.5 y1 - y2
    assert case.matrix.tolist() == [[-1.0, 2.0, 1.0]]
    assert case.limit.tolist() == [-3.0]


def test_disjunctions_multiply():
    text = (
        HEAD
        + """(assert (or (and (<= Y_0 Y_1) (<= Y_0 Y_2)) (>= Y_1 5)))
    (assert (or (<= Y_2 0) (>= Y_2 1)))"""
    )
    question = parse_vnnlib(text)
    assert [len(case.limit) for case in question.cases] == [3, 3, 2, 2]
    split = parse_vnnlib(
        "(declare-const X_0 Real)(declare-const Y_0 Real)"
        "(assert (or (and (>= X_0 0) (<= X_0 1) (<= Y_0 0))"
        "            (and (>= X_0 2) (<= X_0 3) (>= Y_0 9))))"
    )
    assert [float(case.lower) for case in split.cases] == [0.0, 2.0]


def test_files_plain_and_packed(tmp_path):
    text = HEAD + "(assert (<= Y_0 Y_1))"
    (tmp_path / "a.vnnlib").write_text(text)
    (tmp_path / "a.vnnlib.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.vnnlib", "a.vnnlib.gz"):
        question = load_vnnlib(tmp_path / name)
        assert (question.inputs, question.outputs, len(question.cases)) == (2, 3, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(assert (<= Y_0 Y_1)", "line 10: a parenthesis is never closed"),
        ("(assert (<= Y_0 Y_1)))", "line 10: a closing parenthesis without its opening"),
        ("(assert (<= (* Y_0 Y_1) 0))", r"line 10: '\*' does not make a linear term"),
        ("(assert (= Y_0 Y_1))", "line 10: unsupported constraint '='"),
        ("(check-sat)", "line 10: unknown statement 'check-sat'"),
        ("(assert (<= Y_0 abc))", "line 10: 'abc' is neither a variable nor a number"),
        ("(declare-const X_5 Real)", "line 10: X_2 must be declared next; got X_5"),
        ("(assert (<= Y_7 0))", "line 10: Y_7 is not declared"),
        ("(assert (<= X_0 X_1))", "line 10: a constraint on inputs must bound one variable"),
        ("(assert (<= X_0 Y_1))", "line 10: a constraint on inputs must bound one variable"),
        ("(assert (or))", "line 10: 'or' of no constraints"),
        ("(assert (<= Y_0 1e999999999))", "line 10: '1e999999999' is neither"),
        ("(assert (<= (* 1e300 (* 1e300 Y_0)) 0))", "is too large for float64"),
        ("(assert)", "line 10: assert takes one expression"),
        ("((assert) Y_0)", "line 10: unknown statement"),
        ("(assert (and (<= Y_0 0)\n(<= Y_1 word)))", "line 10: 'word' is neither"),
        ("(assert (<= X_0 0.05))", "bounds of X_0 are out of order"),
        ("word", "line 10: 'word' stands outside parentheses"),
    ],
)
def test_malformed_text_names_its_line(text, message):
    with pytest.raises(ValueError, match=message):
        parse_vnnlib(HEAD + "\n" + text)


def test_unbounded_inputs_are_refused():
    with pytest.raises(ValueError, match="X_0 must be bounded on both sides"):
        parse_vnnlib("(declare-const X_0 Real)(declare-const Y_0 Real)(assert (<= X_0 1))")


def test_files_that_are_no_text(tmp_path):
    path = tmp_path / "a.vnnlib"
    for data in (b"\xff\xfe(", gzip.compress(b"(assert)" * 99)[:-20], b"\x1f\x8bnothing"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.vnnlib is not text, plain or gzipped"):
            load_vnnlib(path)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    with torch.no_grad():
        grid = torch.cartesian_prod(torch.linspace(0.1, 0.3, 201), torch.linspace(-1, 1, 401))
        margin = (model(grid)[:, 0] - model(grid)[:, 1]).double()
    return model, float(margin.min()), float(margin.max())


def ask(limit):
    """Is there an input with Y_0 - Y_1 <= limit?"""
    return parse_vnnlib(HEAD + f"(assert (<= (- Y_0 Y_1) {limit:.9f}))")


def test_verdicts():
    model, least, most = network()
    refuted = decide_property(model, ask(least + 1e-3))
    assert refuted.answer == "sat"
    x = refuted.counterexample
    with torch.no_grad():
        y = model.double()(x.double()[None])[0]
        model.float()
    assert float(y[0] - y[1]) <= least + 1e-3
    case = ask(0).cases[0]
    assert bool((x >= case.lower).all() & (x <= case.upper).all())
    proven = decide_property(model, ask(least - 0.5 * (most - least)))
    assert (proven.answer, proven.counterexample) == ("unsat", None)
    assert decide_property(model, ask(least - 100), method="ibp").summary() == "unsat (ibp)"
    close = decide_property(model, ask(least - 0.02 * (most - least)), method="ibp")
    assert (close.answer, close.open_cases) == ("unknown", 1)


def test_a_false_property_is_never_proven():
    """100 networks whose least margin over a grid lies 1e-6 to 1e-2 below the limit."""
    for seed in range(100):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        grid = torch.cartesian_prod(torch.linspace(0.11, 0.29, 31), torch.linspace(-1, 1, 41))
        with torch.no_grad():
            wide = model.double()(grid.double())
            model.float()
        least = float((wide[:, 0] - wide[:, 1]).min())
        limit = least + 10.0 ** (-2 - seed % 5)
        verdict = decide_property(
            model, ask(limit), method="crown", attack_steps=1, attack_restarts=1
        )
        assert verdict.answer != "unsat"


def test_disjunctions_need_every_case():
    model, least, most = network()
    text = f"(assert (or (<= (- Y_0 Y_1) {least - 100:.6f}) (>= (- Y_0 Y_1) {most - 1e-3:.6f})))"
    assert decide_property(model, parse_vnnlib(HEAD + text)).answer == "sat"
    text = f"(assert (or (<= (- Y_0 Y_1) {least - 100:.6f}) (>= (- Y_0 Y_1) {most + 100:.6f})))"
    assert decide_property(model, parse_vnnlib(HEAD + text)).answer == "unsat"


def test_refusals():
    model, _, _ = network()
    with pytest.raises(ValueError, match="about 3 outputs, the model has 2"):
        decide_property(nn.Linear(2, 2).eval(), ask(0))
    with pytest.raises(ValueError, match="shape must hold 2 inputs"):
        decide_property(model, ask(0), (3,))
    with pytest.raises(ValueError, match="evaluation mode"):
        decide_property(model.train(), ask(0))


def test_decimals_that_float64_rounds_inward_are_still_contained():
    texts = ("0.49999999999999999999", "0.50000000000000000001")
    found = parse_vnnlib(f"""
        (declare-const X_0 Real) (declare-const Y_0 Real)
        (assert (>= X_0 {texts[0]})) (assert (<= X_0 {texts[1]})) (assert (<= Y_0 0.0))
    """).cases[0]
    assert Fraction(found.lower.item()) <= Fraction(texts[0])
    assert Fraction(found.upper.item()) >= Fraction(texts[1])
