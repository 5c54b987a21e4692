// The statistics of norm_residual: a sample's moments, those of all samples together, and the running ones.
#pragma once

#include "common/cuda/parts.cuh"
#include "common/cuda/walk.cuh"
#include "norm_residual/cuda.h"

namespace dla::norm_residual {

// Welford's update: every element of a vector has moments of its own, all of the same count.
template <class W, class T>
__global__ void __launch_bounds__(kWalkThreads, W::N == 1 ? 4 : 0)
    moments(const NormMoments<T> a, const WalkPlan plan) {
    using A = Acc<T>;
    const W walk(a.shape, plan);
    auto* shared = shared_memory<Moments<A>>();
    const int warp = threadIdx.x / kWarp;
    walk.each_sample([&](int64_t b) {
        A count = 0, mean[W::N] = {}, deviations[W::N] = {};
        const Cursor<const T> maps[] = {walk.cursor(a.o, b)};
        walk.each_vector(maps, shared + W::kShared, [&](int, const Word<T, W::N>(&words)[1]) {
            A value[W::N];
            unpack<T>(words[0], value);
            count += A(1);
            const A share = reciprocal(count);
#pragma unroll
            for (int i = 0; i < W::N; ++i) {
                const A apart = value[i] - mean[i];
                mean[i] += apart * share;
                deviations[i] += apart * (value[i] - mean[i]);
            }
        });
        Moments<A> merged[W::kChannels];
#pragma unroll
        for (int i = 0; i < W::N; ++i) {
            const Moments<A> of_element{count, mean[i], deviations[i]};
            if (i < W::kChannels) {
                merged[i] = of_element;
            } else {
                merged[0].merge(of_element);
            }
        }
#pragma unroll
        for (int i = 0; i < W::kChannels; ++i) merged[i] = warp_merge(merged[i], plan.lanes);
        const auto write = [&](int64_t c, const Moments<A>& m) {
            if (c >= a.shape.C) return;
            if (plan.runs > 1) {
                reinterpret_cast<Moments<A>*>(a.parts)[(b * plan.runs + walk.run) * a.shape.C + c] = m;
            } else {
                a.mean[b * a.shape.C + c] = m.mean;
                a.var[b * a.shape.C + c] = m.var();
            }
        };
        const bool leads = threadIdx.x % kWarp < plan.lanes;
        if (plan.team == kWarp) {
#pragma unroll
            for (int i = 0; leads && i < W::kChannels; ++i) write(walk.c + i, merged[i]);
            return;
        }
        // A thread for each channel joins the warps.
        const int channels = plan.lanes * W::kChannels;
#pragma unroll
        for (int i = 0; leads && i < W::kChannels; ++i) {
            shared[warp * channels + walk.lane * W::kChannels + i] = merged[i];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < channels; i += kWalkThreads) {
            Moments<A> all = shared[i];
            for (int w = 1; w < kWalkThreads / kWarp; ++w) all.merge(shared[w * channels + i]);
            write(int64_t(walk.tile) * channels + i, all);
        }
        __syncthreads();
    });
}

// The statistics of all samples from those of each, [rows, C], by the law of total variance: 32 channels to a block, a
// warp for every so many-th row.
constexpr int kMergeThreads = 1024;

template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_samples(const NormForward<T> a) {
    using A = Acc<T>;
    constexpr int kWarps = kMergeThreads / kWarp;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t C = a.shape.C, c = int64_t(blockIdx.x) * kWarp + lane;
    A* const shared = shared_memory<A>();
    const auto average = [&](const auto& value) {
        A sum = 0;
#pragma unroll 8
        for (int64_t b = warp; b < a.rows; b += kWarps) sum += c < C ? value(b * C + c) : A(0);
        shared[threadIdx.x] = sum;
        __syncthreads();
        sum = 0;
#pragma unroll 8
        for (int w = 0; w < kWarps; ++w) sum += shared[w * kWarp + lane];
        __syncthreads();
        return sum / A(a.rows);
    };
    const A mean = average([&](int64_t at) { return a.mean[at]; });
    const A var = average([&](int64_t at) { return a.var[at] + (a.mean[at] - mean) * (a.mean[at] - mean); });
    if (warp > 0 || c >= C) return;
    a.used_mean[c] = mean;
    a.used_var[c] = var;
}

// One block: it reads the number of batches before it writes it.
template <class T, class A>
__global__ void __launch_bounds__(kWalkThreads) running_stats(const RunningStats<T, A> a) {
    using Wide = std::conditional_t<std::is_same_v<A, float>, Acc<T>, double>;
    const int64_t batches = a.batches ? *a.batches + 1 : 1;
    __syncthreads();
    if (a.batches && threadIdx.x == 0) *a.batches = batches;
    const Wide momentum = Wide(a.momentum == a.momentum ? a.momentum : 1.0 / double(batches));
    const Wide unbiased = Wide(double(a.count) / double(a.count - 1));
    const auto update = [&](T& running, Wide value) {
        running = narrow<T>(static_cast<Acc<T>>((Wide(1) - momentum) * Wide(widen(running)) + momentum * value));
    };
    for (int64_t c = threadIdx.x; c < a.C; c += kWalkThreads) {
        update(a.running_mean[c * a.mean_stride], a.mean[c]);
        update(a.running_var[c * a.var_stride], a.var[c] * unbiased);
    }
}

}  // namespace dla::norm_residual
