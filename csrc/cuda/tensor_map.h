// Descriptions of tensors for the copy engine of sm_90.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace contaccum {

// A (rows, kinds, d) tensor of 16-bit elements, copied in boxes of 64 rows of one kind by 64
// elements. False where the driver has no such function or refuses.
bool describe_tensor(CUtensorMap* map, bool bf16, const void* data, int64_t rows, int64_t kinds,
                     int64_t d);

constexpr int kBoxRows = 64, kBoxColumns = 64;

}  // namespace contaccum
