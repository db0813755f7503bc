// The kernels for any processor: 128-bit vectors, whatever the compiler makes of them.
#define CONTACCUM_VECTOR_BYTES 16
#define CONTACCUM_STEP step_baseline

#include "step.h"
