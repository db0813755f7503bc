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

// What a log-sum-exp has besides where the expected score is wanted too (kExpect): sum of
// exp(score - max) * score.
template <class A, bool kExpect>
struct Weighted {};
template <class A>
struct Weighted<A, true> {
  A weighted = 0;
};

// Sum of exp(score - max); max = -inf and sum = 0 when empty. A NaN score makes the sum NaN: it
// must reach the loss.
template <class A, bool kExpect = false>
struct Lse : Weighted<A, kExpect> {
  A max = minus_infinity<A>(), sum = 0;

  __device__ __forceinline__ void add_score(A s) {
    if (s > max) {
      if constexpr (kExpect) this->weighted = this->weighted * exp_(max - s) + s;
      sum = sum * exp_(max - s) + A(1);
      max = s;
    } else if (!(s == minus_infinity<A>())) {  // -inf minus -inf would be NaN
      if constexpr (kExpect) this->weighted += exp_(s - max) * s;
      sum += exp_(s - max);
    }
  }
  __device__ __forceinline__ void add(A other_max, A other_sum) {
    if (other_sum == A(0)) return;
    const A both = max > other_max ? max : other_max;
    sum = (sum == A(0) ? A(0) : sum * exp_(max - both)) + other_sum * exp_(other_max - both);
    max = both;
  }
  __device__ __forceinline__ void add(const Lse& other) {
    if constexpr (kExpect) {
      if (other.sum == A(0)) return;
      const A both = max > other.max ? max : other.max;
      const A mine = sum == A(0) ? A(0) : exp_(max - both), theirs = exp_(other.max - both);
      sum = sum * mine + other.sum * theirs;
      this->weighted = this->weighted * mine + other.weighted * theirs;
      max = both;
    } else {
      add(other.max, other.sum);
    }
  }
  __device__ __forceinline__ void add_lse(A lse) {
    add(lse, lse == minus_infinity<A>() ? A(0) : A(1));
  }
  // An entry of the table.
  __device__ __forceinline__ void add_entry(A lse, A expected) {
    if constexpr (kExpect)
      add(Lse{{expected}, lse, lse == minus_infinity<A>() ? A(0) : A(1)});
    else
      add_lse(lse);
  }
  __device__ __forceinline__ A value() const {
    return sum == A(0) ? minus_infinity<A>() : max + log_(sum);
  }
  __device__ __forceinline__ A expected() const {
    if constexpr (kExpect)
      return sum == A(0) ? A(0) : this->weighted / sum;
    else
      return A(0);
  }

  // Merge over lanes that differ in the bits below `width` (a power of two); all get the result.
  __device__ __forceinline__ void merge_lanes(int width) {
    for (int bit = 1; bit < width; bit *= 2)
      add(exchange([&](A x) { return __shfl_xor_sync(0xffffffffu, x, bit); }));
  }
  // What `shuffle` makes of each member.
  template <class Shuffle>
  __device__ __forceinline__ Lse exchange(const Shuffle& shuffle) const {
    Lse other;
    other.max = shuffle(max);
    other.sum = shuffle(sum);
    if constexpr (kExpect) other.weighted = shuffle(this->weighted);
    return other;
  }
};

// Where entries of the table are: log-sum-exps and, with kExpect, expected scores.
template <class A>
struct EntryPointers {
  A* lse;
  A* expected;

  __device__ __forceinline__ EntryPointers operator+(int64_t by) const {
    return {lse + by, expected + by};
  }
};

template <class A, bool kExpect>
__device__ __forceinline__ void store_entry(const EntryPointers<A>& to, int64_t at,
                                            const Lse<A, kExpect>& lse) {
  to.lse[at] = lse.value();
  if constexpr (kExpect) to.expected[at] = lse.expected();
}
template <class A, bool kExpect>
__device__ __forceinline__ void add_stored(Lse<A, kExpect>& lse, const EntryPointers<A>& from,
                                           int64_t at) {
  lse.add_entry(from.lse[at], kExpect ? from.expected[at] : A(0));
}

// Add an entry with no branch, so that neither loads nor exponentials wait for the sum before them.
template <class A, bool kExpect>
__device__ __forceinline__ void add_entry(Lse<A, kExpect>& lse, A entry, A expected = A(0)) {
  const A top = entry > lse.max ? entry : lse.max;
  const A from = top == minus_infinity<A>() ? A(0) : top;  // -inf minus -inf would be NaN
  if constexpr (kExpect)
    lse.weighted = lse.weighted * exp_(lse.max - from) + exp_(entry - from) * expected;
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
