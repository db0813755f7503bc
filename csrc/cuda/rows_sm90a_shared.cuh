// What the parts of rows_sm90a.cuh share.
#pragma once

#include "column_walk.cuh"
#include "online_softmax.cuh"
#include "ptx_sm90a.cuh"
#include "tile_config.cuh"

namespace contaccum {

struct RowsMaps {
  CUtensorMap rows, local_columns, banked_columns;
};

template <class T>
struct RowsShared {
  char rows[T::kStages][2][T::kBoxBytes];  // first: boxes must be aligned to 1024 bytes
  char columns[T::kStages][T::kTiles][T::kBoxBytes];
  int64_t column_id[2][T::kTiles][kBoxRows];  // by warpgroup
  // Of this round of products, and of the next.
  ColumnTile tile[2][T::kTiles];
  int tiles[2];
  bool last[2];  // of the rows' rounds
  double losses[T::kWarpsScoring];
  uint64_t full[T::kStages], empty[T::kStages];
  uint64_t round_over[2];  // its tiles are no longer read
};

// A log-sum-exp under construction, base 2, of one thread's columns.
struct Lse2 {
  float max = minus_infinity<float>(), sum = 0;
  __device__ __forceinline__ void add(float other_max, float other_sum) {
    const float both = fmaxf(max, other_max);
    const float top = fmaxf(both, -1e30f);  // -inf minus -inf would be NaN
    sum = sum * exp2_(max - top) + other_sum * exp2_(other_max - top);
    max = both;
  }
  // Over the four lanes of a row; all get the result.
  __device__ __forceinline__ void merge_lanes() {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
      const float other_max = __shfl_xor_sync(0xffffffffu, max, bit);
      const float other_sum = __shfl_xor_sync(0xffffffffu, sum, bit);
      add(other_max, other_sum);
    }
  }
  __device__ __forceinline__ Lse<float> natural() const {
    Lse<float> lse;
    lse.max = max * kLn2;
    lse.sum = sum;
    return lse;
  }
};

// The 128 rows of a block into the second cache level.
__device__ __forceinline__ void prefetch_rows(const RowsMaps& maps, int first_row, int slices) {
#pragma unroll 1
  for (int s = 0; s < slices; ++s)
    for (int h = 0; h < 2; ++h)
      prefetch_box(&maps.rows, s * kBoxColumns, 0, first_row + h * kBoxRows);
}

}  // namespace contaccum
