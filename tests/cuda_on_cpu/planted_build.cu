// Kernels for the tests of what is read off a compiled library: a right one, and others with one mistake each.
#include "common/cuda/walk.cuh"

namespace dla {
namespace {

template <class W, class T>
__global__ void right(const T* from, T* to) {
    Acc<T> v[W::N];
    load(from + threadIdx.x * W::N, v);
    store(to + threadIdx.x * W::N, v);
}

// Indexed at run time, so no register can hold it.
__global__ void array(const int* from, int* to, int n) {
    int counts[64] = {};
    for (int i = 0; i < n; ++i) ++counts[from[i] % 64];
    for (int i = 0; i < n; ++i) to[i] = counts[from[i] % 64];
}

// More values at once than registers.
__global__ void spilled(const float* from, float* to) {
    float values[96];
#pragma unroll
    for (int i = 0; i < 96; ++i) values[i] = from[i * blockDim.x + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 96; ++i) to[i * blockDim.x + threadIdx.x] = values[i] * values[95 - i];
}

template <class W, class T>
__global__ void narrow_loads(const T* from, T* to) {
    Acc<T> v[W::N];
#pragma unroll
    for (int i = 0; i < W::N; ++i) v[i] = widen(from[threadIdx.x * W::N + i]);
    store(to + threadIdx.x * W::N, v);
}

template <class W, class T>
__global__ void element_alone(const T* from, T* to) {
    Acc<T> v[W::N];
    load(from + threadIdx.x * W::N, v);
#pragma unroll
    for (int i = 0; i < W::N; ++i) to[threadIdx.x * W::N + i] = narrow<T>(v[i]);
}

}  // namespace

template <class T>
using Vectors = Walk<T, kVector<T>, false>;
void launch_all(const float* f, float* g, const __nv_bfloat16* b, __nv_bfloat16* c, const int* i, int* j) {
    right<Vectors<__nv_bfloat16>, __nv_bfloat16><<<1, 32>>>(b, c);
    array<<<1, 32>>>(i, j, 8);
    spilled<<<1, 256>>>(f, g);
    narrow_loads<Vectors<float>, float><<<1, 32>>>(f, g);
    element_alone<Vectors<__nv_bfloat16>, __nv_bfloat16><<<1, 32>>>(b, c);
}

}  // namespace dla
