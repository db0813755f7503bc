// Storage types and the accumulation type; loading a few neighbouring elements at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../params.h"

namespace contaccum {

using Bf16 = __nv_bfloat16;
using F16 = __half;

template <class S>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <class S>
using Acc = typename Accumulation<S>::type;

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(Bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_acc(F16 x) { return __half2float(x); }

__device__ __forceinline__ void round_to(float x, float& to) { to = x; }
__device__ __forceinline__ void round_to(double x, double& to) { to = x; }
__device__ __forceinline__ void round_to(float x, Bf16& to) { to = __float2bfloat16(x); }
__device__ __forceinline__ void round_to(float x, F16& to) { to = __float2half(x); }

template <class S, int V>
struct alignas(sizeof(S) * V > 16 ? 16 : sizeof(S) * V) Pack {
  S x[V];
};

// V elements from an address aligned to a Pack.
template <int V, class S>
__device__ __forceinline__ void load(const S* from, Acc<S> (&to)[V]) {
  const Pack<S, V> pack = *reinterpret_cast<const Pack<S, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = to_acc(pack.x[i]);
}

}  // namespace contaccum
