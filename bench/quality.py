"""Perplexity and accuracy against bits, for every quantizer on the same small trained models.

    python bench/quality.py --cache /tmp/quality --out bench/results/quality

Writes OUT.md (the table), OUT.json (every run) and OUT.svg (the plot). Bits per weight count all
that stands for the quantized weights: codes, scales, zero-points, outliers, tables. The models are
made by `quality_models.py`; embeddings and heads stay in float. OFQ trains on the images, all
others see some inputs or none. With `llmcompressor` installed its rounding to nearest and its GPTQ
run beside ours on the same calibration data.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from quality_models import (
    Text,
    Vision,
    docstrings,
    perplexity,
    trained_language_model,
    trained_vit,
)
from torch import nn
from torch.utils.data import DataLoader

import pyrobust
from pyrobust.quantize import (
    GPTQ,
    QUANTIZERS,
    AdaDim,
    LearnedRounding,
    quantize_vit,
    train_ofq,
)
from pyrobust.quantize.names import quantizer_named

GROUP = {"language": 128, "vision": 64}
SKIP = {
    "language": ("*embed_tokens", "lm_head"),
    "vision": ("*embeddings", "*classifier"),
}
LIBRARY = {  # by label, its modifier
    "llmcompressor RTN": "QuantizationModifier",
    "llmcompressor GPTQ": "GPTQModifier",
}
OFQ = "ofq (trained)"


def quantizers(names: list[str] | None) -> dict[str, Callable[[], Any]]:
    """What is compared, by label: variants of our own, then every other name with its defaults."""
    found: dict[str, Callable[[], Any]] = {
        "rtn": lambda: quantizer_named("quality", "rtn"),
        "adadim (rtn)": lambda: AdaDim("rtn"),
        "gptq": GPTQ,
        "adadim (gptq)": lambda: AdaDim("gptq", propagate="quantized"),
        "adadim (gptq, judged so)": lambda: AdaDim("gptq", judge="method"),
        "learned_rounding": lambda: LearnedRounding(iterations=200, batch_size=4),
        "learned_rounding (gptq)": lambda: LearnedRounding(start="gptq", iterations=0),
    }
    for name in QUANTIZERS:
        if name != "adadim" and name not in found:
            found[name] = lambda name=name: quantizer_named("quality", name)
    return found if names is None else {label: found[label] for label in names}


def fits(label: str, bits: float) -> bool:
    """Whether a quantizer takes this: nf4 has 16 levels."""
    return label != "nf4" or bits == 4


def convert(model: nn.Module, kind: str, make: Callable[[], Any], bits: float, data: Any) -> Any:
    """The packed model, its bits per quantized weight, and the seconds it took."""
    quantizer = make()
    calibrated = hasattr(quantizer, "quantize_block") or hasattr(quantizer, "quantize_layers")
    began = time.perf_counter()
    packed = pyrobust.pack(
        model,
        bits=bits,
        group_size=GROUP[kind],
        skip=SKIP[kind],
        quantizer=quantizer,
        calibration=data if calibrated else None,
    )
    seconds = time.perf_counter() - began
    rows = pyrobust.pack_report(packed).packed
    stored = sum(row.bytes_after for row in rows)
    weights = sum(model.get_submodule(row.name).weight.numel() for row in rows)
    return packed, 8 * stored / weights, seconds


def from_library(model: nn.Module, modifier: str, bits: int, text: Text) -> tuple[nn.Module, float]:
    """`llmcompressor` on a copy: asymmetric groups of 128; its GPTQ in static activation order."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=False, strategy="group", group_size=128
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    with tempfile.TemporaryDirectory() as folder:  # it asks for a model that came from files
        model.save_pretrained(folder)
        result = type(model).from_pretrained(folder).eval()
        _oneshot(result, modifier, scheme, text)
    return result.eval(), bits + (16 + bits) / 128


def _oneshot(result: nn.Module, modifier: str, scheme: Any, text: Text) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers import quantization

    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)}
        for part in text.calibration.split(32)
    ]
    oneshot(
        model=result,
        processor=object(),  # the batches are token numbers already
        dataset=DataLoader(batches, batch_size=None),
        recipe=getattr(quantization, modifier)(config_groups={"all": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(batches),
    )


def language_runs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    text = docstrings()
    text = replace(text, calibration=text.calibration[: args.calibration_sequences])
    data = [{"input_ids": part} for part in text.calibration.split(32)]
    test = text.test[: args.test_sequences]
    for seed in args.seeds:
        model = trained_language_model(
            seed, steps=args.steps, cache=args.cache, progress=not args.quiet
        )
        yield _run("language", "float", seed, 32, 32.0, perplexity(model, test), 0.0)
        for bits in args.bits:
            for label, make in quantizers(args.quantizers).items():
                if not fits(label, bits):
                    continue
                packed, stored, seconds = convert(model, "language", make, bits, data)
                figure = perplexity(packed, test)
                yield _run("language", label, seed, bits, stored, figure, seconds)
            for label, modifier in LIBRARY.items() if args.library else ():  # language models only
                began = time.perf_counter()
                packed, stored = from_library(model, modifier, bits, text)
                seconds = time.perf_counter() - began
                figure = perplexity(packed, test)
                yield _run("language", label, seed, bits, stored, figure, seconds)


def vision_runs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in args.seeds:
        vision = trained_vit(seed, cache=args.cache)
        yield _run("vision", "float", seed, 32, 32.0, accuracy(vision.model, vision), 0.0)
        images = vision.train_images[:256].split(64)
        pairs = list(zip(images, vision.train_labels[:256].split(64), strict=True))
        for bits in args.bits:
            for label, make in quantizers(args.quantizers).items():
                if not fits(label, bits):
                    continue
                data = pairs if label == "gwq" else list(images)  # a loss needs labels
                packed, stored, seconds = convert(vision.model, "vision", make, bits, data)
                figure = accuracy(packed, vision)
                yield _run("vision", label, seed, bits, stored, figure, seconds)
            if args.train:
                packed, stored, seconds = trained_in_low_bits(vision, bits, seed)
                yield _run("vision", OFQ, seed, bits, stored, accuracy(packed, vision), seconds)


def trained_in_low_bits(vision: Vision, bits: int, seed: int) -> tuple[nn.Module, float, float]:
    """OFQ from the float model: 10 epochs and 3 of annealing, activations in float."""
    began = time.perf_counter()
    model = quantize_vit(vision.model, bits, None, SKIP["vision"])
    train_ofq(
        model,
        vision.train_images,
        vision.train_labels,
        epochs=10,
        annealing_epochs=3,
        teacher=vision.model,
        seed=seed,
    )
    packed = pyrobust.pack(model, skip=SKIP["vision"])
    seconds = time.perf_counter() - began
    stored = sum(row.bytes_after for row in pyrobust.pack_report(packed).packed)
    blocks = (m for m in vision.model.modules() if isinstance(m, nn.ModuleList))
    layers = (m for block in blocks for m in block.modules() if isinstance(m, nn.Linear))
    weights = sum(layer.weight.numel() for layer in layers)
    return packed, 8 * stored / weights, seconds


@torch.no_grad()
def accuracy(model: nn.Module, vision: Vision) -> float:
    return float((model(vision.images).argmax(1) == vision.labels).float().mean())


def _run(
    model: str,
    quantizer: str,
    seed: int,
    bits: float,
    stored: float,
    figure: float,
    seconds: float,
) -> dict[str, Any]:
    return {
        "model": model,
        "quantizer": quantizer,
        "seed": seed,
        "bits": bits,
        "bits_per_weight": round(stored, 4),
        "figure": figure,
        "seconds": round(seconds, 2),
    }


# -- what is written -----------------------------------------------------------------------------


def table(runs: list[dict[str, Any]], model: str) -> str:
    """Mean over the seeds; in brackets the smallest and largest, then the stored bits."""
    runs = [run for run in runs if run["model"] == model]
    widths = sorted({run["bits"] for run in runs if run["quantizer"] != "float"}, reverse=True)
    floats = [run["figure"] for run in runs if run["quantizer"] == "float"]
    name = "perplexity per byte" if model == "language" else "accuracy"
    lines = [
        f"Float: {name} {mean(floats):.4f} ({min(floats):.4f} to {max(floats):.4f}).",
        "",
        "| quantizer | " + " | ".join(f"{bits:g} bits" for bits in widths) + " |",
        "| --- " * (len(widths) + 1) + "|",
    ]
    for label in dict.fromkeys(run["quantizer"] for run in runs if run["quantizer"] != "float"):
        own = [run for run in runs if run["quantizer"] == label]
        cells = [_cell([run for run in own if run["bits"] == bits]) for bits in widths]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return "-"
    figures = [run["figure"] for run in runs]
    stored = mean(run["bits_per_weight"] for run in runs)
    return f"{mean(figures):.4f} ({min(figures):.4f} to {max(figures):.4f}) at {stored:.2f}"


def page(runs: list[dict[str, Any]]) -> str:
    seeds = len({run["seed"] for run in runs})
    seen = {run["quantizer"] for run in runs}
    library = (" --library" if seen.intersection(LIBRARY) else "") + (
        " --train" if OFQ in seen else ""
    )
    parts = [
        "# Quality against bits",
        "",
        f"`python bench/quality.py{library}`, torch {torch.__version__}, {platform.machine()}. "
        f"Mean of {seeds} seeds (smallest to largest), then stored bits per quantized weight with "
        "all side data.",
    ]
    for model, title in (
        (
            "language",
            "Llama (2 layers, width 128) on Python's documentation strings, groups of 128",
        ),
        ("vision", "Vision transformer (3 layers, width 64) on digits, groups of 64"),
    ):
        if any(run["model"] == model for run in runs):
            parts += ["", f"## {title}", "", table(runs, model)]
    return "\n".join(parts) + "\n"


def plot(runs: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(run["model"] for run in runs))
    figure, axes = pyplot.subplots(1, len(models), figsize=(6 * len(models), 4.5), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        own = [run for run in runs if run["model"] == model]
        exact = mean(run["figure"] for run in own if run["quantizer"] == "float")
        axis.axhline(exact, color="black", linewidth=0.8, label="float")
        for label in dict.fromkeys(run["quantizer"] for run in own):
            if label == "float":
                continue
            points: dict[float, list[dict[str, Any]]] = {}
            for run in own:
                if run["quantizer"] == label:
                    points.setdefault(run["bits"], []).append(run)
            xs = [mean(r["bits_per_weight"] for r in points[bits]) for bits in sorted(points)]
            ys = [mean(r["figure"] for r in points[bits]) for bits in sorted(points)]
            axis.plot(xs, ys, marker="o", markersize=3, linewidth=1, label=label)
        if model == "language":
            axis.set_yscale("log")
        axis.set_xlabel("stored bits per weight")
        axis.set_ylabel("perplexity per byte" if model == "language" else "accuracy")
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write, without suffix; else print")
    parser.add_argument("--cache", type=Path, help="folder that keeps the trained models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="training steps of the LM")
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 3, 2])
    parser.add_argument("--quantizers", nargs="*", help="labels; all by default")
    parser.add_argument("--models", nargs="*", default=["language", "vision"])
    parser.add_argument("--calibration-sequences", type=int, default=64)
    parser.add_argument("--test-sequences", type=int, default=128)
    parser.add_argument("--library", action="store_true", help="run llmcompressor too")
    parser.add_argument("--train", action="store_true", help="train OFQ on the images too")
    parser.add_argument(
        "--keep", type=Path, nargs="*", default=[], help="JSON files of earlier runs"
    )
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()
    args.bits = [int(bits) if bits == int(bits) else bits for bits in args.bits]
    kept = [run for file in args.keep for run in json.loads(file.read_text())]
    runs = []
    for kind, each in (("language", language_runs), ("vision", vision_runs)):
        if kind in args.models:
            for run in each(args):
                runs.append(run)
                if not args.quiet:
                    print(*run.values(), flush=True)
    latest = {
        (run["model"], run["quantizer"], run["bits"], run["seed"]): run for run in [*kept, *runs]
    }
    runs = list(latest.values())
    text = page(runs)
    if args.out is None:
        print(text)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(runs, indent=0) + "\n")
    args.out.with_suffix(".md").write_text(text)
    plot(runs, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
