// When Hopper's own instructions are used, and the launch of attend_sm90a.cuh, compiled apart.
#pragma once

#include "attend_mma.h"
#include "tensor_map.h"

namespace contaccum {

// A tile of kBoxRows slots has one offset. The biases of both sides take at most this much.
constexpr int64_t kOffsetBytes = 5 << 19;

inline int64_t offset_array_bytes(const CudaStep& step) {
  const Layout& y = step.layout;
  return (1 + y.offset_blocks()) *
         std::max(y.m * padded_locals(step.batch.n), padded_locals(y.m * step.batch.n)) *
         int64_t(sizeof(float));
}

// Whether biases have arrays.
template <class S>
bool has_offset_arrays(const CudaStep& step) {
  const Layout& y = step.layout;
  return takes_tensor_cores<S>(step) && step.device.compute_capability == 90 &&
         step.options.use_offsets && y.capacity > 0 && y.offset_block % kBoxRows == 0 &&
         2 * offset_array_bytes(step) <= kOffsetBytes;
}

template <class S>
bool takes_sm90a(const CudaStep& step, int64_t locals) {
  constexpr int64_t kSmall = 16;  // with few locals bytes decide, not products
  if (!takes_tensor_cores<S>(step) || step.device.compute_capability != 90) return false;
  if (locals <= kSmall) return false;
  return !step.options.use_offsets || step.layout.capacity == 0 || has_offset_arrays<S>(step);
}

// A tile of columns holds whole groups of 8, 16, 32 or 64 columns.
template <class S>
bool takes_rows_sm90a(const CudaStep& step) {
  constexpr int64_t kFewRows = 1024;  // a block takes 128
  const Layout& y = step.layout;
  if (!takes_tensor_cores<S>(step) || step.device.compute_capability != 90) return false;
  if (y.capacity < kFewRows || takes_few_rows_mma<S>(step)) return false;
  const int64_t columns = y.group * y.m;
  if (columns != 8 && columns != 16 && columns != 32 && columns != kBoxRows) return false;
  return !step.options.use_offsets || has_offset_arrays<S>(step);
}

// Clusters of thread blocks of the streaming kernel that fit the device at once.
template <class S>
int sm90a_clusters_at_once(const CudaStep& step);

// False where the driver cannot describe the tensors.
template <class S>
bool launch_attend_sm90a(const Args<S>& a, bool queries, int splits, cudaStream_t stream);
template <class S>
bool launch_rows_sm90a(const Args<S>& a, cudaStream_t stream);

}  // namespace contaccum
