// Launching a kernel, and its shared memory.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace dla {

inline void check_cuda(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // else the next launch would report it again
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// kernel<<<grid, threads, shared, stream>>>(arguments...), checked. A grid reaches 2^31 - 1 blocks in x but 65535 in y
// and z: what grows with a tensor belongs in x. With `together` all blocks run at the same time, or the launch fails.
template <class... Parameters, class... Arguments>
void launch_as(bool together, void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared,
               cudaStream_t stream, const Arguments&... arguments) {
    static_assert((sizeof(Parameters) + ... + 0) <= 4096, "older GPUs and drivers take no more parameters");
    constexpr size_t kWithoutAsking = 48 << 10;
    if (shared > kWithoutAsking) {
        check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
                   "shared memory");
    }
    cudaLaunchAttribute cooperative = {};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &cooperative;
    config.numAttrs = together ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "kernel launch");
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, cudaStream_t stream,
            const Arguments&... arguments) {
    launch_as(false, kernel, grid, threads, shared, stream, arguments...);
}

// How many blocks may be launched together, one on each multiprocessor; 0 where the device does not offer it.
inline int blocks_together() {
    int device = 0, offered = 0, multiprocessors = 0;
    check_cuda(cudaGetDevice(&device), "current device");
    check_cuda(cudaDeviceGetAttribute(&offered, cudaDevAttrCooperativeLaunch, device), "device");
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "device");
    return offered ? multiprocessors : 0;
}

// Waits for all threads of a grid that was launched together; what they wrote before, all of them see after.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

// A block's shared memory, all of it dynamic: one arena that the tests' CPU build can fill with NaN and fence.
template <class T>
__device__ __forceinline__ T* shared_memory() {
    extern __shared__ __align__(16) unsigned char dla_shared[];
    return reinterpret_cast<T*>(dla_shared);
}

}  // namespace dla
