// When products are left to torch, how they are cut so that scratch memory stays bounded, and the
// launches of library.cuh, compiled apart.
//
// Scores of a chunk of columns or rows are one product; kernels of our own make weights of them and
// take all log-sum-exps; the weights times the same vectors are another. Head and fill are known on
// the device alone, so the chunks cover the whole capacity and kernels leave out what is not there.
#pragma once

#include <algorithm>

#include "attend_mma.h"

namespace contaccum {

// Together 64 MiB for 4-byte scores with 2-byte weights; one row or column at least, whatever d and
// m. Offsets add a share of one in a block of slots.
constexpr int64_t kScoreBytes = 32 << 20;    // scores of one product; a half more for weights
constexpr int64_t kProductBytes = 16 << 20;  // weighted sums of one product, or gathered columns
constexpr int64_t kLocalRows = 1024;         // of one product: more leave less room for columns
constexpr int64_t kUnitColumns = 2048;       // that a thread block sums
constexpr int kRowsLibrary = 32;             // banked rows of a thread block

struct LibraryPlan {
  // Query side: `locals` rows against `columns` of the batch, or `units` of unit_slots slots.
  int64_t locals, columns, units, unit_slots;
  // Passage side: `rows`, local or banked, against all local columns; sums of `sums` columns.
  int64_t rows, sums;
  // Upkeep: at most max_items groups, else portable kernels do it; `items` of them at once against
  // kept_rows rows.
  int64_t max_items, items, kept_rows;
};

inline LibraryPlan plan_library(const CudaStep& step) {
  const Layout& y = step.layout;
  const int64_t n = step.batch.n, acc = step.storage == Storage::f64 ? 8 : 4;
  const int64_t stored = step.storage == Storage::f64 ? 8 : step.storage == Storage::f32 ? 4 : 2;
  const int64_t scores = kScoreBytes / acc, vectors = kProductBytes / (y.d * acc);
  const auto within = [](int64_t x, int64_t most) {
    return std::max<int64_t>(1, std::min(x, most));
  };
  LibraryPlan p{};
  p.unit_slots = within(kUnitColumns / y.m, y.block);
  p.locals = within(std::min(vectors, kLocalRows), n);
  p.locals = within(scores / (p.unit_slots * y.m), p.locals);
  p.columns = within(scores / p.locals, n * y.m);
  p.units = within(scores / (p.locals * p.unit_slots * y.m),
                   y.blocks() * ceil_div(y.block, p.unit_slots));
  const int64_t fit = std::max<int64_t>(1, scores / (n * y.m * kRowsLibrary));
  p.rows = std::min(fit * kRowsLibrary, std::max(n, y.capacity));
  p.sums = within(vectors, n * y.m);
  // Only where the last block is shorter than the others can a step need more groups than this.
  const int64_t columns = y.group * y.m, gathered = kProductBytes / (columns * y.d * stored);
  p.items = std::min({1 + std::min(ceil_div(n, y.group), y.groups()), gathered,
                      scores / (columns * kRowsLibrary)});
  p.max_items = p.items == 0 ? 0 : 1 + std::min(ceil_div(n, y.group), y.groups());
  p.kept_rows = p.items == 0 ? 0 : within(scores / (p.items * columns), y.capacity);
  return p;
}

// Whether a step may need more groups than products keep.
inline bool may_exceed(const LibraryPlan& plan, const Layout& y) {
  return plan.items == 0 || y.capacity % y.block != 0;
}

// The portable kernels reach 6 TFLOP/s on the 132 processors of an H100. An estimate: products take
// an eighth of their time, each launch 3 us more.
inline bool products_pay(const CudaStep& step, double operations, double launches) {
  constexpr double kRate = 6e12 / 132, kGain = 8, kLaunch = 3e-6;
  const double seconds = operations / (kRate * step.device.multiprocessors);
  return seconds * (1 - 1 / kGain) > launches * kLaunch;
}

inline bool library_pays(const CudaStep& step) {
  const Layout& y = step.layout;
  const LibraryPlan p = plan_library(step);
  const int64_t n = step.batch.n, columns = n * y.m;
  const int64_t units = y.blocks() * ceil_div(y.block, p.unit_slots);
  const double query_chunks = double(ceil_div(n, p.locals)) *
                              double(ceil_div(columns, p.columns) + ceil_div(units, p.units));
  const double row_chunks = double(ceil_div(n, p.rows) + ceil_div(y.capacity, p.rows));
  const double launches = (step.options.use_offsets ? 12 : 6) * query_chunks +
                          row_chunks * (3 + 2 * double(ceil_div(columns, p.sums))) + 6;
  const double products = step.options.with_grad ? 8 : 4;
  return products_pay(step, products * double(y.d) * double(columns) * double(n + y.capacity),
                      launches);
}

// Where no tensor-core kernel applies and there is work enough, or no other family is allowed. The
// library multiplies bfloat16 into float32 on sm_80 and later. Its banked rows take no expected
// scores.
template <class S>
bool takes_library(const CudaStep& step) {
  if (step.options.keep_expected) return false;
  if (!kernels_allowed(kLibraryKernels) || takes_tensor_cores<S>(step)) return false;
  if (std::is_same_v<S, Bf16> && step.device.compute_capability < 80) return false;
  return !kernels_allowed(kPortableKernels) || library_pays(step);
}

// Of the table, when it is rebuilt before the step: `rows` rows against `blocks` blocks at once.
struct RebuildPlan {
  int64_t rows, blocks;
};

inline RebuildPlan plan_rebuild(const CudaStep& step, int64_t rows) {
  const Layout& y = step.layout;
  const int64_t scores = kScoreBytes / (step.storage == Storage::f64 ? 8 : 4);
  const int64_t columns = y.block * y.m;
  RebuildPlan p{};
  p.rows = std::min(rows, std::max<int64_t>(kRowsLibrary, scores / columns));
  p.blocks = std::max<int64_t>(1, std::min(y.blocks(), scores / (p.rows * columns)));
  return p;
}

// `rows`: that are entered together. Where the batch is in already, a product that throws would
// leave a bank whose table does not fit it: such a rebuild is for other kernels.
template <class S>
bool rebuilds_by_library(const CudaStep& step, int64_t rows) {
  const Layout& y = step.layout;
  if (step.options.rebuild != Rebuild::table || y.capacity == 0) return false;
  if (!kernels_allowed(kLibraryKernels) || takes_entries_mma<S>(step)) return false;
  if (std::is_same_v<S, Bf16> && step.device.compute_capability < 80) return false;
  if (!kernels_allowed(kPortableKernels)) return true;
  const RebuildPlan p = plan_rebuild(step, rows);
  const double chunks = double(ceil_div(y.capacity, p.rows));
  const double launches = chunks * (1 + 2 * double(ceil_div(y.blocks(), p.blocks)));
  const double scores = double(y.m) * double(y.capacity) * double(y.capacity);
  return products_pay(step, 2 * double(y.d) * scores, launches);
}

template <class S>
size_t library_bytes(const CudaStep& step);

// score_entries() in entries.cuh, for a rebuild of rows from first_row on before the step.
template <class S>
void launch_library_entries(const Args<S>& a, const CudaStep& step, int first_row,
                            cudaStream_t stream);

// The query side: attend_queries() in attend.cuh.
template <class S>
void launch_library_queries(const Args<S>& a, const CudaStep& step, cudaStream_t stream);

// Banked rows and the passage side: banked_rows() and attend_passages(). Upkeep that exceeds the
// plan is left undone.
template <class S>
void launch_library_rows(const Args<S>& a, const CudaStep& step, cudaStream_t stream);

}  // namespace contaccum
