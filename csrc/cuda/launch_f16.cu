// The kernels for f16 banks.
#include "launch_step.cuh"

namespace contaccum {

template size_t scratch_bytes<F16>(const CudaStep&);
template const char* launch_step<F16>(const CudaStep&, void*, cudaStream_t);

}  // namespace contaccum
