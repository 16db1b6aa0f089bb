"""Differentiable distortions."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from pyrobust.data.distortions import crop_and_zoom, gaussian_blur, jpeg_like, resize_and_back


def images(size=32):
    ramp = torch.linspace(0, 1, size)
    smooth = 0.5 + 0.4 * torch.sin(6 * ramp[None, :] + 3 * ramp[:, None] ** 2)
    return smooth.expand(2, 3, size, size).clone()


@pytest.mark.parametrize("quality", [20, 50, 80, 95])
def test_jpeg_is_close_to_a_real_encoder_on_grey_images(quality):
    grey = (images()[:1, :1] * 255).round() / 255
    buffer = io.BytesIO()
    Image.fromarray((grey[0, 0] * 255).byte().numpy()).save(buffer, "JPEG", quality=quality)
    real = torch.tensor(np.array(Image.open(buffer)), dtype=torch.float32) / 255
    # coefficients on a rounding border may fall the other way, by one quantisation step
    error = (jpeg_like(grey, quality=quality)[0, 0] - real).abs() * 255
    assert error.mean() < 1
    assert error.max() < 8


def test_jpeg_keeps_odd_sizes_and_passes_gradients():
    x = images(30).requires_grad_()
    y = jpeg_like(x, quality=50)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.abs().sum() > 0


def test_blur_against_scipy():
    x = images().double()
    expected = ndimage.gaussian_filter(x[0, 0].numpy(), 1.0, mode="mirror", truncate=3.0)
    torch.testing.assert_close(gaussian_blur(x, sigma=1.0)[0, 0], torch.tensor(expected))


def test_resize_and_crop_keep_shape_and_constants():
    constant = torch.full((1, 2, 17, 23), 0.25)
    generator = torch.Generator().manual_seed(0)
    for distorted in (
        resize_and_back(constant, factor=0.3),
        crop_and_zoom(constant, factor=0.4, generator=generator),
    ):
        torch.testing.assert_close(distorted, constant)
    assert torch.equal(crop_and_zoom(images(), factor=1.0, generator=generator), images())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jpeg_like(images(), quality=0), "quality must be at least 1; got 0"),
        (lambda: jpeg_like(images(), quality=101), "quality must be at most 100; got 101"),
        (lambda: jpeg_like(images()[0], quality=50), "images must have shape"),
        (
            lambda: crop_and_zoom(images(), factor=0.0, generator=torch.Generator()),
            r"factor must lie in \(0, 1\]",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
