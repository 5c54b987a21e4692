// Sums and moments over a warp and a block. The order is fixed, so the same input always gives the same bits.
#pragma once

#include <cuda_runtime.h>

#include "common/shape.h"

namespace dla {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum over the lanes that differ in the bits from kFirst up to below kEnd, in every one of them; all 32 by default.
template <int kFirst = 1, int kEnd = kWarp, class A>
__device__ __forceinline__ A warp_sum(A v) {
#pragma unroll
    for (int offset = kEnd / 2; offset >= kFirst; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
    return v;
}

// The sum over the block, in every thread. `shared` holds one value for each warp; it may be used again at once.
template <class A>
__device__ __forceinline__ A block_sum(A v, A* shared) {
    v = warp_sum(v);
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = v;
    __syncthreads();
    A total = 0;
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += shared[warp];
    __syncthreads();
    return total;
}

// Close enough for a weight of Chan's formula: off by the last bit of float32. Not of a subnormal value.
__device__ __forceinline__ float reciprocal(float v) {
#ifdef __CUDA_ARCH__
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
#else
    return 1.0f / v;
#endif
}
__device__ __forceinline__ double reciprocal(double v) { return 1.0 / v; }

// Mean and sum of squared deviations of `count` values: merged, never subtracted, so that nothing cancels.
template <class A>
struct Moments {
    A count = 0, mean = 0, deviations = 0;

    __device__ __forceinline__ A var() const { return deviations / count; }

    // Chan's formula.
    __device__ __forceinline__ void merge(const Moments& other) {
        const A total = count + other.count;
        if (total == A(0)) return;
        const A apart = other.mean - mean, share = other.count * reciprocal(total);
        mean += apart * share;
        deviations += other.deviations + apart * apart * (count * share);
        count = total;
    }
};

// The merged moments of a warp, valid in its first lanes, so many (each for the lanes that are as far apart).
template <class A>
__device__ __forceinline__ Moments<A> warp_merge(Moments<A> m, int lanes = 1) {
    for (int offset = kWarp / 2; offset >= lanes; offset /= 2) {
        m.merge({__shfl_down_sync(kAllLanes, m.count, offset), __shfl_down_sync(kAllLanes, m.mean, offset),
                 __shfl_down_sync(kAllLanes, m.deviations, offset)});
    }
    return m;
}

// The merged moments of the block, in every thread; `shared` holds one for each warp.
template <class A>
__device__ __forceinline__ Moments<A> block_merge(Moments<A> m, Moments<A>* shared) {
    m = warp_merge(m);
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = m;
    __syncthreads();
    Moments<A> total = shared[0];
    for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) total.merge(shared[warp]);
    __syncthreads();
    return total;
}

}  // namespace dla
