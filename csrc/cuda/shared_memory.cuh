// Leave for a kernel to have more shared memory than the 48 KiB that any may have.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace contaccum {

// Asked for once a kernel and device, as it takes the host about as long as a launch. `bytes` is
// the same at every call for a device.
template <auto kKernel>
void allow_shared_bytes(int bytes) {
  constexpr int kDevices = 64;
  static std::atomic<bool> allowed[kDevices];
  int device = kDevices;
  if (cudaGetDevice(&device) == cudaSuccess && device < kDevices && allowed[device]) return;
  const cudaError_t error =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && device < kDevices) allowed[device] = true;
}

}  // namespace contaccum
