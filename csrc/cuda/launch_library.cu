// The products and kernels of a step that leaves its products to torch, in order.
#include "arena.h"
#include "entries_library.cuh"
#include "library.cuh"
#include "library.h"

namespace contaccum {
namespace {

template <class S>
struct LibraryScratch {
  using A = Acc<S>;
  A* scores;
  S* weights;
  A* product;  // or gathered columns
  A *unit_max, *unit_sum, *shrink;
  S* offsets;
  A* bias;
  S* mass;
};

// Pieces that so many neighbouring slots may lie in.
int64_t most_pieces(const Layout& y, int64_t slots) {
  return std::min(y.offset_blocks(), slots / y.offset_block + 2) + 1;
}

template <class S>
LibraryScratch<S> share_out(const CudaStep& step, const LibraryPlan& plan, Arena& arena) {
  using A = Acc<S>;
  const Layout& y = step.layout;
  const int64_t columns = step.batch.n * y.m, banked = plan.units * plan.unit_slots * y.m;
  const int64_t weights =
      std::max(plan.locals * std::max(plan.columns, banked), plan.rows * columns);
  const int64_t gathered = plan.items * y.group * y.m;
  LibraryScratch<S> s{};
  s.scores = arena.take<A>(std::max(weights, gathered * plan.kept_rows));
  s.weights = sizeof(S) == sizeof(A) ? reinterpret_cast<S*>(s.scores) : arena.take<S>(weights);
  s.product = reinterpret_cast<A*>(
      arena.take<char>(std::max(std::max(plan.locals, plan.sums) * y.d * int64_t(sizeof(A)),
                                gathered * y.d * int64_t(sizeof(S)))));
  const int64_t units = std::max(plan.units, ceil_div(plan.columns, kUnitColumns));
  s.unit_max = arena.take<A>(units * plan.locals);
  s.unit_sum = arena.take<A>(units * plan.locals);
  s.shrink = arena.take<A>(plan.locals);
  if (!step.options.use_offsets || y.capacity == 0) return s;
  const int64_t queries = most_pieces(y, plan.units * plan.unit_slots) * y.m;
  const int64_t passages = most_pieces(y, plan.rows);
  const int64_t most = std::max(queries * plan.locals, passages * columns);
  s.offsets = arena.take<S>(kTerms<S> * std::max(queries, passages) * y.d);
  s.bias = arena.take<A>(kHalves<S> * most);
  s.mass = arena.take<S>(kTerms<S> * most);
  return s;
}

template <class S>
class LibraryLauncher {
  using A = Acc<S>;

 public:
  LibraryLauncher(const Args<S>& args, const CudaStep& step, cudaStream_t stream)
      : a_(args), step_(step), y_(step.layout), plan_(plan_library(step)), stream_(stream) {
    Arena arena(args.library);
    s_ = share_out<S>(step, plan_, arena);
  }

  void queries() {
    score_targets<S><<<ceil_div(a_.n, kWarps), kThreads, 0, stream_>>>(a_);
    const int64_t columns = int64_t(a_.n) * a_.m;
    for (int64_t begin = 0; begin < columns; begin += plan_.columns) {
      QueryChunk<S> q = query_chunk(begin, std::min(begin + plan_.columns, columns));
      q.local = true;
      q.first = begin == 0;
      q.units = int(ceil_div(q.end - q.begin, kUnitColumns));
      query_rows(q, a_.local_passages + begin * a_.d);
    }
    if (y_.capacity == 0 || !(a_.banked_columns || a_.incremental)) return;
    const int64_t units = y_.blocks() * a_.parts;
    for (int64_t unit = 0; unit < units; unit += plan_.units) {
      const int64_t end = std::min(unit + plan_.units, units);
      const int64_t slot = first_slot(unit), slot_end = first_slot(end);
      QueryChunk<S> q = query_chunk(slot * a_.m, slot_end * a_.m);
      q.first_unit = int(unit);
      q.units = int(end - unit);
      if (a_.use_offsets && a_.banked_columns && slot < slot_end)
        q.bias = write_offsets_of(slot, slot_end, a_.m, 1, q.pieces);
      query_rows(q, a_.passages + slot * a_.m * a_.d);
    }
  }

  void rows() {
    if (a_.with_grad)
      for (int64_t begin = 0; begin < a_.n; begin += plan_.rows) {
        RowChunk<S> r = row_chunk(begin, std::min<int64_t>(begin + plan_.rows, a_.n));
        r.local = true;
        const S* vectors = a_.local_queries + begin * a_.d;
        score(r, vectors);
        sum_rows(r, vectors, begin == 0);
      }
    if (a_.row_blocks == 0) return;
    for (int64_t begin = 0; begin < y_.capacity; begin += plan_.rows) {
      RowChunk<S> r = row_chunk(begin, std::min(begin + plan_.rows, y_.capacity));
      const S* vectors = a_.queries + begin * a_.d;
      score(r, vectors);
      if (a_.use_offsets && a_.banked_rows) {
        r.bias = write_offsets_of(r.begin, r.end, 1, 0, r.pieces);
        multiply(kHalves<S> * r.pieces.count, a_.d, r.columns, {s_.offsets, a_.d, false},
                 {a_.local_passages, a_.d, true}, r.bias);
      }
      sum_banked_rows<S><<<ceil_div(r.end - r.begin, kRowsLibrary), kThreads, 0, stream_>>>(
          a_, r, a_.losses + a_.n + begin / kRowsLibrary);
      if (a_.with_grad && a_.banked_rows) sum_rows(r, vectors, false);
    }
    if (a_.incremental && plan_.items > 0) keep();
  }

 private:
  void multiply(int64_t rows, int64_t depth, int64_t columns, Matrix left, Matrix right,
                void* out) {
    step_.multiply(step_.device.index, {step_.storage, rows, depth, columns, left, right, out});
  }

  // sums = shrink * sums + product * (what a stored one stands for)
  void add(A* sums, const A* shrink, A factor, bool first, int64_t rows) {
    add_product<A><<<ceil_div(rows * a_.d, kElementThreads), kElementThreads, 0, stream_>>>(
        sums, s_.product, shrink, factor, first, int(rows), a_.d);
  }

  // Where a unit begins; for the unit after the last, the capacity.
  int64_t first_slot(int64_t unit) const {
    const int64_t parts = a_.parts;
    return std::min(unit / parts * y_.block + unit % parts * a_.unit_slots, y_.capacity);
  }

  // Offsets of slots [begin, end), and where their biases go.
  A* write_offsets_of(int64_t begin, int64_t end, int kinds, int first_kind, Pieces& pieces) {
    const int64_t first = begin / y_.offset_block, last = (end - 1) / y_.offset_block;
    pieces = {int(begin), int(end), int(first), int(last - first + 2)};
    const dim3 grid(pieces.count * kinds, unsigned(ceil_div(a_.d, kElementThreads)));
    write_offsets<S>
        <<<grid, kElementThreads, 0, stream_>>>(a_, pieces, kinds, first_kind, s_.offsets);
    return s_.bias;
  }

  QueryChunk<S> query_chunk(int64_t begin, int64_t end) const {
    QueryChunk<S> q{};
    q.begin = int(begin);
    q.end = int(end);
    q.scores = s_.scores;
    q.weights = s_.weights;
    q.unit_max = s_.unit_max;
    q.unit_sum = s_.unit_sum;
    q.shrink = s_.shrink;
    q.offsets = s_.offsets;
    q.mass = s_.mass;
    return q;
  }

  // All local rows, some at a time, against the columns of a chunk.
  void query_rows(QueryChunk<S> q, const S* vectors) {
    for (int64_t row = 0; row < a_.n; row += plan_.locals) {
      q.first_row = int(row);
      q.rows = int(std::min<int64_t>(plan_.locals, a_.n - row));
      query_chunk_of_rows(q, vectors);
    }
  }

  void query_chunk_of_rows(const QueryChunk<S>& q, const S* vectors) {
    const int64_t columns = q.end - q.begin, width = q.pieces.count * a_.m;
    const Matrix rows{a_.local_queries + int64_t(q.first_row) * a_.d, a_.d, false};
    if (columns > 0) multiply(q.rows, a_.d, columns, rows, {vectors, a_.d, true}, q.scores);
    if (q.bias != nullptr)
      multiply(q.rows, a_.d, kHalves<S> * width, rows, {q.offsets, a_.d, true}, q.bias);
    survey_scores<S><<<dim3(q.units, q.rows), kSurveyThreads, 0, stream_>>>(a_, q);
    if (!q.local && !a_.banked_columns) return;
    advance_sums<S><<<ceil_div(q.rows, kWarps), kThreads, 0, stream_>>>(a_, q);
    if (!a_.with_grad || columns == 0) return;

    const dim3 grid(unsigned(ceil_div(columns, kElementThreads)), q.rows);
    weigh_columns<S><<<grid, kElementThreads, 0, stream_>>>(a_, q);
    A* sums = a_.part_out + int64_t(q.first_row) * a_.d;
    multiply(q.rows, columns, a_.d, {q.weights, columns, false}, {vectors, a_.d, false},
             s_.product);
    add(sums, q.shrink, A(1) / A(kStoredOne<S>), q.first, q.rows);
    if (q.bias == nullptr) return;
    const dim3 pieces(unsigned(ceil_div(width, kWarps)), q.rows);
    weigh_column_pieces<S><<<pieces, kThreads, 0, stream_>>>(a_, q);
    multiply(q.rows, kTerms<S> * width, a_.d, {q.mass, kTerms<S> * width, false},
             {q.offsets, a_.d, false}, s_.product);
    add(sums, nullptr, A(1), false, q.rows);
  }

  RowChunk<S> row_chunk(int64_t begin, int64_t end) const {
    RowChunk<S> r{};
    r.begin = int(begin);
    r.end = int(end);
    r.columns = a_.n * a_.m;
    r.scores = s_.scores;
    r.weights = s_.weights;
    r.offsets = s_.offsets;
    r.mass = s_.mass;
    return r;
  }

  void score(const RowChunk<S>& r, const S* vectors) {
    multiply(r.end - r.begin, a_.d, r.columns, {vectors, a_.d, false},
             {a_.local_passages, a_.d, true}, r.scores);
  }

  // The rows' part in the sums of the local columns, some of these at a time.
  void sum_rows(const RowChunk<S>& r, const S* vectors, bool first) {
    const int64_t rows = r.end - r.begin, terms = kTerms<S> * r.pieces.count;
    const auto blocks = unsigned(ceil_div(r.columns, kElementThreads));
    weigh_rows<S><<<dim3(unsigned(rows), blocks), kElementThreads, 0, stream_>>>(a_, r);
    if (r.bias != nullptr)
      weigh_row_pieces<S><<<dim3(r.pieces.count, blocks), kElementThreads, 0, stream_>>>(a_, r);
    for (int64_t column = 0; column < r.columns; column += plan_.sums) {
      const int64_t count = std::min<int64_t>(plan_.sums, r.columns - column);
      A* sums = a_.part_out + column * a_.d;
      multiply(count, rows, a_.d, {r.weights + column, r.columns, true}, {vectors, a_.d, false},
               s_.product);
      add(sums, nullptr, A(1) / A(kStoredOne<S>), first, count);
      if (r.bias == nullptr) continue;
      multiply(count, terms, a_.d, {r.mass + column, r.columns, true}, {r.offsets, a_.d, false},
               s_.product);
      add(sums, nullptr, A(1), false, count);
    }
  }

  void keep() {
    const int64_t columns = y_.group * a_.m;
    int width = 1;
    while (width < 32 && width < columns) width *= 2;
    for (int64_t first = 0; first < plan_.max_items; first += plan_.items) {
      KeptItems<S> kept{};
      kept.first = int(first);
      kept.count = int(std::min(plan_.items, plan_.max_items - first));
      kept.most = int(plan_.max_items);
      kept.gathered = reinterpret_cast<S*>(s_.product);
      kept.scores = s_.scores;
      gather_items<S><<<kept.count* int(y_.group), kElementThreads, 0, stream_>>>(a_, kept);
      for (int64_t row = 0; row < y_.capacity; row += plan_.kept_rows) {
        const int64_t rows = std::min(plan_.kept_rows, y_.capacity - row);
        kept.begin = int(row);
        kept.end = int(row + rows);
        multiply(rows, a_.d, kept.count * columns, {a_.queries + row * a_.d, a_.d, false},
                 {kept.gathered, a_.d, true}, s_.scores);
        keep_items<S><<<ceil_div(rows, kWarps), kThreads, 0, stream_>>>(a_, kept, width);
      }
    }
  }

  const Args<S>& a_;
  const CudaStep& step_;
  const Layout& y_;
  const LibraryPlan plan_;
  LibraryScratch<S> s_;
  cudaStream_t stream_;
};

}  // namespace

template <class S>
size_t library_bytes(const CudaStep& step) {
  Arena arena(nullptr);
  share_out<S>(step, plan_library(step), arena);
  return arena.size();
}

template <class S>
void launch_library_queries(const Args<S>& a, const CudaStep& step, cudaStream_t stream) {
  LibraryLauncher<S>(a, step, stream).queries();
}

template <class S>
void launch_library_rows(const Args<S>& a, const CudaStep& step, cudaStream_t stream) {
  LibraryLauncher<S>(a, step, stream).rows();
}

template <class S>
void launch_library_entries(const Args<S>& a, const CudaStep& step, int first_row,
                            cudaStream_t stream) {
  const Layout& y = step.layout;
  const RebuildPlan plan = plan_rebuild(step, a.rebuild_rows);
  const int64_t end_row = std::min<int64_t>(first_row + int64_t(a.rebuild_rows), y.capacity);
  for (int64_t row = first_row; row < end_row; row += plan.rows) {
    const int64_t rows = std::min(plan.rows, end_row - row);
    for (int64_t b = 0; b < y.blocks(); b += plan.blocks) {
      const int64_t end = std::min(b + plan.blocks, y.blocks());
      const int64_t slots = std::min(end * y.block, y.capacity) - b * y.block;
      const EntryChunk<S> chunk{first_row,    int(row),    int(rows),     int(b),
                                int(end - b), slots * y.m, a.entry_scores};
      step.multiply(step.device.index, {step.storage,
                                        rows,
                                        y.d,
                                        chunk.columns,
                                        {a.queries + row * y.d, y.d, false},
                                        {a.passages + b * y.block * y.m * y.d, y.d, true},
                                        a.entry_scores});
      const auto blocks = unsigned(ceil_div(rows, kWarps));
      if (b == 0) score_own<S><<<blocks, kThreads, 0, stream>>>(a, int(row), int(rows));
      (step.options.keep_expected
           ? sum_scores<S, true>
           : sum_scores<S, false>)<<<dim3(blocks, chunk.blocks), kThreads, 0, stream>>>(a, chunk);
    }
  }
}

template size_t library_bytes<float>(const CudaStep&);
template size_t library_bytes<double>(const CudaStep&);
template size_t library_bytes<Bf16>(const CudaStep&);
template size_t library_bytes<F16>(const CudaStep&);
template void launch_library_queries<float>(const Args<float>&, const CudaStep&, cudaStream_t);
template void launch_library_queries<double>(const Args<double>&, const CudaStep&, cudaStream_t);
template void launch_library_queries<Bf16>(const Args<Bf16>&, const CudaStep&, cudaStream_t);
template void launch_library_queries<F16>(const Args<F16>&, const CudaStep&, cudaStream_t);
template void launch_library_rows<float>(const Args<float>&, const CudaStep&, cudaStream_t);
template void launch_library_rows<double>(const Args<double>&, const CudaStep&, cudaStream_t);
template void launch_library_rows<Bf16>(const Args<Bf16>&, const CudaStep&, cudaStream_t);
template void launch_library_rows<F16>(const Args<F16>&, const CudaStep&, cudaStream_t);
template void launch_library_entries<float>(const Args<float>&, const CudaStep&, int, cudaStream_t);
template void launch_library_entries<double>(const Args<double>&, const CudaStep&, int,
                                             cudaStream_t);
template void launch_library_entries<Bf16>(const Args<Bf16>&, const CudaStep&, int, cudaStream_t);
template void launch_library_entries<F16>(const Args<F16>&, const CudaStep&, int, cudaStream_t);

}  // namespace contaccum
