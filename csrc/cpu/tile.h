// The two matrix products of the op on one tile of bank rows, and loading such a tile.
//
// A tile is a few dozen vectors of the bank, converted to acc and padded to whole SIMD vectors
// (leading dimension ld), small enough to stay in the first two cache levels between both products.
#pragma once

#include "../params.h"
#include "simd.h"

namespace contaccum {
namespace {

// Scratch memory of acc values, aligned to a cache line, uninitialised.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : raw_(new char[count * sizeof(A) + 64]),
        data_(reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(raw_) + 63) / 64 * 64)) {}
  ~Buffer() { delete[] raw_; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator A*() const { return data_; }

 private:
  char* raw_;
  A* data_;
};

inline float to_acc(float x) { return x; }
inline double to_acc(double x) { return x; }

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_acc(Bf16 x) { return from_bits(uint32_t(x.bits) << 16); }
inline float to_acc(F16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Shifting the half's fields into a float's leaves the exponent 112 too small; the product also
  // normalises subnormal halves. Infinity and NaN get the float's largest exponent.
  const float y = from_bits(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  uint32_t bits;
  std::memcpy(&bits, &y, 4);
  return from_bits(bits | special | (uint32_t(x.bits & 0x8000u) << 16));
}

// Convert `rows` vectors of length d to acc, each padded with zeros to ld.
template <class A, class S>
inline void convert_rows(const S* from, int64_t rows, int64_t d, A* to, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < d; ++k) to[r * ld + k] = to_acc(from[r * d + k]);
    for (int64_t k = d; k < ld; ++k) to[r * ld + k] = 0;
  }
}

// Sum the lanes of four vectors; the four results land in out[0..3].
template <class A>
inline void sum_lanes4(const Vec<A>* v, A scale, A* out) {
  for (int i = 0; i < 4; ++i) {
    A s = 0;
    for (int l = 0; l < Simd<A>::lanes; ++l) s += v[i][l];
    out[i] = s * scale;
  }
}

#if !defined(__clang__)
// Interleave so that each addition halves four vectors at once: with 16 lanes 13 operations instead
// of 32, with 8 nine instead of 28.
#if CONTACCUM_VECTOR_BYTES == 64
template <>
inline void sum_lanes4<float>(const VecF* v, float scale, float* out) {
  const VecI even = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
  const VecI odd = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
  const VecF a = __builtin_shuffle(v[0], v[1], even) + __builtin_shuffle(v[0], v[1], odd);
  const VecF b = __builtin_shuffle(v[2], v[3], even) + __builtin_shuffle(v[2], v[3], odd);
  const VecI low = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  const VecI high = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
  VecF c = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  const VecI half = {8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7};
  const VecI quarter = {4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15};
  c += __builtin_shuffle(c, half);
  c += __builtin_shuffle(c, quarter);
  for (int i = 0; i < 4; ++i) out[i] = c[i] * scale;
}
#elif CONTACCUM_VECTOR_BYTES == 32
template <>
inline void sum_lanes4<float>(const VecF* v, float scale, float* out) {
  const VecI even = {0, 8, 2, 10, 4, 12, 6, 14}, odd = {1, 9, 3, 11, 5, 13, 7, 15};
  const VecF a = __builtin_shuffle(v[0], v[1], even) + __builtin_shuffle(v[0], v[1], odd);
  const VecF b = __builtin_shuffle(v[2], v[3], even) + __builtin_shuffle(v[2], v[3], odd);
  const VecI low = {0, 1, 8, 9, 4, 5, 12, 13}, high = {2, 3, 10, 11, 6, 7, 14, 15};
  VecF c = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  const VecI half = {4, 5, 6, 7, 0, 1, 2, 3};
  c += __builtin_shuffle(c, half);
  for (int i = 0; i < 4; ++i) out[i] = c[i] * scale;
}
#endif
#endif

// 4 x kLocals accumulators plus operands must fit the register file: 32 registers, else 16.
constexpr int kScoreLocals = kBytes == 64 ? 4 : 3;
constexpr int kSumLocals = kBytes == 64 ? 8 : 4;

// Rows ahead of the one in use that are asked for early: the hardware follows one stream well, not
// four rows read in turn. Measured at 32,768 slots of 384 floats: 14.4 ms without, 9.1 ms with 8.
constexpr int kPrefetchRows = 8;

template <class A, int NL, bool kPrefetch>
inline void score_4(const A* const x[4], const A* local, int64_t ld, A scale, A* out, int64_t ldo) {
  Vec<A> sum[NL][4] = {};
  for (int64_t k = 0; k < ld; k += Simd<A>::lanes) {
    Vec<A> lk[NL];
#pragma GCC unroll 4
    for (int l = 0; l < NL; ++l) lk[l] = load(local + l * ld + k);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec<A> xk = load(x[i] + k);
      if (kPrefetch) __builtin_prefetch(x[i] + kPrefetchRows * ld + k);
#pragma GCC unroll 4
      for (int l = 0; l < NL; ++l) sum[l][i] += lk[l] * xk;
    }
  }
  for (int l = 0; l < NL; ++l) sum_lanes4<A>(sum[l], scale, out + l * ldo);
}

// out[l, r] = scale * <local_l, x_r> for r < rows; out has room for rows rounded up to 4.
template <class A>
void score_tile(const A* x, int64_t rows, const A* local, int64_t locals, int64_t ld, A scale,
                A* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; r += 4) {
    const A* xr[4];
    for (int i = 0; i < 4; ++i) xr[i] = x + min_(r + i, rows - 1) * ld;
    const auto next = [&]<int NL>(int64_t l) {
      const A* some = local + l * ld;
      if (l == 0)
        score_4<A, NL, true>(xr, some, ld, scale, out + r, ldo);
      else
        score_4<A, NL, false>(xr, some, ld, scale, out + l * ldo + r, ldo);
      return l + NL;
    };
    for (int64_t l = 0; l < locals;) {
      const int64_t left = locals - l;
      const bool two_and_two = kScoreLocals == 3 && left == 4;  // faster than three and one
      if (left >= kScoreLocals && !two_and_two)
        l = next.template operator()<kScoreLocals>(l);
      else
        l = left >= 2 ? next.template operator()<2>(l) : next.template operator()<1>(l);
    }
  }
}

template <class A, int NL, int NV>
inline void weighted_sum_block(const A* p, int64_t ldp, int64_t rows, const A* x, int64_t ld,
                               A* sum) {
  constexpr int lanes = Simd<A>::lanes;
  Vec<A> acc[NL][NV];
#pragma GCC unroll 8
  for (int l = 0; l < NL; ++l)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[l][v] = load(sum + l * ld + v * lanes);
  for (int64_t r = 0; r < rows; ++r) {
    Vec<A> xr[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) xr[v] = load(x + r * ld + v * lanes);
#pragma GCC unroll 8
    for (int l = 0; l < NL; ++l) {
      const Vec<A> weight = splat<A>(p[l * ldp + r]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[l][v] += weight * xr[v];
    }
  }
#pragma GCC unroll 8
  for (int l = 0; l < NL; ++l)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(sum + l * ld + v * lanes, acc[l][v]);
}

template <class A, int NL>
inline void weighted_sum_rows(const A* p, int64_t ldp, int64_t rows, const A* x, int64_t ld,
                              A* sum) {
  constexpr int lanes = Simd<A>::lanes, wide = kBytes == 64 ? 3 : 2;
  int64_t k = 0;
  for (; k + wide * lanes <= ld; k += wide * lanes)
    weighted_sum_block<A, NL, wide>(p, ldp, rows, x + k, ld, sum + k);
  for (; k < ld; k += lanes) weighted_sum_block<A, NL, 1>(p, ldp, rows, x + k, ld, sum + k);
}

// sum[l, :] += sum over r < rows of p[l, r] * x[r, :]
template <class A>
void weighted_sum(const A* p, int64_t ldp, int64_t locals, int64_t rows, const A* x, int64_t ld,
                  A* sum) {
  int64_t l = 0;
  for (; l + kSumLocals <= locals; l += kSumLocals)
    weighted_sum_rows<A, kSumLocals>(p + l * ldp, ldp, rows, x, ld, sum + l * ld);
  for (; l < locals; ++l) weighted_sum_rows<A, 1>(p + l * ldp, ldp, rows, x, ld, sum + l * ld);
}

}  // namespace
}  // namespace contaccum
