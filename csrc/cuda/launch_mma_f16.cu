// The tensor-core kernels for f16 banks.
#include "launch_mma.cuh"

namespace contaccum {

template void launch_attend_mma<F16>(const Args<F16>&, const CudaDevice&, bool, int, cudaStream_t);
template void launch_rows_mma<F16>(const Args<F16>&, const CudaStep&, const EntryLaunch*,
                                   cudaStream_t);
template void launch_entries_mma<F16>(const Args<F16>&, const EntryLaunch&, cudaStream_t);

}  // namespace contaccum
