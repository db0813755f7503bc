// Gradients of the columns less their mean, spread over the batches of an update; see
// contaccum_ext/reference.py for the meaning.
//
// - One launch. A warp's threads take neighbouring columns, a thread block's warps every 32nd row.
// - Rows are added in a fixed order. They are read twice; the second time from a cache.
// - Each column counts batches for itself: no thread block waits for another.
#include <cuda_runtime.h>

#include "launch.h"

namespace contaccum {
namespace {

constexpr int kColumns = 32;  // of a thread block; one is one element of d
constexpr int kRows = 32;     // warps of a thread block

template <class A>
__global__ void __launch_bounds__(kColumns* kRows) center_gradients(const Centering c) {
  __shared__ A sums[kRows][kColumns];
  const int64_t column = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  const bool inside = column < c.d;
  A* const gradients = static_cast<A*>(c.gradients) + column;
  A* const left = static_cast<A*>(c.state) + column;
  A* const batches = left + c.d;
  // Before the barrier: what all threads of a column read, one of them writes behind it.
  A total = inside ? *left : A(0);
  const A counted = inside ? *batches : A(0);
  A sum = 0;
  if (inside)
    for (int64_t row = threadIdx.y; row < c.rows; row += kRows) sum += gradients[row * c.d];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRows; ++i) total += sums[i][threadIdx.x];
  if (!inside || !isfinite(total)) return;  // not finite: a refused batch, its gradients are NaN
  const A rest = counted < A(c.over) ? A(c.over) - counted : A(1);  // `over` may have changed
  const A taken = total / rest, mean = taken / A(c.rows);
  for (int64_t row = threadIdx.y; row < c.rows; row += kRows) gradients[row * c.d] -= mean;
  if (threadIdx.y == 0 && c.keep) {
    *left = total - taken;
    *batches = counted + 1 < A(c.over) ? counted + 1 : A(0);
  }
}

}  // namespace

const char* cuda_center(const Centering& centering, void* stream) {
  const dim3 threads(kColumns, kRows);
  const unsigned blocks = unsigned((centering.d + kColumns - 1) / kColumns);
  const auto on = static_cast<cudaStream_t>(stream);
  if (centering.storage == Storage::f64)
    center_gradients<double><<<blocks, threads, 0, on>>>(centering);
  else
    center_gradients<float><<<blocks, threads, 0, on>>>(centering);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace contaccum
