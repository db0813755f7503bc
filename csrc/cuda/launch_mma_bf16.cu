// The tensor-core kernels for bf16 banks.
#include "launch_mma.cuh"

namespace contaccum {

template void launch_attend_mma<Bf16>(const Args<Bf16>&, const CudaDevice&, bool, int,
                                      cudaStream_t);
template void launch_rows_mma<Bf16>(const Args<Bf16>&, const CudaStep&, const EntryLaunch*,
                                    cudaStream_t);
template void launch_entries_mma<Bf16>(const Args<Bf16>&, const EntryLaunch&, cudaStream_t);

}  // namespace contaccum
