// By storage type; one file each, so that they compile side by side.
#include <cuda_runtime.h>

#include <atomic>

#include "launch.h"
#include "number.cuh"

namespace contaccum {

template <class S>
size_t scratch_bytes(const CudaStep& step);
template <class S>
const char* launch_step(const CudaStep& step, void* scratch, cudaStream_t stream);

namespace {
std::atomic<unsigned> allowed{kPortableKernels | kTensorCoreKernels | kLibraryKernels};
}
bool kernels_allowed(KernelFamily family) { return allowed & family; }
void cuda_allow_kernels(unsigned families) { allowed = families; }

size_t cuda_scratch_bytes(const CudaStep& step) {
  switch (step.storage) {
    case Storage::f32:
      return scratch_bytes<float>(step);
    case Storage::f64:
      return scratch_bytes<double>(step);
    case Storage::bf16:
      return scratch_bytes<Bf16>(step);
    case Storage::f16:
      return scratch_bytes<F16>(step);
  }
  return 0;
}

namespace {
const char* launch_any(const CudaStep& step, void* scratch, cudaStream_t stream) {
  switch (step.storage) {
    case Storage::f32:
      return launch_step<float>(step, scratch, stream);
    case Storage::f64:
      return launch_step<double>(step, scratch, stream);
    case Storage::bf16:
      return launch_step<Bf16>(step, scratch, stream);
    case Storage::f16:
      return launch_step<F16>(step, scratch, stream);
  }
  return nullptr;
}
}  // namespace

const char* cuda_step(const CudaStep& step, void* scratch, void* stream) {
  const char* refused = launch_any(step, scratch, static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  return refused ? refused : error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* cuda_device(int index, CudaDevice* device) {
  int major = 0, minor = 0;
  device->index = index;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } wanted[] = {{cudaDevAttrMultiProcessorCount, &device->multiprocessors},
                {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_bytes},
                {cudaDevAttrComputeCapabilityMajor, &major},
                {cudaDevAttrComputeCapabilityMinor, &minor}};
  for (const auto& w : wanted) {
    const cudaError_t error = cudaDeviceGetAttribute(w.value, w.attribute, index);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  device->compute_capability = 10 * major + minor;
  return nullptr;
}

}  // namespace contaccum
