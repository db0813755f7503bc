// Launches of the kernels for sm_90a.
#pragma once

#include <algorithm>
#include <atomic>

#include "attend_sm90a.cuh"
#include "attend_sm90a.h"
#include "rows_sm90a.cuh"
#include "shared_memory.cuh"

namespace contaccum {

template <class S, bool kQuerySide>
bool describe(const Args<S>& a, HopperMaps& maps) {
  constexpr bool bf16 = std::is_same_v<S, Bf16>;
  const int64_t m = a.m, n = a.n, capacity = a.capacity;
  const S* locals = kQuerySide ? a.local_queries : a.local_passages;
  const S* vectors = kQuerySide ? a.local_passages : a.local_queries;
  const S* bank = kQuerySide ? a.passages : a.queries;
  const int64_t kinds = kQuerySide ? m : 1;
  if (capacity == 0) bank = vectors;  // never read
  const Bf16* offsets = kQuerySide ? a.passage_offsets : a.query_offsets;
  if (offsets != nullptr &&
      !describe_tensor(&maps.offsets, true, offsets, (1 + a.offset_blocks) * kinds, 1, a.d))
    return false;
  return describe_tensor(&maps.locals, bf16, locals, kQuerySide ? n : n * m, 1, a.d) &&
         describe_tensor(&maps.local_vectors, bf16, vectors, n, kinds, a.d) &&
         describe_tensor(&maps.bank, bf16, bank, capacity ? capacity : n, kinds, a.d);
}

// A graph can capture launches that start early from CUDA 12.3 on.
inline bool can_start_early() {
  static const bool can = [] {
    int runtime = 0, driver = 0;
    cudaRuntimeGetVersion(&runtime);
    cudaDriverGetVersion(&driver);
    return std::min(runtime, driver) >= 12030;
  }();
  return can;
}

// Blocks are launched in clusters of kCluster.
template <class S, Side kSide, class T>
struct AttendLaunch {
  static constexpr int kBytes = sizeof(HopperShared<T>);
  static_assert(kBytes <= 227 << 10, "what a block may have");
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};

  AttendLaunch(int splits, int64_t locals, cudaStream_t stream) {
    allow_shared_bytes<attend_sm90a<S, kSide, T>>(kBytes);
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {T::kCluster, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(splits * T::kCluster, unsigned(ceil_div(locals, T::kLocal)));
    config.blockDim = dim3(T::kThreads);
    config.dynamicSmemBytes = kBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = starts_early(kSide) && can_start_early() ? 2 : 1;
  }
};

template <class S, Side kSide, class T>
bool launch_tile_sm90a(const Args<S>& a, int splits, cudaStream_t stream) {
  constexpr bool kQuerySide = is_query_side(kSide);
  HopperMaps maps;
  if (!describe<S, kQuerySide>(a, maps)) return false;
  AttendLaunch<S, kSide, T> launch(splits, kQuerySide ? a.n : a.n * a.m, stream);
  cudaLaunchKernelEx(&launch.config, attend_sm90a<S, kSide, T>, a, maps);
  return true;
}

template <class S, Side kSide>
bool launch_side_sm90a(const Args<S>& a, int splits, cudaStream_t stream) {
  return with_tile_sm90a(a.d, [&](auto tile) {
    return launch_tile_sm90a<S, kSide, decltype(tile)>(a, splits, stream);
  });
}

// Not every number of multiprocessors can be cut into clusters: the driver says how many fit.
template <class S>
int sm90a_clusters_at_once(const CudaStep& step) {
  return with_tile_sm90a(step.layout.d, [&](auto tile) {
    using T = decltype(tile);
    constexpr int kDevices = 64;
    static std::atomic<int> clusters[kDevices];
    int device = 0, found = 0;
    cudaGetDevice(&device);
    if (device < kDevices) found = clusters[device];
    if (found == 0) {
      AttendLaunch<S, Side::passages, T> launch(step.device.multiprocessors, T::kLocal, nullptr);
      const cudaError_t error = cudaOccupancyMaxActiveClusters(
          &found, attend_sm90a<S, Side::passages, T>, &launch.config);
      if (error != cudaSuccess || found < 1)
        found = std::max(1, step.device.multiprocessors / T::kCluster);
      if (device < kDevices) clusters[device] = found;
    }
    return found;
  });
}

template <class S>
bool launch_attend_sm90a(const Args<S>& a, bool queries, int splits, cudaStream_t stream) {
  if (queries)
    return a.use_offsets ? launch_side_sm90a<S, Side::queries_with_offsets>(a, splits, stream)
                         : launch_side_sm90a<S, Side::queries>(a, splits, stream);
  return a.use_offsets ? launch_side_sm90a<S, Side::passages_with_offsets>(a, splits, stream)
                       : launch_side_sm90a<S, Side::passages>(a, splits, stream);
}

template <class S, class T>
void launch_rows_tile(const Args<S>& a, const RowsMaps& maps, cudaStream_t stream) {
  constexpr int bytes = sizeof(RowsShared<T>);
  static_assert(bytes <= 227 << 10, "what a block may have");
  constexpr auto kernel = banked_rows_sm90a<S, T>;
  allow_shared_bytes<kernel>(bytes);
  kernel<<<a.row_blocks, T::kThreads, bytes, stream>>>(a, maps);
}

template <class S>
bool launch_rows_sm90a(const Args<S>& a, cudaStream_t stream) {
  constexpr bool bf16 = std::is_same_v<S, Bf16>;
  const int64_t m = a.m, n = a.n, capacity = a.capacity;
  RowsMaps maps;
  if (!describe_tensor(&maps.rows, bf16, a.queries, capacity, 1, a.d) ||
      !describe_tensor(&maps.local_columns, bf16, a.local_passages, n * m, 1, a.d) ||
      !describe_tensor(&maps.banked_columns, bf16, a.passages, capacity * m, 1, a.d))
    return false;
  if (n * m <= kBoxRows)  // a tile of local columns, a tile for upkeep
    launch_rows_tile<S, HopperRowsTile<2, 6>>(a, maps, stream);
  else
    launch_rows_tile<S, HopperRowsTile<4, 4>>(a, maps, stream);
  return true;
}

}  // namespace contaccum
