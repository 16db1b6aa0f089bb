// The emulated bodies of signals (cuda/primitives.h). Copies that a signal waits for land when its
// phase is waited for, never before.
#pragma once

#include "cuda/fibres.h"

namespace pyrobust {
namespace cuda {

void make_signal(SharedPlace signal, uint32_t arrivals);
void show_signals();
void arrive_at(SharedPlace signal);
void arrive_expecting(SharedPlace signal, uint32_t bytes);
void arrive_with_copies(SharedPlace signal);
void await_signal(SharedPlace signal, uint32_t parity);
void copy_bulk(SharedPlace to, const void* from, uint32_t bytes, SharedPlace signal);
void send16(SharedPlace to, const float (&values)[4], uint32_t rank, SharedPlace signal);

PYROBUST_DEVICE void begin_cluster_barrier() { fibres::begin_cluster_barrier(); }
PYROBUST_DEVICE void end_cluster_barrier() { fibres::end_cluster_barrier(); }

}  // namespace cuda
}  // namespace pyrobust
