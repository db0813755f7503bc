// One side of the loss on Hopper's tensor cores, for 16-bit banks of d <= 1024; what attend.cuh
// computes, for batches of more than a few vectors.
//
// - A block holds 64 local vectors and walks over the bank in tiles of 64. Bank and weights come as
//   the operands of warpgroup products from shared memory; sums stay in registers.
// - 64 x d sums fill the registers at d = 384. For more, two blocks share the elements of d as a
//   cluster: each multiplies its half, they exchange partial scores, both weigh the whole tile.
// - One warp asks the copy engine for tiles, one warpgroup makes scores into weights, two sum up
//   weighted tiles. Scores of the next tile are under way while those of a tile are exchanged.
// - The maximum of the online softmax is raised only when a score exceeds it by 2^8, which after
//   the first tiles is rare: until then no thread needs to know another's scores.
#pragma once

#include "online_softmax.cuh"
#include "ptx_sm90a.cuh"
#include "slot_walk.cuh"
#include "tile_config.cuh"

namespace contaccum {

// What the scoring warpgroup tells the summing ones about a buffer of weights.
enum class Order : int { add, rescale_and_add, skip, stop };

template <class T>
struct HopperShared {
  char local[T::kOperandBytes];            // 64 local vectors
  char tile[T::kStages][T::kOperandBytes];  // 64 bank vectors
  char weight[2][T::kWeightBytes];         // (bank, local)
  float4 partial[T::kCluster == 2 ? 8 : 1][T::kGroup];  // the other block's share of the scores
  float reference[2][T::kLocal];                        // of the loss; of the table
  float shrink[2][T::kLocal];
  float bias[2][T::kLocal];
  int64_t local_id[T::kLocal];
  Order order[2];
  uint64_t locals_ready, full[T::kStages], empty[T::kStages], weights_full[2], weights_empty[2];
  uint64_t partial_full, partial_empty;
};

struct HopperMaps {
  CUtensorMap locals, local_vectors, bank;
};

// The query side comes twice: what offsets need there would cost registers without them.
enum class Side { queries, queries_with_offsets, passages };

template <class S, Side kSide, class T>
class AttendHopper {
  static constexpr bool kQuerySide = kSide != Side::passages;
  using Shared = HopperShared<T>;
  using Walk = SlotWalk<S, kQuerySide>;
  static constexpr int kScores = 32;  // of a thread: 2 bank vectors x 16 locals
  static constexpr float kRoom = 8;  // a score may exceed the reference by a factor of 2^kRoom
  // Weights at the reference are 2^kShift: a half keeps its bits down to 2^-14 and ends at 2^16.
  static constexpr float kShift = !std::is_same_v<S, F16> ? 0 : kQuerySide ? 7 : 14;

 public:
  __device__ AttendHopper(const Args<S>& args, const Ring<S>& r, const HopperMaps& maps_, char* raw)
      : a(args),
        ring(r),
        maps(maps_),
        sh(*reinterpret_cast<Shared*>(raw)),
        rank(T::kCluster == 2 ? int(cluster_rank()) : 0),
        split(blockIdx.x / T::kCluster),
        splits(gridDim.x / T::kCluster),
        total(kQuerySide ? args.n : args.n * args.m),
        first(blockIdx.y * T::kLocal),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32 % 4) {}

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      barrier_init(at(sh.locals_ready), 1);
      for (int s = 0; s < T::kStages; ++s) {
        barrier_init(at(sh.full[s]), 1);
        barrier_init(at(sh.empty[s]), 8);  // the warps that sum
      }
      for (int b = 0; b < 2; ++b) {
        barrier_init(at(sh.weights_full[b]), 4);  // the warps that score
        barrier_init(at(sh.weights_empty[b]), 8);
      }
      barrier_init(at(sh.partial_full), 1);
      barrier_init(at(sh.partial_empty), 4);
      barrier_init_fence();
    }
    if (T::kCluster == 2)
      cluster_sync();
    else
      __syncthreads();
    // Registers go where they are needed: 512 for each of the four groups' threads together.
    const int group = uniform(threadIdx.x / T::kGroup);
    if (group == 0) {
      registers_up_to<T::kScoreRegisters>();
      score();
    } else if (group <= 2) {
      registers_up_to<T::kSumRegisters>();
      sum_up(group - 1);
    } else {
      registers_down_to<T::kCopyRegisters>();
      if (threadIdx.x == 3 * T::kGroup) copy();
    }
    __syncwarp();
    if (T::kCluster == 2) cluster_sync();  // neither block leaves while the other may write to it
  }

 private:
  // Not known to the compiler otherwise; products in a branch that might diverge are serialised.
  template <class V>
  __device__ __forceinline__ static V uniform(V x) {
    return V(__shfl_sync(0xffffffffu, int(x), 0));
  }

  template <class V>
  __device__ __forceinline__ static uint32_t at(const V& variable) {
    return shared_address(&variable);
  }

  // --- one thread: tiles from global memory -------------------------------------------------------

  __device__ __forceinline__ void copy_vectors(char* to, const CUtensorMap* map, int kind, int row,
                               uint32_t barrier) {
    barrier_expect(barrier, T::kOperandBytes);
#pragma unroll
    for (int c = 0; c < T::kColumns; ++c)
      copy_box(shared_address(to) + c * T::kBoxBytes, map, rank * T::kSlice + c * kBoxColumns, kind,
               row, barrier);
  }

  __device__ __forceinline__ void copy() {
    prefetch_map(&maps.bank);
    copy_vectors(sh.local, &maps.locals, 0, first, at(sh.locals_ready));
    Walk walk(a, ring, split, splits);
    for (int i = 0; walk.next(); ++i) {
      const int stage = i % T::kStages;
      if (i >= T::kStages) barrier_wait(at(sh.empty[stage]), (i / T::kStages - 1) & 1);
      const SlotTile& t = walk.tile;
      copy_vectors(sh.tile[stage], t.local ? &maps.local_vectors : &maps.bank, t.kind, t.slot,
                   at(sh.full[stage]));
    }
  }

  // --- a warpgroup: scores to weights --------------------------------------------------------------

  // A tile and what its weighing needs from global memory, asked for a tile ahead.
  struct Prepared {
    SlotTile tile;
    int row;           // the thread's bank vectors in the tile: row and row + 8
    float lse[2];      // passage side, base 2
    int64_t id[2];     // query side: of the column; passage side: of the row's positive
    float bias;        // of the local vector threadIdx.x
  };

  __device__ __forceinline__ bool prepare(Walk& walk, Prepared& p) {
    if (!walk.next()) return false;
    const SlotTile& t = p.tile = walk.tile;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = min(my_row() + 8 * h, t.count - 1);
      if constexpr (!kQuerySide) p.lse[h] = (t.local ? a.local_lse : a.row_lse)[t.slot + r];
      if (a.masked())
        p.id[h] = (t.local ? a.local_ids : a.ids)[int64_t(t.slot + r) * a.m +
                                                  (kQuerySide ? t.kind : 0)];
    }
    if (use_offsets() && t.mean >= 0 && threadIdx.x < T::kLocal) {
      const int64_t kind = kQuerySide ? int64_t(t.mean - 1) * a.m + t.kind : t.mean - 1;
      p.bias = first + int(threadIdx.x) < total
                   ? (kQuerySide ? a.query_bias : a.passage_bias)[kind * total + first + threadIdx.x]
                   : 0.f;
    }
    return true;
  }

  __device__ __forceinline__ bool use_offsets() const {
    return kQuerySide ? kSide == Side::queries_with_offsets : a.use_offsets;
  }
  __device__ __forceinline__ int my_row() const { return warp * 16 + lane / 4; }
  __device__ __forceinline__ int my_local(int j) const { return 8 * j + lane % 4 * 2; }  // and its neighbour

  __device__ __forceinline__ void wait_tile(int i) {
    barrier_wait(at(sh.full[i % T::kStages]), i / T::kStages & 1);
  }

  // The block's share of the scores of tile i: bank x local vectors, over its elements of d.
  __device__ __forceinline__ void start_scores(int i, float (&s)[kScores]) {
    const int stage = i % T::kStages;
    hold(s);
    products_begin();
    const uint64_t bank = matrix_at(shared_address(sh.tile[stage]));
    const uint64_t locals = matrix_at(shared_address(sh.local));
#pragma unroll
    for (int c = 0; c < T::kColumns; ++c)
#pragma unroll
      for (int k = 0; k < kBoxColumns / 16; ++k) {
        const int step = (c * T::kBoxBytes + k * 32) >> 4;  // 16 elements along the rows
        product<S, false>(s, bank + step, locals + step, c + k > 0);
      }
    products_commit();
  }

  __device__ __forceinline__ void end_scores(float (&s)[kScores]) {
    products_wait<0>();
    hold(s);
  }

  // To the thread of the same place in the other block; the sums are the same bits in both.
  __device__ __forceinline__ void send_scores(int i, const float (&s)[kScores]) {
    if constexpr (T::kCluster == 2) {
      if (i > 0) barrier_wait(at(sh.partial_empty), (i - 1) & 1);
      const uint32_t barrier = shared_of(at(sh.partial_full), rank ^ 1);
#pragma unroll
      for (int q = 0; q < kScores / 4; ++q)
        store_there(shared_of(at(sh.partial[q][threadIdx.x]), rank ^ 1), s[4 * q], s[4 * q + 1],
                    s[4 * q + 2], s[4 * q + 3], barrier);
    }
  }
  __device__ __forceinline__ void receive_scores(int i, float (&s)[kScores]) {
    if constexpr (T::kCluster == 2) {
      if (threadIdx.x == 0) barrier_expect(at(sh.partial_full), sizeof(sh.partial));
      barrier_wait(at(sh.partial_full), i & 1);
#pragma unroll
      for (int q = 0; q < kScores / 4; ++q) {
        const float4 other = sh.partial[q][threadIdx.x];
        s[4 * q] += other.x;
        s[4 * q + 1] += other.y;
        s[4 * q + 2] += other.z;
        s[4 * q + 3] += other.w;
      }
      __syncwarp();
      if (lane == 0) barrier_arrive_there(shared_of(at(sh.partial_empty), rank ^ 1));
    }
  }

  __device__ __forceinline__ void score() {
    if (threadIdx.x < T::kLocal) {
      const int l = first + int(threadIdx.x);
      sh.local_id[threadIdx.x] =
          a.masked() && l < total ? a.local_ids[kQuerySide ? int64_t(l) * a.m : l] : -1;
      sh.reference[0][threadIdx.x] = sh.reference[1][threadIdx.x] = minus_infinity<float>();
    }
    named_sync<1, T::kGroup>();
    Walk walk(a, ring, split, splits);
    first_unit = walk.first_unit;
    unit = first_unit - 1;
    Prepared now{}, next{};
    float even[kScores] = {}, odd[kScores] = {};
    bool more = uniform(prepare(walk, now));
    barrier_wait(at(sh.locals_ready), 0);
    if (more) {
      wait_tile(0);
      start_scores(0, even);
      end_scores(even);
      send_scores(0, even);
    }
    int i = 0;
    // Behind the last tile the products run once more, on that tile, and are not used: products that
    // are under way on some paths only would be serialised.
    auto step = [&](float (&s)[kScores], float (&ahead)[kScores]) {
      const bool another = uniform(prepare(walk, next));
      if (another) wait_tile(i + 1);
      start_scores(another ? i + 1 : i, ahead);
      receive_scores(i, s);
      weigh(i, now, s);
      end_scores(ahead);
      if (another) send_scores(i + 1, ahead);
      now = next;
      ++i;
      return another;
    };
    while (more) {
      more = step(even, odd);
      if (more) more = step(odd, even);
    }
    claim(i);
    if (threadIdx.x == 0) sh.order[i % 2] = Order::stop;
    __syncwarp();
    if (lane == 0) barrier_arrive(at(sh.weights_full[i % 2]));
    if (kQuerySide) {
      close_units(walk.last_unit);
      store_sums();
    }
  }

  // The buffer of weights that tile i will fill; until then it serves sums across warps.
  __device__ __forceinline__ void claim(int i) {
    if (i >= 2) barrier_wait(at(sh.weights_empty[i % 2]), (i / 2 - 1) & 1);
    column = reinterpret_cast<float(*)[T::kLocal]>(sh.weight[i % 2]);
  }

  // Tile i: scores to weights, into the buffer that the summing warps read next.
  __device__ __forceinline__ void weigh(int i, const Prepared& p, float (&s)[kScores]) {
    const SlotTile& t = p.tile;
    const int buffer = i % 2;
    const bool biased = use_offsets() && t.mean >= 0;
    bool raised = false;
    float scale = a.scale * kLog2e, w[kScores];
    claim(i);
    if (kQuerySide && t.unit != unit) close_units(t.unit);
    if (t.local || t.count < kBoxRows || a.masked()) leave_out(p, s);
    if (kQuerySide && use_offsets() && t.for_table) {  // the table is without offsets
      raise<1>(s, scale, w, buffer);
      accumulate(w, unit_sum);
    }
    if (biased) {
      add_bias(p, s, scale, buffer);
      scale = 1;
    }
    if constexpr (kQuerySide) {
      raised = raise<0>(s, scale, w, buffer);
      if (!use_offsets())
        accumulate(w, unit_sum);
      else if (t.in_loss)
        accumulate(w, sum);
      unit_in_loss = t.in_loss;
    } else {
      const float top[2] = {p.lse[0] * kLog2e - kShift, p.lse[1] * kLog2e - kShift};
#pragma unroll
      for (int x = 0; x < kScores; ++x) w[x] = exp2_(s[x] * scale - top[x / 2 % 2]);
    }
    if (biased && a.with_grad) store_mass(t, w);
    if (t.local) drop_targets(t, w);
    if (t.in_loss && a.with_grad) store_weights(buffer, w);
    if (threadIdx.x == 0)
      sh.order[buffer] = !t.in_loss || !a.with_grad ? Order::skip
                         : raised                   ? Order::rescale_and_add
                                                    : Order::add;
    fence_for_products();
    __syncwarp();
    if (lane == 0) barrier_arrive(at(sh.weights_full[buffer]));
  }

  __device__ __forceinline__ void add_bias(const Prepared& p, float (&s)[kScores], float scale,
                                           int buffer) {
    if (threadIdx.x < T::kLocal) sh.bias[buffer][threadIdx.x] = p.bias;
    named_sync<1, T::kGroup>();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 b = *reinterpret_cast<const float2*>(&sh.bias[buffer][my_local(j)]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        s[4 * j + 2 * h] = s[4 * j + 2 * h] * scale + b.x;
        s[4 * j + 2 * h + 1] = s[4 * j + 2 * h + 1] * scale + b.y;
      }
    }
  }

  // No score where there is no vector or a false negative: the column holds the same passage as the
  // row's positive and is not it.
  __device__ __forceinline__ void leave_out(const Prepared& p, float (&s)[kScores]) {
    const SlotTile& t = p.tile;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = my_row() + 8 * h, own = t.local ? target(t, r) : -1;
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int l = my_local(j) + e;
          bool out = r >= t.count;
          if (a.masked()) {
            const int64_t mine = sh.local_id[l];
            out |= mine == p.id[h] && mine != -1 && l != own;
          }
          if (out) s[4 * j + 2 * h + e] = minus_infinity<float>();
        }
    }
  }
  // The local vector of this block that row r of a local tile is the target of, or has as its own.
  __device__ __forceinline__ int target(const SlotTile& t, int r) const {
    if constexpr (kQuerySide) return t.kind == 0 ? t.slot + r - first : -1;
    return (t.slot + r) * a.m - first;
  }
  // The target is summed apart: P - 1 is small where P is near 1, and must not be the difference
  // of a rounded weight and 1.
  __device__ __forceinline__ void drop_targets(const SlotTile& t, float (&s)[kScores]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int own = target(t, my_row() + 8 * h);
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (my_local(j) + e == own) s[4 * j + 2 * h + e] = 0;
    }
  }

  // sums: of the thread's 16 locals, over its bank vectors.
  __device__ __forceinline__ static void accumulate(const float (&w)[kScores], float (&sums)[16]) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) sums[2 * j + e] += w[4 * j + e] + w[4 * j + 2 + e];
  }

  // Weights: 2^(score - reference), of the loss (0) or of the table (1).
  __device__ __forceinline__ void relate(int which, const float (&s)[kScores], float scale,
                                         float (&x)[kScores]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float2 top = *reinterpret_cast<const float2*>(&sh.reference[which][my_local(j)]);
      top = {fmaxf(top.x, -1e30f), fmaxf(top.y, -1e30f)};  // -inf minus -inf would be NaN
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        x[4 * j + 2 * h] = s[4 * j + 2 * h] * scale - top.x;
        x[4 * j + 2 * h + 1] = s[4 * j + 2 * h + 1] * scale - top.y;
      }
    }
  }
  // Whether the references had to be raised, with all sums that hang on them: some weight is too
  // large. Without offsets the loss and the table share the references of the loss.
  template <int which>
  __device__ __forceinline__ bool raise(const float (&s)[kScores], float scale, float (&w)[kScores],
                                        int buffer) {
    bool raised = false;
#pragma unroll 1
    for (;; raised = true) {
      relate(which, s, scale, w);
      float most[8];
#pragma unroll
      for (int j = 0; j < 8; ++j)
        most[j] = fmaxf(fmaxf(w[4 * j], w[4 * j + 1]), fmaxf(w[4 * j + 2], w[4 * j + 3]));
      const float largest = fmaxf(fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3])),
                                  fmaxf(fmaxf(most[4], most[5]), fmaxf(most[6], most[7])));
      if (raised || !named_any<1, T::kGroup>(largest > kShift + kRoom)) break;
      raise_references<which>(s, scale, buffer);
    }
#pragma unroll
    for (int x = 0; x < kScores; ++x) w[x] = exp2_(w[x]);
    return raised;
  }
  template <int which>
  __device__ __forceinline__ void raise_references(const float (&s)[kScores], float scale,
                                                   int buffer) {
    float top[16];
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float most = fmaxf(s[4 * j + e], s[4 * j + 2 + e]) * scale;
#pragma unroll
        for (int bit = 4; bit < 32; bit *= 2)
          most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, bit));
        if (lane < 4) column[warp][my_local(j) + e] = most;
      }
    named_sync<1, T::kGroup>();
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int l = my_local(j) + e;
        const float before = sh.reference[which][l];
        float most = before + kShift;
#pragma unroll
        for (int w = 0; w < 4; ++w) most = fmaxf(most, column[w][l]);
        top[2 * j + e] = most - kShift;
        const float factor = before == top[2 * j + e] ? 1.f : exp2_(before - top[2 * j + e]);
        if (which == 0) sum[2 * j + e] *= factor;
        if (which == 1 || !use_offsets()) unit_sum[2 * j + e] *= factor;
        if (which == 0 && warp == 0 && lane < 4) sh.shrink[buffer][l] = factor;
      }
    named_sync<1, T::kGroup>();  // all have read the references that now change
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (warp == 0 && lane < 4) sh.reference[which][my_local(j) + e] = top[2 * j + e];
    named_sync<1, T::kGroup>();
  }

  __device__ __forceinline__ void store_weights(int buffer, const float (&w)[kScores]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = my_row() + 8 * h;
      char* row = sh.weight[buffer] + r * 128 + lane % 4 * 4;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float x = w[4 * j + 2 * h], y = w[4 * j + 2 * h + 1];
        void* to = row + ((j ^ (r & 7)) << 4);  // 16-byte units, swizzled as matrix_at() says
        if constexpr (std::is_same_v<S, Bf16>)
          *static_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(x, y);
        else
          *static_cast<__half2*>(to) = __floats2half2_rn(x, y);
      }
    }
  }

  // Sum of the thread's 16 values over all bank vectors; thread l < 64 gets that of local l.
  __device__ __forceinline__ float sum_columns(const float (&mine)[16]) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float whole = mine[2 * j + e];
#pragma unroll
        for (int bit = 4; bit < 32; bit *= 2) whole += __shfl_xor_sync(0xffffffffu, whole, bit);
        if (lane < 4) column[warp][my_local(j) + e] = whole;
      }
    named_sync<1, T::kGroup>();
    float whole = 0;
    if (threadIdx.x < T::kLocal)
#pragma unroll
      for (int w = 0; w < 4; ++w) whole += column[w][threadIdx.x];
    named_sync<1, T::kGroup>();
    return whole;
  }

  // Whether the thread stores what all blocks of the cluster know, for local `threadIdx.x`.
  __device__ __forceinline__ bool stores() const {
    return rank == 0 && threadIdx.x < T::kLocal && first + int(threadIdx.x) < total;
  }

  // Table entries of units [unit, end): the first is what has been summed, the others are empty.
  // Before the first unit come the local vectors, which have no entry.
  __device__ __forceinline__ void close_units(int end) {
    if (a.incremental) {
      const float whole = sum_columns(unit_sum);
      const float top = sh.reference[use_offsets() ? 1 : 0][threadIdx.x % T::kLocal];
      const float lse = whole == 0 ? minus_infinity<float>() : (top + log2f(whole)) * kLn2;
      for (int u = max(unit, first_unit); u < end; ++u)
        if (stores())
          a.unit_lse[int64_t(u) * a.n + first + threadIdx.x] =
              u == unit ? lse : minus_infinity<float>();
    }
#pragma unroll
    for (int x = 0; x < 16; ++x) {
      if (!use_offsets() && unit_in_loss) sum[x] += unit_sum[x];
      unit_sum[x] = 0;
    }
    unit = end;
  }

  __device__ __forceinline__ void store_sums() {
    const float whole = sum_columns(sum);
    if (!stores()) return;
    const int64_t to = int64_t(split) * total + first + threadIdx.x;
    a.part_max[to] = sh.reference[0][threadIdx.x] * kLn2;
    a.part_sum[to] = whole;
  }

  // The tile's probability mass: the weight of its offset. Query side: its logarithm, base 2.
  __device__ __forceinline__ void store_mass(const SlotTile& t, const float (&w)[kScores]) {
    float mine[16] = {};
    accumulate(w, mine);
    const float whole = sum_columns(mine);
    if (!stores()) return;
    const int64_t group = int64_t(mass_index(a, ring, t.slot)) * (kQuerySide ? int(a.m) : 1) + t.kind;
    const int64_t to = group * total + first + threadIdx.x;
    if constexpr (kQuerySide)
      a.query_mass[to] = sh.reference[0][threadIdx.x] + log2f(whole);
    else
      a.passage_mass[to] = whole * exp2_(-kShift);
  }

  // --- two warpgroups: weighted sums ---------------------------------------------------------------

  __device__ __forceinline__ void sum_up(int which) {
    float acc[T::kSums][32];
#pragma unroll
    for (int c = 0; c < T::kSums; ++c)
#pragma unroll
      for (int x = 0; x < 32; ++x) acc[c][x] = 0;
    for (int i = 0;; ++i) {
      const int buffer = i % 2, stage = i % T::kStages;
      barrier_wait(at(sh.weights_full[buffer]), i / 2 & 1);
      const Order order = uniform(sh.order[buffer]);
      if (order == Order::stop) break;
      if (kQuerySide && order == Order::rescale_and_add) rescale(buffer, acc);
      if (order != Order::skip) {
        const uint64_t weights = matrix_at(shared_address(sh.weight[buffer]));
        const uint64_t tile =
            matrix_at(shared_address(sh.tile[stage]) + which * T::kSums * T::kBoxBytes);
#pragma unroll
        for (int c = 0; c < T::kSums; ++c) hold(acc[c]);
        products_begin();
#pragma unroll
        for (int k = 0; k < kBoxRows / 16; ++k)
#pragma unroll
          for (int c = 0; c < T::kSums; ++c) {
            const int rows = k * 16 * 128 >> 4;
            product<S, true>(acc[c], tile + (c * T::kBoxBytes >> 4) + rows, weights + rows, 1);
          }
        products_commit();
        products_wait<0>();
#pragma unroll
        for (int c = 0; c < T::kSums; ++c) hold(acc[c]);
      }
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(at(sh.empty[stage]));
        barrier_arrive(at(sh.weights_empty[buffer]));
      }
    }
    if (a.with_grad) store(which, acc);
  }

  __device__ __forceinline__ void rescale(int buffer, float (&acc)[T::kSums][32]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 f = *reinterpret_cast<const float2*>(&sh.shrink[buffer][my_local(j)]);
#pragma unroll
      for (int c = 0; c < T::kSums; ++c)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          acc[c][4 * j + 2 * h] *= f.x;
          acc[c][4 * j + 2 * h + 1] *= f.y;
        }
    }
  }

  __device__ __forceinline__ void store(int which, const float (&acc)[T::kSums][32]) {
    const int64_t from = int64_t(split) * total + first;
    const float unshift = kQuerySide ? 1.f : exp2_(-kShift);
#pragma unroll
    for (int c = 0; c < T::kSums; ++c)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const int k = rank * T::kSlice + (which * T::kSums + c) * kBoxColumns + my_row() + x / 2 * 8;
          const int l = my_local(j) + x % 2;
          if (k < a.d && first + l < total)
            a.part_out[(from + l) * a.d + k] = acc[c][4 * j + x] * unshift;
        }
  }

  const Args<S>& a;
  const Ring<S>& ring;
  const HopperMaps& maps;
  Shared& sh;
  const int rank, split, splits, total, first;
  const int lane, warp;  // warp: within its warpgroup
  int first_unit = 0, unit = 0;
  bool unit_in_loss = false;
  float (*column)[T::kLocal] = nullptr;    // by warp
  float sum[16] = {}, unit_sum[16] = {};  // by local vector, over the thread's bank vectors
};

// Grid (splits * kCluster, locals / 64), clusters of kCluster.
template <class S, Side kSide, class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    attend_sm90a(const Args<S> a, const __grid_constant__ HopperMaps maps) {
  extern __shared__ __align__(1024) char dynamic[];
  const Ring<S> ring(a, kSide == Side::passages ? a.position : a.cursor);
  AttendHopper<S, kSide, T>(a, ring, maps, dynamic).run();
}

}  // namespace contaccum
