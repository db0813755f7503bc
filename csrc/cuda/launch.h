// What ops.cpp knows of the CUDA kernels: plain C++, no CUDA header.
#pragma once

#include <cstddef>

#include "../params.h"

namespace contaccum {

// What a launch depends on besides shapes.
struct CudaDevice {
  int index;  // as torch counts
  int multiprocessors;
  int compute_capability;  // 10 * major + minor
  int shared_bytes;        // shared memory that a thread block may ask for
};

// A matrix whose rows, or columns where it is transposed, are `stride` elements apart in memory.
struct Matrix {
  const void* data;
  int64_t stride;
  bool transposed;
};

// out = left x right
struct MatrixProduct {
  Storage storage;  // of left (rows, depth) and right (depth, columns)
  int64_t rows, depth, columns;
  Matrix left, right;
  void* out;  // (rows, columns) acc, dense
};

struct CudaStep : StepArgs {
  CudaDevice device;
  // By torch's library, on torch's current stream of the device. Throws where torch does.
  void (*multiply)(int device, const MatrixProduct& product);
};

// Bytes of scratch memory; depends on shapes, options and the device alone.
size_t cuda_scratch_bytes(const CudaStep& step);

// Enqueue the kernels of a step on a stream. Returns null, or CUDA's message.
const char* cuda_step(const CudaStep& step, void* scratch, void* stream);

// Enqueue the one kernel that scales both gradients. Returns null, or CUDA's message.
const char* cuda_scale(const ScaledGradients& gradients, void* stream);

// Enqueue the one kernel that centers gradients. Returns null, or CUDA's message.
const char* cuda_center(const Centering& centering, void* stream);

// Returns null, or CUDA's message.
const char* cuda_device(int index, CudaDevice* device);

// Families of kernels.
enum KernelFamily : unsigned { kPortableKernels = 1, kTensorCoreKernels = 2, kLibraryKernels = 4 };

// For tests and benchmarks: which may be used, all if nothing is said. Tensor cores are used where
// they can be; the library where it pays, or wherever portable kernels are not allowed; those
// where nothing else can serve.
void cuda_allow_kernels(unsigned families);

}  // namespace contaccum
