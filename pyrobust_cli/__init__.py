"""The command line's front door: reads the arguments before anything slow is imported.

A package of its own because importing ``pyrobust`` imports torch, which takes seconds; ``--help``
and a misspelt option are answered without it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from pyrobust_cli.certify_options import add_method_options

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """Prints the version of the installed distribution, read when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        """Print one line and exit with status 0."""
        from importlib.metadata import version

        print(f"pyrobust {version('pyrobust')}")
        parser.exit(0)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all four commands."""
    parser = _Parser(
        prog="pyrobust",
        description="Pack a network into 1-8 bits, bound it, smooth it.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_certify(commands)
    bench = commands.add_parser("bench", help="time the three kernel families against plain torch")
    bench.add_argument(
        "family",
        nargs="?",
        choices=["matmul"],
        help="one family at length; without, all in short",
    )
    bench.add_argument("--seed", type=int, default=0, help="of the random inputs")
    commands.add_parser("info", help="versions, instruction set, threads, CUDA module")
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print JSON, nothing else")
    return parser


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="train, pack, bound and smooth a small network; write a report",
        description=(
            "Train a small network twice, pack it to 8, 4 and 2 bits, certify every test image in "
            "both norms, and write report.json, report.html and the models."
        ),
    )
    demo.add_argument("--data", metavar="FOLDER", help="MNIST idx files (default: digits)")
    demo.add_argument(
        "--out", default="demo-report", metavar="FOLDER", help="(default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--samples", type=int, metavar="N", help="noisy copies per image")
    demo.add_argument("--quick", action="store_true", help="a look within seconds, poor figures")


def _add_certify(commands: argparse._SubParsersAction[_Parser]) -> None:
    certify = commands.add_parser(
        "certify",
        help="certify a saved model image by image into an append-only log",
        description=(
            "Certify a model that pyrobust saved on the test images of a data set. The log gets "
            "one line per image; a killed run goes on with --resume and ends with the same log. "
            "Under torchrun the processes share the images and make the log of one process. "
            "With NET.onnx and PROPERTY.vnnlib: print unsat, sat or unknown instead."
        ),
    )
    certify.add_argument("model", metavar="MODEL.safetensors|NET.onnx")
    certify.add_argument("property", nargs="?", metavar="PROPERTY.vnnlib", help="to be decided")
    certify.add_argument(
        "--data",
        default="digits",
        metavar="SOURCE",
        help="digits; a folder of MNIST idx, CIFAR pickle or image files; module:function",
    )
    add_method_options(certify)
    certify.add_argument("--limit", type=int, metavar="N", help="first N test images only")
    certify.add_argument("--device", default="cpu", help="of the network (default: %(default)s)")
    certify.add_argument(
        "--architecture",
        default="pyrobust.demo:convolutional_network",
        metavar="MODULE:FUNCTION",
        help="makes the float network from image shape and number of classes (default: the demo's)",
    )
    certify.add_argument("--out", metavar="LOG.tsv", help="the log; needed without a property")
    certify.add_argument("--resume", action="store_true", help="go on with an existing log")
    certify.add_argument(
        "--plot", metavar="FILE.png", help="draw certified accuracy against radius"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command == "certify" and options.property is None and options.out is None:
        parser.error("certify: --out LOG.tsv or PROPERTY.vnnlib is required")
    try:
        from pyrobust.cli import run

        run(options)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        message = " ".join(str(error).split())
        print(f"pyrobust: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pyrobust {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0
