// The kernels for bf16 banks.
#include "launch_step.cuh"

namespace contaccum {

template size_t scratch_bytes<Bf16>(const CudaStep&);
template const char* launch_step<Bf16>(const CudaStep&, void*, cudaStream_t);

}  // namespace contaccum
