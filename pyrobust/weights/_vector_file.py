"""Reading the safetensors files that task vectors and packed ones write."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["read_vector_file"]


def read_vector_file(subject: str, path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is truncated, damaged or no safetensors file.
    """
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except SafetensorError as error:
        raise ValueError(
            f"{subject}: {path} must be a whole file of {subject}.save; it is truncated, damaged "
            f"or foreign ({error})."
        ) from error
