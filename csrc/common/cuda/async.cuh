// Copies into shared memory that run on while the thread computes: they hold no registers until they are used.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

namespace dla {

// 16 bytes, both addresses multiples of 16; zeros where nothing is `wanted`, and `from` is not read.
__device__ __forceinline__ void copy_async(void* shared, const void* from, bool wanted) {
#ifdef __CUDA_ARCH__
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(wanted ? 16 : 0) : "memory");
#else
    if (wanted) {
        memcpy(shared, from, 16);
    } else {
        memset(shared, 0, 16);
    }
#endif
}

// The same where `there`, else nothing: without a branch, so that copies stay together.
__device__ __forceinline__ void copy_async_if(bool there, void* shared, const void* from, bool wanted) {
#ifdef __CUDA_ARCH__
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        "setp.ne.b32 there, %3, 0;\n"
        "@there cp.async.cg.shared.global [%0], [%1], 16, %2;\n"
        "}" ::"r"(to),
        "l"(from), "r"(wanted ? 16 : 0), "r"(int(there))
        : "memory");
#else
    if (there) copy_async(shared, from, wanted);
#endif
}

// Closes a group of this thread's copies, which may be empty.
__device__ __forceinline__ void end_copies() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's copies but those of its kPending latest groups. Others see them after a barrier.
template <int kPending>
__device__ __forceinline__ void await_copies() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace dla
