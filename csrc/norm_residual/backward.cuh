// norm_residual's backward: the sums that BatchNorm's gradient needs, then the gradients of both maps.
#pragma once

#include "common/cuda/walk.cuh"
#include "norm_residual/cuda.h"

namespace dla::norm_residual {

template <class T, class A = Acc<T>>
__device__ __forceinline__ A inverse_std(const NormGradient<T>& a, int64_t c) {
    return A(1) / sqrt(a.var[c] + a.eps);
}

// What normalises the thread's channels.
template <class W, class A = typename W::A>
struct Channels {
    A mean[W::kChannels], scale[W::kChannels], bias[W::kChannels];

    template <class T>
    __device__ Channels(const W& walk, const NormGradient<T>& a) {
#pragma unroll
        for (int i = 0; i < W::kChannels; ++i) {
            const int64_t c = walk.inside() ? walk.c + i : 0;
            mean[i] = a.mean[c];
            scale[i] = a.weight[c] * inverse_std(a, c);
            bias[i] = a.bias[c];
        }
    }
};

// Walks the maps that a gradient reads: use(i, words).
template <Relu kRelu, class W, class T, class Use>
__device__ __forceinline__ void each_gradient(const W& walk, const NormGradient<T>& a, int64_t b, void* ring,
                                              const Use& use) {
    if constexpr (kRelu == Relu::sum) {
        const Cursor<const T> maps[] = {walk.cursor(a.grad_out, b), walk.cursor(a.o, b), walk.cursor(a.out, b)};
        walk.each_vector(maps, ring, use);
    } else {
        const Cursor<const T> maps[] = {walk.cursor(a.grad_out, b), walk.cursor(a.o, b)};
        walk.each_vector(maps, ring, use);
    }
}

// What one vector gives: the gradient of the sum, that of keep's product with the normalised map, over keep, and o -
// mean.
template <class W, class A = typename W::A>
struct Gradient {
    A of_sum[W::N], of_branch[W::N], centred[W::N];
};

// The gradient that reaches a sample's channels through GAP, at every pixel.
template <class W, class T, class A = Acc<T>>
__device__ __forceinline__ void through_gap(const W& walk, const NormGradient<T>& a, int64_t b, A (&g)[W::kChannels]) {
#pragma unroll
    for (int i = 0; i < W::kChannels; ++i) {
        g[i] = a.grad_y && walk.inside() ? a.grad_y[b * a.shape.C + walk.c + i] / A(a.shape.HW()) : A(0);
    }
}

// What a gradient reads: grad_out, o, and under a ReLU of the sum out.
template <Relu kRelu>
constexpr int kGradientMaps = kRelu == Relu::sum ? 3 : 2;

template <Relu kRelu, class W, class T, class A = Acc<T>>
__device__ __forceinline__ Gradient<W> gradient(const Channels<W>& of, const A (&gap)[W::kChannels],
                                                const Word<T, W::N> (&words)[kGradientMaps<kRelu>]) {
    Gradient<W> g;
    unpack<T>(words[0], g.of_sum);
    unpack<T>(words[1], g.centred);
    A value[W::N] = {};
    if constexpr (kRelu == Relu::sum) unpack<T>(words[2], value);
#pragma unroll
    for (int i = 0; i < W::N; ++i) {
        const int j = W::kRows ? i : 0;
        g.of_sum[i] += gap[j];
        if (kRelu == Relu::sum && value[i] <= A(0)) g.of_sum[i] = 0;
        g.centred[i] -= of.mean[j];
        g.of_branch[i] = g.of_sum[i];
        if (kRelu == Relu::branch && g.centred[i] * of.scale[j] + of.bias[j] <= A(0)) g.of_branch[i] = 0;
    }
    return g;
}

// Where a block leaves its sums when there are several: [parts, C] twice, then [B, tiles, runs] of keep's.
template <class A>
struct Partials {
    A *weight, *bias, *keep;

    Partials(A* scratch, const Shape& s, const WalkPlan& plan)
        : weight(scratch), bias(weight + plan.parts() * s.C), keep(bias + plan.parts() * s.C) {}

    static int64_t size(const Shape& s, const WalkPlan& plan, bool keep) {
        return 2 * plan.parts() * s.C + (keep ? s.B * plan.tiles * plan.runs : 0);
    }
};

template <class W, class T, Relu kRelu>
__global__ void __launch_bounds__(kWalkThreads, 2)
    sums(const NormSums<T> a, const WalkPlan plan, const Partials<Acc<T>> to) {
    using A = Acc<T>;
    const W walk(a.shape, plan);
    A* shared = shared_memory<A>();
    const Channels<W> of(walk, a);
    A of_bias[W::kChannels] = {}, of_weight[W::kChannels] = {};
    walk.each_sample([&](int64_t b) {
        const A keep = a.keep ? a.keep[b] : A(1);
        A gap[W::kChannels], sum[W::kChannels] = {}, with_centred[W::kChannels] = {};
        through_gap(walk, a, b, gap);
        each_gradient<kRelu>(walk, a, b, shared + W::kShared, [&](int, const auto& words) {
            const auto g = gradient<kRelu, W, T>(of, gap, words);
#pragma unroll
            for (int i = 0; i < W::N; ++i) {
                const int j = W::kRows ? i : 0;
                sum[j] += g.of_branch[i];
                with_centred[j] += g.of_branch[i] * g.centred[i];
            }
        });
#pragma unroll
        for (int i = 0; i < W::kChannels; ++i) {
            of_bias[i] += keep * sum[i];
            of_weight[i] += keep * with_centred[i];
        }
        if (a.grad_keep) {
            const Channels<W> again(walk, a);  // no register keeps them through the walk
            A of_keep = 0;
#pragma unroll
            for (int i = 0; i < W::kChannels; ++i) of_keep += with_centred[i] * again.scale[i] + sum[i] * again.bias[i];
            of_keep = plan.team > kWarp ? block_sum(of_keep, shared) : warp_sum(of_keep);
            if (threadIdx.x % plan.team == 0) to.keep[(b * plan.tiles + walk.tile) * plan.runs + walk.run] = of_keep;
        }
    });
    walk.block_sums(of_bias, shared);
    walk.block_sums(of_weight, shared);
    if (threadIdx.x < plan.lanes && walk.inside()) {
#pragma unroll
        for (int i = 0; i < W::kChannels; ++i) {
            const int64_t at = walk.part() * a.shape.C + walk.c + i;
            to.bias[at] = of_bias[i];
            to.weight[at] = of_weight[i] * inverse_std(a, walk.c + i);
        }
    }
}

// Adds up what the blocks left: 32 channels a block, the warps taking turns with the parts; then a sample a warp.
template <class T>
__global__ void __launch_bounds__(kWalkThreads)
    finish(const NormSums<T> a, const WalkPlan plan, const Partials<Acc<T>> from) {
    using A = Acc<T>;
    constexpr int kWarps = kWalkThreads / kWarp;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t C = a.shape.C, of_channels = ceil_div(C, kWarp);
    if (blockIdx.x >= of_channels) {
        const int64_t b = (blockIdx.x - of_channels) * kWarps + warp;
        if (b >= a.shape.B) return;
        A total = 0;
        const int64_t count = plan.tiles * plan.runs;
        for (int64_t k = lane; k < count; k += kWarp) total += from.keep[b * count + k];
        total = warp_sum(total);
        if (lane == 0) a.grad_keep[b] = total;
        return;
    }
    A* shared = shared_memory<A>();
    const int64_t c = int64_t(blockIdx.x) * kWarp + lane;
    A weight = 0, bias = 0;
    for (int64_t g = warp; c < C && g < plan.parts(); g += kWarps) {
        weight += from.weight[g * C + c];
        bias += from.bias[g * C + c];
    }
    shared[threadIdx.x] = weight;
    shared[kWalkThreads + threadIdx.x] = bias;
    __syncthreads();
    if (warp > 0 || c >= C) return;
    for (int w = 1; w < kWarps; ++w) {
        weight += shared[w * kWarp + lane];
        bias += shared[kWalkThreads + w * kWarp + lane];
    }
    a.grad_weight[c] = weight;
    a.grad_bias[c] = bias;
}

template <class W, class T, Relu kRelu>
__global__ void __launch_bounds__(kWalkThreads, 2) backward(const NormBackward<T> a, const WalkPlan plan) {
    using A = Acc<T>;
    const W walk(a.shape, plan);
    const Channels<W> of(walk, a);
    // grad_o = scale * keep * g + offset - slope * (o - mean)
    A slope[W::kChannels] = {}, offset[W::kChannels] = {};
#pragma unroll
    for (int i = 0; i < W::kChannels; ++i) {
        if (!a.sum_weight || !walk.inside()) continue;
        slope[i] = of.scale[i] * a.sum_weight[walk.c + i] * inverse_std(a, walk.c + i) / a.count;
        offset[i] = -of.scale[i] * a.sum_bias[walk.c + i] / a.count;
    }
    walk.each_sample([&](int64_t b) {
        const A keep = a.keep ? a.keep[b] : A(1);
        const Cursor<T> grad_x = walk.cursor(a.grad_x, b), grad_o = walk.cursor(a.grad_o, b);
        A gap[W::kChannels], factor[W::kChannels];
        through_gap(walk, a, b, gap);
#pragma unroll
        for (int i = 0; i < W::kChannels; ++i) factor[i] = of.scale[i] * keep;
        each_gradient<kRelu>(walk, a, b, shared_memory<unsigned char>(), [&](int at, const auto& words) {
            auto g = gradient<kRelu, W, T>(of, gap, words);
            if (grad_x) store(grad_x[at], g.of_sum);
#pragma unroll
            for (int i = 0; i < W::N; ++i) {
                const int j = W::kRows ? i : 0;
                g.centred[i] = factor[j] * g.of_branch[i] + (offset[j] - slope[j] * g.centred[i]);
            }
            store(grad_o[at], g.centred);
        });
    });
}

}  // namespace dla::norm_residual
