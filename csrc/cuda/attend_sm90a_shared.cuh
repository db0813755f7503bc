// What the warpgroups of attend_sm90a.cuh share.
#pragma once

#include "ptx_sm90a.cuh"
#include "ptx_succession.cuh"
#include "slot_walk.cuh"
#include "tile_config.cuh"

namespace contaccum {

// Each side comes twice: what offsets need would cost registers, and code to jump over, without
// them.
enum class Side { queries, queries_with_offsets, passages, passages_with_offsets };
__host__ __device__ constexpr bool is_query_side(Side side) { return side < Side::passages; }
__host__ __device__ constexpr bool has_offsets(Side side) {
  return side == Side::queries_with_offsets || side == Side::passages_with_offsets;
}

// Whether the kernel may run beside the one before it, prepare_offsets. That one is launched as
// usual: whatever came before it has ended, and can be read without waiting.
__host__ __device__ constexpr bool starts_early(Side side) {
  return side == Side::queries_with_offsets;
}

// What the scoring warpgroup tells the summing ones about a buffer of weights.
enum class Order : int { add, rescale_and_add, add_offsets, skip, stop };

// What weighing a tile needs from global memory, asked for before its scores are there: for two
// bank vectors of a thread.
struct Needed {
  float lse[2];   // passage side
  int64_t id[2];  // query side: of the column; passage side: of the row's positive
  float bias;     // of the tile's offset, where the one before has another: by the first threads
};

// Power of two by which weights are larger than they should be: see WeighHopper.
template <class S>
__host__ __device__ constexpr float weight_shift(Side side) {
  return !std::is_same_v<S, F16> ? 0.f : is_query_side(side) ? 7.f : 14.f;
}

template <class T>
struct HopperShared {
  char local[T::kOperandBytes];                         // 64 local vectors
  char tile[T::kStages][T::kOperandBytes];              // 64 bank vectors
  char weight[2][T::kWeightBytes];                      // (bank, local)
  float4 partial[T::kCluster == 2 ? 8 : 1][T::kGroup];  // the other block's share of the scores
  // Of the loss, less the bias of the tile's offset; of the table. Passage side: the bias.
  float reference[2][T::kLocal];
  float shrink[2][T::kLocal];
  float column[4][T::kLocal];  // by warp
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
