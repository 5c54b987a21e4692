// norm_residual's forward: the normalised map is added to the residual, and the mean of the sum comes with it.
#pragma once

#include "common/cuda/walk.cuh"
#include "norm_residual/cuda.h"

namespace dla::norm_residual {

template <class A>
__device__ __forceinline__ A rectify(A v) {
    return v <= A(0) ? A(0) : v;  // a NaN passes, as in torch
}

template <class W, class T, Relu kRelu>
__global__ void __launch_bounds__(kWalkThreads, W::N * sizeof(T) == 16 ? 3 : 1)
    forward(const NormForward<T> a, const WalkPlan plan) {
    using A = Acc<T>;
    const W walk(a.shape, plan);
    A* shared = shared_memory<A>();
    // Those of all samples, merged or given.
    const A *means = a.rows > 1 ? a.used_mean : a.mean, *vars = a.rows > 1 ? a.used_var : a.var;
    A mean[W::kChannels], scale[W::kChannels], bias[W::kChannels];
#pragma unroll
    for (int i = 0; i < W::kChannels; ++i) {
        const int64_t c = walk.inside() ? walk.c + i : 0;
        const A var = vars[c];
        mean[i] = means[c];
        scale[i] = a.weight[c] / sqrt(var + a.eps);
        bias[i] = a.bias[c];
        if (a.rows == 1 && walk.part() == 0 && threadIdx.x < plan.lanes && walk.inside()) {
            a.used_mean[c] = mean[i];
            a.used_var[c] = var;
        }
    }
    walk.each_sample([&](int64_t b) {
        const A keep = a.keep ? a.keep[b] : A(1);
        const Cursor<const T> maps[] = {walk.cursor(a.x, b), walk.cursor(a.o, b)};
        const Cursor<T> out = walk.cursor(a.out, b);
        A total[W::kChannels] = {};
        walk.each_vector(maps, shared + W::kShared, [&](int at, const Word<T, W::N>(&words)[2]) {
            A residual[W::N], value[W::N];
            unpack<T>(words[0], residual);
            unpack<T>(words[1], value);
#pragma unroll
            for (int i = 0; i < W::N; ++i) {
                const int j = W::kRows ? i : 0;
                A normed = (value[i] - mean[j]) * scale[j] + bias[j];
                if (kRelu == Relu::branch) normed = rectify(normed);
                A sum = residual[i] + keep * normed;
                if (kRelu == Relu::sum) sum = rectify(sum);
                total[j] += sum;
                value[i] = sum;
            }
            store(out[at], value);
        });
        walk.team_sums(total, shared);
        if (walk.walker == 0 && walk.inside()) {
            A* to = plan.runs > 1 ? a.parts + (b * plan.runs + walk.run) * a.shape.C : a.y + b * a.shape.C;
            const A pixels = plan.runs > 1 ? A(1) : A(a.shape.HW());
#pragma unroll
            for (int i = 0; i < W::kChannels; ++i) to[walk.c + i] = total[i] / pixels;
        }
    });
}

}  // namespace dla::norm_residual
