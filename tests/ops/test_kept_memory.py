"""Large ends in memory that is kept between calls: used again, never twice at once, given back."""

import copy
import gc
import io
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from pyrobust import Interval, _native, ops
from pyrobust.ops._kept_memory import new_ends

MIB = 1 << 20
LARGE = (4, MIB)  # 16 MiB an end
LIKE = torch.zeros(1)
KEEPS = _native.lent_limit() > 0  # not with AddressSanitizer


def held():
    return _native.lent_bytes()


@pytest.fixture(autouse=True)
def empty_shelf():
    """Every test begins with nothing kept and a limit of 96 MiB."""
    before = ops.set_kept_memory(0)
    gc.collect()
    assert held() == 0
    ops.set_kept_memory(96 * MIB)
    yield
    ops.set_kept_memory(0)
    ops.set_kept_memory(before)


def test_memory_is_used_again_and_counted_while_nobody_has_it():
    ends = new_ends(LIKE, LARGE)
    places = {end.data_ptr() for end in ends}
    assert len(places) == 2
    assert held() == 0
    del ends
    assert held() == 32 * MIB
    again = new_ends(LIKE, LARGE)
    assert {end.data_ptr() for end in again} == places
    assert held() == 0


def test_what_shares_memory_holds_it():
    lower, upper = new_ends(LIKE, LARGE)
    row, array, other = lower[2], upper.numpy(), torch.from_dlpack(lower)
    row.fill_(3), array.fill(5)
    del lower, upper
    assert held() == 0
    more = [end.fill_(7) for end in new_ends(LIKE, LARGE)]
    assert (other[2] == 3).all()
    assert (array == 5).all()
    del row, array, other, more
    assert held() == 64 * MIB


def test_the_limit_holds_and_what_came_first_stays():
    ends = [new_ends(LIKE, LARGE)[0] for _ in range(8)]
    first = {end.data_ptr() for end in ends[:3]}
    ops.set_kept_memory(0)  # the other ends
    ops.set_kept_memory(48 * MIB)
    while ends:
        ends.pop(0)
        assert held() <= 48 * MIB
    assert held() == 48 * MIB
    again = [end for _ in range(2) for end in new_ends(LIKE, LARGE)]
    assert {end.data_ptr() for end in again} >= first
    del again
    assert ops.set_kept_memory(20 * MIB) == 48 * MIB
    assert held() == 16 * MIB
    assert ops.set_kept_memory(0) == 20 * MIB
    assert held() == 0


def test_what_nobody_takes_for_long_makes_room():
    ops.set_kept_memory(32 * MIB)
    new_ends(LIKE, LARGE)
    assert held() == 32 * MIB
    for _ in range(31):  # 62 blocks that find no room
        new_ends(LIKE, (2, MIB))
        assert held() == 32 * MIB
    new_ends(LIKE, (2, MIB))
    new_ends(LIKE, (2, MIB))
    assert held() == 32 * MIB - 16 * MIB + 2 * 8 * MIB
    places = {end.data_ptr() for end in new_ends(LIKE, (2, MIB))}
    assert {end.data_ptr() for end in new_ends(LIKE, (2, MIB))} == places


@pytest.mark.parametrize(("shape", "fits"), [((4, MIB - 9999), True), ((3, MIB), False)])
def test_only_blocks_of_about_the_size_are_taken(shape, fits):
    before = {end.data_ptr() for end in new_ends(LIKE, LARGE)}
    found = {end.data_ptr() for end in new_ends(LIKE, shape)}
    assert (found == before) == fits
    assert held() == (32 if fits else 56) * MIB


def test_the_best_of_several_is_taken():
    wanted = new_ends(LIKE, (17, MIB // 4))[0].data_ptr()
    for rows in (20, 18, 17):
        new_ends(LIKE, (rows, MIB // 4))
    assert wanted in {end.data_ptr() for end in new_ends(LIKE, (17, MIB // 4))}


@pytest.mark.parametrize(
    ("like", "shape"),
    [
        (LIKE, (1, MIB // 32 - 1)),  # below 128 KiB
        (LIKE, (64, MIB)),  # beyond the limit
        (LIKE.double(), LARGE),
        (LIKE.as_subclass(type("Mine", (torch.Tensor,), {})), LARGE),
        (LIKE.to("meta"), LARGE),
        (LIKE, (2,) * 22),
        (LIKE, (0, 4 * MIB)),
    ],
)
def test_other_ends_are_those_of_torch(like, shape):
    for end in new_ends(like, shape):
        assert end.shape == shape
        assert end.dtype == like.dtype
        assert type(end) is type(like)
        assert end.device == like.device
    del end
    assert held() == 0


SMALL = """
import sys
import torch
from pyrobust import _native
from pyrobust.ops._kept_memory import new_ends

like, elements = torch.zeros(1), int(sys.argv[1])
ends = new_ends(like, (elements,))
places = {end.data_ptr() for end in ends}
del ends
assert _native.lent_bytes() == 0
others = [torch.empty(elements) for _ in range(8)]  # what malloc has at hand goes to these
smaller = new_ends(like, (elements * 3 // 5,))
assert not places.intersection(end.data_ptr() for end in smaller)
assert {end.data_ptr() for end in new_ends(like, (elements,))} == places
"""


@pytest.mark.skipif(not KEEPS, reason="small blocks are not kept with AddressSanitizer")
@pytest.mark.parametrize("elements", [MIB // 32, MIB // 8, 3 * MIB // 4])
def test_ends_below_4_mib_are_used_again_but_not_lent(elements):
    subprocess.run([sys.executable, "-c", SMALL, str(elements)], check=True, timeout=120)


@pytest.mark.parametrize("shape", [LARGE, (MIB // 8,)])
def test_with_no_limit_torch_allocates(shape):
    ops.set_kept_memory(0)
    lower, _ = new_ends(LIKE, shape)
    lower.resize_(5, MIB)
    assert lower.shape == (5, MIB)


def test_the_tensors_are_ordinary_but_cannot_grow():
    lower, upper = new_ends(LIKE, LARGE)
    lower.copy_(torch.arange(4.0)[:, None].expand(LARGE))
    assert not lower.requires_grad
    assert lower.is_contiguous()
    assert lower._version == 1
    with pytest.raises(RuntimeError, match="resiz"):
        upper.view(-1).resize_(5 * MIB)
    assert lower.clone().equal(lower)
    assert copy.deepcopy(lower).equal(lower)
    assert pickle.loads(pickle.dumps(lower)).equal(lower)
    file = io.BytesIO()
    torch.save(lower, file)
    file.seek(0)
    assert torch.load(file).equal(lower)
    upper.copy_(lower)
    assert upper.share_memory_().is_shared()
    assert upper.equal(lower)
    assert held() == 16 * MIB  # what it had before
    (lower.requires_grad_() * 2).sum().backward()
    assert (lower.grad == 2).all()


def test_modes_of_torch():
    with torch.inference_mode():
        assert new_ends(LIKE, LARGE)[0].is_inference()
    with torch.no_grad():
        assert not new_ends(LIKE, LARGE)[0].is_inference()


def test_live_ends_never_share_memory_whatever_the_order():
    choose, live = random.Random(0), {}
    for step in range(300):
        if live and (len(live) > 9 or choose.random() < 0.5):
            number = choose.choice(list(live))
            end = live.pop(number)
            assert (end[:, ::4096] == number).all()
        else:
            shape = choose.choice([(1, MIB), (9, MIB // 8), (5, MIB // 4)])
            live[step] = choose.choice(new_ends(LIKE, shape)).fill_(step)
    live.clear()
    assert 0 < held() <= 96 * MIB


def test_threads_take_and_drop_at_once():
    wrong, box = [], []

    def work(number):
        choose = random.Random(number)
        for step in range(60):
            value = number * 1000 + step
            lower, upper = (end.fill_(value) for end in new_ends(LIKE, (1, MIB)))
            if choose.random() < 0.5:
                box.append(lower)  # dropped by some other thread
            if len(box) > 3 and choose.random() < 0.7:
                box.pop()
            if not ((lower[:, ::512] == value).all() and (upper[:, ::512] == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    box.clear()
    assert held() <= 96 * MIB


def _in_child(end, results):
    mine = [new.fill_(9) for new in new_ends(LIKE, LARGE)]
    results.put((bool((end == 4).all()), len({id(new) for new in mine})))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_its_own():
    live = new_ends(LIKE, LARGE)[0].fill_(4)
    new_ends(LIKE, LARGE)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(live, results))
    child.start()
    assert results.get() == (True, 2)
    child.join()
    assert child.exitcode == 0
    assert (live == 4).all()


def test_boxes_live_while_the_process_ends():
    script = (
        "import threading, torch\n"
        "from pyrobust.ops._kept_memory import new_ends\n"
        "kept = [new_ends(torch.zeros(1), (2, 1 << 20)) for _ in range(3)]\n"
        "kept.append(kept)\n"
        "def wait(*ends): threading.Event().wait()\n"
        "threading.Thread(target=wait, args=kept.pop(0), daemon=True).start()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""


def test_the_environment_turns_it_off():
    script = "from pyrobust import ops; print(ops.set_kept_memory(5))"
    environment = os.environ | {"PYROBUST_KEPT_MEMORY": "0"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["0"]


@pytest.mark.parametrize(
    ("limit", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError), ("1", TypeError)]
)
def test_wrong_limits(limit, error):
    with pytest.raises(error, match="set_kept_memory: limit must be"):
        ops.set_kept_memory(limit)
    assert ops.set_kept_memory(1 << 80) == 96 * MIB
    assert ops.set_kept_memory(0) == 2**63 - 1


def lazily_free():
    with open("/proc/self/smaps_rollup") as lines:
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("LazyFree"))


@pytest.mark.skipif(
    not os.path.exists("/proc/self/smaps_rollup"), reason="Linux counts what is lent"
)
def test_the_system_may_take_what_nobody_has():
    ends = [end.fill_(1) for end in new_ends(LIKE, LARGE)]
    before = lazily_free()
    ends.clear()
    assert lazily_free() >= before + 28 * MIB
    new_ends(LIKE, LARGE)[0].fill_(1)


class Passes(nn.Module):
    """Ends of 4 MiB by a convolution, a norm, curves, sums, products and a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.linear, self.rows = nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, x):
        x = self.norm(self.conv(x).relu())
        x = nn.functional.gelu(x) + x * x
        return nn.functional.leaky_relu(self.rows(self.linear(x).softmax(-1)), 0.1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rounding", ["real", "deployed"])
def test_results_do_not_depend_on_where_ends_lie(rounding, training):
    model, x = Passes().eval(), torch.rand(64, 3, 32, 32)

    def results():
        box = model(Interval.ball(x, 0.01, rounding=rounding))
        if not training:
            return box.lower, box.upper
        gradients = torch.autograd.grad((box.upper - box.lower).sum(), model.parameters())
        return box.lower.detach(), box.upper.detach(), *gradients

    with torch.set_grad_enabled(training):
        ops.set_kept_memory(0)
        expected = results()
        ops.set_kept_memory(96 * MIB)
        kept = [results() for _ in range(3)]
        assert held() > 0
    for found in kept:
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_boxes_held_keep_their_values():
    model, held_boxes = Passes().eval(), []
    inputs = [torch.rand(64, 3, 32, 32) for _ in range(4)]
    with torch.no_grad():
        for x in inputs + inputs:
            held_boxes.append(model(Interval.ball(x, 0.01)))
        firsts = [box.lower for box in held_boxes[:4]]
        for first, second in zip(firsts, held_boxes[4:], strict=True):
            assert first.equal(second.lower)


def test_compiled_code_uses_kept_memory():
    model, x = nn.Sequential(nn.Linear(64, 1024), nn.Linear(1024, 8)).eval(), torch.rand(2048, 64)

    def bounds(x):
        box = model(Interval.ball(x, 0.01))
        return box.lower, box.upper

    with torch.no_grad():
        expected = bounds(x)
        compiled = torch.compile(bounds, backend="aot_eager")
        for _ in range(3):
            assert all(a.equal(b) for a, b in zip(compiled(x), expected, strict=True))
    assert held() > 0
