"""Ties docs/methods.md to the code: rows, modules, tests and public names cannot drift apart."""

import doctest
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from pyrobust.interval.table import BY_NAME

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["certify", "data", "evaluate", "nn", "quantize", "train", "weights"]
METHOD_ROW = re.compile(
    r"^\| (?P<number>\d+) \| (?P<name>[^|]+) \| (?P<paper>[^|]+) \| `(?P<module>[\w.]+)` "
    r"\| (?P<state>\w+) \| (?P<evidence>[^|]+) \|$"
)
SHARED_ROW = re.compile(r"^\| `(?P<module>[\w.]+)` \| (?P<what>[^|]+) \| (?P<evidence>[^|]+) \|$")
LINES = (ROOT / "docs/methods.md").read_text(encoding="utf-8").splitlines()
METHODS = [match.groupdict() for line in LINES if (match := METHOD_ROW.match(line))]
SHARED = [match.groupdict() for line in LINES if (match := SHARED_ROW.match(line))]
WRITTEN = [row for row in METHODS if row["state"] == "done"] + SHARED


def test_fifty_rows_are_numbered_and_name_their_paper():
    assert [int(row["number"]) for row in METHODS] == list(range(1, 51))
    assert len({row["module"] for row in METHODS + SHARED}) == len(METHODS) + len(SHARED)
    for row in METHODS:
        assert re.search(r"arXiv \d{4}\.\d{5}\)$", row["paper"]), row
        assert row["state"] in ("planned", "done"), row
        assert row["module"].split(".")[0] in PACKAGES, row


@pytest.mark.parametrize("row", WRITTEN, ids=lambda row: row["module"])
def test_a_written_module_imports_and_names_existing_tests(row):
    importlib.import_module(f"pyrobust.{row['module']}")
    files = re.findall(r"`(tests/[\w/]+\.py)`", row["evidence"])
    assert files, f"{row['module']}: the evidence names no test file"
    for name in files:
        assert (ROOT / name).is_file(), f"{row['module']}: {name} does not exist"
        assert "def test_" in (ROOT / name).read_text(encoding="utf-8"), f"{name} holds no test"


def test_a_module_that_exists_is_not_still_planned():
    stale = [
        row["module"]
        for row in METHODS
        if row["state"] == "planned" and importlib.util.find_spec(f"pyrobust.{row['module']}")
    ]
    assert not stale, f"planned rows whose module exists: {stale}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_its_home_on_the_page(package):
    module = importlib.import_module(f"pyrobust.{package}")
    homes = tuple(f"pyrobust.{row['module']}" for row in WRITTEN)
    orphans = []
    for name in getattr(module, "__all__", []):
        home = getattr(getattr(module, name), "__module__", None) or ""
        if not home.startswith("pyrobust."):  # numbers and type aliases do not know theirs
            home = _constant_home(name, homes)
        if not any(home == known or home.startswith(known + ".") for known in homes):
            orphans.append(f"{package}.{name} (from {home})")
    assert not orphans, f"public names without a row in docs/methods.md: {orphans}"


def _constant_home(name, homes):
    """A documented module that holds a value which does not name its home."""
    for home in homes:
        if hasattr(importlib.import_module(home), name):
            return home
    return ""


def test_the_examples_of_the_interval_guide_run():
    text = (ROOT / "docs/guide/intervals.md").read_text(encoding="utf-8")
    plain = "\n".join("" if line.startswith("```") else line for line in text.splitlines())
    examples = doctest.DocTestParser().get_doctest(plain, {}, "intervals.md", "intervals.md", 0)
    assert len(examples.examples) > 15
    runner = doctest.DocTestRunner()
    assert runner.run(examples).failed == 0


def test_the_interval_guide_lists_every_operation():
    text = (ROOT / "docs/guide/intervals.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`(\w+)`", text[text.index("## Operations") :]))
    assert {name for name in BY_NAME if not name.startswith("__")} <= listed
