// Python entry points of boxes under functions of one number, and of pairs of boxes or of a box and
// a constant.
#include <pybind11/stl.h>

#include <vector>

#include "bindings/families.h"
#include "bindings/interval_call.h"
#include "bindings/tensor_view.h"
#include "interval/curves.h"
#include "interval/pairs.h"
#include "runtime/check.h"

namespace pyrobust {
namespace {

struct NamedCurve {
  const char* name;
  interval::Curve curve;
  size_t numbers;
};

constexpr NamedCurve kNamed[] = {
    {"gelu", interval::Curve::kGelu, 0},
    {"gelu_tanh", interval::Curve::kGeluTanh, 0},
    {"silu", interval::Curve::kSilu, 0},
    {"mish", interval::Curve::kMish, 0},
    {"hardswish", interval::Curve::kHardswish, 0},
    {"hardsigmoid", interval::Curve::kHardsigmoid, 0},
    {"softplus", interval::Curve::kSoftplus, 0},
    {"logsigmoid", interval::Curve::kLogSigmoid, 0},
    {"sigmoid", interval::Curve::kSigmoid, 0},
    {"tanh", interval::Curve::kTanh, 0},
    {"softsign", interval::Curve::kSoftsign, 0},
    {"exp", interval::Curve::kExp, 0},
    {"expm1", interval::Curve::kExpm1, 0},
    {"elu", interval::Curve::kElu, 3},
    {"log", interval::Curve::kLog, 1},
    {"log1p", interval::Curve::kLog1p, 0},
    {"erf", interval::Curve::kErf, 0},
    {"atan", interval::Curve::kAtan, 0},
    {"sqrt", interval::Curve::kSqrt, 0},
    {"rsqrt", interval::Curve::kRsqrt, 0},
    {"square", interval::Curve::kSquare, 0},
};

interval::CurveOf parse_curve(const std::string& name, const std::vector<double>& numbers) {
  for (const NamedCurve& known : kNamed) {
    if (name != known.name) continue;
    check(numbers.size() == known.numbers, "interval_curve: ", name, " must have ", known.numbers,
          " numbers; got ", numbers.size(), ".");
    interval::CurveOf of{known.curve, {}};
    std::copy(numbers.begin(), numbers.end(), of.numbers);
    return of;
  }
  fail("interval_curve: no native curve is called '", name, "'.");
}

// `deployed`: the three errors of CurveErrors.
bool interval_curve(py::handle lower, py::handle upper, const std::string& curve,
                    const std::vector<double>& numbers, const std::array<double, 3>& deployed,
                    const std::string& rounding, py::handle out_lower, py::handle out_upper,
                    int num_threads) {
  int64_t count;
  const auto t = alike<4>({lower, upper, out_lower, out_upper}, &count);
  const interval::CurveBox work{parse_curve(curve, numbers),
                                t[0],
                                t[1],
                                count,
                                parse_rounding(rounding).rounding,
                                {deployed[0], deployed[1], deployed[2]},
                                t[2],
                                t[3]};
  const py::gil_scoped_release release;
  return interval::bound_curve(work, num_threads);
}

void interval_curve_backward(py::handle of_lower, py::handle of_upper, py::handle lower,
                             py::handle upper, const std::string& curve,
                             const std::vector<double>& numbers, py::handle to_lower,
                             py::handle to_upper, int num_threads) {
  int64_t count;
  const auto t = alike<6>({of_lower, of_upper, lower, upper, to_lower, to_upper}, &count);
  const interval::CurveBackward work{
      parse_curve(curve, numbers), t[0], t[1], t[2], t[3], count, t[4], t[5]};
  const py::gil_scoped_release release;
  interval::bound_curve_backward(work, num_threads);
}

// The values in double that the bounds rest on, (count) float32 to float64; for tests.
void interval_curve_values(py::handle x_, const std::string& curve,
                           const std::vector<double>& numbers, py::handle out_) {
  const TensorView x = view(x_, "x"), out = view(out_, "out");
  x.require_dtype(DType::kFloat32).require_ndim(1);
  out.require_dtype(DType::kFloat64).require_ndim(1).require_size(0, x.shape[0]);
  const interval::CurveOf of = parse_curve(curve, numbers);
  const py::gil_scoped_release release;
  interval::evaluate_curve(of, x.as<const float>(), x.shape[0], out.as<double>());
}

interval::Pairing parse_pairing(const std::string& name) {
  if (name == "add") return interval::Pairing::kSum;
  if (name == "sub") return interval::Pairing::kDifference;
  if (name == "mul") return interval::Pairing::kProduct;
  check(name == "div", "interval_pair: no native operation is called '", name, "'.");
  return interval::Pairing::kQuotient;
}

bool interval_pair(py::handle low_x, py::handle high_x, py::handle low_y, py::handle high_y,
                   const std::string& operation, const std::string& rounding, py::handle out_lower,
                   py::handle out_upper, int num_threads) {
  int64_t count;
  const auto t = alike<6>({low_x, high_x, low_y, high_y, out_lower, out_upper}, &count);
  const interval::BoxPair work{parse_pairing(operation),          t[0], t[1], t[2], t[3], count,
                               parse_rounding(rounding).rounding, t[4], t[5]};
  const py::gil_scoped_release release;
  return interval::bound_pair(work, num_threads);
}

// `to`: gradients of the ends of x and y.
void interval_pair_backward(py::handle of_lower, py::handle of_upper, py::handle low_x,
                            py::handle high_x, py::handle low_y, py::handle high_y,
                            const std::string& operation, const std::array<py::handle, 4>& to,
                            int num_threads) {
  int64_t count;
  const auto t = alike<10>(
      {of_lower, of_upper, low_x, high_x, low_y, high_y, to[0], to[1], to[2], to[3]}, &count);
  const interval::PairBackward work{
      parse_pairing(operation), t[0], t[1], t[2], t[3], t[4], t[5], count, t[6], t[7], t[8], t[9]};
  const py::gil_scoped_release release;
  interval::bound_pair_backward(work, num_threads);
}

bool interval_constant(py::handle lower, py::handle upper, double first, double last,
                       const std::string& operation, bool reversed, const std::string& rounding,
                       py::handle out_lower, py::handle out_upper, int num_threads) {
  int64_t count;
  const auto t = alike<4>({lower, upper, out_lower, out_upper}, &count);
  const interval::BoxConstant work{
      parse_pairing(operation),          reversed, first, last, t[0], t[1], count,
      parse_rounding(rounding).rounding, t[2],     t[3]};
  const py::gil_scoped_release release;
  return interval::bound_constant(work, num_threads);
}

void interval_constant_backward(py::handle of_lower, py::handle of_upper, py::handle lower,
                                py::handle upper, double first, double last,
                                const std::string& operation, bool reversed, py::handle to_lower,
                                py::handle to_upper, int num_threads) {
  int64_t count;
  const auto t = alike<6>({of_lower, of_upper, lower, upper, to_lower, to_upper}, &count);
  const interval::ConstantBackward work{
      parse_pairing(operation), reversed, first, last, t[0], t[1], t[2], t[3], count, t[4], t[5]};
  const py::gil_scoped_release release;
  interval::bound_constant_backward(work, num_threads);
}

}  // namespace

void bind_curves(py::module_& m) {
  m.def("interval_curve", &interval_curve);
  m.def("interval_curve_backward", &interval_curve_backward);
  m.def("interval_curve_values", &interval_curve_values);
  m.def("interval_pair", &interval_pair);
  m.def("interval_pair_backward", &interval_pair_backward);
  m.def("interval_constant", &interval_constant);
  m.def("interval_constant_backward", &interval_constant_backward);
}

}  // namespace pyrobust
