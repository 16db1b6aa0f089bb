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

# Of decoding a weight: LOP3 + SHF + PRMT, and with multiply-adds and shifts by multiplication. For
# float16 x a mask is all: codes are multiplied as denormals. A block with 16 rows of x has at most
# 0.2 of the former and 1.5 of all above it: scales, reads and copies of x, the loop.
DECODING = {
    ("8", "float16"): (0.50, 0.50),
    ("4", "float16"): (0.63, 0.63),
    ("3", "float16"): (0.75, 0.75),
    ("2", "float16"): (0.56, 0.56),
    ("1", "float16"): (0.53, 0.53),
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


# Issue slots and those of the integer pipe, which has half as many, of a block of columns and a
# warp where groups have 128 columns, scales are float16 and nothing else is there: the case that
# docs/guide/cuda.md has times for. 8 and 16 rows of x; by cuda_linear.cuh and by cuda_few.cuh.
PLAIN = {
    ("1", 8): (203, 98),
    ("2", 8): (210, 102),
    ("3", 8): (234, 123),
    ("4", 8): (224, 111),
    ("8", 8): (224, 97),
    ("1", 16): (268, 109),
    ("2", 16): (276, 112),
    ("3", 16): (306, 135),
    ("4", 16): (300, 121),
    ("8", 16): (287, 106),
}
FEW = {
    ("1", 8): (168, 87),
    ("2", 8): (174, 91),
    ("3", 8): (193, 109),
    ("4", 8): (182, 97),
    ("8", 8): (206, 99),
    ("1", 16): (206, 89),
    ("2", 16): (214, 93),
    ("3", 16): (275, 118),
    ("4", 16): (263, 117),
    ("8", 16): (262, 96),
}
INTEGER = ("LOP3", "SHF", "PRMT", "ISETP", "SEL", "IADD3", "LEA", "VIADD", "VIMNMX", "PLOP3")


def plain_kernel(folder, header, shape, run, fixed=""):
    """The kernel ``run``, of that ``shape``, for the case of PLAIN, and its loop."""
    source = folder / "plain.cu"
    source.write_text(
        f'#include "matmul/{header}"\n'
        "namespace pyrobust::matmul::gpu {\n"
        f"PYROBUST_KERNEL_OF(({shape}::kThreads), ({shape}::kBlocksPerSm))\n"
        "plain_kernel(const __grid_constant__ LinearArguments p) {\n"
        "  LinearArguments q = p;\n"
        "  q.zero = nullptr;\n  q.alpha = q.row_scale = nullptr;\n  q.remainder = {};\n"
        "  q.two_groups = 0;\n  q.scale_type = q.out_type = FloatType::kFloat16;\n"
        f"{fixed}  {run}::run(q);\n"
        "}\n"
        "cuda::Status plain(const LinearArguments& p, cuda::Stream stream) {\n"
        "  return cuda::launch(plain_kernel, {}, stream, p);\n"
        "}\n}\n"
    )
    (kernel,) = gates.compile_kernels(str(source), 90, folder).values()
    products = [at for at, text in kernel.code if "HMMA" in text]
    around = [at for at in kernel.loops() if at[0] <= products[0] and at[1] >= products[-1]]
    return kernel, products, min(around, key=lambda loop: loop[1] - loop[0])


def plain_loop(folder, bits, rows, act="float16"):
    """Counts of one block, groups of two: what only the second does counts half."""
    shape = f"Shape<Format::k{bits}, {rows}>"
    run = f"Linear<Format::k{bits}, {CLASSES[act]}, {rows}, 1>"
    kernel, products, (first, last) = plain_kernel(folder, "cuda_linear.cuh", shape, run)
    counts = kernel.counts(first, last)
    sums = [at for at, text in kernel.code if first <= at <= last and "FFMA" in text]
    for at, text in kernel.code:
        target = re.search(r"BRA.*?0x([0-9a-f]+)", text)
        if target and products[-1] < at < sums[0] and sums[-1] < int(target[1], 16) <= last:
            for name, count in kernel.counts(at + 16, int(target[1], 16) - 16).items():
                counts[name] -= count / 2
            return kernel, counts
    raise AssertionError("no branch around the sums of a group")


@pytest.mark.slow
@needs_code
@pytest.mark.parametrize(("bits", "rows"), PLAIN)
def test_the_plain_path_stays_within_its_slots(bits, rows, tmp_path):
    kernel, counts = plain_loop(tmp_path, bits, rows)
    issued, integer = PLAIN[bits, rows]
    assert kernel.spills == 0
    assert counts["HMMA"] == (18 if rows == 8 else 36)
    assert counts["LDSM"] == (2 if rows == 8 else 4)
    assert sum(counts.values()) <= issued
    assert sum(counts[name] for name in INTEGER) <= integer


@pytest.mark.slow
@needs_code
@pytest.mark.parametrize(("bits", "rows"), FEW)
def test_few_rows_stay_within_their_slots(bits, rows, tmp_path):
    """Of a warp and two blocks; a loop that copies the last, short stage counts as if it ran."""
    shape = f"FewShape<Format::k{bits}, {rows}>"
    run = f"Few<Format::k{bits}, Float16, {rows}>"
    fixed = f"  q.count = {rows};\n"
    kernel, _, loop = plain_kernel(tmp_path, "cuda_few.cuh", shape, run, fixed)
    counts = kernel.counts(*loop)
    issued, integer = FEW[bits, rows]
    assert kernel.spills == 0
    assert counts["HMMA"] == (36 if rows == 8 else 72)
    assert counts["LDSM"] == (4 if rows == 8 else 8)
    assert sum(counts.values()) / 2 <= issued
    assert sum(counts[name] for name in INTEGER) / 2 <= integer


@pytest.mark.slow
def test_every_instance_of_few_rows(tmp_path):
    kernels = gates.compile_kernels("matmul/cuda_few.cu", 90, tmp_path)
    assert len(kernels) == 20
    for kernel in kernels.values():
        assert kernel.spills == 0
        assert kernel.registers <= 128
        if not kernel.code:
            continue
        for required in ("UBLKCP", r"LDGSTS\.E\.BYPASS\.128", "SYNCS", r"LDSM\.16", r"LDS\.128"):
            assert kernel.has(required), required
        assert not kernel.has(gates.ODD_DESCRIPTOR)
        assert not kernel.has("MEMBAR.*GPU")


def check_instance(folder, bits, act):
    kernel = compile_one(folder, f"k{bits}", act)
    assert kernel.spills == 0
    assert kernel.registers <= 200
    if not kernel.code:
        return
    half = r"HMMA\.16816\.F32\.BF16" if act == "bfloat16" else r"HMMA\.16816\.F32"
    for required in (half, r"LDGSTS\.E\.BYPASS\.128", r"LDSM\.16", r"LDS\.128", r"STS\.128"):
        assert kernel.has(required), required
    assert not kernel.has(r"\b(LDL|STL)")
    assert not kernel.has(gates.ODD_DESCRIPTOR)
    _, counts = plain_loop(folder, bits, 16, act)
    logic, issued = DECODING[bits, act]
    assert counts["HMMA"] == (36 if act == "float16" else 32)
    assert sum(counts[name] for name in ("LOP3", "SHF", "PRMT")) / WEIGHTS <= logic + 0.2
    others = sum(counts.values()) - counts["HMMA"]
    assert others / WEIGHTS <= issued + 1.5


def test_four_bits(tmp_path):
    check_instance(tmp_path, "4", "float16")


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "act"), DECODING)
def test_every_width(bits, act, tmp_path):
    check_instance(tmp_path, bits, act)


def products_of_warpgroups(unit, folder):
    """Each kernel with machine code, and the counts of its loop of products; none spills."""
    kernels = gates.compile_kernels(f"matmul/cuda_{unit}.cu", "90a", folder)
    assert len(kernels) == 10
    for kernel in kernels.values():
        assert kernel.spills == 0
        if kernel.code:
            yield (
                kernel,
                next(c for c in (kernel.counts(*at) for at in kernel.loops()) if c["HGMMA"]),
            )


@pytest.mark.slow
def test_products_of_warpgroups(tmp_path):
    """No spills, and no wait for every single product, which a branch among them would bring."""
    for kernel, counts in products_of_warpgroups("wide", tmp_path):
        assert counts["HGMMA"] == 16
        assert counts["WARPGROUP"] <= 8
        assert kernel.has(r"LDGSTS\.E\.BYPASS\.128")


@pytest.mark.slow
def test_products_of_warpgroups_with_many_rows(tmp_path):
    """Products of a step are under way while the next is decoded: ptxas has not parted them."""
    for kernel, counts in products_of_warpgroups("broad", tmp_path):
        assert counts["HGMMA"] == 8
        assert counts["WARPGROUP"] == 8  # before and after the two products of a step
        assert not kernel.has(gates.ODD_DESCRIPTOR)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("unit", ["1", "2", "3", "4", "8", "codebook", "complex"])
def test_no_instance_spills(unit, architecture, tmp_path):
    kernels = gates.compile_kernels(f"matmul/cuda_{unit}.cu", architecture, tmp_path)
    assert max(kernel.spills for kernel in kernels.values()) == 0
    assert len(kernels) == (2 if unit == "complex" else 8)
