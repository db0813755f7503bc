// The processor's own exponential, which CUDA C++ gives to those who compile with fast math.
#pragma once

namespace contaccum {

// 2^x within 2^-22; zero below the smallest normal number.
__device__ __forceinline__ float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace contaccum
