// What only some steps need beside their streaming passes: the gradient of the scale, and vectors
// that decide with the batch whether it is enqueued.
//
// - A local row's w (sum_j P_j s_j - s_target) is <q, dq>, offsets included; a banked row's is left
//   by banked_rows(), from the table of expected scores.
// - One thread block adds the rows up, in a fixed order.
#pragma once

#include "reduce.cuh"

namespace contaccum {

// x of all threads, in a fixed order; thread 0 gets it.
__device__ __forceinline__ double sum_threads(double x) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = x;
  __syncthreads();
  for (int half = kThreads / 2; half; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  return sums[0];
}

// After finish_queries. Grid (n).
template <class S>
__global__ void __launch_bounds__(kThreads) local_scale_terms(const Args<S> a) {
  const int64_t at = int64_t(blockIdx.x) * a.d;
  double sum = 0;
  for (int k = threadIdx.x; k < a.d; k += kThreads)
    sum += double(to_acc(a.local_queries[at + k])) * double(a.d_queries[at + k]);
  sum = sum_threads(sum);
  if (threadIdx.x == 0) a.terms[blockIdx.x] = sum;
}

// Last of the terms: banked rows have left theirs, and the ring may have moved on. Grid (1).
template <class S>
__global__ void __launch_bounds__(kThreads) finish_scale(const Args<S> a) {
  const bool refused = a.enqueue && !batch_is_finite(a);
  const double weight = Ring<S>(a, a.position).row_weight();
  double sum = 0;
  for (int i = threadIdx.x; i < a.n + a.row_blocks; i += kThreads)
    sum += (i < a.n ? 1.0 : weight) * a.terms[i];
  sum = sum_threads(sum);
  if (threadIdx.x == 0)
    *a.d_scale = refused ? not_a_number<Acc<S>>() : Acc<S>(sum / double(a.scale));
}

// A batch is enqueued only if its companions are finite too. After finish_queries, which says so of
// the batch itself, by the same numbers. Grid (n).
template <class S>
__global__ void __launch_bounds__(kThreads) check_companions(const Args<S> a) {
  for (int v = threadIdx.x / 32; v < a.companion_count; v += kWarps) {
    const S* x = a.companions + (int64_t(blockIdx.x) * a.companion_count + v) * a.d;
    if (!isfinite(warp_dot(x, x, a.d) * a.scale)) a.not_finite[blockIdx.x] = 1;
  }
}

}  // namespace contaccum
