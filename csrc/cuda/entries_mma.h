// How the rows that get table entries are cut for tensor cores, and the launch of entries_mma.cuh,
// compiled apart.
#pragma once

#include "attend_mma.h"
#include "tile_config.cuh"

namespace contaccum {

using WideEntries = EntriesTile<128, 128, 3>;
using NarrowEntries = EntriesTile<128, 64, 3>;  // where shared memory is too small for the former
using SmallEntries = EntriesTile<32, 32, 8>;

// Columns of a tile, for `rows` rows that meet `columns` columns. A large tile takes some eight
// microseconds, sixteen small ones almost twice that, so large ones pay where they reach two
// processors of three.
inline int entry_columns(const CudaDevice& device, int64_t rows, int64_t columns) {
  const double tiles = double(rows) * double(columns) / (128 * 128);
  if (3 * tiles < 2 * device.multiprocessors) return SmallEntries::kColumns;
  return WideEntries::kSharedBytes <= device.shared_bytes ? WideEntries::kColumns
                                                          : NarrowEntries::kColumns;
}

// Columns that a thread block scores at once for the table; 0 without tensor cores.
template <class S>
int64_t columns_of_entries(const CudaStep& step, int64_t rows, int64_t slots) {
  return takes_entries_mma<S>(step) ? entry_columns(step.device, rows, slots * step.layout.m) : 0;
}
template <class S>
int64_t columns_of_batch(const CudaStep& step) {  // blocks that it touches are mostly head's
  return columns_of_entries<S>(step, step.batch.n, 2 * step.layout.block);
}

enum class Entries;

// What a launch covers besides Args.
struct EntryLaunch {
  Entries which;
  int first_row;
  int64_t rows;     // at most
  int64_t blocks;   // besides head's and the next
  int64_t columns;  // of a tile: entry_columns()
};

inline dim3 entries_grid(int strips, const EntryLaunch& launch, int rows_at_once) {
  return dim3(ceil_div(launch.rows, rows_at_once), strips, 2 + launch.blocks);
}

template <class S>
void launch_entries_mma(const Args<S>& a, const EntryLaunch& launch, cudaStream_t stream);

}  // namespace contaccum
