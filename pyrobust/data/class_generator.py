"""Labelled samples from class-conditional generative models.

A generator is any callable ``generator(labels, rng) -> images``: ``labels`` is ``(B,)`` int64,
``rng`` a ``torch.Generator``, the images are ``(B, ...)`` float. Two come with the library: a
Gaussian per class on principal components, fitted to data in a moment, and an adapter for
class-conditional pipelines of the diffusers library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyrobust._checks import check_float_tensor, check_integer

__all__ = ["ClassGaussian", "ClassGenerator", "DiffusersGenerator", "draw_labelled"]

ClassGenerator = Callable[[Tensor, torch.Generator], Tensor]


def draw_labelled(
    generator: ClassGenerator,
    n: int,
    *,
    classes: int,
    seed: int = 0,
    batch_size: int = 64,
    clamp: tuple[float, float] | None = (0.0, 1.0),
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draw ``n`` samples whose labels run through the classes in turn.

    Args:
        generator: as in the head of this module.
        n: number of samples, ``>= 1``.
        classes: number of classes, ``>= 1``.
        seed: of the stream handed to the generator, one per batch (seed, batch number), so that a
            range of batches can be drawn again.
        batch_size: samples per call of the generator.
        clamp: range that the samples are cut to; None leaves them.
        progress: show a progress bar.

    Returns:
        ``(n, ...)`` float samples and ``(n,)`` int64 labels, on the CPU.

    Raises:
        TypeError: the generator returns no float tensor.
        ValueError: a size is out of range, or the generator returns another number of samples.
    """
    subject = "draw_labelled"
    check_integer(subject, "n", n, 1)
    check_integer(subject, "classes", classes, 1)
    check_integer(subject, "batch_size", batch_size, 1)
    labels = torch.arange(n) % classes
    parts = []
    for number, part in enumerate(
        tqdm(labels.split(batch_size), desc=subject, disable=not progress)
    ):
        rng = torch.Generator().manual_seed(seed * 1_000_003 + number)
        images = generator(part, rng)
        check_float_tensor(subject, "the generator's result", images)
        if len(images) != len(part):
            raise ValueError(
                f"{subject}: the generator must return {len(part)} samples; got {len(images)}."
            )
        images = images.detach().cpu()
        parts.append(images if clamp is None else images.clamp(*clamp))
    return torch.cat(parts), labels


class ClassGaussian:
    """A Gaussian on the leading principal components of each class.

    Args:
        components: principal components per class, ``>= 1``.

    Attributes:
        means_: ``(K, D)`` float32 class means.
        factors_: ``(K, D, components)`` float32; a sample is ``mean + factor z``, ``z`` standard
            normal.
        shape_: shape of one image.

    Example:
        >>> x, y = torch.rand(20, 1, 2, 2), torch.arange(20) % 2
        >>> generator = ClassGaussian(1).fit(x, y)
        >>> draw_labelled(generator, 3, classes=2)[0].shape
        torch.Size([3, 1, 2, 2])
    """

    def __init__(self, components: int = 10) -> None:
        check_integer("ClassGaussian", "components", components, 1)
        self.components = components

    def fit(self, x: Tensor, y: Tensor) -> ClassGaussian:
        """Fit to images ``x`` ``(n, ...)`` float with labels ``y`` ``(n,)`` in ``[0, K)``.

        Raises:
            TypeError: ``x`` is not float.
            ValueError: a class has fewer than ``components + 1`` images, or images fewer pixels.
        """
        check_float_tensor("ClassGaussian", "x", x)
        flat = x.flatten(1)
        means, factors = [], []
        for label in range(int(y.max()) + 1):
            rows = flat[y == label]
            if min(len(rows) - 1, flat.shape[1]) < self.components:
                raise ValueError(
                    f"ClassGaussian: class {label} has {len(rows)} images of {flat.shape[1]} "
                    f"pixels, too few for {self.components} components."
                )
            mean = rows.mean(0)
            _, values, directions = torch.linalg.svd(rows - mean, full_matrices=False)
            deviation = values[: self.components] / (len(rows) - 1) ** 0.5
            means.append(mean)
            factors.append(directions[: self.components].mT * deviation)
        self.means_, self.factors_ = torch.stack(means), torch.stack(factors)
        self.shape_ = tuple(x.shape[1:])
        return self

    def __call__(self, labels: Tensor, rng: torch.Generator) -> Tensor:
        """``(B, ...)`` samples of the classes ``labels``."""
        z = torch.randn(len(labels), self.components, generator=rng)
        flat = self.means_[labels] + (self.factors_[labels] @ z.unsqueeze(-1)).squeeze(-1)
        return flat.reshape(len(labels), *self.shape_)


class DiffusersGenerator:
    """A class-conditional pipeline of the diffusers library as a generator.

    Args:
        pipeline: a pipeline whose call takes ``class_labels``, ``generator``, ``output_type``, such
            as ``DiTPipeline``.
        options: further keyword arguments of each call, such as ``num_inference_steps`` and
            ``guidance_scale``.

    Raises:
        TypeError: the pipeline's call takes no ``class_labels``.
    """

    def __init__(self, pipeline: Any, options: dict[str, Any] | None = None) -> None:
        import inspect

        if "class_labels" not in inspect.signature(pipeline.__call__).parameters:
            raise TypeError(
                "DiffusersGenerator: pipeline must take class_labels, as DiTPipeline does; got "
                f"{type(pipeline).__name__}."
            )
        self.pipeline = pipeline
        self.options = dict(options or {})

    def __call__(self, labels: Tensor, rng: torch.Generator) -> Tensor:
        """``(B, C, H, W)`` images in [0, 1] of the classes ``labels``."""
        made = self.pipeline(
            class_labels=labels.tolist(), generator=rng, output_type="np", **self.options
        )
        return torch.from_numpy(made.images).permute(0, 3, 1, 2).contiguous().float()
