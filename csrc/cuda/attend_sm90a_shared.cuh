// What the warpgroups of attend_sm90a.cuh share.
#pragma once

#include "ptx_sm90a.cuh"
#include "slot_walk.cuh"
#include "tile_config.cuh"

namespace contaccum {

// The query side comes twice: what offsets need there would cost registers without them.
enum class Side { queries, queries_with_offsets, passages };

// What the scoring warpgroup tells the summing ones about a buffer of weights.
enum class Order : int { add, rescale_and_add, add_offsets, skip, stop };

// What weighing a tile needs from global memory, asked for before its scores are there: for two
// bank vectors of a thread and 16 local ones.
struct Needed {
  float lse[2];    // passage side
  int64_t id[2];   // query side: of the column; passage side: of the row's positive
  float2 bias[8];  // of the tile's offset, or zero

  // Whether a weight with the offset may be too small to tell the weight without it.
  __device__ __forceinline__ bool is_far() const {
    constexpr float kSafe = 32;
    bool far = false;
#pragma unroll
    for (int j = 0; j < 8; ++j) far |= !(bias[j].x > -kSafe) || !(bias[j].y > -kSafe);
    return far;
  }
};

// Power of two by which weights are larger than they should be: see WeighHopper.
template <class S>
__host__ __device__ constexpr float weight_shift(Side side) {
  return !std::is_same_v<S, F16> ? 0.f : side == Side::passages ? 14.f : 7.f;
}

template <class T>
struct HopperShared {
  char local[T::kOperandBytes];                         // 64 local vectors
  char tile[T::kStages][T::kOperandBytes];              // 64 bank vectors
  char weight[2][T::kWeightBytes];                      // (bank, local)
  float4 partial[T::kCluster == 2 ? 8 : 1][T::kGroup];  // the other block's share of the scores
  float reference[2][T::kLocal];                        // of the loss; of the table
  float shrink[2][T::kLocal];
  float column[4][T::kLocal];     // by warp
  alignas(16) uint16_t ones[64];  // in the bank's dtype
  int64_t local_id[T::kLocal];
  SlotTile slots[T::kStages];  // what `tile` holds; no slots behind the last
  Order order[2];
  uint64_t locals_ready, full[T::kStages], empty[T::kStages], weights_full[2], weights_empty[2];
  uint64_t partial_full, partial_empty;
};

struct HopperMaps {
  CUtensorMap locals, local_vectors, bank, offsets;
};

}  // namespace contaccum
