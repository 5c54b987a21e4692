// What the backward kernels of light_update share: the gradient that reaches o, and the products that all gradients of
// vectors and filters follow from.
#pragma once

#include "light_update/block.cuh"

namespace dla::light_update {

// The gradient that reaches o of a channel, as a line over the gradient of out and o: BatchNorm's backward, and what
// GAP of either brings. Four numbers for each channel of the block, in shared memory.
template <class A>
struct OutputGradient {
    A of_grad, of_o, mean, offset;

    template <class T>
    __device__ OutputGradient(const Backward<T>& a, int64_t b, int64_t c) {
        const A pixels = A(a.shape.HW());
        const int64_t i = b * a.shape.C + c;
        if (!a.weight) {
            of_grad = mean = 0;  // the former not used: 0 times an infinite gradient is no number
            of_o = 1;
            offset = a.grad_o_mean ? a.grad_o_mean[i] / pixels : A(0);
            return;
        }
        const A inverse_std = A(1) / sqrt(a.var[c] + a.eps), scale = a.weight[c] * inverse_std;
        of_grad = a.keep ? scale * a.keep[b] : scale;
        of_o = a.sum_weight ? -scale * inverse_std * a.sum_weight[c] / a.count : A(0);
        mean = a.mean[c];
        offset = a.grad_out_mean ? of_grad * a.grad_out_mean[i] / pixels : A(0);
        if (a.sum_bias) offset -= scale * a.sum_bias[c] / a.count;
        if (a.grad_o_mean) offset += a.grad_o_mean[i] / pixels;
    }

    __device__ __forceinline__ A at(A grad_out, A o) const { return of_grad * grad_out + (of_o * (o - mean) + offset); }
};

// A thread's share in x or in what is carried.
template <class A, int kLane>
struct Side {
    A filter[9][kLane];
    A products[9][kLane] = {};  // for each tap the sum of the map times o's gradient shifted by it
    A offset[kLane] = {};       // to the gradient of x, to which that of out belongs, what GAP of out brings

    template <class T>
    __device__ Side(const Backward<T>& a, const Place& p, int map, int first, const A* attention) {
        const int64_t C = a.shape.C;
#pragma unroll
        for (int e = 0; e < kLane; ++e) {
            const int64_t c = min(int64_t(first + e), C - 1);  // beyond the last one nothing is stored
#pragma unroll
            for (int k = 0; k < 9; ++k) {
                filter[k][e] =
                    map ? carried_filter(a.vectors, C, p.b, c, k) : x_filter(a.vectors, c, k, p.c, attention);
            }
            if (map == 0 && a.grad_out_mean) offset[e] = a.grad_out_mean[p.b * C + c] / A(a.shape.HW());
        }
    }

    // One row of o's gradient with its neighbouring columns, the one that tap row `dy` leads to: adds to the products,
    // and to the map's gradient.
    template <int kWidth>
    __device__ __forceinline__ void add(int dy, const A (&grad_o)[kWidth + 2][kLane], const A (&values)[kWidth][kLane],
                                        A (&grad_map)[kWidth][kLane]) {
#pragma unroll
        for (int dx = 0; dx < 3; ++dx) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
#pragma unroll
                for (int e = 0; e < kLane; ++e) {
                    products[3 * dy + dx][e] += values[j][e] * grad_o[j + 2 - dx][e];
                    grad_map[j][e] += filter[3 * dy + dx][e] * grad_o[j + 2 - dx][e];
                }
            }
        }
    }
};

// Adds up the products of the block's threads, strip by strip, and writes them to the block's part.
template <int kCount, int kLane, class T, class A = Acc<T>>
__device__ void finish_products(const Backward<T>& a, const Tiling& t, const Place& p,
                                const A (&products)[kCount][kLane], A* shared) {
    const int channels = t.lanes * kLane, length = kCount * channels;
    __syncthreads();
    A* to = shared + p.strip * length + p.lane * kLane;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
        for (int e = 0; e < kLane; ++e) to[k * channels + e] = products[k][e];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < length; i += blockDim.x) {
        const int64_t c = p.c + i % channels;
        if (c >= a.shape.C) continue;
        A sum = 0;
        for (int m = 0; m < t.strips; ++m) sum += shared[m * length + i];
        a.parts[((int64_t(p.b) * t.parts() + p.part) * kProducts + i / channels) * a.shape.C + c] = sum;
    }
}

}  // namespace dla::light_update
