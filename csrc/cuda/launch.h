// What ops.cpp knows of the CUDA kernels: plain C++, no CUDA header.
#pragma once

#include <cstddef>

#include "../params.h"

namespace contaccum {

// Everything one step needs. All pointers are device pointers.
struct CudaStep {
  Storage storage;  // of the bank; the batch has been converted to it
  Storage output;   // of the gradients
  Layout layout;
  BankState state;
  Batch batch;
  StepOptions options;
  StepOutput out;
  int multiprocessors;
  int compute_capability;  // 10 * major + minor
};

// Bytes of scratch memory; depends on shapes, options and the device alone.
size_t cuda_scratch_bytes(const CudaStep& step);

// Enqueue the kernels of a step on a stream. Returns null, or CUDA's message.
const char* cuda_step(const CudaStep& step, void* scratch, void* stream);

// Multiprocessors and compute capability of a device. Returns null, or CUDA's message.
const char* cuda_device(int device, int* multiprocessors, int* compute_capability);

}  // namespace contaccum
