// The module pyrobust._native: the kernel families and the machine they run on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/families.h"
#include "runtime/cpu_features.h"

namespace {

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < pyrobust::kIsaCount; ++i) {
    const auto isa = static_cast<pyrobust::Isa>(i);
    if (pyrobust::isa_supported(isa)) names.emplace_back(pyrobust::isa_name(isa));
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of pyrobust.";
  m.def("isa", [] { return std::string(pyrobust::isa_name(pyrobust::current_isa())); });
  m.def("set_isa", [](const std::string& name) { pyrobust::set_isa(pyrobust::parse_isa(name)); });
  m.def("supported_isas", &supported_isas);
  m.def("set_word_lookups", [](bool allowed) {
    const bool before = pyrobust::looks_words_up();
    pyrobust::set_word_lookups(allowed);
    return before;
  });
  pyrobust::bind_matmul(m);
  pyrobust::bind_additions(m);
  pyrobust::bind_eager_linear(m);
  pyrobust::bind_eager_interval(m);
  pyrobust::bind_eager_boxes(m);
  pyrobust::bind_eager_chain(m);
  pyrobust::bind_settled_ends(m);
  pyrobust::bind_panel_cache(m);
  pyrobust::bind_kept_ends(m);
  pyrobust::bind_limits(m);
  pyrobust::bind_sampling(m);
  pyrobust::bind_interval(m);
  pyrobust::bind_curves(m);
  pyrobust::bind_relaxation(m);
  pyrobust::bind_transformer(m);
}
