// What the kernels of layer_attention share: a thread's place, and attention over the layers.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vector.cuh"
#include "layer_attention/cuda.h"

namespace dla::layer_attention {

constexpr int kMaxThreads = 256;
// Vectors that a thread has at hand: four reads under way for every map.
constexpr int kDepth = 4;

// N elements in accesses of at most 16 bytes.
template <int N, class T>
__device__ __forceinline__ void load_pieces(const T* from, Acc<T> (&to)[N]) {
    constexpr int kPiece = N < kVector<T> ? N : kVector<T>;
#pragma unroll
    for (int e = 0; e < N; e += kPiece) {
        Acc<T> piece[kPiece];
        load(from + e, piece);
#pragma unroll
        for (int i = 0; i < kPiece; ++i) to[e + i] = piece[i];
    }
}

template <int N, class T>
__device__ __forceinline__ void store_pieces(T* to, const Acc<T> (&from)[N]) {
    constexpr int kPiece = N < kVector<T> ? N : kVector<T>;
#pragma unroll
    for (int e = 0; e < N; e += kPiece) {
        Acc<T> piece[kPiece];
#pragma unroll
        for (int i = 0; i < kPiece; ++i) piece[i] = from[e + i];
        store(to + e, piece);
    }
}

// A thread's vectors: N pixels of a channel in NCHW, N channels of a pixel in channels_last.
template <int N_, bool kRows_>
struct Place {
    static constexpr int N = N_;
    static constexpr bool kRows = kRows_;
    static constexpr int kChannels = kRows ? N : 1;  // of a thread

    int b, run;           // sample, and the block's run of vectors
    int c0, c, safe;      // the block's and the thread's first channel; one that is in the map where that is not
    int at, stride, end;  // the thread's first vector of a plane, its distance to the next one, and where they end
    int last;             // the last vector of a plane
    int channels, slot;   // of the block, and the thread's first one among them
    int lane;             // of the channels' vectors in a warp

    __device__ Place(const Plan& p, const Shape& s) {
        unsigned block = blockIdx.x;
        channels = p.teams * p.lanes * kChannels;
        c0 = static_cast<int>(block % p.chunks) * channels;
        block /= p.chunks;
        run = static_cast<int>(block % p.runs);
        b = static_cast<int>(block / p.runs);
        const int team = threadIdx.x / p.team, thread = threadIdx.x % p.team;
        lane = thread % p.lanes;
        slot = (team * p.lanes + lane) * kChannels;
        c = c0 + slot;
        stride = p.team / p.lanes;
        const int each = stride * kDepth * p.steps, first = run * each;
        at = first + thread / p.lanes;
        last = static_cast<int>(kRows ? s.HW() : s.HW() / N) - 1;
        end = c < s.C ? min(first + each, last + 1) : 0;
        safe = min(c, static_cast<int>(s.C) - kChannels);
    }

    // This thread's kDepth vectors of a map. Beyond the end it reads others again: no load waits behind a branch.
    template <class T>
    __device__ __forceinline__ void load_all(const Map<const T>& map, int from, Acc<T> (&to)[kDepth][N]) const {
        const T* origin = map.at(b, safe, 0);
        const int64_t distance = kRows ? map.pixel : N;
#pragma unroll
        for (int i = 0; i < kDepth; ++i) load_pieces(origin + min(from + i * stride, last) * distance, to[i]);
    }

    // The same for `count` maps in turn, the next one under way while body(m, vectors) takes one.
    template <class T, class Body>
    __device__ __forceinline__ void each_map(const Map<const T>* maps, int count, int from, const Body& body) const {
        Word<T, N> next[kDepth];
        const auto begin = [&](const Map<const T>& map) {
            const T* origin = map.at(b, safe, 0);
            const int64_t distance = kRows ? map.pixel : N;
#pragma unroll
            for (int i = 0; i < kDepth; ++i) {
                next[i] = fetch<N>(origin + min(from + i * stride, last) * distance);
            }
        };
        if (count > 0) begin(maps[0]);
#pragma unroll 1
        for (int m = 0; m < count; ++m) {
            Word<T, N> now[kDepth];
#pragma unroll
            for (int i = 0; i < kDepth; ++i) now[i] = next[i];
            begin(maps[min(m + 1, count - 1)]);
            Acc<T> values[kDepth][N];
#pragma unroll
            for (int i = 0; i < kDepth; ++i) unpack<T>(now[i], values[i]);
            body(m, values);
        }
    }

    template <class T>
    __device__ __forceinline__ void store_all(const Map<T>& map, int from, const Acc<T> (&values)[kDepth][N]) const {
        T* origin = map.at(b, c, 0);
        const int64_t distance = kRows ? map.pixel : N;
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            if (from + i * stride < end) store_pieces(origin + (from + i * stride) * distance, values[i]);
        }
    }

    // The thread's channels out of a table of the block's.
    template <class A>
    __device__ __forceinline__ void load_channels(const A* table, A (&to)[kChannels]) const {
        load_pieces(table + slot, to);
    }
};

// q k^T / sqrt(head_dim) of a range of layers and the heads of `count` channels from `first` on -> scores [layers,
// heads], by the whole block. Eight lanes take a product.
template <class A>
__device__ void score(const Attention<A>& a, int64_t C, int64_t b, int64_t head0, int heads, const Range& range,
                      A* scores) {
    constexpr int kLanes = 8, kSide = kWarp / kLanes;
    const int lane = threadIdx.x % kLanes, pairs = range.count * heads;
    for (int base = threadIdx.x / kWarp * kSide; base < pairs; base += blockDim.x / kWarp * kSide) {
        const int pair = base + threadIdx.x % kWarp / kLanes;
        A sum = 0;
        if (pair < pairs) {
            const int64_t c = (head0 + pair % heads) * a.head_dim;
            const A* q = a.q + b * C + c;
            const A* k = a.k + (b * a.layers + range.first + pair / heads) * C + c;
#pragma unroll 4
            for (int64_t j = lane; j < a.head_dim; j += kLanes) sum += q[j] * k[j];
        }
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
        if (lane == 0 && pair < pairs) scores[pair] = sum / sqrt(A(a.head_dim));
    }
    __syncthreads();
}

// The highest score and the sum of the exponentials relative to it, joined from one range of layers to the next.
template <class A>
struct Softmax {
    A highest, total;

    __device__ __forceinline__ A weight(A score) const { return exp(score - highest) / total; }
};

// By a warp, over `count` scores that lie `step` apart; valid in every lane.
template <class A>
__device__ __forceinline__ Softmax<A> softmax_of(const A* scores, int count, int step, const Softmax<A>* before) {
    A highest = before ? before->highest : scores[0];
    for (int i = threadIdx.x % kWarp; i < count; i += kWarp) highest = max(highest, scores[i * step]);
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        highest = max(highest, __shfl_xor_sync(kAllLanes, highest, offset));
    }
    A total = 0;
    for (int i = threadIdx.x % kWarp; i < count; i += kWarp) total += exp(scores[i * step] - highest);
    total = warp_sum(total);
    if (before) total += before->total * exp(before->highest - highest);
    return {highest, total};
}

// Layers whose scores a block holds at once, and the scratch that attention takes.
template <class A>
DLA_HOST_DEVICE inline int scored(const Attention<A>& a) {
    return static_cast<int>(a.layers < kMaps ? a.layers : kMaps);
}
template <class A>
DLA_HOST_DEVICE inline int attend_shared(const Attention<A>& a, int channels) {
    return (scored(a) + 2) * channels;
}

// Attention times gate for a range of layers and the block's channels -> weights [layers, channels]; `scores` is
// scratch of attend_shared() elements. A channel beyond the map has weight 0.
template <class A>
__device__ void attend(const Attention<A>& a, const Shape& s, int64_t b, int64_t c0, int channels, const Range& range,
                       A* scores, A* weights) {
    auto* const softmax = reinterpret_cast<Softmax<A>*>(scores + scored(a) * channels);
    const int64_t last = min(c0 + channels, s.C) - 1, head0 = c0 / a.head_dim;
    const int heads = static_cast<int>(last / a.head_dim - head0) + 1;
    for (int64_t first = 0; first < a.layers; first += kMaps) {
        const Range part{first, static_cast<int>(min(int64_t(kMaps), a.layers - first))};
        score(a, s.C, b, head0, heads, part, scores);
        for (int h = threadIdx.x / kWarp; h < heads; h += blockDim.x / kWarp) {
            const Softmax<A> all = softmax_of(scores + h, part.count, heads, first > 0 ? &softmax[h] : nullptr);
            __syncwarp();
            if (threadIdx.x % kWarp == 0) softmax[h] = all;
        }
        __syncthreads();
    }
    if (a.layers > kMaps) score(a, s.C, b, head0, heads, range, scores);  // they hold the last range's
    for (int i = threadIdx.x; i < range.count * channels; i += blockDim.x) {
        const int m = i / channels;
        const int64_t c = c0 + i % channels, h = c / a.head_dim - head0;
        A weight = 0;
        if (c < s.C) {
            weight = softmax[h].weight(scores[m * heads + h]) * a.gates[(b * a.layers + range.first + m) * s.C + c];
        }
        weights[i] = weight;
    }
    __syncthreads();
}

}  // namespace dla::layer_attention
