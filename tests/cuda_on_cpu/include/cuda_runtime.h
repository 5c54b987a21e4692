// CUDA for a CPU: as much of the language and the runtime as the kernels use. One host thread runs the threads of a
// block in turn, each until it waits for others; between two waits nothing is interleaved, so that a missing barrier
// shows: a thread reads what no other has written yet, and shared memory begins as NaN.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Of the thread that runs now.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

constexpr size_t kShared = 99 << 10;  // what a block may have on every GPU from sm_80 on: sm_86 has no more
constexpr unsigned kLanes = 32;
// So few that grids of the tests are larger, and so many that blocks wait for each other.
constexpr int kMultiprocessors = 6;

void wait_for_block();
void wait_for_grid();

// A place for each lane's value, and what the others of `mask` put there: all of them have arrived when it returns.
struct Exchange {
    alignas(16) unsigned char values[kLanes][16];
};
const Exchange& exchange(unsigned mask, const void* value, size_t size);

template <class T>
T from_lane(unsigned mask, T value, unsigned lane) {
    static_assert(sizeof(T) <= 16);
    const Exchange& all = exchange(mask, &value, sizeof value);
    if (mask >> lane & 1) memcpy(&value, all.values[lane], sizeof value);
    return value;
}

inline unsigned lane() { return threadIdx.x % kLanes; }

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait_for_block(); }
inline void __syncwarp(unsigned mask = ~0u) { cuda_on_cpu::exchange(mask, nullptr, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const unsigned lane = cuda_on_cpu::lane();
    return cuda_on_cpu::from_lane(mask, value, lane / width * width + source % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const unsigned lane = cuda_on_cpu::lane(), from = lane ^ bits;
    return cuda_on_cpu::from_lane(mask, value, from / width > lane / width ? lane : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const unsigned lane = cuda_on_cpu::lane(), from = lane + by;
    return cuda_on_cpu::from_lane(mask, value, from / width > lane / width ? lane : from);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const unsigned lane = cuda_on_cpu::lane();
    return cuda_on_cpu::from_lane(mask, value, lane % width < by ? lane : lane - by);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const auto& all = cuda_on_cpu::exchange(mask, &predicate, sizeof predicate);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < cuda_on_cpu::kLanes; ++lane) {
        int vote = 0;
        if (mask >> lane & 1) memcpy(&vote, all.values[lane], sizeof vote);
        votes |= unsigned(vote != 0) << lane;
    }
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// Nothing runs beside the thread that adds.
template <class T>
T atomicAdd(T* to, T value) {
    const T before = *to;
    *to += value;
    return before;
}

template <class T>
T __ldg(const T* from) {
    return *from;
}
template <class T>
T __ldcs(const T* from) {
    return *from;
}
template <class T>
void __stcs(T* to, T value) {
    *to = value;
}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float rsqrt(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline int __float_as_int(float x) {
    int bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrCooperativeLaunch };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int cooperative;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};

const char* cudaGetErrorString(cudaError_t);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
    return size_t(bytes) <= cuda_on_cpu::kShared ? cudaSuccess : cudaErrorInvalidConfiguration;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
    memset(to, value, bytes);
    return cudaSuccess;
}

namespace cuda_on_cpu {

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

}  // namespace cuda_on_cpu

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    return cuda_on_cpu::run(*config, [&] { kernel(arguments...); });
}
