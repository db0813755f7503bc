// One step for one storage type: the kernels in order.
#pragma once

#include "arrange.cuh"
#include "attend.cuh"
#include "enter.cuh"
#include "offsets.cuh"
#include "reduce.cuh"
#include "scale_grad.cuh"
#include "shared_memory.cuh"

namespace contaccum {

template <class S, int V>
class Launcher {
  using A = Acc<S>;
  static constexpr int T = kTileRows<A>, L = kLocals<A>;

 public:
  Launcher(const CudaStep& step, void* scratch, cudaStream_t stream)
      : Launcher(step, arrange<S>(step, Arena(scratch)), stream) {}

  // Null, or what went wrong.
  const char* run() {
    const bool library = takes_library<S>(step_), expect = step_.options.keep_expected;
    const int64_t columns = int64_t(a_.n) * a_.m;
    prepare();
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
    if (a_.incremental && !entries_with_rows_)
      enter_batch();
    else if (a_.enqueue && !a_.incremental)
      rebuild(Entries::after);
    return error_;
  }

 private:
  Launcher(const CudaStep& step, const Arranged<S>& plan, cudaStream_t stream)
      : step_(step),
        for_entries_(plan.for_entries),
        entries_with_rows_(plan.entries_with_rows),
        a_(with_entries(step, plan)),
        stream_(stream) {}

  // With the entries of the batch's rows.
  static Args<S> with_entries(const CudaStep& step, const Arranged<S>& plan) {
    Arena arena = plan.for_entries;
    Args<S> a = plan.args;
    if (a.incremental) arrange_batch(step, arena, a);
    return a;
  }

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
    const int64_t finishing = 1 + writers + sums;
    if (!entries_with_rows_) return finish_passages<S, C><<<finishing, kThreads, 0, stream_>>>(a_);
    if constexpr (sizeof(S) == 2) {
      const int64_t survivors = ceil_div(a_.capacity, kThreads);
      finish_and_enter<S, C>
          <<<finishing + survivors + entries_of_batch<S>(step_).rows, kThreads, 0, stream_>>>(
              a_, int(finishing), int(survivors));
    }
  }

  // Flags are cleared, biases worked out.
  void prepare() {
    const auto flags = reinterpret_cast<char*>(a_.query_done);
    const bool has_flags = a_.with_grad && (a_.query_slice || a_.passage_slice);
    const int64_t bytes = has_flags ? reinterpret_cast<char*>(a_.part_max) - flags : 0;
    if constexpr (sizeof(S) == 2)
      if (a_.query_bias != nullptr || a_.passage_bias != nullptr)
        return prepare_biases(int(bytes / sizeof(int)));
    if (bytes > 0) cudaMemsetAsync(flags, 0, bytes, stream_);
  }
  void prepare_biases(int flags) {
    const int64_t means = 1 + a_.offset_blocks, columns = int64_t(a_.n) * a_.m;
    const int64_t tiles = (a_.query_bias ? bias_tiles(means * a_.m, a_.n) : 0) +
                          (a_.passage_bias ? bias_tiles(means, columns) : 0);
    constexpr auto kernel = prepare_offsets<S>;
    allow_shared_bytes<kernel>(kOffsetBytesShared);
    kernel<<<tiles, kOffsetThreads, kOffsetBytesShared, stream_>>>(a_, flags);
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
      if (entries_with_rows_) {
        const EntryLaunch entries = entries_of_batch<S>(step_);
        return launch_rows_mma<S>(a_, step_, &entries, stream_);
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

  void enter_batch() {
    const EntryLaunch entries = entries_of_batch<S>(step_);
    const int64_t survivors = ceil_div(a_.capacity, kEnterThreads);
    score_entries_of(a_, entries);
    (step_.options.keep_expected
         ? enter_rows<S, true>
         : enter_rows<S, false>)<<<survivors + entries.rows, kEnterThreads, 0, stream_>>>(
        a_, Entries::batch, 0, int(survivors));
  }

  void rebuild(Entries which) {
    Arena arena = for_entries_;
    Args<S> a = a_;
    arrange_rebuild(step_, arena, a);
    const int64_t columns = columns_of_entries<S>(step_, a.rebuild_rows, a.capacity);
    const bool library = which == Entries::before && rebuilds_by_library<S>(step_, a.rebuild_rows);
    for (int row = 0; row < a.capacity; row += a.rebuild_rows) {
      if (library)
        launch_library_entries<S>(a, step_, row, stream_);
      else
        score_entries_of(a, {which, row, a.rebuild_rows, a.blocks, columns});
      (step_.options.keep_expected
           ? enter_rows<S, true>
           : enter_rows<S, false>)<<<a.rebuild_rows, kEnterThreads, 0, stream_>>>(a, which, row, 0);
    }
  }

  const CudaStep& step_;
  const Arena for_entries_;
  const bool entries_with_rows_;
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
