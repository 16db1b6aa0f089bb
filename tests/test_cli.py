"""The command line, run in process; what must be known before torch is imported, in a fresh one."""

import json
import re
import subprocess
import sys

import pytest
import torch

import pyrobust
from pyrobust.demo import convolutional_network
from pyrobust_cli import main


def one_line(capsys):
    """What was printed as an error: exactly one line."""
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_help_and_bad_options_do_not_import_torch():
    code = (
        "import sys, pyrobust_cli\n"
        "for words in (['--help'], ['demo', '--help'], ['demo', '--sed', 'x'], []):\n"
        "    try: pyrobust_cli.main(words)\n"
        "    except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'pyrobust' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    "words",
    [[], ["fly"], ["demo", "--seed", "x"], ["certify", "model"], ["info", "--fast"]],
)
def test_a_misspelt_command_is_one_line_and_status_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert one_line(capsys).startswith("pyrobust")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["demo", "--data", "nowhere"],
            "pyrobust: load_images: data must be digits, an existing folder or module:function; "
            "got 'nowhere'.",
        ),
        (["demo", "--samples", "0"], "pyrobust: DemoSettings: samples must be at least 1; got 0."),
        (
            ["certify", "nothing", "--out", "log"],
            "pyrobust: certify: model must be an existing file; got 'nothing'.",
        ),
        (
            ["certify", "nothing", "--out", "log", "--method", "smoothing", "--alpha", "2"],
            "pyrobust: certify: alpha must lie in the open interval (0, 1); got 2.0.",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert one_line(capsys) == message


def test_certify_refuses_a_truncated_model(capsys, tmp_path):
    model = tmp_path / "m.safetensors"
    pyrobust.save(pyrobust.pack(convolutional_network((1, 8, 8), 10), bits=2), model)
    model.write_bytes(model.read_bytes()[:-40])
    assert main(["certify", str(model), "--out", str(tmp_path / "log")]) == 2
    assert one_line(capsys).startswith("pyrobust: load: ")
    assert not (tmp_path / "log").exists()


def test_version_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"pyrobust {pyrobust.__version__}\n"


def test_info_prints_a_table_or_json(capsys):
    assert main(["info"]) == 0
    assert f"version         {pyrobust.__version__}" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(pyrobust.info().to_dict()))


def test_certify_prints_the_totals_of_its_log(capsys, tmp_path):
    model, log, picture = (tmp_path / name for name in ("m.safetensors", "log.tsv", "plot.png"))
    pyrobust.save(pyrobust.pack(convolutional_network((1, 8, 8), 10), bits=2), model)
    words = ["certify", str(model), "--out", str(log), "--limit", "6", "--eps", "0", "--json"]
    assert main([*words, "--plot", str(picture)]) == 0
    result = json.loads(capsys.readouterr().out)
    head, *lines = (line.split("\t") for line in log.read_text().splitlines())
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    assert result["images"] == len(rows) == 6
    assert result["correct"] == sum(row["predict"] == row["label"] for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(words) == 2
    assert main([*words, "--resume"]) == 0


def test_certify_decides_a_table_of_radii(capsys, tmp_path):
    model, log = tmp_path / "m.safetensors", tmp_path / "log.tsv"
    pyrobust.save(pyrobust.pack(convolutional_network((1, 8, 8), 10), bits=2), model)
    words = ["certify", str(model), "--out", str(log), "--limit", "3", "--method", "smoothing"]
    assert main([*words, "--radii", "0,0.1", "--samples", "100", "--selection", "10"]) == 0
    assert "passes" in capsys.readouterr().out


def test_certify_refuses_options_of_other_methods(capsys, tmp_path):
    words = ["certify", "m", "--out", str(tmp_path / "log"), "--sigma", "1"]
    assert main(words) == 2
    assert "sigma must be an option of method ibp (eps, bound)" in one_line(capsys)
    assert main([*words, "--data", "nowhere", "--method", "smoothing"]) == 2
    assert "data must be digits, an existing folder or module:function" in one_line(capsys)


def test_bench_of_the_product_has_every_width(capsys, monkeypatch):
    from pyrobust import quick_bench

    monkeypatch.setattr(quick_bench, "_LARGE", 128)
    monkeypatch.setattr(quick_bench, "_MATMUL_ROUNDS", 1)
    assert main(["bench", "matmul", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 6 * 2 * 2
    assert {row["work"].split(",")[1].strip() for row in rows} == {"int8", "float"}
    assert all(row["speed"] > 0 and row["limit_seconds"] > 0 for row in rows)
    peers = {row["peer"] for row in rows}
    assert peers <= {"bfloat16 F.linear", "torch int4pack", "torch int8pack"}
    assert main(["bench", "matmul"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert "ratio to the best of torch's products" in head
    assert all(re.search(r"[\d.]+ GB/s +\d+% +[\d.]+x  ", line) for line in lines)


def test_products_of_torch_beside_ours_multiply_the_same_weight():
    from pyrobust import quick_bench
    from pyrobust.quantize import round_to_nearest

    for bits, symmetric in ((4, False), (4, True), (8, False)):
        packed = round_to_nearest(
            torch.randn(128, 128), bits=bits, group_size=64, symmetric=symmetric
        )
        x = torch.randn(3, 128).bfloat16()
        expected = x.float() @ packed.dequantize().t()
        for product in quick_bench._torch_products(packed).values():
            assert (product(x).float() - expected).norm() < 0.02 * expected.norm()


def test_limits_read_all_that_they_are_given():
    from pyrobust import _machine_limits, _native

    words = torch.randint(-(2**62), 2**62, (64 * 13,))
    expected = 0
    for word in words.tolist():
        expected ^= word % 2**64
    assert [_native.read_words(words, threads) for threads in (1, 2, 3)] == [expected] * 3
    assert _native.multiply_bytes(3) in (0, 3 * 16 * 64)
    assert _native.look_words_up(3) in (0, 3 * 16 * 32 * 5)
    assert _machine_limits.least_seconds(1 << 16, 0, 1) > 0
    assert _machine_limits.product_rate(1) >= _machine_limits.product_rate()


def test_bench_compares_three_families(capsys):
    assert main(["bench", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["family"] for row in rows] == ["matmul", "sampling", "interval"]
    for row in rows:
        assert row["speed"] == pytest.approx(row["plain_seconds"] / row["seconds"])
    assert main(["bench"]) == 0
    assert "sampling" in capsys.readouterr().out


@pytest.fixture
def question(tmp_path):
    """A network whose output is 2 x over [0, 1], and the text of a property of it."""
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    make = onnx.helper
    weight = onnx.numpy_helper.from_array(torch.tensor([[2.0]]).numpy(), "w")
    ends = [[make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 1])] for name in "xy"]
    graph = make.make_graph([make.make_node("MatMul", ["x", "w"], ["y"])], "net", *ends, [weight])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, tmp_path / "net.onnx")

    def words(limit, *more):
        (tmp_path / "p.vnnlib").write_text(
            "(declare-const X_0 Real)\n(declare-const Y_0 Real)\n(assert (>= X_0 0))\n"
            f"(assert (<= X_0 1))\n(assert (>= Y_0 {limit}))\n"
        )
        return ["certify", str(tmp_path / "net.onnx"), str(tmp_path / "p.vnnlib"), *more]

    return words


def test_certify_decides_properties(capsys, question):
    assert main(question(2.5)) == 0
    assert capsys.readouterr().out == "unsat\n"
    assert main(question(1.5)) == 0
    answer, point = capsys.readouterr().out.splitlines()
    assert answer == "sat"
    assert 0.75 <= float(point.removeprefix("(X_0 ").removesuffix(")")) <= 1
    assert main(question(2.5, "--json", "--bound", "ibp")) == 0
    assert json.loads(capsys.readouterr().out) == {"answer": "unsat", "method": "ibp"}


def test_a_malformed_property_is_one_line(capsys, question):
    words = question("abc")
    assert main(words) == 2
    assert "line 5: 'abc' is neither a variable nor a number" in one_line(capsys)
    assert main([*question(1), "--bound", "magic"]) == 2
    assert "method must be one of ibp" in one_line(capsys)
