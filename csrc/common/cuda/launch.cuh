// Launching a kernel, and its shared memory.
#pragma once

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
// and z: what grows with a tensor belongs in x.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, cudaStream_t stream,
            const Arguments&... arguments) {
    constexpr size_t kWithoutAsking = 48 << 10;
    if (shared > kWithoutAsking) {
        check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
                   "shared memory");
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "kernel launch");
}

// A block's shared memory, all of it dynamic: one arena that the tests' CPU build can fill with NaN and fence.
template <class T>
__device__ __forceinline__ T* shared_memory() {
    extern __shared__ __align__(16) unsigned char dla_shared[];
    return reinterpret_cast<T*>(dla_shared);
}

}  // namespace dla
