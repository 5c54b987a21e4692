// Joins what the blocks that share a map's channels have left, [B, parts, C], in order.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"

namespace dla {

constexpr int kJoinThreads = 256;

template <class A>
__global__ void __launch_bounds__(kJoinThreads)
    join_moments(const Moments<A>* parts, int64_t count, int64_t B, int64_t C, A* mean, A* var) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= B * C) return;
    const Moments<A>* from = parts + i / C * count * C + i % C;
    Moments<A> all = from[0];
    for (int64_t k = 1; k < count; ++k) all.merge(from[k * C]);
    mean[i] = all.mean;
    var[i] = all.var();
}

// Sums, over `pixels`.
template <class A>
__global__ void __launch_bounds__(kJoinThreads)
    join_means(const A* parts, int64_t count, int64_t B, int64_t C, A pixels, A* mean) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= B * C) return;
    const A* from = parts + i / C * count * C + i % C;
    A total = 0;
    for (int64_t k = 0; k < count; ++k) total += from[k * C];
    mean[i] = total / pixels;
}

template <class... Parameters, class... Arguments>
void launch_join(void (*kernel)(Parameters...), int64_t B, int64_t C, cudaStream_t stream,
                 const Arguments&... arguments) {
    const auto blocks = static_cast<unsigned>(ceil_div(B * C, kJoinThreads));
    launch(kernel, dim3(blocks), kJoinThreads, 0, stream, arguments...);
}

}  // namespace dla
