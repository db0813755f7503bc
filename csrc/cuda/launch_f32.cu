// The kernels for f32 banks.
#include "launch_step.cuh"

namespace contaccum {

template size_t scratch_bytes<float>(const CudaStep&);
template const char* launch_step<float>(const CudaStep&, void*, cudaStream_t);

}  // namespace contaccum
