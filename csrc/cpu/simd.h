// Vectors of the instruction set that the including file was compiled for, as GCC vector types,
// with exp and log. CONTACCUM_VECTOR_BYTES is 16, 32 or 64. Everything is in an anonymous
// namespace: the same text is compiled for several instruction sets and no two copies may be merged
// by the linker.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace contaccum {
namespace {

constexpr int kBytes = CONTACCUM_VECTOR_BYTES;

typedef float VecF __attribute__((vector_size(kBytes)));
typedef double VecD __attribute__((vector_size(kBytes)));
typedef int32_t VecI __attribute__((vector_size(kBytes)));
typedef int64_t VecL __attribute__((vector_size(kBytes)));
typedef float VecFUnaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef double VecDUnaligned __attribute__((vector_size(kBytes), aligned(8), may_alias));

template <class A>
struct Simd;

template <>
struct Simd<float> {
  using V = VecF;
  using U = VecFUnaligned;
  using I = VecI;
  using Int = int32_t;
  static constexpr int lanes = kBytes / 4;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float round_magic = 12582912.f;   // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int32_t round_bits = 0x4b400000;  // its bit pattern
  static constexpr float exp_floor = -87.f;          // below, exp is taken as 0
  static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  static constexpr int exp_terms = 7, log_terms = 5;
  static constexpr int32_t sqrt_half_bits = 0x3f3504f3;
};

template <>
struct Simd<double> {
  using V = VecD;
  using U = VecDUnaligned;
  using I = VecL;
  using Int = int64_t;
  static constexpr int lanes = kBytes / 8;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double round_magic = 6755399441055744.0;
  static constexpr int64_t round_bits = 0x4338000000000000;
  static constexpr double exp_floor = -708.0;
  static constexpr double ln2_hi = 6.93145751953125e-1, ln2_lo = 1.42860682030941723212e-6;
  static constexpr int exp_terms = 13, log_terms = 11;
  static constexpr int64_t sqrt_half_bits = 0x3fe6a09e667f3bcd;
};

template <class A>
using Vec = typename Simd<A>::V;

template <class A>
inline Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename Simd<A>::U*>(p);
}
template <class A>
inline void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename Simd<A>::U*>(p) = v;
}
template <class A>
inline Vec<A> splat(A x) {
  return x - Vec<A>{};
}
template <class V>
inline V max_(V a, V b) {
  return a > b ? a : b;
}
inline int64_t min_(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Reduce |x - n ln 2| <= ln 2 / 2, Taylor series to exp_terms (relative error below one ulp of A),
// scale by 2^n through the exponent bits. The scores' maximum is subtracted first, so x <= 0 up to
// rounding and overflow cannot happen.
template <class A>
inline Vec<A> exp_(Vec<A> x) {
  using S = Simd<A>;
  using V = Vec<A>;
  const V shifted = x * A(1.44269504088896340736) + S::round_magic;
  const V whole = shifted - S::round_magic;
  const V r = (x - whole * S::ln2_hi) - whole * S::ln2_lo;
  V y = splat<A>(1);
#pragma GCC unroll 16
  for (int k = S::exp_terms; k > 0; --k) y = y * (r * A(1.0 / k)) + A(1);
  const typename S::I exponent = ((typename S::I)shifted - S::round_bits + S::bias) << S::mantissa;
  return x < S::exp_floor ? V{} : y * (V)exponent;
}

// x = 2^e f with f in [sqrt 1/2, sqrt 2); log f = 2 atanh((f - 1) / (f + 1)) by its series.
template <class A>
inline Vec<A> log_(Vec<A> x) {
  using S = Simd<A>;
  using V = Vec<A>;
  using I = typename S::I;
  const I e = ((I)x - S::sqrt_half_bits) >> S::mantissa;
  const V f = (V)((I)x - (e << S::mantissa));
  const V whole = (V)(e + S::round_bits) - S::round_magic;
  const V s = (f - A(1)) / (f + A(1)), s2 = s * s;
  V series = splat<A>(A(1.0 / (2 * S::log_terms + 1)));
#pragma GCC unroll 16
  for (int k = S::log_terms - 1; k >= 0; --k) series = series * s2 + A(1.0 / (2 * k + 1));
  const V y = whole * S::ln2_hi + (A(2) * s * series + whole * S::ln2_lo);
  return x > A(0) ? y : splat<A>(-A(INFINITY));
}

// What a log-sum-exp has besides where the expected score is wanted too (kExpect): sum of
// exp(score - max) * score.
template <class V, bool kExpect>
struct Weighted {};
template <class V>
struct Weighted<V, true> {
  V weighted{};
};

// A log-sum-exp under construction: sum of exp(score - max); max = -inf and sum = 0 when empty.
template <class A, bool kExpect = false>
struct Lse : Weighted<Vec<A>, kExpect> {
  Vec<A> max = splat<A>(-A(INFINITY)), sum = Vec<A>{};

  void add(const Lse& other) {
    // The larger maximum keeps its sum, the other's shrinks; -inf - -inf must not be taken.
    const auto mine = max >= other.max;
    const Vec<A> high = mine ? max : other.max, low = mine ? other.max : max;
    const Vec<A> shrink = low > -A(INFINITY) ? exp_<A>(low - high) : Vec<A>{};
    sum = mine ? sum + other.sum * shrink : sum * shrink + other.sum;
    if constexpr (kExpect)
      this->weighted = mine ? this->weighted + other.weighted * shrink
                            : this->weighted * shrink + other.weighted;
    max = high;
  }
  Vec<A> value() const { return max + log_<A>(sum); }
  Vec<A> expected() const { return sum > A(0) ? this->weighted / sum : Vec<A>{}; }
};

// The same for one row.
template <class A, bool kExpect = false>
struct ScalarLse : Weighted<A, kExpect> {
  A max = -A(INFINITY), sum = 0;

  void add(const ScalarLse& other) {
    if (!(other.max > -A(INFINITY))) return;
    const A both = max > other.max ? max : other.max;
    const A mine = max > -A(INFINITY) ? std::exp(max - both) : A(0);
    const A theirs = std::exp(other.max - both);
    sum = sum * mine + other.sum * theirs;
    if constexpr (kExpect) this->weighted = this->weighted * mine + other.weighted * theirs;
    max = both;
  }
  A value() const { return sum > 0 ? max + std::log(sum) : -A(INFINITY); }
  A expected() const { return sum > 0 ? this->weighted / sum : A(0); }
};

}  // namespace
}  // namespace contaccum
