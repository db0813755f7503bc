// What ops.cpp knows of the CUDA kernels: plain C++, no CUDA header.
#pragma once

#include <cstddef>

#include "../params.h"

namespace contaccum {

// What a launch depends on besides shapes.
struct CudaDevice {
  int multiprocessors;
  int compute_capability;  // 10 * major + minor
  int shared_bytes;        // shared memory that a thread block may ask for
};

struct CudaStep : StepArgs {
  CudaDevice device;
};

// Bytes of scratch memory; depends on shapes, options and the device alone.
size_t cuda_scratch_bytes(const CudaStep& step);

// Enqueue the kernels of a step on a stream. Returns null, or CUDA's message.
const char* cuda_step(const CudaStep& step, void* scratch, void* stream);

// Enqueue the one kernel that scales both gradients. Returns null, or CUDA's message.
const char* cuda_scale(const ScaledGradients& gradients, void* stream);

// Returns null, or CUDA's message.
const char* cuda_device(int index, CudaDevice* device);

// For tests and benchmarks: whether tensor cores may be used. They are where they can be.
void cuda_allow_tensor_cores(bool allow);

}  // namespace contaccum
