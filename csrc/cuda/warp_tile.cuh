// Inner products by one warp: kTileRows bank vectors with kLocals local ones, lanes along d.
#pragma once

#include "args.cuh"

namespace contaccum {

// The lane's place in a warp's tile: lane = tile row * kLocals + local.
template <class A>
__device__ __forceinline__ int lane_local() {
  return threadIdx.x % kLocals<A>;
}
template <class A>
__device__ __forceinline__ int lane_row() {
  return threadIdx.x % 32 / kLocals<A>;
}

// Of 2 * kWidth values in each lane, a lane gets the sum over lanes of one, the one whose index are
// its low bits: each exchange halves what a lane still has to do, 31 shuffles for 32 values where
// 32 sums would take 160. Recursive, so that every index is a constant and v stays in registers.
template <int kWidth, class A>
__device__ __forceinline__ A sum_across(A (&v)[32]) {
  const bool upper = threadIdx.x & kWidth;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const A give = upper ? v[i] : v[i + kWidth];
    const A keep = upper ? v[i + kWidth] : v[i];
    v[i] = keep + __shfl_xor_sync(0xffffffffu, give, kWidth);
  }
  if constexpr (kWidth == 1)
    return v[0];
  else
    return sum_across<kWidth / 2>(v);
}

// The lane's inner product, of its bank row and its local vector; those beyond `last_local` are
// replaced by it. V elements are read at once; d is a multiple of V.
template <int V, class S>
__device__ __forceinline__ Acc<S> warp_scores(const S* const (&row)[kTileRows<Acc<S>>],
                                              const S* locals, int first_local, int last_local,
                                              int d) {
  using A = Acc<S>;
  constexpr int T = kTileRows<A>, L = kLocals<A>;
  const S* local[L];
#pragma unroll
  for (int l = 0; l < L; ++l) local[l] = locals + int64_t(min(first_local + l, last_local)) * d;
  A sum[32] = {};
  for (int k = threadIdx.x % 32 * V; k < d; k += 32 * V) {
    A x[T][V];
#pragma unroll
    for (int t = 0; t < T; ++t) load<V>(row[t] + k, x[t]);
#pragma unroll
    for (int l = 0; l < L; ++l) {
      A y[V];
      load<V>(local[l] + k, y);
#pragma unroll
      for (int t = 0; t < T; ++t)
#pragma unroll
        for (int i = 0; i < V; ++i) sum[t * L + l] += x[t][i] * y[i];
    }
  }
  return sum_across<16>(sum);
}

// Addresses of kTileRows rows from row `first` on; those beyond `last` are replaced by it.
template <class S>
__device__ __forceinline__ void rows_from(const S* rows, int first, int last, int d,
                                          const S* (&row)[kTileRows<Acc<S>>]) {
#pragma unroll
  for (int t = 0; t < kTileRows<Acc<S>>; ++t) row[t] = rows + int64_t(min(first + t, last)) * d;
}

// Inner product of the offset now - then (vectors of means) with the lane's local vector; the
// result is the same in all lanes of one local.
template <class S>
__device__ __forceinline__ Acc<S> warp_bias(const Acc<S>* now, const Acc<S>* then, const S* locals,
                                            int first_local, int last_local, int d) {
  using A = Acc<S>;
  constexpr int L = kLocals<A>;
  A sum[L] = {};
  for (int k = threadIdx.x % 32; k < d; k += 32) {
    const A offset = now[k] - then[k];
#pragma unroll
    for (int l = 0; l < L; ++l)
      sum[l] += offset * to_acc(locals[int64_t(min(first_local + l, last_local)) * d + k]);
  }
  A mine = 0;
#pragma unroll
  for (int l = 0; l < L; ++l) {
    A total = sum[l];
#pragma unroll
    for (int bit = 16; bit; bit /= 2) total += __shfl_xor_sync(0xffffffffu, total, bit);
    if (lane_local<A>() == l) mine = total;
  }
  return mine;
}

}  // namespace contaccum
