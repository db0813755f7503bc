#include "launch_sm90a.cuh"

namespace contaccum {

template bool launch_attend_sm90a(const Args<Bf16>&, bool, int, cudaStream_t);
template int sm90a_clusters_at_once<Bf16>(const CudaStep&);
template bool launch_rows_sm90a(const Args<Bf16>&, cudaStream_t);

}  // namespace contaccum
