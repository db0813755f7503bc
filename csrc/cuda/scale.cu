// What backward does: both gradients that the forward pass saved, times the factor that came from
// behind the loss, rounded once to the inputs' dtype.
//
// - One launch for both: the first thread blocks take the queries', the rest the passages'.
// - The factor is read on the device, by every thread: the host never waits for it.
// - Neighbouring threads move neighbouring groups of kVector elements.
#include <cuda_runtime.h>

#include "launch.h"
#include "number.cuh"

namespace contaccum {
namespace {

constexpr int kScaleThreads = 256;
constexpr int kVector = 4;  // floats read at once: 16 bytes, the widest access there is

template <class A>
__device__ __forceinline__ A read_factor(const void* from, Storage kind) {
  switch (kind) {
    case Storage::f32:
      return A(*static_cast<const float*>(from));
    case Storage::f64:
      return A(*static_cast<const double*>(from));
    case Storage::bf16:
      return A(to_acc(*static_cast<const Bf16*>(from)));
    case Storage::f16:
      return A(to_acc(*static_cast<const F16*>(from)));
  }
  return A(0);
}

int64_t blocks_of(const ScaledGradient& g, int vector) {
  const int64_t elements = int64_t(kScaleThreads) * vector;
  return (g.count + elements - 1) / elements;
}

// V: 1 where an address is not aligned to kVector elements.
template <class S, int V>
__global__ void __launch_bounds__(kScaleThreads)
    scale_gradients(const ScaledGradients all, unsigned query_blocks) {
  using A = Acc<S>;
  const bool queries = blockIdx.x < query_blocks;
  const A* from = static_cast<const A*>(queries ? all.queries.from : all.passages.from);
  S* to = static_cast<S*>(queries ? all.queries.to : all.passages.to);
  const int64_t count = queries ? all.queries.count : all.passages.count;
  const int64_t block = queries ? blockIdx.x : blockIdx.x - query_blocks;
  const int64_t begin = (block * kScaleThreads + threadIdx.x) * V;
  const A factor = read_factor<A>(all.factor, all.factor_storage);
  if (begin + V <= count) {
    A x[V];
    load<V>(from + begin, x);
    Pack<S, V> scaled;
#pragma unroll
    for (int i = 0; i < V; ++i) round_to(factor * x[i], scaled.x[i]);
    *reinterpret_cast<Pack<S, V>*>(to + begin) = scaled;
  } else {
    for (int64_t i = begin; i < count; ++i) round_to(factor * from[i], to[i]);
  }
}

template <class S, int V>
void launch_with(const ScaledGradients& all, cudaStream_t stream) {
  const int64_t queries = blocks_of(all.queries, V), passages = blocks_of(all.passages, V);
  if (queries + passages == 0) return;
  scale_gradients<S, V>
      <<<unsigned(queries + passages), kScaleThreads, 0, stream>>>(all, unsigned(queries));
}

template <class S>
void launch(const ScaledGradients& all, cudaStream_t stream) {
  bool aligned = true;
  for (const ScaledGradient& g : {all.queries, all.passages}) {
    aligned &= reinterpret_cast<uintptr_t>(g.from) % alignof(Pack<Acc<S>, kVector>) == 0;
    aligned &= reinterpret_cast<uintptr_t>(g.to) % alignof(Pack<S, kVector>) == 0;
  }
  return aligned ? launch_with<S, kVector>(all, stream) : launch_with<S, 1>(all, stream);
}

}  // namespace

const char* cuda_scale(const ScaledGradients& all, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (all.storage) {
    case Storage::f32:
      launch<float>(all, on);
      break;
    case Storage::f64:
      launch<double>(all, on);
      break;
    case Storage::bf16:
      launch<Bf16>(all, on);
      break;
    case Storage::f16:
      launch<F16>(all, on);
      break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace contaccum
