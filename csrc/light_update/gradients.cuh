// From the products to the gradients of vectors and filters: a block for each sample, then sums over the samples.
#pragma once

#include "light_update/backward.cuh"

namespace dla::light_update {

constexpr int kSampleThreads = 512;

// One element of the query or the key: a filter of `taps` along the channels.
template <class A>
__device__ __forceinline__ A along_channels(const A* y, const A* weight, int64_t taps, int64_t C, int64_t c) {
    A sum = 0;
    for (int64_t t = 0; t < taps; ++t) {
        const int64_t from = c + t - taps / 2;
        if (from >= 0 && from < C) sum += weight[t] * y[from];
    }
    return sum;
}

// A sample's products -> the gradients of its vectors, and a row of its shares in the gradients that all samples share:
// value_weight [C, 9], carry_weight [C, 9], carry_scale [C], query_weight and key_weight [taps].
template <class T>
__global__ void __launch_bounds__(kSampleThreads)
    sample_gradients(const __grid_constant__ Backward<T> a, const __grid_constant__ Tiling t) {
    using A = Acc<T>;
    const Vectors<A>& v = a.vectors;
    const int64_t b = blockIdx.x, C = a.shape.C;
    A* const products = a.parts + b * t.parts() * kProducts * C;  // [kProducts, C], once the parts are added up
    A* const row = a.rows + b * a.row_length();
    A* const of_attention = row + a.summed();  // three vectors [C]
    A *const of_query = of_attention + C, *const of_key = of_query + C;
    A* const shared = shared_memory<A>();

    for (int64_t i = threadIdx.x; t.parts() > 1 && i < t.maps * 9 * C; i += blockDim.x) {
        A sum = 0;
        for (int64_t k = 0; k < t.parts(); ++k) sum += products[k * kProducts * C + i];
        products[i] = sum;
    }
    __syncthreads();

    if (!v.y) {
        for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
            for (int k = 0; k < 9; ++k) row[c * 9 + k] = products[k * C + c];
        }
        return;
    }
    for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
        A sum = 0;
        for (int k = 0; k < 9; ++k) sum += v.value_weight[c * 9 + k] * products[k * C + c];
        of_attention[c] = sum;
        if (!v.carry_scale) continue;
        const A scale = v.carry_scale[c], centre = products[(9 + 4) * C + c];
        A of_scale = (v.gate ? v.gate[b * C + c] : A(1)) * centre;
        if (a.grad_gate) a.grad_gate[b * C + c] = scale * centre;
        for (int k = 0; v.carry_weight && k < 9; ++k) {
            of_scale += v.carry_weight[c * 9 + k] * products[(9 + k) * C + c];
            row[9 * C + c * 9 + k] = scale * products[(9 + k) * C + c];
        }
        row[18 * C + c] = of_scale;
    }
    __syncthreads();

    // A warp for each head: the sigmoid's derivative, then query and key.
    const int lane = threadIdx.x % kWarp;
    for (int64_t c0 = threadIdx.x / kWarp * v.head_dim; c0 < C; c0 += blockDim.x / kWarp * v.head_dim) {
        A score = 0, grad = 0;
        for (int64_t c = c0 + lane; c < c0 + v.head_dim; c += kWarp) {
            const A q = along_channels(v.y + b * C, v.query_weight, v.taps, C, c);
            const A k = along_channels(v.y + b * C, v.key_weight, v.taps, C, c);
            of_query[c] = k;
            of_key[c] = q;
            score += q * k;
            grad += of_attention[c];
        }
        const A root = sqrt(A(v.head_dim)), attention = A(1) / (A(1) + exp(-warp_sum(score) / root));
        grad = warp_sum(grad) * attention * (A(1) - attention) / root;
        for (int64_t c = c0 + lane; c < c0 + v.head_dim; c += kWarp) {
            of_query[c] *= grad;
            of_key[c] *= grad;
            for (int k = 0; k < 9; ++k) row[c * 9 + k] = attention * products[k * C + c];
        }
    }
    __syncthreads();

    for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
        A sum = 0;
        for (int64_t k = 0; k < v.taps; ++k) {
            const int64_t to = c - k + v.taps / 2;
            if (to >= 0 && to < C) sum += v.query_weight[k] * of_query[to] + v.key_weight[k] * of_key[to];
        }
        a.grad_y[b * C + c] = sum;
    }
    for (int64_t k = 0; k < 2 * v.taps; ++k) {
        const A* of = k < v.taps ? of_query : of_key;
        A sum = 0;
        for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
            const int64_t from = c + k % v.taps - v.taps / 2;
            if (from >= 0 && from < C) sum += of[c] * v.y[b * C + from];
        }
        sum = block_sum(sum, shared);
        if (threadIdx.x == 0) row[19 * C + k] = sum;
    }
}

// Sums the samples' rows: kSumColumns elements to a block, and as many threads to each as fit, each over every so
// many-th sample.
constexpr int kSumColumns = 32;

template <class T>
__global__ void __launch_bounds__(kMaxThreads) add_samples(const __grid_constant__ Backward<T> a) {
    using A = Acc<T>;
    constexpr int kSlices = kMaxThreads / kSumColumns;
    const int64_t C = a.shape.C, i = int64_t(blockIdx.x) * kSumColumns + threadIdx.x % kSumColumns;
    // Of the carry's parts that are not there the rows hold nothing.
    const int64_t taps = a.vectors.taps, ends[] = {9 * C, 18 * C, 19 * C, 19 * C + taps, 19 * C + 2 * taps};
    A* const outputs[] = {a.grad_value_weight, a.grad_carry_weight, a.grad_carry_scale, a.grad_query_weight,
                          a.grad_key_weight};
    A* to = nullptr;
    int64_t begin = 0;
#pragma unroll
    for (int k = 0; k < 5; ++k) {
        if (i >= begin && i < ends[k] && outputs[k]) to = outputs[k] + (i - begin);
        begin = ends[k];
    }
    A* const shared = shared_memory<A>();
    A sum = 0;
    for (int64_t b = threadIdx.x / kSumColumns; to && b < a.shape.B; b += kSlices) {
        sum += a.rows[b * a.row_length() + i];
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= kSumColumns || !to) return;
    for (int slice = 1; slice < kSlices; ++slice) sum += shared[slice * kSumColumns + threadIdx.x];
    *to = sum;
}

}  // namespace dla::light_update
