// How one step is split between thread blocks and where its scratch memory lies. Everything here
// depends on shapes, options and the device, never on data, so that a captured graph may be
// replayed.
#pragma once

#include <algorithm>

#include "arena.h"
#include "attend_mma.h"
#include "attend_sm90a.h"
#include "entries.cuh"
#include "entries_mma.h"
#include "launch.h"
#include "library.h"
#include "rows.cuh"

namespace contaccum {

constexpr int64_t kPartialBytes = 14 << 20;  // of the sums of all splits, if more than one
constexpr int64_t kUnitBytes = 1 << 20;      // of unit_lse where finer units are worth it
constexpr int64_t kEntryBytes = 2 << 20;     // of strip_part, and of the rows of a rebuild
constexpr int64_t kMaxStrips = 1 << 15;      // of a block: a dimension of a grid
constexpr int kBlocksPerProcessor = 2;       // thread blocks of a streaming kernel that fit at once
// On Hopper 2^kSharing splits share a place. Each waits for the one before it, some microseconds;
// where the bank's log-sum-exps alone are megabytes, that is little beside the streaming.
constexpr int kSharing = 1, kSharingOfMany = 2;
constexpr int64_t kManySlots = 1 << 19;

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

// How the batch's rows are scored against a block: in strips of groups.
template <class S>
void cut_strips(const CudaStep& step, Args<S>& a) {
  const int64_t fit = kEntryBytes / (blocks_of_batch(step) * a.n * int64_t(sizeof(Acc<S>)));
  const int64_t strips = std::max<int64_t>(1, std::min<int64_t>({fit, a.groups, kMaxStrips}));
  const int64_t tile = columns_of_batch<S>(step) / (int64_t(a.group) * a.m);  // groups
  a.strip_groups = int(std::max(ceil_div(a.groups, strips), tile));
  a.strips = int(ceil_div(a.groups, a.strip_groups));
}

// Where the batch's entries share the launch of the rows of a small bank: where all thread blocks
// of both are at work at once, since what comes as a second wave gains nothing.
template <class S>
bool takes_entries_with_rows(const CudaStep& step, const Args<S>& a) {
  if (!a.incremental || !takes_few_rows_mma<S>(step) || step.options.keep_expected) return false;
  const EntryLaunch entries = entries_of_batch<S>(step);
  const dim3 grid = entries_grid(a.strips, entries, SmallEntries::kRows);
  const int64_t blocks =
      int64_t(a.row_blocks) * few_rows_parts(step, a) + int64_t(grid.x) * grid.y * grid.z;
  return entries.columns == SmallEntries::kColumns &&
         blocks <= kFewRowsAtOnce * step.device.multiprocessors;
}

// A step's arguments, and where the scratch memory goes on.
template <class S>
struct Arranged {
  Args<S> args;
  Arena for_entries;
  bool entries_with_rows;  // share a launch
  size_t bytes;            // without entries
};

template <class S>
Arranged<S> arrange(const CudaStep& step, Arena arena) {
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
  if (a.incremental) cut_strips(step, a);

  const int64_t splits = a.local_splits + a.bank_splits;  // at most kMaxSplits + 1
  a.position = arena.take<int64_t>(2);
  a.not_finite = arena.take<int>(n);
  a.losses = arena.take<double>(n + a.row_blocks);
  if (o.with_scale_grad) a.terms = arena.take<double>(n + a.row_blocks);
  a.local_lse = arena.take<A>(n);
  a.local_positive = arena.take<A>(n);
  a.row_lse = arena.take<A>(a.banked_rows ? y.capacity : 0);
  a.sharing = y.capacity >= kManySlots ? kSharingOfMany : kSharing;
  a.query_slice = sm90a_queries ? sm90a_slice(y.d) : 0;
  a.passage_slice = sm90a_passages ? sm90a_slice(y.d) : 0;
  const int64_t query_places = a.places(int(splits), a.query_slice);
  const int64_t passage_places = a.places(a.gradient_local + a.gradient_bank, a.passage_slice);
  a.query_done = arena.take<int>(sm90a_queries ? query_places * ceil_div(n, kBoxRows) : 0);
  a.passage_done =
      arena.take<int>(sm90a_passages ? passage_places * ceil_div(columns, kBoxRows) : 0);
  // Nothing comes between the flags and part_max: prepare() clears what lies before it.
  a.part_max = arena.take<A>(splits * n);
  a.part_sum = arena.take<A>(splits * n);
  if (has_offset_arrays<S>(step)) {  // what the kernels that follow read
    const int64_t floats = offset_array_bytes(step) / int64_t(sizeof(float));
    const int64_t vectors = a.with_grad ? 1 + y.offset_blocks() : 0;
    const bool large_rows =
        takes_rows_sm90a<S>(step) || (takes_rows_mma<S>(step) && !takes_few_rows_mma<S>(step));
    if (sm90a_queries) {
      a.query_bias = arena.take<float>(floats);
      a.passage_offsets = arena.take<Bf16>(vectors * y.m * y.d);
    }
    if (sm90a_passages || (a.row_blocks > 0 && large_rows))
      a.passage_bias = arena.take<float>(floats);
    if (sm90a_passages) a.query_offsets = arena.take<Bf16>(vectors * y.d);
  }
  a.unit_lse = arena.take<A>(a.incremental ? int64_t(a.blocks) * a.parts * n : 0);
  a.library = arena.take<char>(library ? library_bytes<S>(step) : 0);
  const int64_t sums = std::max(query_places * a.place_size(n, a.query_slice),
                                passage_places * a.place_size(columns, a.passage_slice));
  Arena behind = arena;
  a.part_out = behind.take<A>(a.with_grad ? sums : 0);
  // Entries take the place of the sums, which have been read by then; but where they share the
  // banked rows' launch, the sums of the passage side come after them.
  const bool entries_with_rows = takes_entries_with_rows(step, a);
  return {a, entries_with_rows ? behind : arena, entries_with_rows, behind.size()};
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
  take_parts(step, arena, a, a.n, blocks_of_batch(step));
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
  if (!rebuilds_by_library<S>(step, a.rebuild_rows)) return;
  const RebuildPlan plan = plan_rebuild(step, a.rebuild_rows);
  a.entry_scores = arena.take<A>(plan.rows * plan.blocks * step.layout.block * step.layout.m);
}

template <class S>
size_t scratch_bytes(const CudaStep& step) {
  const Arranged<S> plan = arrange<S>(step, Arena(nullptr));
  Args<S> a = plan.args;
  Arena batch = plan.for_entries, rebuild = batch;  // they share their part: never in use together
  if (a.incremental) arrange_batch(step, batch, a);
  if (step.options.rebuild == Rebuild::table || (a.enqueue && !a.incremental))
    arrange_rebuild(step, rebuild, a);
  return std::max({plan.bytes, batch.size(), rebuild.size()});
}

}  // namespace contaccum
