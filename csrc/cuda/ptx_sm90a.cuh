// The instructions of sm_90a that CUDA C++ has no name for: bulk tensor copies, barriers in shared
// memory, clusters, products of a warpgroup (four warps).
#pragma once

#include <cuda.h>

#include <type_traits>

#include "number.cuh"
#include "ptx_mma.cuh"

namespace contaccum {

// Where a variable of shared memory lies, for the instructions below.
template <class V>
__device__ __forceinline__ uint32_t at(const V& variable) {
  return shared_address(&variable);
}

// --- clusters ---

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}
// The address of the same variable in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t shared_of(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
// Every thread of the cluster, its earlier writes visible to all.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// --- barriers in shared memory ---

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals)
               : "memory");
}
// Initialised barriers become visible to the copy engine and to the cluster.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
// As so many arrivals: one thread may come for others.
template <int kArrivals = 1>
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "n"(kArrivals)
               : "memory");
}
// Arrive, and let the phase wait for so many bytes besides.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// For barriers that hand a buffer back: no data goes with it.
__device__ __forceinline__ void barrier_arrive_there(uint32_t barrier_there) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];\n" ::"r"(barrier_there) : "memory");
}
// Until the phase of this parity is over. What the copy engine or store_there() wrote is then seen:
// the barrier has counted its bytes.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Four numbers into another block's shared memory; its barrier counts the bytes.
__device__ __forceinline__ void store_there(uint32_t there, float a, float b, float c, float d,
                                            uint32_t barrier_there) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];\n" ::"r"(there),
      "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier_there)
      : "memory");
}

// Four numbers from shared memory, not before those that the program reads earlier: the compiler
// would ask for all at once and have no registers for them.
__device__ __forceinline__ float4 load_in_order(uint32_t from) {
  float4 x;
  asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(from)
               : "memory");
  return x;
}

// --- flags in global memory, from one thread block to another ---

// What the thread has written or has seen written can be read by who waits for this height.
__device__ __forceinline__ void raise_flag(int* flag, int height) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;\n" ::"l"(flag), "r"(height) : "memory");
}
__device__ __forceinline__ void wait_for_flag(const int* flag, int height) {
  int raised = 0;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(raised) : "l"(flag) : "memory");
  while (raised < height);
}

// --- named barriers: some of the warps of a block ---

template <int kCount>
__device__ __forceinline__ void named_sync(int id) {
  asm volatile("barrier.cta.sync %0, %1;\n" ::"r"(id), "n"(kCount) : "memory");
}
template <int kCount>
__device__ __forceinline__ bool named_any(int id, bool mine) {
  uint32_t any;
  asm volatile(
      "{\n"
      ".reg .pred p, q;\n"
      "setp.ne.u32 p, %1, 0;\n"
      "barrier.cta.red.or.pred q, %2, %3, p;\n"
      "selp.u32 %0, 1, 0, q;\n"
      "}\n"
      : "=r"(any)
      : "r"(uint32_t(mine)), "r"(id), "n"(kCount)
      : "memory");
  return any;
}

// --- registers: a warpgroup gives some back, another takes them ---

template <int kCount>
__device__ __forceinline__ void registers_up_to() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void registers_down_to() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

// --- the copy engine ---

// A box of a (rows, kinds, d) tensor into shared memory; what lies outside the tensor is zero.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int k, int kind,
                                         int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2, %3, %4}], [%5];\n" ::"r"(to),
      "l"(map), "r"(k), "r"(kind), "r"(row), "r"(barrier)
      : "memory");
}
// The same into several blocks of the cluster (bits of `blocks`), at the same place; each has its
// own barrier count the bytes.
__device__ __forceinline__ void copy_box_to(uint16_t blocks, uint32_t to, const CUtensorMap* map,
                                            int k, int kind, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes."
      "multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;\n" ::"r"(to),
      "l"(map), "r"(k), "r"(kind), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}
// A box into the second cache level.
__device__ __forceinline__ void prefetch_box(const CUtensorMap* map, int k, int kind, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];\n" ::"l"(map),
               "r"(k), "r"(kind), "r"(row)
               : "memory");
}
// A line of global memory into the first cache level.
__device__ __forceinline__ void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L1 [%0];\n" ::"l"(address));
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}
// Ordinary stores to shared memory become visible to the tensor cores.
__device__ __forceinline__ void fence_for_products() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// --- products of a warpgroup ---

// Of the description of an operand what differs between operands, a number to which 16-byte units
// can be added; the other half is in CONTACCUM_PRODUCT. Rows of 128 bytes, swizzled in eights:
// groups of eight rows lie 1024 bytes apart. Longer rows, of transposed operands only, go on `next`
// bytes behind.
__device__ __forceinline__ uint32_t matrix_at(uint32_t address, int next = 16) {
  return uint32_t(next >> 4) << 16 | (address & 0x3ffff) >> 4;
}

__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
// The compiler may not move these registers across: products write them behind its back.
template <int N>
__device__ __forceinline__ void hold(float (&c)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
template <int M, int N>
__device__ __forceinline__ void hold(float (&c)[M][N]) {
#pragma unroll
  for (int i = 0; i < M; ++i) hold(c[i]);
}
// What follows from x may not be worked out before.
__device__ __forceinline__ void hold(uint32_t& x) { asm volatile("" : "+r"(x)); }

// c (64 x N, float) = or += a (64 x 16) * b (16 x N), both in shared memory. With kTransposed their
// rows run along the 64 and N elements, else along the 16.
#define CONTACCUM_C8(c, i)                                                                    \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define CONTACCUM_C32(c, i) \
  CONTACCUM_C8(c, i), CONTACCUM_C8(c, i + 8), CONTACCUM_C8(c, i + 16), CONTACCUM_C8(c, i + 24)
// The names of 32 registers.
#define CONTACCUM_R0                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, "                                                                                      \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CONTACCUM_R32                                                                          \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, "                                                                                      \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CONTACCUM_R64                                                                          \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, "                                                                                      \
  "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define CONTACCUM_R96                                                                            \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// 0x40000040: swizzled by 128 bytes, 1024 / 16 from one group of eight rows to the next.
#define CONTACCUM_PRODUCT(N, DTYPE, REGISTERS, A, B, ADD, TRANSPOSED)             \
  "{\n"                                                                           \
  ".reg .pred add;\n"                                                             \
  ".reg .b64 a, b;\n"                                                             \
  "setp.ne.b32 add, %" ADD                                                        \
  ", 0;\n"                                                                        \
  "mov.b64 a, {%" A                                                               \
  ", 0x40000040};\n"                                                              \
  "mov.b64 b, {%" B                                                               \
  ", 0x40000040};\n"                                                              \
  "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." DTYPE "." DTYPE " {" REGISTERS \
  "}, a, b, add, 1, 1, %" TRANSPOSED ", %" TRANSPOSED                             \
  ";\n"                                                                           \
  "}\n"

// An overload by the shape of c. A, B, ADD and TRANSPOSED: numbers of the operands behind c's.
#define CONTACCUM_PRODUCT_OVERLOAD(SHAPE, N, REGISTERS, A, B, ADD, TRANSPOSED, ...)           \
  template <class S, bool kTransposed>                                                        \
  __device__ __forceinline__ void product(float(&c) SHAPE, uint32_t a, uint32_t b, int add) { \
    if constexpr (std::is_same_v<S, Bf16>)                                                    \
      asm volatile(CONTACCUM_PRODUCT(N, "bf16", REGISTERS, A, B, ADD, TRANSPOSED)             \
                   : __VA_ARGS__                                                              \
                   : "r"(a), "r"(b), "r"(add), "n"(int(kTransposed)));                        \
    else                                                                                      \
      asm volatile(CONTACCUM_PRODUCT(N, "f16", REGISTERS, A, B, ADD, TRANSPOSED)              \
                   : __VA_ARGS__                                                              \
                   : "r"(a), "r"(b), "r"(add), "n"(int(kTransposed)));                        \
  }
CONTACCUM_PRODUCT_OVERLOAD([32], "64", CONTACCUM_R0, "32", "33", "34", "35", CONTACCUM_C32(c, 0))
CONTACCUM_PRODUCT_OVERLOAD([2][32], "128", CONTACCUM_R0 ", " CONTACCUM_R32, "64", "65", "66", "67",
                           CONTACCUM_C32(c[0], 0), CONTACCUM_C32(c[1], 0))
CONTACCUM_PRODUCT_OVERLOAD([3][32], "192", CONTACCUM_R0 ", " CONTACCUM_R32 ", " CONTACCUM_R64, "96",
                           "97", "98", "99", CONTACCUM_C32(c[0], 0), CONTACCUM_C32(c[1], 0),
                           CONTACCUM_C32(c[2], 0))
CONTACCUM_PRODUCT_OVERLOAD([4][32], "256",
                           CONTACCUM_R0 ", " CONTACCUM_R32 ", " CONTACCUM_R64 ", " CONTACCUM_R96,
                           "128", "129", "130", "131", CONTACCUM_C32(c[0], 0),
                           CONTACCUM_C32(c[1], 0), CONTACCUM_C32(c[2], 0), CONTACCUM_C32(c[3], 0))
template <class S, bool kTransposed>
__device__ __forceinline__ void product(float (&c)[1][32], uint32_t a, uint32_t b, int add) {
  product<S, kTransposed>(c[0], a, b, add);
}
#undef CONTACCUM_PRODUCT_OVERLOAD
#undef CONTACCUM_C8
#undef CONTACCUM_C32
#undef CONTACCUM_R0
#undef CONTACCUM_R32
#undef CONTACCUM_R64
#undef CONTACCUM_R96
#undef CONTACCUM_PRODUCT

}  // namespace contaccum
