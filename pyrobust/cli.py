"""What the four commands do; ``pyrobust_cli`` reads the arguments."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyrobust.data import ImageSet, load_images

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Carry out the command of the parsed ``options`` and print its result.

    Raises:
        ValueError: an option is out of range.
        OSError: a file or folder is missing or cannot be written.
    """
    commands = {"demo": _demo, "certify": _certify, "bench": _bench, "info": _info}
    result, table = commands[options.command](options)
    if result:  # empty in all but the first of several processes
        print(json.dumps(result, indent=2) if options.json else table)


def _demo(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from pyrobust.demo import DemoSettings, run_demo
    from pyrobust.report import report_table

    data = _load_data(options.data)
    settings = DemoSettings(seed=options.seed).fitted_to(data)
    if options.quick:
        settings, data = settings.quick(), data.head(6000, 200)
    if options.samples is not None:
        settings = replace(settings, samples=options.samples)
    report = run_demo(data, options.out, settings=settings, progress=not options.json)
    place = Path(options.out)
    return (
        report,
        f"{report_table(report)}\n\nwritten: {place / 'report.html'}, report.json, models",
    )


def _certify(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if options.property is not None:
        return _decide(options)
    from pyrobust.certify.job import CertificationJob, certify_to_log
    from pyrobust.certify.job_data import load_job_data
    from pyrobust.certify.job_methods import method_of
    from pyrobust_cli.certify_options import method_options

    job = CertificationJob(
        model=options.model,
        architecture=options.architecture,
        method=method_of(options.method, method_options(options)),
        limit=options.limit,
        device=options.device,
    )
    data = load_job_data(options.method, options.data)
    result = certify_to_log(
        job, data, options.out, resume=options.resume, progress=not options.json
    )
    if options.plot and result:
        result["plot"] = _plot_log(options.out, options.plot)
    return result, "\n".join(f"{name.replace('_', ' '):<18} {v}" for name, v in result.items())


def _decide(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The verdict on a property, and the counterexample in the form of VNN-COMP."""
    from pyrobust.certify import decide_property, load_onnx, load_vnnlib

    question = load_vnnlib(options.property)
    model = load_onnx(options.model)
    shape: Any = model.input_shape
    seed, method = getattr(options, "seed", 0), getattr(options, "bound", "alpha-crown")
    verdict = decide_property(model, question, shape, method=method, seed=seed)
    result: dict[str, Any] = {"answer": verdict.answer, "method": verdict.method}
    lines = [verdict.answer]
    if verdict.counterexample is not None:
        point = verdict.counterexample.flatten().tolist()
        result["counterexample"] = point
        lines += [f"(X_{i} {value!r})" for i, value in enumerate(point)]
    return result, "\n".join(lines)


def _plot_log(log: str, picture: str) -> str:
    """Draw the certified accuracy of a log; returns the name of the picture."""
    from pyrobust.certify.job import certificate_of_log

    certificate, labels = certificate_of_log(log)
    axes = certificate.plot(labels=labels)
    axes.figure.savefig(picture)
    return picture


def _bench(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from pyrobust.quick_bench import bench_table, run_bench

    result = run_bench(seed=options.seed, family=options.family)
    return result, bench_table(result)


def _info(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from pyrobust.info import info

    facts = info()
    return facts.to_dict(), str(facts)


def _load_data(source: str | None) -> ImageSet:
    """What ``source`` names, or digits."""
    return load_images(source or "digits")
