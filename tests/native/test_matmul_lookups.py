"""One bit by look-ups (csrc/matmul/sign_tables.h): int64 sums, the bits of other kernels."""

import os
import subprocess
import sys

import pytest
import torch

from pyrobust import _native
from pyrobust.quantize import QTensor

from ..packed_products import BATCHES, multiply, random_weight

if "avx512" not in _native.supported_isas():
    pytest.skip("no instruction set of this machine looks words up", allow_module_level=True)

# Least rows of W, and tails of a tile of panels, of a panel, of a block, of the last group; groups
# that are filled up, and of several runs of 256 columns, in whole rows too; all groups at once and
# some; tables of one group for few rows only.
SHAPES = [(256, 128, 128), (300, 200, 64), (385, 161, 32), (289, 1344, 96), (270, 330, 100)]
SHAPES += [(290, 1300, 1300), (257, 1700, 640), (256, 2100, 512), (320, 9000, 9000)]
SHAPES += [(2300, 640, 128), (256, 6400, 128), (260, 300, 16), (256, 16448, 16448)]


@pytest.fixture(autouse=True)
def lookups():
    """Panels and look-ups from the first product on, on AVX-512 and one thread."""
    isa, panels = _native.isa(), _native.set_panels(1, 0)
    allowed, threads = _native.set_word_lookups(True), torch.get_num_threads()
    _native.set_isa("avx512")
    torch.set_num_threads(1)
    yield
    _native.set_isa(isa)
    _native.set_panels(*panels)
    _native.set_word_lookups(allowed)
    torch.set_num_threads(threads)


def _reference(x: torch.Tensor, packed: QTensor) -> torch.Tensor:
    """What matmul.h fixes: int64 sums of groups, in double from the first group on."""
    step = x.double().abs().amax(1, keepdim=True) / 127
    q = (x.double() / step).round()
    signs = 2.0 * packed.unpack_codes().double() - 1
    total = torch.zeros(len(x), packed.shape[0], dtype=torch.float64)
    for g in range(packed.scale.shape[1]):
        of_group = slice(g * packed.group_size, (g + 1) * packed.group_size)
        sums = (q[:, of_group].long().double() @ signs[:, of_group].t()).long()  # exact: below 2^53
        total += sums.double() * packed.scale[:, g].double()
    return (total * step).float()


def _without_lookups(x: torch.Tensor, packed: QTensor, **options) -> torch.Tensor:
    _native.set_word_lookups(False)
    result = multiply(x, packed, activations="int8", **options)
    _native.set_word_lookups(True)
    return result


@pytest.mark.parametrize(("rows", "cols", "group_size"), SHAPES)
def test_exact(rows, cols, group_size):
    generator = torch.Generator().manual_seed(cols)
    packed = random_weight(rows, cols, 1, group_size, generator=generator)
    x = torch.randn(200, cols, generator=generator)
    expected = _reference(x, packed)
    for batch in BATCHES:
        result = multiply(x[:batch], packed, activations="int8")
        assert torch.equal(result, expected[:batch]), batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_of_other_kernels(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    packed = random_weight(300, 333, 1, 64, generator=generator)
    packed = QTensor.from_codes(
        packed.unpack_codes(), packed.scale.bfloat16().to(scale), None, bits=1, group_size=64
    )
    bias = torch.randn(300, generator=generator)
    x = torch.randn(37, 333, generator=generator).to(dtype)
    x[3] = 0
    x[5, 7] = float("nan")
    results = [_without_lookups(x, packed, bias=bias)]
    results.append(multiply(x, packed, bias, activations="int8"))
    _native.set_isa("portable")
    results.append(multiply(x, packed, bias, activations="int8"))
    for result in results[1:]:
        assert torch.equal(result.view(torch.uint8), results[0].view(torch.uint8))


@pytest.mark.parametrize("group_size", [32, 128, 256, 512])
def test_largest_sums(group_size):
    """Activations of -127 and 127 whose signs are those of a row, or against them, or alike."""
    signs = torch.randint(0, 2, (256, 1024)) * 2 - 1
    signs[:2] = torch.tensor([[1], [-1]])
    packed = QTensor.from_codes(
        ((signs + 1) // 2).to(torch.uint8), torch.ones(256, 1024 // group_size), None,
        bits=1, group_size=group_size,
    )  # fmt: skip
    x = torch.cat([signs[:8], -signs[:8]]).float()
    assert torch.equal(multiply(127 * x, packed, activations="int8"), 127 * x @ signs.float().t())


def test_two_level_scales():
    generator = torch.Generator().manual_seed(0)
    packed = QTensor.from_codes(
        torch.randint(0, 2, (256, 640), dtype=torch.uint8, generator=generator),
        torch.randint(0, 256, (256, 5), dtype=torch.uint8, generator=generator),
        None, bits=1, group_size=128, row_scale=torch.rand(256, generator=generator),
    )  # fmt: skip
    x = torch.randn(19, 640, generator=generator)
    result = multiply(x, packed, activations="int8")
    assert torch.equal(result, _without_lookups(x, packed))


def test_rows_do_not_depend_on_others_and_threads():
    generator = torch.Generator().manual_seed(0)
    packed = random_weight(900, 2000, 1, 128, generator=generator)
    x = torch.randn(300, 2000, generator=generator)
    whole = multiply(x, packed, activations="int8")
    for batch in BATCHES:
        last = len(x) - batch
        assert torch.equal(multiply(x[last:], packed, activations="int8"), whole[last:])
    for threads in (2, 3, 5):  # shares of 180 rows of W have no tables
        torch.set_num_threads(threads)
        assert torch.equal(multiply(x, packed, activations="int8"), whole)


@pytest.mark.parametrize("value", ["0", "1", "yes"])
def test_environment_forces_the_choice(value):
    code = "from pyrobust import _native; print(_native.set_word_lookups(False))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYROBUST_LOOKUPS": value},
        capture_output=True,
        text=True,
    )
    if value == "yes":
        assert "PYROBUST_LOOKUPS must be 0 or 1; got 'yes'." in done.stderr
    else:
        assert done.stdout.split() == [str(value == "1")]
