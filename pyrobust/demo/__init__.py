"""The demo behind ``pyrobust demo``: one model, packed, bounded and smoothed, on real data."""

from pyrobust.demo.evaluation import evaluate_variant, interval_certified, model_bytes
from pyrobust.demo.network import convolutional_network
from pyrobust.demo.run import run_demo, train_networks
from pyrobust.demo.settings import DemoSettings

__all__ = [
    "DemoSettings",
    "convolutional_network",
    "evaluate_variant",
    "interval_certified",
    "model_bytes",
    "run_demo",
    "train_networks",
]
