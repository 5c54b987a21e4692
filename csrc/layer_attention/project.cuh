// layer_attention's queries and keys: filters slid along the channels, bound by launches, not by bytes.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "layer_attention/cuda.h"

namespace dla::layer_attention {

constexpr int kSlideThreads = 256;

// The filter over row [C] at channel c, over row * gates where gates are given; `reversed` for the gradient.
template <class A>
__device__ __forceinline__ A slide(const A* row, const A* gates, const A* filter, int64_t K, bool reversed, int64_t c,
                                   int64_t C) {
    A total = 0;
    for (int64_t j = 0; j < K; ++j) {
        const int64_t from = c + j - K / 2;
        if (from < 0 || from >= C) continue;
        total += filter[reversed ? K - 1 - j : j] * (gates ? row[from] * gates[from] : row[from]);
    }
    return total;
}

// A thread for each channel of every key, and of every query, which come as one more layer; `key` is the last one
// alone.
template <class A>
__global__ void __launch_bounds__(kSlideThreads) project(const Filters<A> a, A* q, A* k, A* key) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t c = i % a.C, m = i / a.C % (a.layers + 1), b = i / a.C / (a.layers + 1);
    if (b >= a.B) return;
    if (m == a.layers) {
        q[b * a.C + c] = slide<A>(a.features + a.row(b, m - 1), nullptr, a.query_weight, a.K, false, c, a.C);
        return;
    }
    const int64_t row = a.row(b, m);
    const A* filter = a.key_filter(m);
    const A value = filter ? slide(a.features + row, a.gates + row, filter, a.K, false, c, a.C) : a.features[row + c];
    k[row + c] = value;
    if (m == a.layers - 1) key[b * a.C + c] = value;
}

// A thread for each channel of every layer's features and gates.
template <class A>
__global__ void __launch_bounds__(kSlideThreads) project_backward(const Filters<A> a, const FilterGradients<A> g) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t c = i % a.C, m = i / a.C % a.layers, b = i / a.C / a.layers;
    if (b >= a.B) return;
    const int64_t row = a.row(b, m);
    const A* filter = a.key_filter(m);
    A of_features = g.k[row + c];
    if (filter) {
        const A of_gated = slide<A>(g.k + row, nullptr, filter, a.K, true, c, a.C);
        of_features = of_gated * a.gates[row + c];
        g.grad_gates[row + c] += of_gated * a.features[row + c];
    }
    if (m == a.layers - 1) of_features += slide<A>(g.q + b * a.C, nullptr, a.query_weight, a.K, true, c, a.C);
    g.grad_features[row + c] = of_features;
}

// A block for each tap of every key's filter, and of the query's, which comes last.
template <class A>
__global__ void __launch_bounds__(kSlideThreads) filter_gradients(const Filters<A> a, const FilterGradients<A> g) {
    const int64_t f = blockIdx.x / a.K, j = blockIdx.x % a.K, shift = j - a.K / 2;
    const bool query = f == a.filters;
    const int64_t m = query ? a.layers - 1 : a.layers - a.filters + f;
    A total = 0;
    for (int64_t i = threadIdx.x; i < a.B * a.C; i += blockDim.x) {
        const int64_t b = i / a.C, c = i % a.C, from = c + shift, row = a.row(b, m);
        if (from < 0 || from >= a.C) continue;
        total += query ? g.q[b * a.C + c] * a.features[row + from]
                       : g.k[row + c] * (a.features[row + from] * a.gates[row + from]);
    }
    total = block_sum(total, shared_memory<A>());
    if (threadIdx.x == 0) (query ? g.grad_query_weight : g.grad_key_weights + f * a.K)[j] = total;
}

template <class A>
void launch(const Filters<A>& a, A* q, A* k, A* key, CUstream_st* stream) {
    if (a.B * a.C == 0) return;
    const int64_t blocks = ceil_div(a.B * (a.layers + 1) * a.C, kSlideThreads);
    dla::launch(project<A>, dim3(static_cast<unsigned>(blocks)), kSlideThreads, 0, stream, a, q, k, key);
}

template <class A>
void launch(const Filters<A>& a, const FilterGradients<A>& g, CUstream_st* stream) {
    if (a.B * a.C > 0) {
        const int64_t blocks = ceil_div(a.B * a.layers * a.C, kSlideThreads);
        dla::launch(project_backward<A>, dim3(static_cast<unsigned>(blocks)), kSlideThreads, 0, stream, a, g);
    }
    dla::launch(filter_gradients<A>, dim3(static_cast<unsigned>((a.filters + 1) * a.K)), kSlideThreads,
                kSlideThreads / kWarp * sizeof(A), stream, a, g);
}

}  // namespace dla::layer_attention
