// Rows against blocks of the bank on tensor cores; what score_entries in entries.cuh computes, for
// 16-bit banks.
//
// - A thread block has kRows rows and a strip of groups of one block, kColumns columns at a time;
//   rows and columns stream through shared memory by slices of d.
// - Scores lie in shared memory row by row. Groups that fit a tile go to one thread each, so that
//   none waits for another; wider ranges are shared by the row's kParts threads.
// - Small tiles are for small batches: there latency decides, and every processor should help.
#pragma once

#include "entries.cuh"
#include "ptx_mma.cuh"
#include "tile_config.cuh"

namespace contaccum {

template <class S, class T, bool kExpect>
class ScoreEntries {
  using RowLse = Lse<float, kExpect>;
  static constexpr int MT = T::kWarpRows / 16, NT = T::kWarpColumns / 8;
  static constexpr int kChunks = T::kSlice / 8, kRowsAtOnce = kThreads / kChunks;
  static constexpr int kAtOnce = 8;  // scores that a thread adds without waiting for one another

 public:
  struct Shared {
    union {
      char stage[T::kStages][(T::kRows + T::kColumns) * T::kRowBytes];
      float scores[T::kWarpsDeep][T::kRows][T::kScoreStride];  // apart by the warps' share of d
      float part_weighted[T::kParts][T::kRows];                // used while no scores are
    };
    int64_t ids[T::kColumns];
    int row_places[T::kRows], column_places[T::kColumns];  // see EntryRows
    float part_max[T::kParts][T::kRows], part_sum[T::kParts][T::kRows];
  };

  __device__ ScoreEntries(const EntryRows<S, kExpect>& r, Shared& shared, int first_row,
                          int which_block)
      : a(r.a),
        rows(r),
        sh(shared),
        i(which_block),
        begin(r.block(which_block) * r.a.block),
        limit(min(r.ring.block_end(r.block(which_block)), r.ring.fill)),
        first(first_row),
        my_row(threadIdx.x % T::kRows),
        part(threadIdx.x / T::kRows),
        slot(r.slot(min(first + my_row, r.count - 1))),
        positive_id(a.masked() ? r.id(r.column_place(slot * a.m)) : -1) {
    if (threadIdx.x < T::kRows) sh.row_places[threadIdx.x] = r.row_place(first + my_row);
  }

  __device__ void run(int strip) {
    const int k = strip * a.strip_groups, k_end = min(k + a.strip_groups, a.groups);
    if (i >= 2) {
      const RowLse whole = over(begin_of(k), begin_of(k_end));
      if (part == 0 && valid()) store_entry(rows.strip_part(i, strip), first + my_row, whole);
    } else if (a.group * a.m <= T::kColumns) {
      narrow_groups(k, k_end);
    } else {
      wide_groups(k, k_end);
    }
  }

 private:
  __device__ bool valid() const { return first + my_row < rows.count; }
  // First slot of a group; slots not filled yet are left out.
  __device__ int begin_of(int k) const { return min(begin + k * a.group, limit); }
  // Where head divides group k, else its end.
  __device__ int cut_of(int k) const {
    const int head = rows.ring.head, end = begin_of(k + 1);
    return i == 0 && head > begin_of(k) && head < end ? head : end;
  }
  __device__ void put(int k, const RowLse& lse, const RowLse& rest) const {
    if (!valid()) return;
    store_entry(rows.group_part(i, k), first + my_row, lse);
    if (i == 0 && k == rows.ring.passed_groups())
      store_entry(rows.group_part(0, a.groups), first + my_row, rest);
  }

  // As many whole groups as a tile holds at a time.
  __device__ void narrow_groups(int k, int k_end) {
    const int at_once = T::kColumns / (a.group * a.m);
    for (; k < k_end; k += at_once) {
      const int last = min(k + at_once, k_end), tile = begin_of(k) * a.m;
      const int end = begin_of(last) * a.m;
      if (tile < end) score(tile, end);
      for (int g = k + part; g < last; g += T::kParts) {
        RowLse lse, rest;
        const int cut = cut_of(g) * a.m - tile;
        add_columns(lse, begin_of(g) * a.m - tile, cut, tile);
        add_columns(rest, cut, begin_of(g + 1) * a.m - tile, tile);
        put(g, lse, rest);
      }
      __syncthreads();  // the scores lie where the next slices will
    }
  }

  __device__ void wide_groups(int k, int k_end) {
    for (; k < k_end; ++k) {
      const int cut = cut_of(k);
      const RowLse lse = over(begin_of(k), cut), rest = over(cut, begin_of(k + 1));
      if (part == 0) put(k, lse, rest);
    }
  }

  // Log-sum-exp over slots [from, to); the threads of part 0 get it.
  __device__ RowLse over(int from, int to) {
    constexpr int kShare = T::kColumns / T::kParts;
    RowLse lse;
    for (int tile = from * a.m; tile < to * a.m; tile += T::kColumns) {
      const int end = min(tile + T::kColumns, to * a.m);
      score(tile, end);
      add_columns(lse, part * kShare, min((part + 1) * kShare, end - tile), tile);
      __syncthreads();  // the scores lie where the next slices will
    }
    sh.part_max[part][my_row] = lse.max;
    sh.part_sum[part][my_row] = lse.sum;
    if constexpr (kExpect) sh.part_weighted[part][my_row] = lse.weighted;
    __syncthreads();
    if (part == 0)
#pragma unroll
      for (int p = 1; p < T::kParts; ++p) {
        RowLse other;
        other.max = sh.part_max[p][my_row];
        other.sum = sh.part_sum[p][my_row];
        if constexpr (kExpect) other.weighted = sh.part_weighted[p][my_row];
        lse.add(other);
      }
    __syncthreads();  // before the parts of another range
    return lse;
  }

  // Add the thread's row's scores [c, end) of a tile that begins with flat column `tile`.
  __device__ void add_columns(RowLse& lse, int c, int end, int tile) const {
    const int own = slot * a.m - tile;
    for (; c < end; c += kAtOnce) {
      float s[kAtOnce], top = lse.max;
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        const int x = c + e;
        const bool out = x >= end || (positive_id != -1 && sh.ids[x] == positive_id && x != own);
        float sum = 0;
#pragma unroll
        for (int w = 0; w < T::kWarpsDeep; ++w) sum += sh.scores[w][my_row][x];
        s[e] = out ? minus_infinity<float>() : sum * a.scale;
        top = s[e] > top ? s[e] : top;
      }
      const float from =
          top == minus_infinity<float>() ? 0.f : top;  // -inf minus -inf would be NaN
      const float shrink = exp2_((lse.max - from) * kLog2e);
      lse.sum *= shrink;
      if constexpr (kExpect) lse.weighted *= shrink;
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        const float weight = exp2_((s[e] - from) * kLog2e);
        lse.sum += weight;
        // 0 times -inf would be NaN
        if constexpr (kExpect)
          lse.weighted += s[e] == minus_infinity<float>() ? 0.f : weight * s[e];
      }
      lse.max = top;
    }
  }

  __device__ void load_slice(int column, int end, int k0, int stage) {
    const uint32_t to = shared_address(sh.stage[stage]);
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks, k = k0 + chunk * 8;
#pragma unroll
    for (int x = 0; x < T::kRows / kRowsAtOnce; ++x) {
      const int r = row + x * kRowsAtOnce;
      const bool inside = first + r < rows.count && k < a.d;
      copy_16(to + r * T::kRowBytes + chunk * 16,
              inside ? rows.query(sh.row_places[r]) + k : a.queries, inside);
    }
#pragma unroll
    for (int x = 0; x < T::kColumns / kRowsAtOnce; ++x) {
      const int c = row + x * kRowsAtOnce;
      const bool inside = column + c < end && k < a.d;
      copy_16(to + (T::kRows + c) * T::kRowBytes + chunk * 16,
              inside ? rows.passage(sh.column_places[c]) + k : a.queries, inside);
    }
  }

  // Scores of the rows against flat columns [column, end), and the columns' ids, into shared
  // memory. Callers have left what lay there behind a barrier.
  __device__ void score(int column, int end) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp % T::kWarpsDown * T::kWarpRows;
    const int warp_column = warp / T::kWarpsDown % T::kWarpsAcross * T::kWarpColumns;
    const int deep = warp / (T::kWarpsDown * T::kWarpsAcross);
    const int slices = (a.d + T::kSlice - 1) / T::kSlice;
    const int mine = column + threadIdx.x;
    int64_t id = -1;  // asked for before the copies, waited for beside them
    if (threadIdx.x < T::kColumns) {
      const int place = rows.column_place(mine);
      sh.column_places[threadIdx.x] = place;
      if (a.masked() && mine < end) id = rows.id(place);
    }
    __syncthreads();
    for (int s = 0; s < T::kStages - 1; ++s) {
      if (s < slices) load_slice(column, end, s * T::kSlice, s);
      copy_commit();
    }
    if (threadIdx.x < T::kColumns) sh.ids[threadIdx.x] = id;

    float acc[MT][NT][4] = {};
    int stage = 0;
    for (int s = 0; s < slices; ++s) {
      copy_wait<T::kStages - 2>();
      __syncthreads();  // slice s has landed for all; slice s - 1 has been used by all
      const int ahead = s + T::kStages - 1;
      if (ahead < slices)
        load_slice(column, end, ahead * T::kSlice, stage == 0 ? T::kStages - 1 : stage - 1);
      copy_commit();
      const uint32_t at = shared_address(sh.stage[stage]);
      const uint32_t from_rows = at + (warp_row + lane % 16) * T::kRowBytes + lane / 16 * 16;
      // Matrices of a load: columns 0 - 7 and 8 - 15 of d of eight columns, then of the next eight.
      const uint32_t from_columns =
          at + (T::kRows + warp_column + lane / 16 * 8 + lane % 8) * T::kRowBytes +
          lane / 8 % 2 * 16;
#pragma unroll
      for (int step = 0; step < T::kSlice / 16 / T::kWarpsDeep; ++step) {
        const int offset = (step * T::kWarpsDeep + deep) * 32;
        uint32_t x[MT][4], y[NT / 2][4];
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
          load_matrices(x[mt], from_rows + mt * 16 * T::kRowBytes + offset);
#pragma unroll
        for (int nt = 0; nt < NT / 2; ++nt)
          load_matrices(y[nt], from_columns + nt * 16 * T::kRowBytes + offset);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int nt = 0; nt < NT; ++nt)
            multiply_add<S>(acc[mt][nt], x[mt], y[nt / 2][nt % 2 * 2], y[nt / 2][nt % 2 * 2 + 1]);
      }
      stage = stage + 1 == T::kStages ? 0 : stage + 1;
    }
    copy_wait<0>();
    __syncthreads();  // the scores take the place of the slices
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sh.scores[deep][warp_row + mt * 16 + e / 2 * 8 + lane / 4]
                   [warp_column + nt * 8 + lane % 4 * 2 + e % 2] = acc[mt][nt][e];
    __syncthreads();
  }

  const Args<S>& a;
  const EntryRows<S, kExpect>& rows;
  Shared& sh;
  const int i, begin, limit;  // the block, its first slot, its last filled slot + 1
  const int first, my_row, part, slot;
  const int64_t positive_id;
};

// Grid (rows / kRows, strips, 2 + blocks), whatever place in it the thread block has.
template <class S, class T, bool kExpect>
__device__ void score_strip(const Args<S>& a, Entries which, int first_row, dim3 at, char* shared) {
  using Scores = ScoreEntries<S, T, kExpect>;
  // The ring's position is asked for before the barrier that has_entered() waits at.
  const EntryRows<S, kExpect> rows(a, which, first_row, true);
  const int first = at.x * T::kRows;
  if (!has_entered(a, which) || first >= rows.count || rows.block(at.z) < 0) return;
  Scores(rows, *reinterpret_cast<typename Scores::Shared*>(shared), first, at.z).run(at.y);
}

template <class S, class T, bool kExpect>
__global__ void __launch_bounds__(kThreads, 2)
    score_entries_mma(const Args<S> a, Entries which, int first_row) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // earlier GPUs take entries.cuh
  extern __shared__ __align__(16) char dynamic[];
  score_strip<S, T, kExpect>(a, which, first_row, blockIdx, dynamic);
#endif
}

}  // namespace contaccum
