"""Layers of a model gathered by the blocks that hold them, by name alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

__all__ = ["group_layers", "longest_list"]


def longest_list(model: nn.Module, layers: Iterable[str]) -> str | None:
    """The name of the longest ``ModuleList`` that holds any of ``layers``, or None."""
    names = list(layers)
    lists: dict[str, int] = {
        name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)
    }
    for found in sorted(lists, key=lambda name: -lists[name]):
        if any(name.startswith(f"{found}.") for name in names):
            return found
    return None


def group_layers(
    subject: str,
    model: nn.Module,
    layers: Iterable[str],
    blocks: str | Sequence[str] | None = None,
) -> list[list[str]]:
    """Names of layers, those of one block together and every other by itself.

    Args:
        subject: who asks, for the errors.
        model: that holds them.
        layers: their names, in the order to keep.
        blocks: the name of the container of the blocks, or the names of the blocks; None takes the
            longest ``ModuleList`` that holds any of the layers.

    Raises:
        ValueError: ``blocks`` names no modules of the model, or no block holds a layer.
    """
    names = list(layers)
    inside = longest_list(model, names) if blocks is None else blocks
    holders = [] if inside is None else _block_names(subject, model, inside)
    groups: dict[str, list[str]] = {}
    for name in names:
        owner = next((b for b in holders if name == b or name.startswith(f"{b}.")), name)
        groups.setdefault(owner, []).append(name)
    if blocks is not None and not groups.keys() & set(holders):
        raise ValueError(f"{subject}: blocks must hold layers to pack; got {blocks!r}.")
    return list(groups.values())


def _block_names(subject: str, model: nn.Module, blocks: str | Sequence[str]) -> list[str]:
    modules = dict(model.named_modules())
    names = [blocks] if isinstance(blocks, str) else list(blocks)
    if not names or any(name not in modules or not name for name in names):
        raise ValueError(f"{subject}: blocks must name modules of the model; got {blocks!r}.")
    if isinstance(blocks, str):
        return [f"{blocks}.{child}" for child, _ in modules[blocks].named_children()]
    return names
