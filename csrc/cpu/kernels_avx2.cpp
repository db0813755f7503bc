// The kernels for AVX2. Every header with code of its own comes before the pragma: what it defines
// is shared with files that must run on any processor.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define CONTACCUM_VECTOR_BYTES 32
#define CONTACCUM_STEP step_avx2

#include "step.h"
#else
namespace contaccum {
void step_avx2(const StepArgs& step, const Plan& plan) { step_baseline(step, plan); }
}  // namespace contaccum
#endif
