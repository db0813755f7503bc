// The kernels for f64 banks.
#include "launch_step.cuh"

namespace contaccum {

template size_t scratch_bytes<double>(const CudaStep&);
template const char* launch_step<double>(const CudaStep&, void*, cudaStream_t);

}  // namespace contaccum
