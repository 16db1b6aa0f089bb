"""What every module of pyrobust.nn that holds weights promises, one row of module_cases each."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from .module_cases import CASES, ModuleCase

FLOAT_CASES = {name: case for name, case in CASES.items() if case.takes_floats}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> ModuleCase:
    return request.param


@pytest.fixture(params=FLOAT_CASES.values(), ids=FLOAT_CASES.keys())
def float_case(request) -> ModuleCase:
    return request.param


def run(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


def assert_same_module(first: nn.Module, second: nn.Module, case: ModuleCase) -> None:
    x = case.batch(3)
    assert torch.equal(run(first, x), run(second, x))
    assert list(first.state_dict()) == list(second.state_dict())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
        assert tensor.dtype == second.state_dict()[name].dtype, name


def test_state_dict_round_trip_in_place_assigned_and_through_a_file(case):
    source = case.make()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for assign in (False, True):
        torch.manual_seed(99)
        target = case.make()
        for tensor in target.state_dict().values():
            tensor.zero_()
        target.load_state_dict(state, assign=assign)
        assert_same_module(source, target, case)


def test_state_of_another_format_is_refused_and_changes_nothing(case):
    if case.other is None:
        pytest.skip("one format only")
    target = case.make()
    with pytest.raises(RuntimeError, match="was packed with"):
        target.load_state_dict(case.other().state_dict())
    assert_same_module(target, case.make(), case)


def test_descriptions_that_are_none_are_refused(case):
    target = case.make()
    state = target.state_dict()
    found = state["_extra_state"]
    for other in (found.float(), found[0], found[:3], torch.tensor([]), found + 10**6):
        with pytest.raises(RuntimeError, match=r"the state (is of another format|was packed with)"):
            target.load_state_dict(state | {"_extra_state": other})


def test_missing_and_unexpected_keys_are_refused(case):
    state = case.make().state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        case.make().load_state_dict({**state, "extra": torch.zeros(1)})
    first = next(iter(state))
    del state[first]
    with pytest.raises(RuntimeError, match="Missing key"):
        case.make().load_state_dict(state)


def test_deepcopy_and_pickle_are_independent_equal_copies(case):
    source = case.make()
    for other in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert_same_module(source, other, case)
        for name, tensor in other.named_buffers():
            assert tensor.data_ptr() != source.get_buffer(name).data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_change_of_dtype_keeps_the_packed_weight_and_comes_back(case, dtype):
    module, untouched = case.make(), case.make()
    module.to(dtype)
    for name, tensor in module.named_buffers():
        assert torch.equal(tensor, untouched.get_buffer(name))
        assert tensor.dtype == untouched.get_buffer(name).dtype
    assert torch.equal(module.dequantize(), untouched.dequantize())
    absent = [buffer is None for buffer in module._buffers.values()]
    assert absent == sorted(absent)  # last, as torch.export of some versions needs them
    for name, tensor in module.named_parameters():
        assert tensor.dtype == dtype, name
    module.to(torch.float32)(case.batch(3))  # computes again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_activations_of_each_dtype_agree_with_float32(case, dtype):
    reflecting = getattr(case.make(), "padding_mode", "zeros") == "reflect"
    if reflecting and dtype == torch.float16 and torch.__version__ < "2.5":
        pytest.skip("torch 2.4 pads no float16 by reflection on the CPU")
    x = case.batch(4)
    expected = run(case.make(), x.to(dtype).float() if case.takes_floats else x)
    out = run(case.make().to(dtype), x.to(dtype) if case.takes_floats else x)
    assert out.dtype == dtype
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 1e-6)
    assert torch.allclose(out.float(), expected, atol=tolerance, rtol=tolerance)


def test_float64_activations_are_multiplied_in_float64_forwards_and_backwards(float_case):
    module, twin = float_case.make().double(), float_twin(float_case.make())
    x, y = (float_case.batch(3).double().requires_grad_() for _ in range(2))
    out, expected = module(x), twin(y)
    rounded = getattr(module, "activations", None) is not None  # to 8 bits, then
    assert out.dtype == torch.float64
    assert rounded or torch.allclose(out, expected, rtol=1e-13, atol=1e-13)
    out.square().sum().backward()
    assert x.grad.dtype == torch.float64
    if not rounded:
        expected.square().sum().backward()
        assert torch.allclose(x.grad, y.grad, rtol=1e-12, atol=1e-12)
        push = torch.ones_like(x)
        change = torch.func.jvp(module, (x.detach(),), (push,))[1]
        assert torch.allclose(change, torch.func.jvp(twin, (y.detach(),), (push,))[1])


def test_meta_device_keeps_shapes_and_can_be_filled(case):
    source = case.make()
    module = copy.deepcopy(source).to("meta")
    assert all(tensor.is_meta for tensor in module.buffers())
    module.to_empty(device="cpu")
    module.load_state_dict(source.state_dict())
    assert_same_module(source, module, case)
    again = copy.deepcopy(source).to("meta")
    again.load_state_dict(source.state_dict(), assign=True)
    assert_same_module(source, again, case)


def test_batches_of_zero_one_and_many_agree_row_by_row(case):
    module, x = case.make(), case.batch(33)
    out = run(module, x)
    assert run(module, x[:0]).shape == (0, *out.shape[1:])
    assert torch.equal(run(module, x[5:6]), out[5:6])
    assert torch.equal(torch.cat([run(module, x[:7]), run(module, x[7:])]), out)


def test_non_contiguous_input_gives_the_same_bits(case):
    module, x = case.make(), case.batch(6)
    wide = torch.stack([x, x + 1 if case.takes_floats else x], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    transposed = x.transpose(0, -1).contiguous().transpose(0, -1)
    for view in (wide, transposed):
        assert torch.equal(run(module, view), run(module, x))


def test_gradient_reaches_the_input(float_case):
    module = float_case.make()
    x = float_case.batch(2).requires_grad_()
    out = module(x)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    # affine (the rounding of activations counts as the identity): compare with the float twin
    twin = float_twin(module)
    reference = float_case.batch(2).double().requires_grad_()
    (twin(reference) * weights).sum().backward()
    assert torch.allclose(x.grad.double(), reference.grad, atol=1e-5, rtol=1e-5)


def float_twin(module: nn.Module) -> nn.Module:
    """The float64 torch layer with the decoded weight."""
    bias = module.bias is not None
    if hasattr(module, "in_features"):
        twin: nn.Module = nn.Linear(module.in_features, module.out_features, bias)
    else:
        sizes = (module.in_channels, module.out_channels, module.kernel_size, module.stride)
        options = (module.padding, module.dilation, module.groups, bias, module.padding_mode)
        twin = module.layer_type(*sizes, *options)
    twin.weight = nn.Parameter(module.dequantize(), requires_grad=False)
    if bias:
        twin.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return twin.double()


def test_compiles_without_graph_breaks(case):
    torch._dynamo.reset()
    module = case.make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (2, 5):
        x = case.batch(size)
        assert torch.equal(run(compiled, x), run(module, x))
    if case.takes_floats:
        x, y = case.batch(2).requires_grad_(), case.batch(2).requires_grad_()
        compiled(x).square().sum().backward()
        module(y).square().sum().backward()
        assert torch.allclose(x.grad, y.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_compiles_with_inductor(case):
    torch._dynamo.reset()
    module = case.make()
    x = case.batch(3)
    assert torch.equal(run(torch.compile(module, fullgraph=True), x), run(module, x))


def test_exports_with_a_dynamic_batch_and_survives_a_file(case):
    module = case.make()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (case.batch(3),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x = case.batch(8)
    assert torch.equal(run(loaded, x), run(module, x))


def test_bad_input_gives_one_clear_error(case):
    module = case.make()
    for make_bad, error, sentence in case.bad:
        with pytest.raises(error, match=sentence):
            run(module, make_bad())
