// Log-sum-exps of the table's groups among a tile of columns, for rows_sm90a.cuh: a thread has two
// rows and 16 of the columns, which four lanes share.
#pragma once

#include "rows_sm90a_shared.cuh"

namespace contaccum {

template <class S>
struct TileGroups {
  const Args<S>& a;
  const int (&slot)[2];  // of the rows
  const bool (&valid)[2];
  const int lane;

  __device__ __forceinline__ void keep(const ColumnTile& t, const float (&s)[32]) {
    switch (a.group * a.m / 8) {
      case 1:
        return keep_of<1>(t, s);
      case 2:
        return keep_of<2>(t, s);
      case 4:
        return keep_of<4>(t, s);
      default:
        return keep_of<8>(t, s);
    }
  }

 private:
  // Of G groups, lanes that differ in `bit` keep one half each, with the sums of both; of one, all.
  template <int G, int kGroups>
  __device__ __forceinline__ void share_out(int bit, float (&top)[2][kGroups],
                                            float (&sum)[2][kGroups]) const {
    const bool upper = lane & bit;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (G == 1) {
        sum[h][0] += __shfl_xor_sync(0xffffffffu, sum[h][0], bit);
      } else {
#pragma unroll
        for (int k = 0; k < G / 2; ++k) {
          const float theirs = upper ? sum[h][k] : sum[h][k + G / 2];
          sum[h][k] = upper ? sum[h][k + G / 2] : sum[h][k];
          sum[h][k] += __shfl_xor_sync(0xffffffffu, theirs, bit);
          top[h][k] = upper ? top[h][k + G / 2] : top[h][k];
        }
      }
    }
  }
  // The tile's groups, each a log-sum-exp of its own, into the table. N: columns of a group / 8.
  // All at once, as each is a chain of shuffles.
  template <int N>
  __device__ __forceinline__ void keep_of(const ColumnTile& t, const float (&s)[32]) {
    constexpr int G = 8 / N, kHalf = G > 1 ? G / 2 : 1, kQuarter = kHalf > 1 ? kHalf / 2 : 1;
    float top[2][G], sum[2][G] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int k = 0; k < G; ++k) {
        top[h][k] = -1e30f;  // -inf minus -inf would be NaN
#pragma unroll
        for (int j = k * N; j < (k + 1) * N; ++j)
          top[h][k] = fmaxf(top[h][k], fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
      }
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int k = 0; k < G; ++k)
          top[h][k] = fmaxf(top[h][k], __shfl_xor_sync(0xffffffffu, top[h][k], bit));
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        sum[h][j / N] +=
            exp2_(s[4 * j + 2 * h] - top[h][j / N]) + exp2_(s[4 * j + 2 * h + 1] - top[h][j / N]);
    share_out<G>(2, top, sum);
    share_out<kHalf>(1, top, sum);
    const int first = (G > 1 && lane & 2 ? G / 2 : 0) + (kHalf > 1 && lane & 1 ? kHalf / 2 : 0);
    const bool stores = (G > 1 || !(lane & 2)) && (kHalf > 1 || !(lane & 1));
#pragma unroll
    for (int k = 0; k < kQuarter; ++k) {
      float* const to = a.group_lse + int64_t(t.group + first + k) * a.capacity;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (stores && valid[h] && first + k < t.count)
          to[slot[h]] = (top[h][k] + log2f(sum[h][k])) * kLn2;
    }
  }
};

}  // namespace contaccum
