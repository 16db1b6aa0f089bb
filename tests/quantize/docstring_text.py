"""Text that ships with Python: the documentation strings of its standard library, as bytes."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import torch
from torch import Tensor


def docstring_bytes(limit: int = 500_000) -> Tensor:
    """The first ``limit`` bytes, int64 in [0, 128), modules in sorted order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts: list[str] = []
    size = 0
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node)
                if text and text.isascii():
                    parts.append(text)
                    size += len(text) + 2
        if size >= limit:
            break
    raw = "\n\n".join(parts).encode()[:limit]
    return torch.tensor(list(raw), dtype=torch.int64)


def windows(text: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """``(count, length)`` random excerpts."""
    starts = torch.randint(0, len(text) - length, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(length)]
