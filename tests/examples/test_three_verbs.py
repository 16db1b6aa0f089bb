"""The example of the README, run as a user would run it."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "three_verbs.py"


def test_the_three_verbs_run_and_certify(capsys):
    spec = importlib.util.spec_from_file_location("three_verbs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shares = module.main(epochs=8)
    printed = capsys.readouterr().out
    assert "4 packed, 0 skipped" in printed
    assert f"accuracy {shares['accuracy']:.1%}" in printed
    assert shares["accuracy"] > 0.85
    assert shares["bounded"] > 0.4
    assert shares["smoothed"] > 0.4
