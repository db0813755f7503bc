// Launches of the tensor-core kernels.
#pragma once

#include <algorithm>

#include "attend_mma.cuh"
#include "attend_mma.h"
#include "entries_mma.cuh"
#include "entries_mma.h"
#include "rows_mma.cuh"
#include "shared_memory.cuh"

namespace contaccum {

template <class S, bool kQuerySide, int MT, int NT>
void launch_tile(const Args<S>& a, const CudaDevice& device, int splits, cudaStream_t stream) {
  using Tile = MmaTile<MT, NT>;
  static_assert(Tile::kBank == kMmaBankTile, "the split of the work counts tiles");
  const int room = (device.shared_bytes - Tile::kSharedBytes) / Tile::kStageBytes;
  const int stages = std::max(1, std::min(room, kMaxStages));
  const int bytes = Tile::kSharedBytes + stages * Tile::kStageBytes;
  constexpr auto kernel = attend_mma<S, kQuerySide, MT, NT>;
  allow_shared_bytes<kernel>(bytes);
  const int locals = kQuerySide ? a.n : a.n * a.m;
  kernel<<<dim3(splits, ceil_div(locals, Tile::kLocal)), kThreads, bytes, stream>>>(a, stages);
}

template <class S, bool kQuerySide, int MT>
void launch_slices(const Args<S>& a, const CudaDevice& device, int splits, cudaStream_t stream) {
  switch (mma_n_tiles(a.d, kQuerySide ? a.n : a.n * a.m)) {
    case 1:
      return launch_tile<S, kQuerySide, MT, 1>(a, device, splits, stream);
    case 2:
      return launch_tile<S, kQuerySide, MT, 2>(a, device, splits, stream);
    default:
      if constexpr (MT <= 6) launch_tile<S, kQuerySide, MT, 4>(a, device, splits, stream);
  }
}

template <class S, bool kQuerySide>
void launch_side(const Args<S>& a, const CudaDevice& device, int splits, cudaStream_t stream) {
  if (a.d <= 384)
    launch_slices<S, kQuerySide, 3>(a, device, splits, stream);
  else if (a.d <= 768)
    launch_slices<S, kQuerySide, 6>(a, device, splits, stream);
  else
    launch_slices<S, kQuerySide, 8>(a, device, splits, stream);
}

template <class S>
void launch_attend_mma(const Args<S>& a, const CudaDevice& device, bool queries, int splits,
                       cudaStream_t stream) {
  if (queries)
    launch_side<S, true>(a, device, splits, stream);
  else
    launch_side<S, false>(a, device, splits, stream);
}

template <class S, class Tile>
void launch_rows(const Args<S>& a, int parts, cudaStream_t stream) {
  static_assert(Tile::kMinOffsetBlock == 32, "takes_rows_mma() says so");
  constexpr int bytes = sizeof(typename BankedRowsMma<S, Tile>::Shared);
  constexpr auto kernel = banked_rows_mma<S, Tile>;
  allow_shared_bytes<kernel>(bytes);
  kernel<<<dim3(a.row_blocks, parts), kThreads, bytes, stream>>>(a);
}

template <class S>
void launch_few_rows(const Args<S>& a, int parts, const EntryLaunch& entries, cudaStream_t stream) {
  constexpr int bytes =
      std::max<int>(sizeof(typename BankedRowsMma<S, FewRows>::Shared), SmallEntries::kSharedBytes);
  const dim3 grid = entries_grid(a.strips, entries, SmallEntries::kRows);
  constexpr auto kernel = few_rows_mma<S>;
  allow_shared_bytes<kernel>(bytes);
  kernel<<<a.row_blocks * parts + grid.x * grid.y * grid.z, kThreads, bytes, stream>>>(a, parts,
                                                                                       grid);
}

template <class S>
void launch_rows_mma(const Args<S>& a, const CudaStep& step, const EntryLaunch* entries,
                     cudaStream_t stream) {
  static_assert(
      FewRows::kRows == kFewRowsMma && NarrowRows::kRows == kRowsMma && WideRows::kRows == kRowsMma,
      "row_blocks() counts them");
  if (takes_few_rows_mma<S>(step)) {
    const int parts = few_rows_parts(step, a);
    if (entries != nullptr) return launch_few_rows<S>(a, parts, *entries, stream);
    return launch_rows<S, FewRows>(a, parts, stream);
  }
  // 128 columns do not fit the shared memory of the smaller chips.
  const bool wide = a.n * a.m > 64 && sizeof(typename BankedRowsMma<S, WideRows>::Shared) <=
                                          size_t(step.device.shared_bytes);
  if (wide)
    launch_rows<S, WideRows>(a, 1, stream);
  else
    launch_rows<S, NarrowRows>(a, 1, stream);
}

template <class S, class Tile, bool kExpect>
void launch_entries(const Args<S>& a, const EntryLaunch& launch, cudaStream_t stream) {
  static_assert(sizeof(typename ScoreEntries<S, Tile, kExpect>::Shared) == Tile::kSharedBytes,
                "entry_columns() counts what the kernel needs");
  constexpr auto kernel = score_entries_mma<S, Tile, kExpect>;
  allow_shared_bytes<kernel>(Tile::kSharedBytes);
  const dim3 grid = entries_grid(a.strips, launch, Tile::kRows);
  kernel<<<grid, kThreads, Tile::kSharedBytes, stream>>>(a, launch.which, launch.first_row);
}

template <class S, bool kExpect>
void launch_entries_by_size(const Args<S>& a, const EntryLaunch& launch, cudaStream_t stream) {
  if (launch.columns == SmallEntries::kColumns)
    launch_entries<S, SmallEntries, kExpect>(a, launch, stream);
  else if (launch.columns == NarrowEntries::kColumns)
    launch_entries<S, NarrowEntries, kExpect>(a, launch, stream);
  else
    launch_entries<S, WideEntries, kExpect>(a, launch, stream);
}

template <class S>
void launch_entries_mma(const Args<S>& a, const EntryLaunch& launch, cudaStream_t stream) {
  if (a.expected != nullptr)
    launch_entries_by_size<S, true>(a, launch, stream);
  else
    launch_entries_by_size<S, false>(a, launch, stream);
}

}  // namespace contaccum
