#include <cuda_runtime.h>

#include "tensor_map.h"

namespace contaccum {

bool describe_tensor(CUtensorMap* map, bool bf16, const void* data, int64_t rows, int64_t kinds,
                     int64_t d) {
  // From the driver that is loaded: linking against it would keep the module from loading where
  // there is none.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &status);
    return status == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (!encode) return false;
  const cuuint64_t sizes[] = {cuuint64_t(d), cuuint64_t(kinds), cuuint64_t(rows)};
  const cuuint64_t bytes[] = {cuuint64_t(2 * d), cuuint64_t(2 * d * kinds)};
  const cuuint32_t box[] = {kBoxColumns, 1, kBoxRows}, steps[] = {1, 1, 1};
  return encode(map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
                const_cast<void*>(data), sizes, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace contaccum
