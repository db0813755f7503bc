// A log-sum-exp under construction, and how the lanes of a warp merge theirs.
#pragma once

#include <math_constants.h>

#include "ptx_exp2.cuh"

namespace contaccum {

__device__ __forceinline__ float exp_(float x) { return expf(x); }
__device__ __forceinline__ double exp_(double x) { return exp(x); }
__device__ __forceinline__ float log_(float x) { return logf(x); }
__device__ __forceinline__ double log_(double x) { return log(x); }
__device__ __forceinline__ float expm1_(float x) { return expm1f(x); }
__device__ __forceinline__ double expm1_(double x) { return expm1(x); }

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <class A>
__device__ __forceinline__ A minus_infinity() {
  return -A(CUDART_INF_F);
}

template <class A>
__device__ __forceinline__ A not_a_number() {
  return A(CUDART_NAN_F);
}

// Sum of exp(score - max); max = -inf and sum = 0 when empty. A NaN score makes the sum NaN: it
// must reach the loss.
template <class A>
struct Lse {
  A max = minus_infinity<A>(), sum = 0;

  __device__ __forceinline__ void add_score(A s) {
    if (s > max) {
      sum = sum * exp_(max - s) + A(1);
      max = s;
    } else if (!(s == minus_infinity<A>())) {  // -inf minus -inf would be NaN
      sum += exp_(s - max);
    }
  }
  __device__ __forceinline__ void add(A other_max, A other_sum) {
    if (other_sum == A(0)) return;
    const A both = max > other_max ? max : other_max;
    sum = (sum == A(0) ? A(0) : sum * exp_(max - both)) + other_sum * exp_(other_max - both);
    max = both;
  }
  __device__ __forceinline__ void add(const Lse& other) { add(other.max, other.sum); }
  __device__ __forceinline__ void add_lse(A lse) {
    add(lse, lse == minus_infinity<A>() ? A(0) : A(1));
  }
  __device__ __forceinline__ A value() const {
    return sum == A(0) ? minus_infinity<A>() : max + log_(sum);
  }

  // Merge over lanes that differ in the bits below `width` (a power of two); all get the result.
  __device__ __forceinline__ void merge_lanes(int width) {
    for (int bit = 1; bit < width; bit *= 2) {
      const A other_max = __shfl_xor_sync(0xffffffffu, max, bit);
      const A other_sum = __shfl_xor_sync(0xffffffffu, sum, bit);
      add(other_max, other_sum);
    }
  }
};

// Add an entry with no branch, so that neither loads nor exponentials wait for the sum before them.
template <class A>
__device__ __forceinline__ void add_entry(Lse<A>& lse, A entry) {
  const A top = entry > lse.max ? entry : lse.max;
  const A from = top == minus_infinity<A>() ? A(0) : top;  // -inf minus -inf would be NaN
  lse.sum = lse.sum * exp_(lse.max - from) + exp_(entry - from);
  lse.max = top;
}

template <class A>
__device__ __forceinline__ A warp_max(A x) {
#pragma unroll
  for (int bit = 16; bit; bit /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, x, bit);
    x = other > x ? other : x;
  }
  return x;
}

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int bit = 16; bit; bit /= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
  return x;
}

}  // namespace contaccum
