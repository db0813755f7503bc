// When tensor cores are used, and the launch of attend_mma.cuh, compiled apart.
#pragma once

#include "args.cuh"
#include "launch.h"

namespace contaccum {

inline int64_t ceil_div(int64_t x, int64_t unit) { return (x + unit - 1) / unit; }

constexpr int64_t kMmaBankTile = 32;  // MmaTile::kBank, for those who do not see the kernels

bool kernels_allowed(KernelFamily family);

// Local vectors of a thread block, in eights.
inline int mma_n_tiles(int64_t d, int64_t locals) {
  const int most = d <= 768 ? 4 : 2;
  return locals <= 8 ? 1 : locals <= 16 ? 2 : most;
}

// For the kernels of the table's entries, which stream d, that is all.
template <class S>
bool takes_entries_mma(const CudaStep& step) {
  if (sizeof(S) != 2 || step.layout.d % 8 != 0) return false;
  if (step.device.compute_capability < 80 || !kernels_allowed(kTensorCoreKernels)) return false;
  const void* used[] = {step.batch.queries, step.batch.passages, step.state.queries,
                        step.state.passages};
  for (const void* p : used)
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  return true;
}

template <class S>
bool takes_tensor_cores(const CudaStep& step) {
  return takes_entries_mma<S>(step) && step.layout.d <= 1024;
}

constexpr int kRowsMma = 128, kFewRowsMma = 32;  // RowsTile::kRows
constexpr int kFewRowsAtOnce = 2;                // thread blocks of FewRows that a processor holds

// A small bank and a small batch: latency decides. Small tiles then reach more processors, as many
// as these hold at once, and more columns than two such tiles are better taken at once.
template <class S>
bool takes_few_rows_mma(const CudaStep& step) {
  const Layout& y = step.layout;
  return takes_tensor_cores<S>(step) && y.offset_block >= 32 && step.batch.n * y.m <= 64 &&
         ceil_div(y.capacity, kFewRowsMma) <= kFewRowsAtOnce * step.device.multiprocessors;
}

// Thread blocks for the same few rows: local columns and upkeep apart where all are at work at
// once.
template <class S>
int few_rows_parts(const CudaStep& step, const Args<S>& a) {
  return a.incremental && 2 * a.row_blocks <= kFewRowsAtOnce * step.device.multiprocessors ? 2 : 1;
}

// Below this many slots, thread blocks of 128 rows leave most of a large device idle.
template <class S>
bool takes_rows_mma(const CudaStep& step) {
  return takes_few_rows_mma<S>(step) ||
         (takes_tensor_cores<S>(step) && step.layout.capacity >= 4096 &&
          step.layout.offset_block >= 32);
}

// With few rows the entries of a small batch may share the launch: few_rows_mma().
struct EntryLaunch;
template <class S>
void launch_rows_mma(const Args<S>& a, const CudaStep& step, const EntryLaunch* entries,
                     cudaStream_t stream);

template <class S>
void launch_attend_mma(const Args<S>& a, const CudaDevice& device, bool queries, int splits,
                       cudaStream_t stream);

}  // namespace contaccum
