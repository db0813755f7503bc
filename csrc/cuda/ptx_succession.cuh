// The instructions by which a kernel starts while the one before it still runs.
#pragma once

namespace contaccum {

// Once every thread block has come here, the next kernel may start, if it is launched so.
__device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}
// Until the kernel before this one has ended, and what it wrote can be seen.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace contaccum
