"""Small trained models for `quality.py` and for tests: a language model and a vision transformer.

Built from Hugging Face configurations and trained here, without downloads: the language model on
the documentation strings of Python's standard library, byte by byte; the vision transformer on
scikit-learn's digits.
"""

from __future__ import annotations

import ast
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pyrobust.data import load_digits

__all__ = ["Text", "Vision", "docstrings", "perplexity", "trained_language_model", "trained_vit"]

LENGTH = 128  # bytes of one sequence


@dataclass(frozen=True)
class Text:
    """Sequences of bytes, ``(N, LENGTH)`` int64, in three parts of different files."""

    train: Tensor
    calibration: Tensor
    test: Tensor


def docstrings() -> Text:
    """Documentation strings of the standard library; one file in ten is for testing."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/*.py"))
    files = [f for f in files if not {"test", "tests", "idlelib", "site-packages"} & {*f.parts}]
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for index, file in enumerate(files):
        text = "\n\n".join(_docstrings_of(file)).encode("ascii", "ignore")
        parts[index % 10 == 0].append(text + b"\n\n" if text else b"")
    train, test = (_sequences(b"".join(parts[key])) for key in (False, True))
    return Text(train[256:], train[:256], test)


def _docstrings_of(file: Path) -> list[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text]


def _sequences(text: bytes) -> Tensor:
    count = len(text) // LENGTH
    flat = torch.frombuffer(bytearray(text[: count * LENGTH]), dtype=torch.uint8)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return flat.view(count, LENGTH).long()[order]


def language_model(*, hidden: int = 128, layers: int = 2) -> nn.Module:
    """A Llama of random weights over bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def trained_language_model(
    seed: int,
    *,
    steps: int = 300,
    hidden: int = 128,
    layers: int = 2,
    cache: Path | None = None,
    progress: bool = False,
) -> nn.Module:
    """A language model after ``steps`` batches of 16 sequences; kept in ``cache`` if given."""
    torch.manual_seed(seed)
    model = language_model(hidden=hidden, layers=layers)
    file = None if cache is None else cache / f"lm-{hidden}-{layers}-{steps}-{seed}.pt"
    if _load(model, file):
        return model.eval()
    tokens = docstrings().train
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 4e-3, total_steps=steps, pct_start=0.1
    )
    model.train()
    for _ in tqdm(range(steps), desc=f"language model {seed}", disable=not progress):
        batch = tokens[torch.randint(len(tokens), (16,), generator=generator)]
        loss = _next_byte_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    _save(model, file)
    return model.eval()


def _next_byte_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, sequences: Tensor) -> float:
    """Per byte."""
    losses = [_next_byte_loss(model, part) * len(part) for part in sequences.split(32)]
    return float(torch.stack(losses).sum().div(len(sequences)).exp())


@dataclass(frozen=True)
class Vision:
    """A trained vision transformer and its data."""

    model: nn.Module
    train_images: Tensor
    train_labels: Tensor
    images: Tensor
    labels: Tensor


class _Logits(nn.Module):
    """A Hugging Face classifier that returns its logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images).logits


def trained_vit(seed: int, *, epochs: int = 12, cache: Path | None = None) -> Vision:
    """A vision transformer on digits, 8 by 8 pixels in patches of 2 by 2."""
    from transformers import ViTConfig, ViTForImageClassification

    from pyrobust.train import GaussianCrossEntropy, fit

    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = _Logits(ViTForImageClassification(config))
    data = load_digits()
    file = None if cache is None else cache / f"vit-{epochs}-{seed}.pt"
    if not _load(model, file):
        generator = torch.Generator().manual_seed(seed)
        objective = GaussianCrossEntropy(0.1, generator=generator)
        fit(
            model,
            data.train_images,
            data.train_labels,
            objective=objective,
            epochs=epochs,
            learning_rate=1e-3,
            generator=generator,
        )
        _save(model, file)
    return Vision(
        model.eval(), data.train_images, data.train_labels, data.test_images, data.test_labels
    )


def _load(model: nn.Module, file: Path | None) -> bool:
    if file is None or not file.exists():
        return False
    model.load_state_dict(torch.load(file, weights_only=True))
    return True


def _save(model: nn.Module, file: Path | None) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}.tmp")
        torch.save(model.state_dict(), draft)
        os.replace(draft, file)
