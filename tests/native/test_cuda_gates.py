"""Compile gates: what a change of the CUDA kernels costs shows here without a GPU."""

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
ARCHITECTURES = [pytest.param(90), pytest.param(80, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=["sm_90", "sm_80"])
def sampling(request, tmp_path_factory):
    return gates.compile_kernels("sampling/cuda.cu", request.param, tmp_path_factory.mktemp("s"))


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=["sm_90", "sm_80"])
def interval(request, tmp_path_factory):
    kernels = {}
    for unit in ("cuda", "cuda_prepare", "cuda_warps"):
        folder = tmp_path_factory.mktemp("i")
        kernels |= gates.compile_kernels(f"interval/{unit}.cu", request.param, folder)
    return kernels


@pytest.fixture(scope="module")
def interval_warpgroups(tmp_path_factory):
    folder = tmp_path_factory.mktemp("w")
    return gates.compile_kernels("interval/cuda_wide.cu", "90a", folder)


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=["sm_90", "sm_80"])
def around_library(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("l")
    return gates.compile_kernels("interval/cuda_library.cu", request.param, folder)


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=["sm_90", "sm_80"])
def plain_products(request, tmp_path_factory):
    return gates.compile_kernels("matmul/cuda.cu", request.param, tmp_path_factory.mktemp("m"))


def test_decoding_has_the_loads_of_four_rows_under_way(plain_products):
    """Which takes registers: 80 leave room for 768 threads."""
    assert all(kernel.spills == 0 for kernel in plain_products.values())
    kernels = matching(plain_products, "decode_rows_kernel")
    assert len(kernels) == 5
    for kernel in kernels:
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
    """A product has a multiprocessor for itself, for its ring of shared memory."""
    assert len(matching(interval, "prepare_kernel")) == 2
    assert len(matching(interval, "product_kernel")) == 14
    for kernel in interval.values():
        assert kernel.spills == 0
        assert not kernel.has(gates.ODD_DESCRIPTOR)


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
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize(
    ("source", "copies", "most"),
    [
        ("PackedSource<8>", 4, (10.7, 12.1)),
        ("PackedSource<4>", 2, (8.9, 10.1)),
        ("PackedSource<3>", 2, (10.8, 12.0)),
        ("PackedSource<2>", 1, (8.4, 9.7)),
        ("PackedSource<1>", 1, (6.6, 7.9)),
        ("BFloat16Source", 8, (12.7, 14.3)),
        ("Float32Source", 8, (18.5, 20.3)),
    ],
)
def test_interval_products_stay_within_their_instructions(interval, source, copies, most, tiles):
    """Instructions a weight beside the tensor cores', for eight inputs and for sixteen. Half a step
    of a lane is 64 weights, four rows of 16 (of float32 32, two rows); weights and inputs come by
    16-byte copies and leave shared memory 16 bytes at a time. Dense weights count the path of odd
    rows too."""
    (kernel,) = matching(interval, rf"product_kernel<.*{source} *, {tiles}, 0>")
    assert not kernel.has("LDL|STL")
    # |W| of 1 bit is the same for all rows, which the compiler sees for compute capability 9.0.
    products = (24 if source in ("Float32Source", "PackedSource<1>") else 32) * tiles
    loop = min(
        (loop for loop in kernel.loops() if kernel.counts(*loop)["HMMA"] >= products),
        key=lambda loop: loop[1] - loop[0],
    )
    counts = kernel.counts(*loop)
    assert counts["HMMA"] in (products, 32 * tiles)
    assert counts["LDGSTS"] == copies + 2 * tiles
    wide = sum(loop[0] <= at <= loop[1] and "LDS.128" in text for at, text in kernel.code)
    assert wide >= 8 * tiles
    weights = 32 if source == "Float32Source" else 64
    assert (sum(counts.values()) - counts["HMMA"]) / weights <= most[tiles - 1]


def test_interval_products_of_warpgroups_do_not_spill(interval_warpgroups):
    kernels = matching(interval_warpgroups, "wide_kernel")
    assert len(kernels) == 23
    for kernel in kernels:
        assert kernel.spills == 0
        assert not kernel.has(gates.ODD_DESCRIPTOR)


@needs_code
@pytest.mark.parametrize(
    ("source", "most"),
    [
        ("PackedSource<8>", (8.7, 12.6)),
        ("PackedSource<4>", (7.1, 11.2)),
        ("PackedSource<3>", (8.9, 13.2)),
        ("PackedSource<2>", (6.8, 11.1)),
        ("PackedSource<1>", (5.8, 10.0)),
        ("BFloat16Source", (13.8, 16.1)),
    ],
)
def test_interval_products_of_warpgroups_stay_within_their_instructions(
    interval_warpgroups, source, most
):
    """Instructions a weight beside products, for 8 inputs (dense weights: 16) and for 64: a stage
    of a lane is two rows of 32 packed weights, or of 16 dense ones, which count the path of odd
    rows too."""
    dense = source == "BFloat16Source"  # of 9 inputs and more
    for eights, least in ((2 if dense else 1, most[0]), (8, most[1])):
        (kernel,) = matching(interval_warpgroups, rf"wide_kernel<.*{source} *, {eights}, 0>")
        loop = min(
            (loop for loop in kernel.loops() if kernel.counts(*loop)["HGMMA"]),
            key=lambda loop: loop[1] - loop[0],
        )
        counts = kernel.counts(*loop)
        assert counts["HGMMA"] == (12 if dense else 24)
        assert counts["LDL"] == counts["STL"] == 0
        assert (sum(counts.values()) - counts["HGMMA"]) / (32 if dense else 64) <= least


# Sources that CMakeLists.txt compiles for other architectures than 80 and 90.
UNITS = {"matmul/cuda_few": ["90"], "matmul/cuda_wide": ["90a"], "matmul/cuda_broad": ["90a"]}
UNITS |= {"interval/cuda_wide": ["90a"], "interval/cuda_warps": ["80"]}


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "most"), [("80", 100), ("90", 100), ("90a", 100)])
def test_there_are_few_instances_of_templates(architecture, most, tmp_path):
    """Every one costs a third of a second of compilation."""
    instances = 0
    for source in sorted((gates.ROOT / "csrc").glob("*/cuda*.cu")):
        name = str(source.relative_to(gates.ROOT / "csrc").with_suffix(""))
        if architecture in UNITS.get(name, ["80", "90"]):
            kernels = gates.compile_kernels(f"{name}.cu", architecture, tmp_path)
            instances += sum("<" in kernel for kernel in kernels)
    assert instances <= most
