"""Compile gates: what a change of the CUDA kernels costs shows here without a GPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyrobust.ops import _cuda_module

sys.path.insert(0, str(Path(__file__).parent))
import cuda_gates as gates

pytestmark = pytest.mark.skipif(gates.NVCC is None, reason="nvcc is not installed: gates not run")
needs_code = pytest.mark.skipif(
    gates.disassembler() is None,
    reason="no cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)",
)
ARCHITECTURES = [pytest.param(90), pytest.param(80, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=["sm_90", "sm_80"])
def sampling(request, tmp_path_factory):
    return gates.compile_kernels("sampling/cuda.cu", request.param, tmp_path_factory.mktemp("s"))


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=["sm_90", "sm_80"])
def interval(request, tmp_path_factory):
    return gates.compile_kernels("interval/cuda.cu", request.param, tmp_path_factory.mktemp("i"))


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=["sm_90", "sm_80"])
def around_library(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("l")
    return gates.compile_kernels("interval/cuda_library.cu", request.param, folder)


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=["sm_90", "sm_80"])
def plain_products(request, tmp_path_factory):
    return gates.compile_kernels("matmul/cuda.cu", request.param, tmp_path_factory.mktemp("m"))


def test_decoding_has_the_loads_of_four_rows_under_way(plain_products):
    """Which takes registers: 80 leave room for 768 threads."""
    kernels = matching(plain_products, "decode_rows_kernel")
    assert len(kernels) == 5
    for kernel in kernels:
        assert kernel.spills == 0
        assert kernel.registers <= 80
        if kernel.code:
            assert kernel.has("STG.E.128")


def drawing_loop(kernel):
    """The loop over samples of which all is stored: of those with Philox's products, 60 of four
    counters, and those of 16 values with their scale, the one with a single comparison."""
    loops = [loop for loop in kernel.loops() if kernel.counts(*loop)["FMUL"] >= 16]
    (drawing,) = (
        loop
        for loop in loops
        if wide_products(kernel, loop) >= 60 and kernel.counts(*loop)["ISETP"] == 1
    )
    return drawing


def distances_of_loads(kernel, loop):
    """Instructions from each load from shared memory to the first that reads what it loads."""
    texts = [text for at, text in kernel.code if loop[0] <= at <= loop[1]]
    found = []
    for at, text in enumerate(texts):
        if not (load := re.match(r"LDS\.(\d+) R(\d+)", text)):
            continue
        first, words = int(load[2]), int(load[1]) // 32
        loaded = {f"R{first + i}" for i in range(words)}
        readers = (
            i for i in range(at + 1, len(texts)) if loaded & set(re.findall(r"R\d+", texts[i]))
        )
        found.append(next(readers) - at)
    return found


def wide_products(kernel, loop):
    first, last = loop
    return sum(first <= at <= last and "IMAD.WIDE.U32" in text for at, text in kernel.code)


def matching(kernels, pattern):
    found = [kernel for name, kernel in kernels.items() if re.search(pattern, name)]
    assert found, pattern
    return found


def test_sampling_kernels_keep_their_registers(sampling):
    """128 registers leave room for 16 warps, 96 for 20, 80 for 24, 64 for 32."""
    for pattern, most in (
        (r"noise_kernel<\(pyrobust::sampling::Noise\)0", 128),
        (r"noise_kernel<\(pyrobust::sampling::Noise\)[12]", 96),
        ("rows_kernel", 64),
        ("vote_kernel", 80),
    ):
        for kernel in matching(sampling, pattern):
            assert kernel.spills == 0
            assert kernel.registers <= most


def test_interval_kernels_do_not_spill(interval):
    """128 registers leave room for two blocks of 256 threads; bfloat16 weights have one, and so has
    every kernel whose rows share inputs."""
    for kernel in interval.values():
        assert kernel.spills == 0
        assert not kernel.has(gates.ODD_DESCRIPTOR)
    for name, kernel in interval.items():
        if "product_kernel" in name:
            assert kernel.registers <= (208 if "BFloat16" in name else 128)


def test_kernels_around_a_library_leave_room_for_many_threads(around_library):
    """They move bytes: 42 registers leave room for 1536 threads of 2048."""
    assert len(around_library) == 7
    for kernel in around_library.values():
        assert kernel.spills == 0
        assert kernel.registers <= 42


@needs_code
def test_kernels_around_a_library_move_vectors(around_library):
    for name in ("split_rows_kernel", "split_weight_kernel", "split_pixels_kernel"):
        (kernel,) = matching(around_library, name)
        assert kernel.has("LDG.E.*128")
        assert kernel.has("STG.E.64")
    (unfold,) = matching(around_library, "unfold_kernel")
    assert unfold.has("LDG.E.64")
    assert unfold.has("STG.E.64")
    (finish,) = matching(around_library, "finish_kernel")
    assert finish.has("LDG.E.*128")
    assert finish.has("STG.E.128")
    for kernel in around_library.values():
        assert not kernel.has("LDL|STL")


@needs_code
def test_noise_stores_vectors_and_stays_within_its_instructions(sampling):
    """Issue slots a value, without the loops around the one that draws. Loads from the table are on
    average 20 instructions ahead on sm_90, where they take about 30 cycles."""
    for kind, out, most in ((0, 0, 24.6), (0, 2, 25.1), (1, 0, 12.0), (1, 2, 12.5), (2, 2, 28.3)):
        pattern = rf"noise_kernel<\(pyrobust::sampling::Noise\){kind}, .*FloatType\){out}>"
        (kernel,) = matching(sampling, pattern)
        drawing = drawing_loop(kernel)
        counts = kernel.counts(*drawing)
        assert sum(counts.values()) / 16 <= most
        assert counts["STG"] == 4
        assert counts["SHFL"] == 0
        assert counts["LDS"] == (32 if kind == 0 else 0)
        assert counts["LDL"] == counts["STL"] == 0
        if kind == 0 and kernel.has("I2FP"):  # sm_90
            assert sum(distances_of_loads(kernel, drawing)) >= 20 * 32
        assert kernel.has("STG.E.128" if out == 0 else "STG.E.64")
        assert kernel.has("LDG.E.*128")
        assert not kernel.has(gates.ODD_DESCRIPTOR)


@needs_code
@pytest.mark.parametrize(
    ("source", "most"),
    [
        ("PackedSource<8>", 6.2),
        ("PackedSource<4>", 5.8),
        ("PackedSource<3>", 7.4),
        ("PackedSource<2>", 5.9),
        ("PackedSource<1>", 3.9),
        ("BFloat16Source", 10.4),
        ("Float32Source", 13.4),
    ],
)
def test_interval_products_stay_within_their_instructions(interval, source, most):
    """Instructions a weight beside the tensor cores'. A step of a lane is 128 weights: four rows of
    32; dense weights count both of their paths, vectors and tails."""
    (kernel,) = matching(interval, f"product_kernel<.*{source} *>")
    assert kernel.has(r"HMMA.16816.F32.BF16")
    assert kernel.has("LDG.E.*128")
    assert not kernel.has("LDL|STL")
    assert not kernel.has(gates.ODD_DESCRIPTOR)
    counts = kernel.counts(*kernel.loops()[0])
    assert (sum(counts.values()) - counts["HMMA"]) / 128 <= most


@needs_code
@pytest.mark.parametrize(
    ("source", "most"),
    [
        ("PackedSource<8>", 9.8),
        ("PackedSource<4>", 9.3),
        ("PackedSource<3>", 10.8),
        ("PackedSource<2>", 9.3),
        ("PackedSource<1>", 7.3),
        ("BFloat16Source", 13.7),
        ("Float32Source", 17.7),
    ],
)
def test_interval_products_with_shared_inputs_stay_within_their_instructions(
    interval, source, most
):
    """Instructions a weight for sixteen inputs, beside the tensor cores'. A step of a lane is 64
    weights: two rows of 32; dense weights count both of their paths. Inputs come by eight copies a
    thread and step, and leave shared memory 16 bytes at a time."""
    (kernel,) = matching(interval, f"shared_kernel<.*{source} *>")
    assert not kernel.has("LDL|STL")
    assert not kernel.has(gates.ODD_DESCRIPTOR)
    loop = min(
        (loop for loop in kernel.loops() if kernel.counts(*loop)["HMMA"] >= 64),
        key=lambda loop: loop[1] - loop[0],
    )
    counts = kernel.counts(*loop)
    assert counts["HMMA"] == (96 if source == "Float32Source" else 64)
    assert counts["LDGSTS"] == 8
    wide = sum(loop[0] <= at <= loop[1] and "LDS.128" in text for at, text in kernel.code)
    assert wide == 32
    assert (sum(counts.values()) - counts["HMMA"]) / 64 <= most


@needs_code
@pytest.mark.skipif(not _cuda_module.has_cuda_module(), reason="pyrobust._cuda is not built here")
def test_the_module_has_few_instances_of_templates_an_architecture():
    """At most 97, and twenty products of warpgroups: every one costs a second of compilation."""
    path = _cuda_module.cuda_module("test").__file__
    command = [f"{gates.disassembler()}/cuobjdump", "--dump-resource-usage", path]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    parts = re.split(r"arch = sm_(\d+)", run.stdout)
    counts: dict[str, int] = {}
    for architecture, text in zip(parts[1::2], parts[2::2], strict=True):
        names = "\n".join(re.findall(r"Function (\S+):", text))
        plain = subprocess.run(
            ["c++filt"], input=names, capture_output=True, text=True, check=True
        ).stdout
        instances = sum("<" in name for name in plain.splitlines())
        counts[architecture] = counts.get(architecture, 0) + instances
    assert set(counts) >= {"80", "90"}
    assert max(counts.values()) <= 117, counts
    assert counts["80"] <= 97, counts
