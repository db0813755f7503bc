// The CPU kernels' entry points and the instruction sets they exist for.
#pragma once

#include "../params.h"
#include "plan.h"

namespace contaccum {

// Loss, both gradients and enqueue. Every argument has been checked.
using StepKernel = void (*)(const StepArgs&, const Plan&);

void step_baseline(const StepArgs&, const Plan&);
void step_avx2(const StepArgs&, const Plan&);
void step_avx512(const StepArgs&, const Plan&);

// Run task(i, context) for i in [0, count), in parallel over torch's threads; defined in ops.cpp.
void run_tasks(int64_t count, void (*task)(int64_t, const void*), const void* context);

}  // namespace contaccum
