"""GWQ: keep the weights that the loss minds most in 16 bits, round the others to a few bits.

About one weight in a hundred matters far more than the rest, and the gradient of the language
modelling loss on as little as one sequence finds it. These weights stand in a sparse matrix in 16
bits; the ranges of the groups are those of the other weights, which are rounded to 2 to 8 bits; one
pass multiplies both. Use it where activations have outlier channels, as large language models do;
on models without them, keeping the largest weights or a diagonal-Hessian score does as well or
better (``score=``).

Source: Shao et al., "GWQ: Gradient-Aware Weight Quantization for Large Language Models", 2024,
arXiv 2411.00850; second-level statistics as in SpQR (:mod:`pyrobust.quantize.second_level`).
Departures: |g| is averaged over sequences; where a few input columns hold most of a layer's
outliers, these columns are kept whole, which stores one index a column instead of one a weight.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyrobust._checks import check_choice, check_finite, check_integer, check_unit
from pyrobust.quantize.calibration import Call
from pyrobust.quantize.calibration_block import Quantized
from pyrobust.quantize.conversion_folder import ConversionFolder, describe_conversion
from pyrobust.quantize.layer_groups import group_layers, longest_list
from pyrobust.quantize.outliers import (
    OUTLIER_BITS,
    largest,
    outlier_columns,
    outlier_count,
    quantize_with_outliers,
)
from pyrobust.quantize.qtensor import QTensor
from pyrobust.quantize.ranked_scores import Ranked, largest_of_all, load_ranked, save_ranked
from pyrobust.quantize.round_to_nearest import round_to_nearest
from pyrobust.quantize.sensitivity import (
    SENSITIVITY_KINDS,
    prediction_loss,
    sensitivity,
)

__all__ = ["GWQ", "gwq_quantize"]


@dataclass(frozen=True)
class GWQ:
    """The quantizer for ``pyrobust.pack(model, quantizer=GWQ(...), calibration=batches)``.

    Linear layers and convolutions keep their outliers; the weights of embeddings are rounded to
    nearest (the method leaves embeddings and the head in float: name them in ``skip``). The default
    format of the method is ``group_size=16``.

    Args:
        outlier_fraction: share of the weights to keep, in [0, 1).
        score: a kind of :func:`~pyrobust.quantize.sensitivity`.
        ranking: ``"layer"`` keeps that share of each layer, ``"global"`` of all layers together.
        second_level: scales and zero-points in 3 bits.
        whole_columns: keep columns whole where that stores outliers in fewer bits.
        loss: as for :func:`~pyrobust.quantize.sensitivity`.
        layers_at_once: as there.
        seed: of ``score="random"``.
        progress: show a progress bar.

    Raises:
        ValueError: an argument is out of range.
    """

    outlier_fraction: float = 0.01
    score: str = "grad"
    ranking: str = "layer"
    second_level: bool = False
    whole_columns: bool = True
    loss: Callable[[nn.Module, Any], Tensor] = prediction_loss
    layers_at_once: int | None = None
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        check_unit("GWQ", "outlier_fraction", self.outlier_fraction)
        if self.outlier_fraction == 1:
            raise ValueError("GWQ: outlier_fraction must be below 1; got 1.")
        check_choice("GWQ", "score", self.score, SENSITIVITY_KINDS)
        check_choice("GWQ", "ranking", self.ranking, ("layer", "global"))
        if self.layers_at_once is not None:
            check_integer("GWQ", "layers_at_once", self.layers_at_once, 1)

    resumable = True

    def quantize_layers(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        formats: Mapping[str, Mapping[str, Any]],
        calibration: Iterable[Any] | Tensor | None,
        *,
        blocks: str | Sequence[str] | None = None,
        resume: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> dict[str, Quantized]:
        """Packed weights by the names of the layers; see ``pyrobust.pack``.

        With ``blocks`` or ``resume`` the layers are scored block by block, each in a sweep of its
        own over the data: scores of one block are in memory, and finished blocks are kept in the
        folder. With ``ranking="global"`` all layers are scored before the first is packed; then
        what may still be among the largest scores is kept in the folder after each block.
        """
        for name in layers:
            check_choice(f"GWQ: '{name}'", "bits", formats[name]["bits"], OUTLIER_BITS)
        own = replace(self, progress=self.progress or progress)
        batches = _batches(calibration)
        together = blocks is None and resume is None
        names = [list(layers)] if together else group_layers("pack", model, layers, blocks)
        groups = [{name: layers[name] for name in group} for group in names]
        folder = None
        if resume is not None:
            described = describe_conversion(self, layers, formats, _as_calls(batches))
            folder = ConversionFolder("pack", resume, described)
        ranked = None
        if self.ranking == "global":
            ranked = own._ranked_together(model, groups, formats, batches, folder)
        results: dict[str, Quantized] = {}
        for index, group in enumerate(groups):
            made = None if folder is None else folder.load(index)
            if made is None:
                kept = own._outliers(model, group, formats, batches) if ranked is None else ranked
                made = own._packed(group, kept, formats)
                if folder is not None:
                    folder.save(index, made)
            results |= made
        return results

    def _packed(
        self,
        layers: Mapping[str, nn.Module],
        kept: Ranked,
        formats: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Quantized]:
        places = {name: kept[name][0] for name in layers if name in kept}
        return {
            name: Quantized(self._pack(_weight(layer), places.get(name), formats[name]))
            for name, layer in layers.items()
        }

    def _ranked_together(
        self,
        model: nn.Module,
        groups: Sequence[Mapping[str, nn.Module]],
        formats: Mapping[str, Mapping[str, Any]],
        batches: list[Any] | None,
        folder: ConversionFolder | None,
    ) -> Ranked:
        """The largest scores of all layers, group by group as the folder holds them."""
        sizes = [w.numel() for group in groups for w in _scored(group).values()]
        count = outlier_count(self.outlier_fraction, sum(sizes))
        best: Ranked = {}
        for index, group in enumerate(groups):
            found = None if folder is None else load_ranked(folder, index)
            own = found or self._outliers(model, group, formats, batches, count)
            best = largest_of_all(best | own, count)
            if folder is not None and found is None:
                save_ranked(folder, index, {name: best[name] for name in own})
        return best

    def _outliers(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        formats: Mapping[str, Mapping[str, Any]],
        batches: list[Any] | None,
        most: int | None = None,
    ) -> Ranked:
        """The weights to keep by layer, up to ``most`` in each; no score outlives its layer."""
        weights = _scored(layers)
        if self.outlier_fraction == 0 or not weights:
            return {}

        def take(name: str, score: Tensor) -> tuple[Tensor, Tensor]:
            check_finite("GWQ", f"the score of '{name}'", score)
            size = score.numel()
            count = outlier_count(self.outlier_fraction, size) if most is None else most
            places = largest(score, min(size, count))
            return places.cpu(), score.flatten()[places].cpu()

        def change(name: str, weight: Tensor) -> Tensor:
            flat = weight.flatten(1)
            plain = round_to_nearest(flat, **formats[name]).dequantize()
            return weight - plain.reshape(weight.shape).to(weight)

        return sensitivity(
            model,
            batches,
            self.score,
            layers=list(weights),
            loss=self.loss,
            change=change if self.score == "hessian-diag" else None,
            consume=take,
            layers_at_once=self.layers_at_once,
            seed=self.seed,
            progress=self.progress,
        )

    def _pack(self, weight: Tensor, places: Tensor | None, form: Mapping[str, Any]) -> QTensor:
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        if places is not None:
            mask[places] = True
        mask = mask.reshape(weight.shape).flatten(1)
        if self.whole_columns:
            mask[:, outlier_columns(mask)] = True
        flat = weight.detach().flatten(1)
        return quantize_with_outliers(flat, mask, second_level=self.second_level, **form)


def gwq_quantize(
    model: nn.Module,
    calibration: Iterable[Any] | Tensor,
    bits: float = 4,
    group_size: int = 16,
    outlier_fraction: float = 0.01,
    score: str = "grad",
    *,
    symmetric: bool = False,
    second_level: bool = False,
    ranking: str = "layer",
    activations: str | None = None,
    layers: Iterable[str] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] = prediction_loss,
    blocks: str | Sequence[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> nn.Module:
    """GWQ as published: the linear layers of the blocks packed, embeddings and head in float.

    Args:
        model: in evaluation mode; it is not changed.
        calibration: as ``batches`` of :func:`~pyrobust.quantize.sensitivity`; one sequence will do.
        bits: 2, 3, 4 or 8.
        group_size: weights that share a scale; the last group of a row may be shorter.
        outlier_fraction: share of each layer's weights to keep in 16 bits, in [0, 1).
        score: a kind of :func:`~pyrobust.quantize.sensitivity`.
        symmetric: no zero-points.
        second_level: scales and zero-points in 3 bits (SpQR's second level).
        ranking: ``"layer"`` or ``"global"``.
        activations: None or ``"int8"``.
        layers: names of the ``torch.nn.Linear`` layers to pack; None takes those inside the longest
            ``ModuleList`` of the model that holds any, or all of them where there is none.
        loss: ``loss(model, batch)`` is a scalar.
        blocks: as for :func:`pyrobust.pack`: scores are collected block by block.
        resume: as for :func:`pyrobust.pack`.
        progress: show progress bars.

    Returns:
        A copy of the model with :class:`~pyrobust.nn.DenseSparseLinear` layers, and its report
        (:func:`pyrobust.pack_report`).

    Raises:
        ValueError: as ``pyrobust.pack`` and :func:`~pyrobust.quantize.sensitivity` raise it.
    """
    from pyrobust.pack import pack

    chosen = _chosen_layers(model, layers)
    quantizer = _Recording(
        GWQ(outlier_fraction, score, ranking, second_level, loss=loss, progress=progress)
    )
    packed = pack(
        model,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        activations=activations,
        bits_for=lambda name, _: bits if name in chosen else None,
        quantizer=quantizer,
        calibration=calibration,
        blocks=blocks,
        resume=resume,
        progress=progress,
    )
    _store_compactly(packed, quantizer.made)
    return packed


def _store_compactly(packed: nn.Module, made: Mapping[str, QTensor]) -> None:
    """Replace the packed layers by such that save the same weights in fewer bits."""
    from pyrobust._pack_report import PackReport, attach, pack_report
    from pyrobust.nn.dense_sparse_linear import DenseSparseLinear
    from pyrobust.nn.twins import replace_layers

    report = pack_report(packed)
    rows = {row.name: row for row in report.layers}
    twins: dict[nn.Module, nn.Module] = {}
    by_name: dict[str, DenseSparseLinear] = {}
    for row in report.packed:
        owner = row.shared_with or row.name
        layer: Any = packed.get_submodule(row.name)
        twin = DenseSparseLinear.from_qtensor(
            made[owner], layer.bias, activations=layer.activations
        )
        twin.weight_dtype = layer.weight_dtype
        by_name[row.name] = twin.train(layer.training).to(layer.codes.device)
        if owner != row.name:  # one weight in memory and in the file
            twin._buffers.update(by_name[owner]._buffers)
        else:
            rows[row.name] = replace(row, bytes_after=twin.nbytes_packed)
        twins[layer] = twin
    less = sum(row.bytes_after - rows[row.name].bytes_after for row in report.packed)
    replace_layers(packed, twins)
    attach(packed, PackReport(tuple(rows.values()), report.bytes_before, report.bytes_after - less))


class _Recording:
    """A quantizer that remembers what it made."""

    resumable = True

    def __init__(self, quantizer: GWQ) -> None:
        self.quantizer = quantizer
        self.made: dict[str, QTensor] = {}

    def quantize_layers(self, *args: Any, **options: Any) -> dict[str, Quantized]:
        results = self.quantizer.quantize_layers(*args, **options)
        self.made = {name: result.qtensor for name, result in results.items()}
        return results


def _chosen_layers(model: nn.Module, layers: Iterable[str] | None) -> set[str]:
    """Given names, or the linear layers inside the longest list of blocks, or all of them."""
    from pyrobust.nn.transposed_linear import as_linear

    with as_linear(model):
        linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if layers is not None:
        chosen = set(layers)
        unknown = sorted(chosen.difference(linear))
        if unknown:
            raise ValueError(
                "gwq_quantize: layers must name torch.nn.Linear layers of the model; got "
                f"{unknown[0]!r}."
            )
        return chosen
    inside = longest_list(model, linear)
    return set(linear) if inside is None else {n for n in linear if n.startswith(f"{inside}.")}


def _batches(calibration: Iterable[Any] | Tensor | None) -> list[Any] | None:
    """The data as a list that can be gone over again; a tensor row by row."""
    if calibration is None:
        return None
    if isinstance(calibration, Tensor):
        return list(calibration.split(1)) if calibration.numel() else []
    return list(calibration)


def _as_calls(batches: list[Any] | None) -> list[Call]:
    """The same for checksums."""
    calls = []
    for batch in batches or []:
        if isinstance(batch, Mapping):
            calls.append(Call((), dict(batch)))
        else:
            calls.append(Call(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {}))
    return calls


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def _scored(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The weights that may be kept: all but those of embeddings."""
    return {n: _weight(m) for n, m in layers.items() if not isinstance(m, nn.Embedding)}
