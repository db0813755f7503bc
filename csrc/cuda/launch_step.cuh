// One step for one storage type: how the work is split, where its scratch memory lies, and the
// kernels in order. Everything here depends on shapes, options and the device, never on data, so
// that a captured graph may be replayed.
#pragma once

#include <algorithm>

#include "arena.h"
#include "attend.cuh"
#include "attend_mma.h"
#include "attend_sm90a.h"
#include "entries.cuh"
#include "entries_mma.h"
#include "launch.h"
#include "library.h"
#include "offsets.cuh"
#include "reduce.cuh"
#include "rows.cuh"
#include "scale_grad.cuh"

namespace contaccum {

constexpr int64_t kPartialBytes = 14 << 20;  // of the sums of all splits, if more than one
constexpr int64_t kUnitBytes = 1 << 20;      // of unit_lse where finer units are worth it
constexpr int64_t kEntryBytes = 2 << 20;     // of strip_part, and of the rows of a rebuild
constexpr int64_t kMaxStrips = 1 << 15;      // of a block: a dimension of a grid
constexpr int kBlocksPerProcessor = 2;       // thread blocks of a streaming kernel that fit at once

// How one streaming pass is cut.
struct Cut {
  int64_t locals;  // local vectors of a thread block
  int64_t tile;    // bank vectors that it reads at once
  int64_t blocks;  // thread blocks that fit the device at once
};

template <class S>
Cut cut_for(const CudaStep& step, int64_t locals) {
  if (takes_sm90a<S>(step, locals)) return {kBoxRows, kBoxRows, sm90a_clusters_at_once<S>(step)};
  if (takes_tensor_cores<S>(step))
    return {8 * mma_n_tiles(step.layout.d, locals), kMmaBankTile, step.device.multiprocessors};
  return {kLocals<Acc<S>>, kWarps * kTileRows<Acc<S>>,
          kBlocksPerProcessor * step.device.multiprocessors};
}

// Splits of a streaming pass with `rows` local vectors: enough to fill the device, few enough for
// the partial sums to stay small.
inline int split_budget(const CudaStep& step, int64_t rows, const Cut& cut, int64_t acc_bytes) {
  const int64_t fill = cut.blocks / ceil_div(rows, cut.locals);
  const int64_t fit = kPartialBytes / (rows * step.layout.d * acc_bytes);
  return int(std::max<int64_t>(1, std::min<int64_t>({fill, fit, kMaxSplits})));
}

// Share of `splits` for `local` of `local + bank` vectors in tiles of `tile`.
inline int local_share(int splits, int64_t local, int64_t bank, int64_t tile) {
  const int64_t share = ceil_div(splits * local, local + bank);
  return int(std::max<int64_t>(1, std::min(share, ceil_div(local, tile))));
}

// Slots of a unit where splits take whole units: the largest that shares the work nearly as evenly
// as any, since closing a unit costs about a third of a tile.
inline int unit_slots_sm90a(const Layout& y, int64_t n, int splits) {
  const int64_t tiles = std::max<int64_t>(1, ceil_div(y.block, kBoxRows));
  int64_t best = tiles, best_cost = 0;
  for (int64_t parts = 1; parts <= tiles; ++parts) {
    const int64_t unit = ceil_div(tiles, parts), units = y.blocks() * ceil_div(tiles, unit);
    if (parts > 1 && units * n * int64_t(sizeof(float)) > kUnitBytes) break;
    const int64_t cost = ceil_div(units, splits) * (3 * unit + 1);
    if (parts > 1 && cost >= best_cost) continue;
    best = unit;
    best_cost = cost;
  }
  return int(best * kBoxRows);
}

// Thread blocks of the kernel over banked rows.
template <class S>
int row_blocks(const CudaStep& step) {
  const int64_t rows = step.layout.capacity;
  if (step.options.keep_expected) return int(ceil_div(rows, kRowWarps * kTileRows<Acc<S>>));
  if (takes_rows_sm90a<S>(step)) {  // pairs, as many as there is room for
    const int64_t pairs = ceil_div(rows, 4 * kBoxRows);
    return 2 * int(std::min<int64_t>(pairs, step.device.multiprocessors / 2));
  }
  if (takes_library<S>(step)) return int(ceil_div(rows, kRowsLibrary));
  const int of_block = takes_few_rows_mma<S>(step) ? kFewRowsMma
                       : takes_rows_mma<S>(step)   ? kRowsMma
                                                   : kRowWarps * kTileRows<Acc<S>>;
  return int(ceil_div(rows, of_block));
}

template <class S>
Args<S> arrange(const CudaStep& step, Arena& arena) {
  using A = Acc<S>;
  const Layout& y = step.layout;
  const StepOptions& o = step.options;
  Args<S> a{};
  a.n = int(step.batch.n);
  a.m = Divisor(int(y.m));
  a.d = int(y.d);
  a.capacity = Divisor(int(y.capacity));
  a.group = Divisor(int(y.group));
  a.offset_block = Divisor(int(y.offset_block));
  a.block = Divisor(int(y.block));
  a.groups = int(y.groups());
  a.offset_blocks = int(y.offset_blocks());
  a.blocks = Divisor(int(y.blocks()));
  a.scale = A(o.scale);
  a.window_blocks = int(o.window_blocks);
  a.weight_all_rows = o.weight_all_rows;
  a.banked_rows = o.banked_rows && y.capacity > 0;
  a.banked_columns = o.banked_columns && y.capacity > 0;
  a.use_offsets = o.use_offsets && y.capacity > 0;
  a.with_grad = o.with_grad;
  a.enqueue = o.enqueue && y.capacity > 0;
  // Beyond this the slots that upkeep reads would themselves be overwritten by the batch.
  a.incremental = a.enqueue && std::min(step.batch.n, y.capacity) <= y.capacity - 2 * y.block;
  a.drift_decay = A(o.drift_decay);
  a.queries = static_cast<S*>(step.state.queries);
  a.passages = static_cast<S*>(step.state.passages);
  a.ids = step.state.ids;
  a.cursor = step.state.cursor;
  a.block_lse = static_cast<A*>(step.state.block_lse);
  a.group_lse = static_cast<A*>(step.state.group_lse);
  a.row_state = static_cast<A*>(step.state.row_state);
  a.means = static_cast<A*>(step.state.means);
  a.expected = static_cast<A*>(step.state.expected);
  a.local_queries = static_cast<const S*>(step.batch.queries);
  a.local_passages = static_cast<const S*>(step.batch.passages);
  a.local_ids = step.batch.ids;
  a.companions = static_cast<const S*>(step.batch.companions);
  a.companion_count = int(step.batch.companion_count);
  a.loss = static_cast<A*>(step.out.loss);
  a.d_queries = static_cast<A*>(step.out.d_queries);
  a.d_passages = static_cast<A*>(step.out.d_passages);
  a.d_scale = static_cast<A*>(step.out.d_scale);

  const int64_t n = a.n, columns = n * a.m;
  const Cut cut = cut_for<S>(step, n), gradient_cut = cut_for<S>(step, columns);
  const int64_t tile = cut.tile;
  const int query_splits = split_budget(step, n, cut, sizeof(A));
  const bool sm90a_queries = takes_sm90a<S>(step, n),
             sm90a_passages = takes_sm90a<S>(step, columns);
  a.local_splits = local_share(query_splits, columns, y.capacity * y.m, tile);
  if (sm90a_queries) {
    a.local_splits = 0;  // each split takes its share of both
    a.bank_splits = query_splits;
    a.unit_slots = unit_slots_sm90a(y, n, query_splits);
    a.parts = Divisor(int(ceil_div(y.block, a.unit_slots)));
  } else if (y.capacity > 0) {
    const int64_t wanted = std::max(1, query_splits - a.local_splits);
    const int64_t most = ceil_div(y.block * y.m, tile);
    const int64_t parts = std::min(ceil_div(wanted, y.blocks()), std::min(most, y.block));
    const int64_t whole = std::max<int64_t>(1, tile / y.m);  // slots: no tile is cut in two
    a.unit_slots = int(std::min(y.block, ceil_div(ceil_div(y.block, parts), whole) * whole));
    a.parts = Divisor(int(ceil_div(y.block, a.unit_slots)));
    a.bank_splits = int(std::min<int64_t>(wanted, y.blocks() * a.parts));
  }
  const int gradient_splits = split_budget(step, columns, gradient_cut, sizeof(A));
  a.gradient_local = local_share(gradient_splits, n, y.capacity, tile);
  a.gradient_bank = a.banked_rows
                        ? int(std::min<int64_t>(std::max(1, gradient_splits - a.gradient_local),
                                                ceil_div(y.capacity, tile)))
                        : 0;
  if (sm90a_passages) {
    a.gradient_local = 0;
    a.gradient_bank = gradient_splits;
  }
  const bool library = takes_library<S>(step);
  if (library) {  // which adds up everything itself
    a.local_splits = a.gradient_local = 1;
    a.bank_splits = a.gradient_bank = 0;
    a.unit_slots = int(plan_library(step).unit_slots);
    a.parts = Divisor(int(ceil_div(y.block, a.unit_slots)));
  }
  a.row_blocks = a.banked_rows || a.incremental ? row_blocks<S>(step) : 0;

  const int64_t splits = a.local_splits + a.bank_splits;  // at most kMaxSplits + 1
  a.position = arena.take<int64_t>(2);
  a.not_finite = arena.take<int>(n);
  a.losses = arena.take<double>(n + a.row_blocks);
  if (o.with_scale_grad) a.terms = arena.take<double>(n + a.row_blocks);
  a.local_lse = arena.take<A>(n);
  a.local_positive = arena.take<A>(n);
  a.row_lse = arena.take<A>(a.banked_rows ? y.capacity : 0);
  a.query_slice = sm90a_queries ? sm90a_slice(y.d) : 0;
  a.passage_slice = sm90a_passages ? sm90a_slice(y.d) : 0;
  const int64_t query_places = a.places(int(splits), a.query_slice);
  const int64_t passage_places = a.places(a.gradient_local + a.gradient_bank, a.passage_slice);
  a.query_done = arena.take<int>(sm90a_queries ? query_places * ceil_div(n, kBoxRows) : 0);
  a.passage_done =
      arena.take<int>(sm90a_passages ? passage_places * ceil_div(columns, kBoxRows) : 0);
  // Nothing comes between the flags and part_max: run() clears what lies before it.
  a.part_max = arena.take<A>(splits * n);
  a.part_sum = arena.take<A>(splits * n);
  if (has_offset_arrays<S>(step)) {  // what the kernels that follow read
    const int64_t floats = offset_array_bytes(step) / int64_t(sizeof(float));
    const int64_t vectors = a.with_grad ? 1 + y.offset_blocks() : 0;
    const bool large_rows =
        takes_rows_sm90a<S>(step) || (takes_rows_mma<S>(step) && !takes_few_rows_mma<S>(step));
    if (sm90a_queries) {
      a.query_bias = arena.take<float>(floats);
      a.query_mass = arena.take<float>(floats);
      a.passage_offsets = arena.take<Bf16>(vectors * y.m * y.d);
    }
    if (sm90a_passages || (a.row_blocks > 0 && large_rows))
      a.passage_bias = arena.take<float>(floats);
    if (sm90a_passages) {
      a.passage_mass = arena.take<float>(floats);
      a.query_offsets = arena.take<Bf16>(vectors * y.d);
    }
  }
  const int64_t sums = std::max(query_places * a.place_size(n, a.query_slice),
                                passage_places * a.place_size(columns, a.passage_slice));
  a.part_out = arena.take<A>(a.with_grad ? sums : 0);
  a.unit_lse = arena.take<A>(a.incremental ? int64_t(a.blocks) * a.parts * n : 0);
  a.library = arena.take<char>(library ? library_bytes<S>(step) : 0);
  return a;
}

// Blocks of the bank that a batch of n rows may touch.
inline int64_t touched_blocks(const Layout& y, int64_t n) {
  return std::min(y.blocks(), ceil_div(n - 1, y.block) + 1);
}

// Blocks besides head's and the next that the batch's rows are scored against.
inline int64_t blocks_of_batch(const CudaStep& step) {
  const Layout& y = step.layout;
  return step.options.keep_expected ? y.blocks() : touched_blocks(y, step.batch.n);
}

template <class S>
EntryLaunch entries_of_batch(const CudaStep& step) {
  const int64_t rows = std::min(step.batch.n, step.layout.capacity);
  return {Entries::batch, 0, rows, blocks_of_batch(step), columns_of_batch<S>(step)};
}

// Room for the parts of `rows` rows over `blocks` blocks.
template <class S>
void take_parts(const CudaStep& step, Arena& arena, Args<S>& a, int64_t rows, int64_t blocks) {
  using A = Acc<S>;
  const int64_t groups = 2 * (a.groups + 1) * rows, strips = blocks * a.strips * rows;
  a.group_part = arena.take<A>(groups);
  a.strip_part = arena.take<A>(strips);
  if (!step.options.keep_expected) return;
  a.group_part_expected = arena.take<A>(groups);
  a.strip_part_expected = arena.take<A>(strips);
}

// The entries of the batch's rows.
template <class S>
void arrange_batch(const CudaStep& step, Arena& arena, Args<S>& a) {
  using A = Acc<S>;
  const int64_t blocks = blocks_of_batch(step), n = a.n;
  const int64_t fit = kEntryBytes / (blocks * n * int64_t(sizeof(A)));
  const int64_t strips = std::max<int64_t>(1, std::min<int64_t>({fit, a.groups, kMaxStrips}));
  const int64_t tile = columns_of_batch<S>(step) / (int64_t(a.group) * a.m);  // groups
  a.strip_groups = int(std::max(ceil_div(a.groups, strips), tile));
  a.strips = int(ceil_div(a.groups, a.strip_groups));
  take_parts(step, arena, a, n, blocks);
}

// The entries of all rows, a part of the rows at a time.
template <class S>
void arrange_rebuild(const CudaStep& step, Arena& arena, Args<S>& a) {
  using A = Acc<S>;
  const int64_t entries = (2 * (a.groups + 1) + a.blocks) * (step.options.keep_expected ? 2 : 1);
  const int64_t fit = 2 * kEntryBytes / (entries * int64_t(sizeof(A)));
  a.rebuild_rows = int(std::max<int64_t>(32, std::min<int64_t>(fit, step.layout.capacity)));
  a.strips = 1;
  a.strip_groups = a.groups;
  take_parts(step, arena, a, a.rebuild_rows, a.blocks);
}

template <class S>
size_t scratch_bytes(const CudaStep& step) {
  Arena arena(nullptr);
  Args<S> a = arrange<S>(step, arena);
  Arena batch = arena, rebuild = arena;  // they share their part: never in use together
  if (a.incremental) arrange_batch(step, batch, a);
  if (step.options.rebuild == Rebuild::table || (a.enqueue && !a.incremental))
    arrange_rebuild(step, rebuild, a);
  return std::max(batch.size(), rebuild.size());
}

template <class S, int V>
class Launcher {
  using A = Acc<S>;
  static constexpr int T = kTileRows<A>, L = kLocals<A>;

 public:
  Launcher(const CudaStep& step, void* scratch, cudaStream_t stream)
      : step_(step), arena_(scratch), a_(arrange<S>(step, arena_)), stream_(stream) {}

  // Null, or what went wrong.
  const char* run() {
    const bool library = takes_library<S>(step_), expect = step_.options.keep_expected;
    const int64_t columns = int64_t(a_.n) * a_.m;
    const auto flags = reinterpret_cast<char*>(a_.query_done);
    if (a_.with_grad && (a_.query_slice || a_.passage_slice))
      cudaMemsetAsync(flags, 0, reinterpret_cast<char*>(a_.part_max) - flags, stream_);
    if constexpr (sizeof(S) == 2)
      if (a_.query_bias != nullptr || a_.passage_bias != nullptr) prepare();
    if (library)
      launch_library_queries<S>(a_, step_, stream_);
    else
      attend(true, a_.local_splits + a_.bank_splits, a_.n);
    if (sum_columns_of(a_.n) == kFewColumns)
      end_queries<kFewColumns>();
    else
      end_queries<kManyColumns>();
    if (a_.companion_count > 0 && a_.enqueue)
      check_companions<S><<<a_.n, kThreads, 0, stream_>>>(a_);
    if (a_.terms != nullptr) local_scale_terms<S><<<a_.n, kThreads, 0, stream_>>>(a_);
    // Here and not first: where a product throws, the table is as it was.
    if (step_.options.rebuild == Rebuild::table) rebuild(Entries::before);
    if (step_.options.rebuild == Rebuild::window && a_.capacity > 0)
      (expect
           ? sum_window<S, true>
           : sum_window<S, false>)<<<ceil_div(a_.capacity, kThreads), kThreads, 0, stream_>>>(a_);
    if (library) {
      launch_library_rows<S>(a_, step_, stream_);
      if (a_.incremental) keep_what_exceeds(plan_library(step_));
    } else {
      if (a_.row_blocks > 0) score_rows();
      if (a_.with_grad) attend(false, a_.gradient_local + a_.gradient_bank, columns);
    }
    if (sum_columns_of(columns) == kFewColumns)
      end_passages<kFewColumns>(columns);
    else
      end_passages<kManyColumns>(columns);
    if (a_.terms != nullptr) finish_scale<S><<<1, kThreads, 0, stream_>>>(a_);
    if (a_.incremental)
      enter_batch();
    else if (a_.enqueue)
      rebuild(Entries::after);
    return error_;
  }

 private:
  template <int C>
  void end_queries() {
    const int64_t chunks = a_.with_grad ? ceil_div(a_.d, C) : 1;
    finish_queries<S, C><<<dim3(a_.n, chunks), kThreads, 0, stream_>>>(a_);
  }
  template <int C>
  void end_passages(int64_t columns) {
    const int64_t means = ceil_div(int64_t(1 + a_.m) * a_.d, kMeanColumns);
    const int64_t writers = a_.enqueue ? a_.n + means : 0;
    const int64_t sums = a_.with_grad ? columns * ceil_div(a_.d, C) : 0;
    finish_passages<S, C><<<1 + writers + sums, kThreads, 0, stream_>>>(a_);
  }

  void prepare() {
    const int64_t means = 1 + a_.offset_blocks, columns = int64_t(a_.n) * a_.m;
    const int64_t tiles = (a_.query_bias ? bias_tiles(means * a_.m, a_.n) : 0) +
                          (a_.passage_bias ? bias_tiles(means, columns) : 0);
    const auto kernel = prepare_offsets<S>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kOffsetBytesShared);
    kernel<<<tiles, kOffsetThreads, kOffsetBytesShared, stream_>>>(a_);
  }

  void check(bool described) {
    if (!described) error_ = "the driver cannot describe tensors to the copy engine";
  }

  void attend(bool queries, int splits, int64_t locals) {
    if constexpr (sizeof(S) == 2)
      if (takes_sm90a<S>(step_, locals))
        return check(launch_attend_sm90a<S>(a_, queries, splits, stream_));
    if constexpr (sizeof(S) == 2)
      if (takes_tensor_cores<S>(step_))
        return launch_attend_mma<S>(a_, step_.device, queries, splits, stream_);
    const dim3 grid(splits, ceil_div(locals, L));
    if constexpr (V == 1)
      return a_.d <= kThreads ? attend_with<1>(queries, grid) : attend_with<16>(queries, grid);
    else if (a_.d <= kThreads)
      attend_with<1>(queries, grid);
    else if (a_.d <= 3 * kThreads)
      attend_with<3>(queries, grid);
    else if (a_.d <= 4 * kThreads)
      attend_with<4>(queries, grid);
    else
      attend_with<16>(queries, grid);
  }
  template <int DPT>
  void attend_with(bool queries, dim3 grid) {
    static_assert(16 * kThreads == kMaxDim, "the widest kernel covers every d that is accepted");
    if (queries)
      attend_queries<S, DPT, V><<<grid, kThreads, 0, stream_>>>(a_);
    else
      attend_passages<S, DPT, V><<<grid, kThreads, 0, stream_>>>(a_);
  }

  // Also the entries of the batch's rows, where they share the launch.
  void score_rows() {
    if (step_.options.keep_expected) {
      banked_rows<S, V, true><<<a_.row_blocks, kRowThreads, 0, stream_>>>(a_);
      return;
    }
    if constexpr (sizeof(S) == 2) {
      if (takes_rows_sm90a<S>(step_)) return check(launch_rows_sm90a<S>(a_, stream_));
      if (a_.incremental && takes_entries_with_rows<S>(step_)) {
        const EntryLaunch entries = entries_of_batch<S>(step_);
        return launch_rows_mma<S>(for_batch(), step_, &entries, stream_);
      }
      if (takes_rows_mma<S>(step_)) return launch_rows_mma<S>(a_, step_, nullptr, stream_);
    }
    banked_rows<S, V, false><<<a_.row_blocks, kRowThreads, 0, stream_>>>(a_);
  }

  void keep_what_exceeds(const LibraryPlan& plan) {
    if (!may_exceed(plan, step_.layout)) return;
    const int64_t blocks = ceil_div(a_.capacity, kRowWarps * T);
    keep_many_groups<S, V><<<blocks, kRowThreads, 0, stream_>>>(a_, int(plan.max_items));
  }

  // Rows from first_row on against head's block, the next and `blocks` others.
  void score_entries_of(const Args<S>& a, const EntryLaunch& launch) {
    if constexpr (sizeof(S) == 2)
      if (launch.columns > 0) return launch_entries_mma<S>(a, launch, stream_);
    const dim3 grid(ceil_div(launch.rows, T), ceil_div(a.strips, kWarps), 2 + launch.blocks);
    const bool expect = step_.options.keep_expected;
    (expect ? score_entries<S, V, true>
            : score_entries<S, V, false>)<<<grid, kThreads, 0, stream_>>>(a, launch.which,
                                                                          launch.first_row);
  }

  // The arguments of kernels that make or read the entries of the batch's rows.
  Args<S> for_batch() const {
    Arena arena = arena_;
    Args<S> a = a_;
    arrange_batch(step_, arena, a);
    return a;
  }

  void enter_batch() {
    const Args<S> a = for_batch();
    const EntryLaunch entries = entries_of_batch<S>(step_);
    const int64_t survivors = ceil_div(a.capacity, kEnterThreads);
    if (!takes_entries_with_rows<S>(step_)) score_entries_of(a, entries);
    (step_.options.keep_expected
         ? enter_rows<S, true>
         : enter_rows<S, false>)<<<survivors + entries.rows, kEnterThreads, 0, stream_>>>(
        a, Entries::batch, 0, int(survivors));
  }

  void rebuild(Entries which) {
    Arena arena = arena_;
    Args<S> a = a_;
    arrange_rebuild(step_, arena, a);
    const int64_t columns = columns_of_entries<S>(step_, a.rebuild_rows, a.capacity);
    for (int row = 0; row < a.capacity; row += a.rebuild_rows) {
      score_entries_of(a, {which, row, a.rebuild_rows, a.blocks, columns});
      (step_.options.keep_expected
           ? enter_rows<S, true>
           : enter_rows<S, false>)<<<a.rebuild_rows, kEnterThreads, 0, stream_>>>(a, which, row, 0);
    }
  }

  const CudaStep& step_;
  Arena arena_;
  const Args<S> a_;
  cudaStream_t stream_;
  const char* error_ = nullptr;
};

// Neighbouring elements are read four at once where every vector begins at a multiple of them.
template <class S>
bool is_aligned(const CudaStep& step) {
  bool aligned = step.layout.d % 4 == 0;
  for (const void* p :
       {step.batch.queries, step.batch.passages, static_cast<const void*>(step.state.queries),
        static_cast<const void*>(step.state.passages)})
    aligned &= reinterpret_cast<uintptr_t>(p) % alignof(Pack<S, 4>) == 0;
  return aligned;
}

template <class S>
const char* launch_step(const CudaStep& step, void* scratch, cudaStream_t stream) {
  return is_aligned<S>(step) ? Launcher<S, 4>(step, scratch, stream).run()
                             : Launcher<S, 1>(step, scratch, stream).run();
}

}  // namespace contaccum
