// What the kernels of light_update share: a block's place, the folded filters, the sums over a block.
#pragma once

#include "common/cuda/async.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vector.cuh"
#include "light_update/cuda.h"

namespace dla::light_update {

// How what is carried enters: not at all, times one factor for each channel, or through a 3x3 filter.
enum class Carry { none, scaled, filtered };

// A thread's strip is four columns wide, but where rows.cuh says otherwise: each row is read six wide, and all that is
// in flight stays in registers.
constexpr int kColumns = 4;
constexpr int kMaxThreads = 256;

// Where a block of channels_last stands in the map, and a thread in the block: none is left over, as strips fill warps.
struct Place {
    int b, c, column, first, last;  // the block's sample, first channel, first column, and rows [first, last)
    int part;                       // of the sample's map
    int columns;                    // in the map
    int lane, strip;

    __device__ Place(const Tiling& t, const Shape& s, int channels) {
        int block = blockIdx.x;
        c = block % t.chunks * channels;
        block /= t.chunks;
        part = block % t.parts();
        b = block / t.parts();
        column = part % t.tiles * t.columns;
        columns = min(t.columns, static_cast<int>(s.W) - column);
        first = part / t.tiles * t.rows;
        last = min(static_cast<int>(s.H), first + t.rows);
        lane = threadIdx.x % t.lanes;
        strip = threadIdx.x / t.lanes;
    }
};

// sigmoid(q k^T / sqrt(head_dim)) of the heads of `count` channels from `first` on, in `shared`, by the whole block; 1
// without a y. In few instructions: all of them count where a thread has few pixels.
template <class A>
__device__ void attend(const Vectors<A>& v, int C, int b, int first, int count, A* shared) {
    const int head_dim = static_cast<int>(v.head_dim), taps = static_cast<int>(v.taps), lane = threadIdx.x % kWarp;
    const int head = static_cast<unsigned>(first) / head_dim;
    const A* const y = v.y + int64_t(b) * C;
    for (int h = threadIdx.x / kWarp; (head + h) * head_dim < first + count; h += blockDim.x / kWarp) {
        A score = 0;
        for (int j = lane; v.y && j < head_dim; j += kWarp) {
            const int begin = (head + h) * head_dim + j - taps / 2;
            A query = 0, key = 0;
#pragma unroll 4
            for (int k = 0; k < taps; ++k) {
                if (begin + k < 0 || begin + k >= C) continue;
                query += v.query_weight[k] * y[begin + k];
                key += v.key_weight[k] * y[begin + k];
            }
            score += query * key;
        }
        score = warp_sum(score);
        if (lane == 0) shared[h] = v.y ? A(1) / (A(1) + exp(-score / sqrt(A(head_dim)))) : A(1);
    }
    __syncthreads();
}

// o is one 3x3 filter over x plus one over carried: attention, lambda and gate are folded into them.
template <class A>
__device__ __forceinline__ A x_filter(const Vectors<A>& v, int64_t c, int t, int64_t first, const A* attention) {
    return attention[c / v.head_dim - first / v.head_dim] * v.value_weight[c * 9 + t];
}

template <class A>
__device__ __forceinline__ A carried_filter(const Vectors<A>& v, int64_t C, int64_t b, int64_t c, int t) {
    const A gate = t != 4 ? A(0) : v.gate ? v.gate[b * C + c] : A(1);
    return v.carry_scale[c] * (gate + (v.carry_weight ? v.carry_weight[c * 9 + t] : A(0)));
}

// A thread's strip on its way down the map, kLane channels wide. Each row of the input adds to three rows of the
// output, so that it is read, and widened, once.
template <class A, int kLane, int kWidth>
struct Strip {
    A done[kWidth][kLane], here[kWidth][kLane] = {}, next[kWidth][kLane] = {};

    // Now the row above the one that is read is finished.
    __device__ __forceinline__ void advance() {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
#pragma unroll
            for (int e = 0; e < kLane; ++e) {
                done[j][e] = here[j][e];
                here[j][e] = next[j][e];
                next[j][e] = 0;
            }
        }
    }

    __device__ __forceinline__ void add(const A (&filter)[9][kLane], const A (&row)[kWidth + 2][kLane]) {
#pragma unroll
        for (int dx = 0; dx < 3; ++dx) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
#pragma unroll
                for (int e = 0; e < kLane; ++e) {
                    done[j][e] += filter[6 + dx][e] * row[j + dx][e];
                    here[j][e] += filter[3 + dx][e] * row[j + dx][e];
                    next[j][e] += filter[dx][e] * row[j + dx][e];
                }
            }
        }
    }

    // The same with a filter of which only the centre is there; the row may come with its neighbouring columns.
    template <int kRow>
    __device__ __forceinline__ void add_centre(const A (&filter)[kLane], const A (&row)[kRow][kLane]) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
#pragma unroll
            for (int e = 0; e < kLane; ++e) here[j][e] += filter[e] * row[j + (kRow - kWidth) / 2][e];
        }
    }
};

// What a thread knows of its strip's values: mean and squared deviations by Welford's formula for a row of the strip at
// a time; `folded` instead sums o and the output that it becomes. The columns from `valid` on are not in the map;
// with kWhole none of the strip's are, or all.
template <class A, int kLane, bool kFolded, int kWidth, bool kWhole>
struct Gathered {
    A first[kLane] = {}, second[kLane] = {};
    A count = 0;
    int valid;

    __device__ explicit Gathered(int valid) : valid(valid) {}

    __device__ __forceinline__ bool has(int j) const { return kWhole || j < valid; }

    // The mean so far is subtracted from the values before they are summed, in the first row its own; what is taken off
    // their squares afterwards is then half of them at most, so that nothing cancels.
    __device__ __forceinline__ void add(const A (&o)[kWidth][kLane]) {
        if (valid <= 0) return;
        A share = 0;
        if (count == A(0)) {
            const A each = reciprocal(A(valid));
#pragma unroll
            for (int e = 0; e < kLane; ++e) {
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    if (has(j)) first[e] += o[j][e];
                }
                first[e] *= each;
            }
        } else {
            share = reciprocal(count + A(valid));
        }
        count += A(valid);
#pragma unroll
        for (int e = 0; e < kLane; ++e) {
            A apart = o[0][e] - first[e], squares = apart * apart;
#pragma unroll
            for (int j = 1; j < kWidth; ++j) {
                const A centred = o[j][e] - first[e];
                if (has(j)) {
                    apart += centred;
                    squares += centred * centred;
                }
            }
            const A step = apart * share;
            first[e] += step;
            second[e] += squares - apart * step;
        }
    }

    __device__ __forceinline__ void add_pair(int e, A o, A out) {
        first[e] += o;
        second[e] += out;
    }

    __device__ __forceinline__ Moments<A> moments(int e) const {
        if constexpr (kFolded) return {A(0), first[e], second[e]};
        return {count, first[e], second[e]};
    }
};

// Joins what two sets of values gave.
template <bool kFolded, class A>
__device__ __forceinline__ void join(Moments<A>& to, const Moments<A>& from) {
    if constexpr (kFolded) {
        to.mean += from.mean;
        to.deviations += from.deviations;
    } else {
        to.merge(from);
    }
}

template <bool kFolded, class T>
__device__ __forceinline__ void write_moments(const Forward<T>& a, int64_t b, int64_t c, const Moments<Acc<T>>& m) {
    const Acc<T> pixels = kFolded ? Acc<T>(a.shape.HW()) : Acc<T>(1);
    a.mean[b * a.shape.C + c] = m.mean / pixels;
    a.other[b * a.shape.C + c] = kFolded ? m.deviations / pixels : m.var();
}

// Joins what the block's threads found and writes it: the result where the block has seen all of the map, else a part.
template <bool kFolded, int kLane, class T, int kWidth, bool kWhole, class A = Acc<T>>
__device__ void finish_moments(const Forward<T>& a, const Tiling& t, const Place& p,
                               const Gathered<A, kLane, kFolded, kWidth, kWhole>& found, Moments<A>* shared) {
    constexpr int kSegments = 8;  // joined side by side, then one after another
    const int channels = t.lanes * kLane, members = t.strips;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kLane; ++e) shared[p.strip * channels + p.lane * kLane + e] = found.moments(e);
    __syncthreads();
    const int length = static_cast<int>(ceil_div(members, kSegments));
    for (int i = threadIdx.x; i < channels * kSegments; i += blockDim.x) {
        const int begin = i / channels * length, end = min(members, begin + length);
        for (int m = begin + 1; m < end; ++m) {
            join<kFolded>(shared[begin * channels + i % channels], shared[m * channels + i % channels]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < channels; i += blockDim.x) {
        const int64_t c = p.c + i;
        if (c >= a.shape.C) continue;
        Moments<A> all = shared[i];
        for (int m = length; m < members; m += length) join<kFolded>(all, shared[m * channels + i]);
        if (t.parts() == 1) {
            write_moments<kFolded>(a, p.b, c, all);
        } else {
            reinterpret_cast<Moments<A>*>(a.parts)[(int64_t(p.b) * t.parts() + p.part) * a.shape.C + c] = all;
        }
    }
}

// Joins the parts of a map, in order.
template <bool kFolded, class T>
__global__ void __launch_bounds__(kMaxThreads) join_parts(const __grid_constant__ Forward<T> a, int64_t parts) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, C = a.shape.C;
    if (i >= a.shape.B * C) return;
    const auto* from = reinterpret_cast<const Moments<Acc<T>>*>(a.parts) + i / C * parts * C + i % C;
    Moments<Acc<T>> all = from[0];
    for (int64_t k = 1; k < parts; ++k) join<kFolded>(all, from[k * C]);
    write_moments<kFolded>(a, i / C, i % C, all);
}

// BatchNorm with constant statistics as one product and one sum, of a thread's channels.
template <class A, int kLane>
struct Fold {
    A scale[kLane] = {}, shift[kLane] = {};

    template <class T>
    __device__ __forceinline__ Fold(const Forward<T>& a, int64_t c) {
        if (!a.out) return;
#pragma unroll
        for (int e = 0; e < kLane; ++e) {
            if (c + e >= a.shape.C) return;
            scale[e] = a.norm_weight[c + e] / sqrt(a.norm_var[c + e] + a.eps);
            shift[e] = a.norm_bias[c + e] - a.norm_mean[c + e] * scale[e];
        }
    }
};

}  // namespace dla::light_update
