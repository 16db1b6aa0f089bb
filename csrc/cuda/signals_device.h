// The device bodies of signals (cuda/primitives.h): mbarriers, bulk copies and stores to other
// blocks of a cluster. Compute capability 9.0; below it the bodies are empty, for kernels that are
// never launched there.
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PYROBUST_SIGNALS 1
#else
#define PYROBUST_SIGNALS 0
#endif

namespace pyrobust {
namespace cuda {

// A signal of `arrivals` arrivals in each of its phases, in 8 bytes of shared memory. By one
// thread; show_signals() and a barrier come before others use it.
PYROBUST_DEVICE void make_signal(SharedPlace signal, uint32_t arrivals) {
#if PYROBUST_SIGNALS
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(signal), "r"(arrivals) : "memory");
#endif
}

PYROBUST_DEVICE void show_signals() {
#if PYROBUST_SIGNALS
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::
                   : "memory");
#endif
}

// One arrival; reads of shared memory before it have been made.
PYROBUST_DEVICE void arrive_at(SharedPlace signal) {
#if PYROBUST_SIGNALS
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(signal) : "memory");
#endif
}

// One arrival, and `bytes` of copies that the phase waits for.
PYROBUST_DEVICE void arrive_expecting(SharedPlace signal, uint32_t bytes) {
#if PYROBUST_SIGNALS
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(signal), "r"(bytes)
               : "memory");
#endif
}

// One arrival, once all copy16_async of this thread have landed; they belong to no group then.
PYROBUST_DEVICE void arrive_with_copies(SharedPlace signal) {
#if PYROBUST_SIGNALS
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(signal) : "memory");
#endif
}

// Waits until the phase of this parity is over; that before the first counts as over.
PYROBUST_DEVICE void await_signal(SharedPlace signal, uint32_t parity) {
#if PYROBUST_SIGNALS
  asm volatile(
      "{\n.reg .pred over;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n}\n" ::"r"(signal),
      "r"(parity)
      : "memory");
#endif
}

// A copy of a multiple of 16 bytes, at such addresses, that `signal` was told to expect.
PYROBUST_DEVICE void copy_bulk(SharedPlace to, const void* from, uint32_t bytes,
                               SharedPlace signal) {
#if PYROBUST_SIGNALS
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(signal)
      : "memory");
#endif
}

// Four floats to this place of block `rank` of the cluster, whose `signal` expects them. That block
// must have begun and may not end before its signal is over. It waits by await_signal, whose scope
// is the thread block: what arrives lies in that block's own memory, which no cache stands before.
// A wait of the cluster's scope adds nothing for it but invalidates L1 (four CCTL.IVALL a kernel).
PYROBUST_DEVICE void send16(SharedPlace to, const float (&values)[4], uint32_t rank,
                            SharedPlace signal) {
#if PYROBUST_SIGNALS
  asm volatile(
      "{\n.reg .u32 place, its;\n"
      "mapa.shared::cluster.u32 place, %0, %2;\nmapa.shared::cluster.u32 its, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [place], {%3, %4, %5, %6}, "
      "[its];\n}\n" ::"r"(to),
      "r"(signal), "r"(rank), "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
      : "memory");
#endif
}

// A barrier of all threads of the cluster in two halves, which orders nothing but signals that were
// made and shown before: all blocks have begun.
PYROBUST_DEVICE void begin_cluster_barrier() {
#if PYROBUST_SIGNALS
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
#endif
}

PYROBUST_DEVICE void end_cluster_barrier() {
#if PYROBUST_SIGNALS
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#endif
}

}  // namespace cuda
}  // namespace pyrobust
