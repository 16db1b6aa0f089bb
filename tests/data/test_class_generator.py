"""Generators of labelled samples."""

import pytest
import torch

from pyrobust.data import ClassGaussian, DiffusersGenerator, draw_labelled, load_digits


def test_a_class_gaussian_has_the_moments_of_its_class():
    torch.manual_seed(0)
    x = torch.randn(400, 6) @ torch.randn(6, 6) + 5
    generator = ClassGaussian(6).fit(x, torch.zeros(400, dtype=torch.int64))
    drawn, labels = draw_labelled(generator, 20_000, classes=1, batch_size=5000, clamp=None)
    assert labels.unique().tolist() == [0]
    torch.testing.assert_close(drawn.mean(0), x.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), x.T.cov(), atol=0.3, rtol=0.1)


def test_draws_are_reproducible_labelled_and_clamped():
    digits = load_digits()
    generator = ClassGaussian(10).fit(digits.train_images, digits.train_labels)
    first, labels = draw_labelled(generator, 25, classes=10, seed=3, batch_size=10)
    again, _ = draw_labelled(generator, 25, classes=10, seed=3, batch_size=10)
    other, _ = draw_labelled(generator, 25, classes=10, seed=4, batch_size=10)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert labels.tolist() == [i % 10 for i in range(25)]
    assert first.shape[1:] == digits.train_images.shape[1:]
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1
    # the head of the batch is a batch of its own: the second is drawn alike
    assert not torch.equal(first[:5], first[10:15])


def test_refusals():
    with pytest.raises(ValueError, match="too few for 3 components"):
        ClassGaussian(3).fit(torch.rand(3, 5), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="components must be at least 1"):
        ClassGaussian(0)
    with pytest.raises(ValueError, match="must return 4 samples; got 1"):
        draw_labelled(lambda labels, rng: torch.rand(1, 2), 4, classes=2)
    with pytest.raises(TypeError, match="the generator's result must be a floating-point"):
        draw_labelled(lambda labels, rng: labels, 4, classes=2)
    with pytest.raises(TypeError, match="must take class_labels"):
        DiffusersGenerator(object.__new__(type("Pipe", (), {"__call__": lambda self, x: x})))


def test_a_diffusers_pipeline_draws_labelled_images():
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=1000,  # the pipeline's class for guidance is 1000, the one after
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1
    )
    # as loaded pipelines are: in training mode labels are dropped at random
    pipeline = diffusers.DiTPipeline(transformer.eval(), vae.eval(), diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    generator = DiffusersGenerator(pipeline, {"num_inference_steps": 2})
    images, labels = draw_labelled(generator, 3, classes=2, batch_size=2)
    again, _ = draw_labelled(generator, 3, classes=2, batch_size=2)
    assert images.shape[:2] == (3, 3)
    assert labels.tolist() == [0, 1, 0]
    assert torch.equal(images, again)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
