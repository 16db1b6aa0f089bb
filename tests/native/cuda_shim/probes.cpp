// The probes of probes.cuh on fibres.
#include "probes.cuh"

#include <string>

#include "bindings/tensor_view.h"
#include "shim.h"

namespace pyrobust {
namespace {

using cuda::launch;
using namespace probes;

void ring_sum_of(py::handle in, py::handle out, int left) {
  const TensorView from = view(in, "in"), to = view(out, "out");
  const auto kernel = left == 1 ? ring_sum<1> : left == 2 ? ring_sum<2> : ring_sum<0>;
  launch(kernel, {1, 1, kThreads, 3 * 16 * kThreads}, 0, from.as<int32_t>(),
         static_cast<int>(from.shape[0]), to.as<int32_t>());
}

void signalled_sum_of(py::handle in, py::handle out, int fault) {
  const TensorView from = view(in, "in"), to = view(out, "out");
  constexpr decltype(&signalled_sum<0>) kKernels[] = {signalled_sum<0>, signalled_sum<1>,
                                                      signalled_sum<2>, signalled_sum<3>,
                                                      signalled_sum<4>, signalled_sum<5>};
  const auto kernel = kKernels[fault];
  launch(kernel, {1, 1, 32, 2 * 512 + 16}, 0, from.as<int32_t>(), static_cast<int>(from.shape[0]),
         to.as<int32_t>());
}

void warpgroup_product_of(py::handle a, py::handle b, py::handle d, int fault) {
  constexpr decltype(&warpgroup_product<0>) kKernels[] = {
      warpgroup_product<0>, warpgroup_product<1>, warpgroup_product<2>, warpgroup_product<3>,
      warpgroup_product<4>, warpgroup_product<5>, warpgroup_product<6>};
  launch(kKernels[fault], {1, 1, 128, 1024}, 0, view(a, "a").as<uint16_t>(),
         view(b, "b").as<uint16_t>(), view(d, "d").as<float>());
}

void doubled_of(py::handle in, py::handle out, bool overlaps, int fault) {
  cuda::LaunchShape shape = {1, 1, 32, 0};
  shape.overlaps = overlaps;
  const auto kernel = fault == 0 ? doubled<0> : fault == 1 ? doubled<1> : doubled<2>;
  launch(kernel, shape, 0, view(in, "in").as<float>(), view(out, "out").as<float>());
}

void exchanged_of(py::handle in, py::handle out, bool fault) {
  cuda::LaunchShape shape = {2, 1, 32, 512 + 16};
  shape.cluster = 2;
  launch(fault ? exchanged<1> : exchanged<0>, shape, 0, view(in, "in").as<float>(),
         view(out, "out").as<float>());
}

void never_signalled_of(py::handle in) {
  launch(never_signalled, {1, 1, 32, 128}, 0, view(in, "in").as<int32_t>());
}

void reversed_of(py::handle in, py::handle out, bool barrier) {
  const TensorView from = view(in, "in"), to = view(out, "out");
  launch(barrier ? reversed<true> : reversed<false>,
         {static_cast<unsigned>(from.numel() / kThreads), 1, kThreads, 4 * kThreads}, 0,
         from.as<int32_t>(), to.as<int32_t>());
}

void diverged_barrier(py::handle out) {
  launch(diverged, {1, 1, kThreads, 0}, 0, view(out, "out").as<int32_t>());
}

void read_shared_rows(int rows, py::handle out) {
  launch(read_rows, {1, 1, 32, 256}, 0, rows, view(out, "out").as<uint32_t>());
}

void multiply_of(py::handle a, py::handle b, py::handle d) {
  const TensorView left = view(a, "a"), right = view(b, "b"), sums = view(d, "d");
  if (left.dtype == DType::kInt8) {
    launch(multiply_s8, {1, 1, 32, 0}, 0, left.as<int8_t>(), right.as<int8_t>(),
           sums.as<int32_t>());
    return;
  }
  launch(left.dtype == DType::kFloat16 ? multiply<true> : multiply<false>, {1, 1, 32, 768}, 0,
         left.as<uint16_t>(), right.as<uint16_t>(), sums.as<float>());
}

void transposed_of(py::handle in, py::handle out) {
  launch(transposed, {1, 1, 32, 512}, 0, view(in, "in").as<uint16_t>(),
         view(out, "out").as<uint16_t>());
}

void in_turn_of(py::handle order, int first_turn) {
  const TensorView to = view(order, "order");
  int32_t lock = first_turn, place = 0;
  launch(in_turn, {static_cast<unsigned>(to.numel()), 1, 32, 0}, 0, &lock, &place,
         to.as<int32_t>());
}

void words_of(py::handle a, py::handle b, py::handle c, py::handle x, py::handle y,
              py::handle out) {
  const TensorView first = view(a, "a");
  launch(words, {static_cast<unsigned>(first.numel() / 32), 1, 32, 0}, 0, first.as<uint32_t>(),
         view(b, "b").as<uint32_t>(), view(c, "c").as<uint32_t>(), view(x, "x").as<float>(),
         view(y, "y").as<float>(), view(out, "out").as<uint32_t>());
}

void reduced_of(py::handle x, py::handle sums, py::handle histogram, py::handle least) {
  launch(reduced, {1, 1, 32, 0}, 0, view(x, "x").as<float>(), view(sums, "sums").as<float>(),
         view(histogram, "histogram").as<int64_t>(), view(least, "least").as<int64_t>());
}

void copied_of(py::handle in, int shift, py::handle out) {
  launch(copied, {1, 1, 32, 0}, 0, view(in, "in").as<uint8_t>(), shift,
         view(out, "out").as<uint8_t>());
}

}  // namespace

void bind_probes(py::module_& m) {
  m.def("ring_sum", &ring_sum_of);
  m.def("signalled_sum", &signalled_sum_of);
  m.def("warpgroup_product", &warpgroup_product_of);
  m.def("doubled", &doubled_of);
  m.def("exchanged", &exchanged_of);
  m.def("never_signalled", &never_signalled_of);
  m.def("reversed", &reversed_of);
  m.def("diverged_barrier", &diverged_barrier);
  m.def("read_shared_rows", &read_shared_rows);
  m.def("multiply", &multiply_of);
  m.def("transposed", &transposed_of);
  m.def("in_turn", &in_turn_of);
  m.def("words", &words_of);
  m.def("reduced", &reduced_of);
  m.def("copied", &copied_of);
}

}  // namespace pyrobust
