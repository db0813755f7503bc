// One side of the loss on tensor cores, for 16-bit banks of d <= 1024; what attend.cuh computes.
//
// - The bank is the M operand of both products and the local vectors the N operand, so eight of
//   them waste nothing. Warps split d: each loads its slice of a tile, multiplies it with its slice
//   of the local vectors (in registers), and uses the same slice again for the weighted sum.
// - Only the scores cross warps: 32 x 32 partial sums through shared memory, two barriers a tile.
// - A warp's slice of a tile is its own from load to last use, so the pipeline needs no barrier.
#pragma once

#include "online_softmax.cuh"
#include "ptx_mma.cuh"
#include "ring.cuh"
#include "tile_config.cuh"

namespace contaccum {

// Vectors [j, j + count) of a flat array with m vectors a slot.
struct BankTile {
  int j, count;
  int mean;  // their row of means, or -1 without offsets
  int unit;
  bool in_loss, for_table;
};

// The tiles of a split, one after the other. The pipeline runs one ahead of the other.
template <class S, bool kQuerySide, int kTile>
class TileWalk {
 public:
  __device__ TileWalk(const Args<S>& args, const Ring<S>& r, int split, int local_splits,
                      int bank_splits)
      : a(args),
        ring(r),
        local(split < local_splits),
        m(kQuerySide && !local ? int(args.m) : 1),
        step(m <= kTile ? kTile / m * m : kTile) {
    if (local) {
      const int64_t vectors = kQuerySide ? a.n * a.m : a.n;
      j = int(vectors * split / local_splits);
      run_end = int(vectors * (split + 1) / local_splits);
      tile = {0, 0, -1, 0, true, false};
      return;
    }
    split -= local_splits;
    const int64_t units = kQuerySide ? a.blocks * a.parts : ring.fill;
    tile.unit = first_unit = int(units * split / bank_splits);
    last_unit = int(units * (split + 1) / bank_splits);
    if constexpr (kQuerySide) {
      --tile.unit;
    } else {
      slot = first_unit;
      slot_end = last_unit;
      tile.for_table = false;
    }
  }

  // Whether there is another tile.
  __device__ bool next() {
    while (j >= run_end)
      if (!next_run()) return false;
    tile.j = j;
    tile.count = min(step, run_end - j);
    j += tile.count;
    return true;
  }

  const Args<S>& a;
  const Ring<S>& ring;
  const bool local;
  const int m;     // vectors a slot
  const int step;  // vectors a tile: whole slots where they fit
  BankTile tile{};
  int first_unit = 0, last_unit = 0;

 private:
  __device__ bool next_run() {
    if (local) return false;
    while (slot >= slot_end) {
      if (!kQuerySide || ++tile.unit >= last_unit) return false;
      const int b = tile.unit / a.parts;
      slot = b * a.block + tile.unit % a.parts * a.unit_slots;
      slot_end = min(min(slot + a.unit_slots, ring.block_end(b)), ring.fill);
      tile.for_table = a.incremental && !ring.is_direct(b);
    }
    Run run = ring.run(slot, slot_end);
    // A unit lies in one block: without offsets nothing but head can divide it.
    if (kQuerySide && !a.use_offsets && (slot >= ring.head || slot_end <= ring.head))
      run.end = slot_end;
    slot = run.end;
    tile.in_loss = run.in_window && (kQuerySide ? a.banked_columns : a.banked_rows);
    tile.mean = a.use_offsets && tile.in_loss ? run.mean : -1;
    if (!tile.in_loss && !tile.for_table) return true;
    j = run.begin * m;
    run_end = run.end * m;
    return true;
  }

  int j = 0, run_end = 0;
  int slot = 0, slot_end = 0;
};

template <class S, bool kQuerySide, class Tile>
class AttendMma {
  static constexpr int MT = Tile::MT, NT = Tile::NT, kLocal = Tile::kLocal, kBank = Tile::kBank;
  static constexpr int kPer = kLocal * kBank / kThreads;  // scores of a thread: one row, neighbours
  static constexpr int kRowLanes = kBank / kPer;
  static_assert(kPer == NT && kRowLanes <= 32, "a local row's scores lie in one warp");
  using Walk = TileWalk<S, kQuerySide, kBank>;
  // Weights are at most 1, most far less: below 6e-5 a half would lose bits.
  static constexpr float kWeightScale = std::is_same_v<S, F16> ? 32768.f : 1.f;

 public:
  __device__ AttendMma(const Args<S>& args, const Ring<S>& r, char* dynamic, int stage_count)
      : a(args),
        ring(r),
        sh(*reinterpret_cast<typename Tile::Shared*>(dynamic)),
        stages(stage_count),
        total(kQuerySide ? args.n : args.n * args.m),
        first(blockIdx.y * kLocal),
        locals(kQuerySide ? args.local_queries : args.local_passages),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        slice(warp * Tile::kSlice),
        my_stage(shared_address(dynamic) + Tile::kSharedBytes + warp * kBank * Tile::kRowBytes),
        my_local(threadIdx.x / kRowLanes),
        my_column(threadIdx.x % kRowLanes * kPer) {
    const int l = first + my_local;
    valid = l < total;
    if (a.masked() && valid) my_id = a.local_ids[kQuerySide ? int64_t(l) * a.m : l];
  }

  __device__ void run(int local_splits, int bank_splits) {
    Walk ahead(a, ring, blockIdx.x, local_splits, bank_splits);
    Walk walk(a, ring, blockIdx.x, local_splits, bank_splits);
    if constexpr (kQuerySide)
      vectors = walk.local ? a.local_passages : a.passages;
    else
      vectors = walk.local ? a.local_queries : a.queries;
    for (int s = 0; s < stages; ++s) load_tile(ahead, s);
    load_locals();
    int stage = 0, unit = walk.first_unit;
    while (walk.next()) {
      const BankTile& t = walk.tile;
      if (t.unit != unit) close_units(unit, t.unit);
      float lse[kPer];  // asked for early, used after the barrier
      if constexpr (!kQuerySide)
#pragma unroll
        for (int e = 0; e < kPer; ++e)
          lse[e] = my_column + e < t.count
                       ? (walk.local ? a.local_lse : a.row_lse)[t.j + my_column + e]
                       : 0.f;
      wait_tile();
      score(stage);
      if (t.mean >= 0 && (t.mean != bias_mean || walk.m > kBank)) offset_scores(t, walk.m);
      __syncthreads();
      weigh(t, walk.local, walk.m, lse);
      __syncthreads();
      if (a.with_grad && t.in_loss) accumulate(t, stage, walk.m);
      __syncwarp();  // the slice has been read by every lane before it is overwritten
      load_tile(ahead, stage);
      stage = stage + 1 == stages ? 0 : stage + 1;
    }
    if (!walk.local) close_units(unit, walk.last_unit);
    copy_wait<0>();
  }

  __device__ void store() {
    const int64_t at = int64_t(blockIdx.x) * total + first;
    if (kQuerySide) {
      for (int bit = 1; bit < kRowLanes; bit *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
      if (valid && my_column == 0) {
        a.part_max[at + my_local] = top;
        a.part_sum[at + my_local] = sum;
      }
    }
    if (!a.with_grad) return;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int k = slice + mt * 16 + lane / 4 + e / 2 * 8, l = nt * 8 + lane % 4 * 2 + e % 2;
          if (k < a.d && first + l < total)
            a.part_out[(at + l) * a.d + k] = acc[mt][nt][e] * (1.f / kWeightScale);
        }
  }

 private:
  // The lane's part of its warp's slice of a tile; a group is committed even where no tile is left,
  // so that the number of groups in flight stays known.
  __device__ void load_tile(Walk& ahead, int stage) {
    if (ahead.next()) {
      constexpr int kChunks = 2 * MT, kRowsAtOnce = 32 / kChunks;
      const int first_row = lane / kChunks, chunk = lane % kChunks;
      const int rows = slice + chunk * 8 < a.d ? ahead.tile.count : 0;
      uint32_t to = my_stage + stage * Tile::kStageBytes + first_row * Tile::kRowBytes + chunk * 16;
      const S* from = vectors + int64_t(ahead.tile.j + first_row) * a.d + slice + chunk * 8;
#pragma unroll
      for (int i = 0; i < kBank; i += kRowsAtOnce) {
        const int row = i + first_row;
        if (first_row < kRowsAtOnce && row < kBank)
          copy_16(to, row < rows ? from : vectors, row < rows);
        to += kRowsAtOnce * Tile::kRowBytes;
        from += kRowsAtOnce * a.d;
      }
    }
    copy_commit();
  }
  __device__ void wait_tile() {
    if (stages == 3)
      copy_wait<2>();
    else if (stages == 2)
      copy_wait<1>();
    else
      copy_wait<0>();
    __syncwarp();
  }

  // B fragments of the local vectors: element k = 2 (lane % 4) and 8 further, column lane / 4.
  __device__ void load_locals() {
#pragma unroll
    for (int ks = 0; ks < MT; ++ks)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int l = first + nt * 8 + lane / 4, k = slice + ks * 16 + half * 8 + lane % 4 * 2;
          local[ks][nt][half] =
              l < total && k < a.d
                  ? *reinterpret_cast<const uint32_t*>(locals + int64_t(l) * a.d + k)
                  : 0u;
        }
  }

  // The warp's share of the scores: its slice of the tile times its slice of the local vectors.
  __device__ void score(int stage) {
    float s[kBank / 16][NT][4] = {};
    const uint32_t from =
        my_stage + stage * Tile::kStageBytes + lane % 16 * Tile::kRowBytes + lane / 16 * 16;
#pragma unroll
    for (int ks = 0; ks < MT; ++ks)
#pragma unroll
      for (int bt = 0; bt < kBank / 16; ++bt) {
        uint32_t x[4];
        load_matrices(x, from + bt * 16 * Tile::kRowBytes + ks * 32);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
          multiply_add<S>(s[bt][nt], x, local[ks][nt][0], local[ks][nt][1]);
      }
#pragma unroll
    for (int bt = 0; bt < kBank / 16; ++bt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sh.part[warp][nt * 8 + lane % 4 * 2 + e % 2][bt * 16 + lane / 4 + e / 2 * 8] =
              s[bt][nt][e];
  }

  __device__ int kind(const BankTile& t, int m, int i) const {
    return kQuerySide ? 1 + (t.j + i) % m : 0;
  }

  // Scores of the offsets mean_now - mean_of_run, a warp NT local vectors.
  __device__ void offset_scores(const BankTile& t, int m) {
    const int kinds = min(m, m <= kBank ? m : t.count);
    bias_mean = t.mean;
    for (int i = 0; i < kinds; ++i) {
      const float* now = a.mean(0, kind(t, m, i));
      const float* then = a.mean(t.mean, kind(t, m, i));
      float dot[NT] = {};
      for (int k = lane; k < a.d; k += 32) {
        const float offset = now[k] - then[k];
#pragma unroll
        for (int r = 0; r < NT; ++r)
          dot[r] +=
              offset * to_acc(locals[int64_t(min(first + warp * NT + r, total - 1)) * a.d + k]);
      }
#pragma unroll
      for (int r = 0; r < NT; ++r) {
        const float whole = warp_sum(dot[r]) * a.scale;
        if (lane == 0) sh.bias[warp * NT + r][i] = whole;
      }
    }
  }

  // Add up the warps' shares; mask; turn scores into weights.
  __device__ void weigh(const BankTile& t, bool is_local, int m, const float (&lse)[kPer]) {
    float s[kPer] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      float share[kPer];
      load<kPer>(&sh.part[w][my_local][my_column], share);
#pragma unroll
      for (int e = 0; e < kPer; ++e) s[e] += share[e];
    }
#pragma unroll
    for (int e = 0; e < kPer; ++e) {
      const int c = my_column + e;
      s[e] *= a.scale;
      if (c >= t.count || !valid || left_out(t.j + c, is_local)) s[e] = minus_infinity<float>();
      if (t.for_table) unit_lse.add_score(s[e]);
    }
    if (!t.in_loss) return;
    if (t.mean >= 0)
#pragma unroll
      for (int e = 0; e < kPer; ++e) s[e] += sh.bias[my_local][(my_column + e) % m];
    if constexpr (kQuerySide) {
      float tile_top = s[0];
#pragma unroll
      for (int e = 1; e < kPer; ++e) tile_top = s[e] > tile_top ? s[e] : tile_top;
      for (int bit = 1; bit < kRowLanes; bit *= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, tile_top, bit);
        tile_top = other > tile_top ? other : tile_top;
      }
      const float new_top = tile_top > top ? tile_top : top;
      const float factor = top == new_top ? 1.f : expf(top - new_top);
      sum *= factor;
      top = new_top;
      if (my_column == 0) sh.shrink[my_local] = factor;
    }
#pragma unroll
    for (int e = 0; e < kPer; ++e) {
      const int c = my_column + e;
      const float reference = kQuerySide ? top : lse[e];
      s[e] = s[e] == minus_infinity<float>() ? 0.f : expf(s[e] - reference);
      sum += s[e];
      // The target is in the sum, not in the product: see reduce.cuh.
      const bool own = is_local && (kQuerySide ? t.j + c == (first + my_local) * a.m
                                               : first + my_local == (t.j + c) * a.m);
      store_weight(my_local, c, own ? 0.f : s[e]);
    }
    if (t.mean >= 0) {
      const int kinds = min(m, t.count);
      for (int i = 0; i < kinds; ++i) {
        float mass = 0;
#pragma unroll
        for (int e = 0; e < kPer; ++e) mass += (my_column + e) % m == i ? s[e] : 0.f;
        for (int bit = 1; bit < kRowLanes; bit *= 2)
          mass += __shfl_xor_sync(0xffffffffu, mass, bit);
        if (my_column == 0) sh.mass[my_local][i] = mass * kWeightScale;
      }
    }
  }

  // Rounded to the bank's dtype, as the vectors that it weighs.
  __device__ void store_weight(int l, int c, float w) {
    S* rounded = reinterpret_cast<S*>(&sh.weight[l][c]);
    if constexpr (std::is_same_v<S, Bf16>)
      *rounded = __float2bfloat16(w * kWeightScale);
    else
      *rounded = __float2half(w * kWeightScale);
  }

  // See Attend::left_out.
  __device__ bool left_out(int j, bool is_local) const {
    if (my_id == -1) return false;
    if constexpr (kQuerySide) {
      const int64_t column = is_local ? a.local_ids[j] : a.ids[j];
      return column == my_id && !(is_local && j == (first + my_local) * a.m);
    } else {
      const int64_t positive = (is_local ? a.local_ids : a.ids)[int64_t(j) * a.m];
      return positive == my_id && !(is_local && first + my_local == j * a.m);
    }
  }

  // acc (slice of d, locals) += tile^T (slice, bank) * weights^T (bank, locals)
  __device__ void accumulate(const BankTile& t, int stage, int m) {
    if constexpr (kQuerySide) {
      float factor[NT][2];
      bool changed = false;
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          factor[nt][e] = sh.shrink[nt * 8 + lane % 4 * 2 + e];
          changed |= factor[nt][e] != 1.f;
        }
      if (__any_sync(0xffffffffu, changed)) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[mt][nt][e] *= factor[nt][e % 2];
      }
    }
    const uint32_t from = my_stage + stage * Tile::kStageBytes +
                          (lane / 16 * 8 + lane % 8) * Tile::kRowBytes + lane / 8 % 2 * 16;
    const uint32_t weights = shared_address(sh.weight);
#pragma unroll
    for (int kk = 0; kk < kBank / 16; ++kk) {
      uint32_t w[NT][2];
#pragma unroll
      for (int nt = 0; nt < NT; nt += 2) {
        // With a single n-tile the upper lanes' addresses are unused: they repeat the lower ones.
        const int matrix = lane / 8, row = (nt + (NT > 1 ? matrix / 2 : 0)) * 8 + lane % 8;
        uint32_t r[4];
        load_matrices(r, weights + row * Tile::kWeightStride * 2 + (kk * 2 + matrix % 2) * 16);
        w[nt][0] = r[0];
        w[nt][1] = r[1];
        if constexpr (NT > 1) {
          w[nt + 1][0] = r[2];
          w[nt + 1][1] = r[3];
        }
      }
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
        uint32_t x[4];
        load_matrices_transposed(x, from + kk * 16 * Tile::kRowBytes + mt * 32);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) multiply_add<S>(acc[mt][nt], x, w[nt][0], w[nt][1]);
      }
    }
    if (t.mean < 0) return;
    for (int i = 0; i < min(m, t.count); ++i) {
      const float* now = a.mean(0, kind(t, m, i));
      const float* then = a.mean(t.mean, kind(t, m, i));
      float mass[NT][2];
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int e = 0; e < 2; ++e) mass[nt][e] = sh.mass[nt * 8 + lane % 4 * 2 + e][i];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int k = slice + mt * 16 + lane / 4 + half * 8;
          const float offset = k < a.d ? now[k] - then[k] : 0.f;
#pragma unroll
          for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e) acc[mt][nt][half * 2 + e] += offset * mass[nt][e];
        }
    }
  }

  // Table entries of units [unit, end): the first is what has been summed, the others are empty.
  __device__ void close_units(int& unit, int end) {
    if (!kQuerySide || !a.incremental) return;
    unit_lse.merge_lanes(kRowLanes);
    for (; unit < end; ++unit) {
      if (valid && my_column == 0)
        a.unit_lse[int64_t(unit) * a.n + first + my_local] = unit_lse.value();
      unit_lse = Lse<float>{};
    }
  }

  const Args<S>& a;
  const Ring<S>& ring;
  typename Tile::Shared& sh;
  const int stages, total, first;
  const S* locals;
  const S* vectors;
  const int warp, lane, slice;
  const uint32_t my_stage;
  const int my_local, my_column;  // the thread's scores: of one local vector, kPer columns
  bool valid;
  int64_t my_id = -1;  // id of the local row's positive, or of the local column
  int bias_mean = -1;
  float acc[MT][NT][4] = {};
  uint32_t local[MT][NT][2];
  float top = minus_infinity<float>(), sum = 0;  // sum still apart by lane
  Lse<float> unit_lse;
};

// Grid (local and bank splits, rows / kLocal).
template <class S, bool kQuerySide, int MT, int NT>
__global__ void __launch_bounds__(kThreads, 1) attend_mma(const Args<S> a, int stages) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // earlier GPUs take attend.cuh
  extern __shared__ __align__(16) char dynamic[];
  const Ring<S> ring(a, kQuerySide ? a.cursor : a.position);
  AttendMma<S, kQuerySide, MmaTile<MT, NT>> side(a, ring, dynamic, stages);
  side.run(kQuerySide ? a.local_splits : a.gradient_local,
           kQuerySide ? a.bank_splits : a.gradient_bank);
  side.store();
#endif
}

}  // namespace contaccum
