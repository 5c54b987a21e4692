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
        const A inverse_std = A(1) / sqrt(a.var[c] + a.eps), scale = a.weight[c] * inverse_std;
        const A pixels = A(a.shape.HW());
        const int64_t i = b * a.shape.C + c;
        of_grad = a.keep ? scale * a.keep[b] : scale;
        of_o = a.sum_weight ? -scale * inverse_std * a.sum_weight[c] / a.count : A(0);
        mean = a.mean[c];
        offset = a.grad_out_mean ? of_grad * a.grad_out_mean[i] / pixels : A(0);
        if (a.sum_bias) offset -= scale * a.sum_bias[c] / a.count;
        if (a.grad_o_mean) offset += a.grad_o_mean[i] / pixels;
    }

    __device__ __forceinline__ A at(A grad_out, A o) const { return of_grad * grad_out + (of_o * (o - mean) + offset); }
};

// What gathers in a thread: for each tap the sum of a map times the gradient of o shifted by it. A map that enters by
// its centre alone has one.
template <class A, int kLane, bool kCentre>
struct Products {
    static constexpr int kCount = kCentre ? 1 : 9;
    A sums[kCount][kLane] = {};

    // One row of o's gradient with its neighbouring columns, the one that tap row `dy` leads to. Adds to the map's
    // gradient what reaches it from there.
    __device__ __forceinline__ void add(int dy, const A (&grad)[kColumns + 2][kLane], const A (&map)[kColumns][kLane],
                                        const A* filter, int step, A (&grad_map)[kColumns][kLane]) {
#pragma unroll
        for (int dx = 0; dx < 3; ++dx) {
            if (kCentre && (dy != 1 || dx != 1)) continue;
            A weight[kLane];
            load<kLane>(filter + (3 * dy + dx) * step, weight);
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
#pragma unroll
                for (int e = 0; e < kLane; ++e) {
                    sums[kCentre ? 0 : 3 * dy + dx][e] += map[j][e] * grad[j + 2 - dx][e];
                    grad_map[j][e] += weight[e] * grad[j + 2 - dx][e];
                }
            }
        }
    }
};

// Fills [kProducts, channels] of shared memory with the folded filters; what is not there is zero.
template <class T, class A = Acc<T>>
__device__ void fill_filters(const Backward<T>& a, int64_t b, int64_t first, int channels, const A* attention,
                             A* filters) {
    for (int i = threadIdx.x; i < kProducts * channels; i += blockDim.x) {
        const int t = i / channels;
        const int64_t c = first + i % channels;
        A filter = 0;
        if (c < a.shape.C) {
            if (t < 9) {
                filter = x_filter(a.vectors, c, t, first, attention);
            } else if (a.carried) {
                filter = carried_filter(a.vectors, a.shape.C, b, c, t - 9);
            }
        }
        filters[i] = filter;
    }
}

// Adds up the products of the block's threads, member by member, and writes them to the block's part.
template <int kLane, bool kCarried, bool kCentre, class T, class A = Acc<T>>
__device__ void finish_products(const Backward<T>& a, const Tiling& t, const Place& p,
                                const Products<A, kLane, false>& of_x, const Products<A, kLane, kCentre>& of_carried,
                                A* shared) {
    const int channels = t.lanes * kLane;
    __syncthreads();
    if (p.active) {
        A* to = shared + p.member * kProducts * channels + p.lane * kLane;
#pragma unroll
        for (int e = 0; e < kLane; ++e) {
#pragma unroll
            for (int k = 0; k < 9; ++k) {
                to[k * channels + e] = of_x.sums[k][e];
                A carried = 0;
                if (kCarried && (!kCentre || k == 4)) carried = of_carried.sums[kCentre ? 0 : k][e];
                to[(9 + k) * channels + e] = carried;
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kProducts * channels; i += blockDim.x) {
        const int64_t c = p.c + i % channels;
        if (c >= a.shape.C) continue;
        A sum = 0;
        for (int m = 0; m < t.members(); ++m) sum += shared[m * kProducts * channels + i];
        a.parts[((p.b * t.parts() + p.part) * kProducts + i / channels) * a.shape.C + c] = sum;
    }
}

}  // namespace dla::light_update
