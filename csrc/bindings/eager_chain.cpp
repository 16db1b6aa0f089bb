// Packed linear layers and ReLUs that follow one another in a Sequential, as one call: the modules
// are read here, and boxes between them are never made. As in eager_interval.cpp, what is not
// wholly plain gives None, and the modules are called one after another.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "bindings/eager_box.h"
#include "bindings/eager_ends.h"
#include "bindings/families.h"
#include "bindings/fast_methods.h"
#include "bindings/interval_call.h"
#include "bindings/panel_cache.h"
#include "bindings/plain_arguments.h"
#include "interval/interval.h"
#include "interval/plan.h"

namespace pyrobust {
namespace {

// A module class, and what its calls run unless somebody changes the class.
struct KnownClass {
  PyObject *type = nullptr, *forward = nullptr, *call = nullptr;

  explicit KnownClass(py::handle known = {}) {
    if (!known) return;
    type = known.inc_ref().ptr();
    forward = py::object(known.attr("forward")).release().ptr();
    call = py::object(known.attr("__call__")).release().ptr();
  }

  bool unchanged() const {
    static PyObject* const names[2] = {interned("forward"), interned("__call__")};
    return type != nullptr && attribute(type, names[0]).ptr() == forward &&
           attribute(type, names[1]).ptr() == call;
  }
};

struct KnownModules {
  KnownClass packed_linear, relu;
  std::vector<PyObject*> global_hooks;  // dictionaries of torch
};

KnownModules& known_modules() {
  static auto* const known = new KnownModules();  // never destroyed: the interpreter may be gone
  return *known;
}

PyObject* entry_of(PyObject* dictionary, PyObject* name) {
  PyObject* const value = PyDict_GetItemWithError(dictionary, name);
  if (value == nullptr) throw NotPlain();
  return value;
}

// What a call of a module does beside its forward is nothing.
bool calls_forward_alone(PyObject* attributes) {
  static PyObject* const empty[5] = {interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                     interned("_backward_hooks"), interned("_backward_pre_hooks"),
                                     interned("_modules")};
  static PyObject* const compiled = interned("_compiled_call_impl");
  static PyObject* const forward = interned("forward");
  for (PyObject* const name : empty) {
    PyObject* const value = entry_of(attributes, name);
    if (!PyDict_Check(value) || PyDict_GET_SIZE(value) != 0) return false;
  }
  if (PyDict_GetItemWithError(attributes, forward) != nullptr) return false;
  PyObject* const own_call = PyDict_GetItemWithError(attributes, compiled);
  return own_call == nullptr || own_call == Py_None;
}

bool is_true(PyObject* attributes, PyObject* name) { return truth(entry_of(attributes, name)); }

// A PackedLinear, and whether ReLUs stand before it.
struct PackedLayer {
  PyObject* attributes;
  bool rectified;
};

// The longest run of known modules from `start` on.
struct Run {
  std::vector<PackedLayer> layers;
  bool rectified = false;  // a ReLU ends it
  Py_ssize_t end;

  Run(PyObject* modules, Py_ssize_t start) : end(start) {
    const KnownModules& known = known_modules();
    if (!known.packed_linear.unchanged() || !known.relu.unchanged()) return;
    PyObject *name, *module;
    for (Py_ssize_t at = 0, index = 0; PyDict_Next(modules, &at, &name, &module); ++index) {
      if (index < start) continue;
      if (!add(module)) return;
      end = index + 1;
    }
  }

 private:
  bool add(PyObject* module) {
    static PyObject* const inplace = interned("inplace");
    const KnownModules& known = known_modules();
    const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(module));
    const bool packed = type == known.packed_linear.type;
    if (!packed && type != known.relu.type) return false;
    const auto attributes =
        py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    if (!attributes || !calls_forward_alone(attributes.ptr())) return false;
    if (packed) {
      layers.push_back({attributes.ptr(), rectified});  // the module keeps them
      rectified = false;
      return true;
    }
    // In place a ReLU changes the box itself; of one that nobody else has it does not matter.
    if (layers.empty() && is_true(attributes.ptr(), inplace)) return false;
    rectified = true;
    return true;
  }
};

// The weight and the bias of a PackedLinear; tensors that its dictionaries hold.
struct Operands {
  matmul::PackedMatrix weight;
  const float* bias;
  bool int8;
  py::object extras;  // must outlive the weight
  std::shared_ptr<const PanelMemory> panels;

  Operands(PyObject* attributes, bool grad_enabled, int num_threads) {
    static PyObject* const names[] = {
        interned("_buffers"),   interned("_parameters"), interned("codes"),       interned("scale"),
        interned("zero"),       interned("bias"),        interned("in_features"), interned("bits"),
        interned("group_size"), interned("group_dim"),   interned("activations")};
    PyObject* const buffers = entry_of(attributes, names[0]);
    PyObject* const parameters = entry_of(attributes, names[1]);
    if (!PyDict_Check(buffers) || !PyDict_Check(parameters)) throw NotPlain();
    PyObject* const tensors[4] = {entry_of(buffers, names[2]), entry_of(buffers, names[3]),
                                  entry_of(buffers, names[4]), entry_of(parameters, names[5])};
    for (PyObject* const tensor : tensors) require_tensor(tensor, grad_enabled);
    if (tensors[3] != Py_None) require_unnegated(tensors[3]);
    extras = parts_of(buffers);
    require_tensors(extras, grad_enabled);
    weight = packed_matrix(
        view(tensors[0], "codes"), view(tensors[1], "scale"), view_optional(tensors[2], "zero"),
        integer(entry_of(attributes, names[6])), levels_of(entry_of(attributes, names[7])),
        integer(entry_of(attributes, names[8])),
        static_cast<int>(integer(entry_of(attributes, names[9]))), extras);
    bias = float_bias(tensors[3], weight.rows);
    int8 = mode_of(entry_of(attributes, names[10])) == matmul::Mode::kInt8;
    if (!int8) {
      panels = attach_panels(tensors[0], tensors[1], tensors[2], num_threads, &weight,
                             kElementsOfBounds);
    }
  }

 private:
  // The optional parts in the order of WeightExtras; None where there is none.
  static py::object parts_of(PyObject* buffers) {
    static PyObject* const names[5] = {interned("row_scale"), interned("codebook"),
                                       interned("remainder_values"), interned("remainder_columns"),
                                       interned("remainder_offsets")};
    PyObject* parts[5];
    for (int i = 0; i < 5; ++i) parts[i] = entry_of(buffers, names[i]);
    if (std::all_of(parts, parts + 5, [](PyObject* part) { return part == Py_None; })) {
      return py::none();
    }
    py::tuple all(5);
    for (size_t i = 0; i < 5; ++i) all[i] = py::handle(parts[i]);
    return all;
  }
};

// Ends of the layers between, in turns, and the calls of one input.
struct Chain {
  std::vector<interval::Call> calls;
  interval::Floats memory;
  int64_t products = 0;

  Chain(const std::vector<Operands>& operands, const Run& run, const Promise& promise,
        bool rectified, std::atomic<bool>* unbounded) {
    int64_t widest = 0;
    for (const Operands& layer : operands) widest = std::max(widest, layer.weight.rows);
    widest = interval::whole_lines(widest);
    memory = interval::floats(4 * widest);
    for (size_t i = 0; i < operands.size(); ++i) {
      const matmul::PackedMatrix& weight = operands[i].weight;
      float* const out = memory.get() + static_cast<int64_t>(i % 2) * 2 * widest;
      calls.push_back({i > 0 ? calls[i - 1].out_lower : nullptr,
                       i > 0 ? calls[i - 1].out_upper : nullptr,
                       {nullptr, &weight, weight.rows, weight.cols},
                       operands[i].bias,
                       promise.rounding,
                       operands[i].int8,
                       promise.operand_error,
                       run.layers[i].rectified || (i == 0 && rectified),
                       false,
                       out,
                       out + widest,
                       unbounded});
      products += weight.rows * weight.cols;
    }
  }

  void run(const Box& box, const Result& result, int num_threads) {
    interval::Call &first = calls.front(), &last = calls.back();
    for (int64_t b = 0; b < box.batch(); ++b) {
      first.lower = box.low + b * first.weight.terms;
      first.upper = box.high + b * first.weight.terms;
      last.out_lower = result.low + b * last.weight.rows;
      last.out_upper = result.high + b * last.weight.rows;
      interval::interval_chain(calls.data(), static_cast<int64_t>(calls.size()), num_threads);
    }
  }
};

bool any_global_hook() {
  const std::vector<PyObject*>& hooks = known_modules().global_hooks;
  return std::any_of(hooks.begin(), hooks.end(),
                     [](PyObject* held) { return PyDict_GET_SIZE(held) != 0; });
}

// Whether one layer's ends are what the next one takes.
bool fit(const std::vector<Operands>& operands) {
  for (size_t i = 1; i < operands.size(); ++i) {
    if (operands[i].weight.cols != operands[i - 1].weight.rows) return false;
  }
  return true;
}

// box, modules, start, num_threads, grad_enabled -> the box after a run of modules from that of
// index `start` on, and the index of the next module
constexpr Py_ssize_t kCount = 5;

py::object box_chain(PyObject* const* a) {
  const bool boxed = reinterpret_cast<PyObject*>(Py_TYPE(a[0])) == box_names().type;
  if (!boxed || !PyDict_Check(a[1]) || any_global_hook()) return py::none();
  const Run run(a[1], integer(a[2]));
  // A single layer is as fast by itself.
  if (run.layers.size() < 2) return py::none();
  const bool grad_enabled = truth(a[4]);
  const Held held(a[0], a[4]);
  require_ends(held.first, held.second, grad_enabled);
  const Box box(held.first, held.second);
  if (box.batch() > interval::kFewInputs || box.batch() == 0) return py::none();
  const Promise promise = parse_rounding(py::str(held.rounding));
  if (promise.operand_error > 0.0f) return py::none();  // weights must be looked at first
  const int threads = static_cast<int>(integer(a[3]));
  std::vector<Operands> operands;
  operands.reserve(run.layers.size());
  for (const PackedLayer& layer : run.layers) {
    operands.emplace_back(layer.attributes, grad_enabled, threads);
  }
  box.require_terms(operands.front().weight.cols);
  if (!fit(operands)) return py::none();
  Result result(box, operands.back().weight.rows, true);
  std::atomic<bool> unbounded{false};
  Chain chain(operands, run, promise, truth(held.rectified), &unbounded);
  if (box.batch() * chain.products < kLeastReleasedWork) {
    chain.run(box, result, threads);
  } else {
    const py::gil_scoped_release release;
    chain.run(box, result, threads);
  }
  if (unbounded) return py::none();  // refused, with its place, elsewhere
  PyObject* const graded = run.rectified ? a[4] : Py_False;
  return py::make_tuple(new_box(result.first, result.second, held.rounding, run.rectified, graded),
                        run.end);
}

}  // namespace

void bind_eager_chain(py::module_& m) {
  static PyMethodDef methods[] = {method("box_chain", &entry<&box_chain, kCount>)};
  add_methods(m, methods);
  m.def("set_chain_types",
        [](py::object packed_linear, py::object relu, const py::sequence& global_hooks) {
          KnownModules& known = known_modules();
          known.packed_linear = KnownClass(packed_linear);
          known.relu = KnownClass(relu);
          known.global_hooks.clear();
          for (py::handle hooks : global_hooks) {
            if (PyDict_Check(hooks.ptr())) known.global_hooks.push_back(hooks.inc_ref().ptr());
          }
        });
}

}  // namespace pyrobust
