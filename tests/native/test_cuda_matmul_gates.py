"""Compile gates of the packed product: registers, spills, required instructions, and instructions
a weight against what masks, shifts and multiply-adds a format cannot do without."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import cuda_gates as gates

pytestmark = pytest.mark.skipif(gates.NVCC is None, reason="nvcc is not installed: gates not run")
needs_code = pytest.mark.skipif(
    gates.disassembler() is None,
    reason="no cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)",
)

# Of decoding a weight: LOP3 + SHF + PRMT, and with multiply-adds and shifts by multiplication.
# Everything issued has 1.45 above it: zeros and scales of one group, reads of x, the loop.
DECODING = {
    ("8", "float16"): (0.50, 1.00),
    ("4", "float16"): (0.63, 1.13),
    ("3", "float16"): (0.72, 1.22),
    ("2", "float16"): (0.56, 1.06),
    ("1", "float16"): (0.50, 0.98),
    ("8", "bfloat16"): (1.50, 2.50),
    ("4", "bfloat16"): (0.88, 1.38),
    ("3", "bfloat16"): (0.84, 1.34),
    ("2", "bfloat16"): (0.69, 1.19),
    ("1", "bfloat16"): (0.50, 0.98),
}
CLASSES = {"float16": "Float16", "bfloat16": "BFloat16"}
WEIGHTS = 128  # of a lane in a block


def compile_one(folder, format_, act, rows=16, group_dim=1):
    """The kernel of one instance, for sm_90."""
    source = folder / "one.cu"
    source.write_text(
        '#include "matmul/cuda_linear.cuh"\n'
        "namespace pyrobust::matmul::gpu {\n"
        "cuda::Status one(const LinearArguments& p, cuda::Stream stream) {\n"
        f"  return start<Format::{format_}, {CLASSES[act]}, {rows}, {group_dim}>(p, stream);\n"
        "}\n}\n"
    )
    (kernel,) = gates.compile_kernels(str(source), 90, folder).values()
    return kernel


def decoding(kernel):
    """Counts from the first operand read to the last product: one block of columns."""
    products = [address for address, text in kernel.code if "HMMA" in text]
    reads = [a for a, text in kernel.code if re.search("LDSM|LDS.128", text) and a < products[0]]
    # The block's first codes are read after the barrier that follows the copies' commit.
    commit = max(a for a, text in kernel.code if "LDGDEPBAR" in text and a < products[0])
    return kernel.counts(min(a for a in reads if a > commit), products[-1])


def check_instance(folder, bits, act):
    kernel = compile_one(folder, f"k{bits}", act)
    assert kernel.spills == 0
    assert kernel.registers <= 200
    if not kernel.code:
        return
    half = r"HMMA\.16816\.F32\.BF16" if act == "bfloat16" else r"HMMA\.16816\.F32"
    for required in (half, r"LDGSTS\.E\.BYPASS\.128", r"LDSM\.16", r"LDS\.128", r"STG\.E\.128"):
        assert kernel.has(required), required
    assert not kernel.has(r"\b(LDL|STL)")
    assert not kernel.has(gates.ODD_DESCRIPTOR)
    counts = decoding(kernel)
    logic, issued = DECODING[bits, act]
    assert counts["HMMA"] == 32
    assert sum(counts[name] for name in ("LOP3", "SHF", "PRMT")) / WEIGHTS <= logic + 0.05
    others = sum(counts.values()) - counts["HMMA"]
    assert others / WEIGHTS <= issued + 1.45


def test_four_bits(tmp_path):
    check_instance(tmp_path, "4", "float16")


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "act"), DECODING)
def test_every_width(bits, act, tmp_path):
    check_instance(tmp_path, bits, act)


@pytest.mark.slow
def test_products_of_warpgroups(tmp_path):
    """No spills, and no wait for every single product, which a branch among them would bring."""
    kernels = gates.compile_kernels("matmul/cuda_wide.cu", "90a", tmp_path)
    assert len(kernels) == 10
    for kernel in kernels.values():
        assert kernel.spills == 0
        if not kernel.code:
            continue
        counts = kernel.counts(*kernel.loops()[0])
        assert counts["HGMMA"] == 16
        assert counts["WARPGROUP"] <= 8
        assert kernel.has(r"LDGSTS\.E\.BYPASS\.128")


# Bytes that the instances of 16 rows store and load again on the older architecture.
KNOWN_SPILLS = {(80, "8"): 56, (80, "codebook"): 16}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("unit", ["1", "2", "3", "4", "8", "codebook", "complex"])
def test_no_instance_spills(unit, architecture, tmp_path):
    kernels = gates.compile_kernels(f"matmul/cuda_{unit}.cu", architecture, tmp_path)
    allowed = KNOWN_SPILLS.get((architecture, unit), 0)
    assert max(kernel.spills for kernel in kernels.values()) <= allowed
    assert len(kernels) == (2 if unit == "complex" else 12)
