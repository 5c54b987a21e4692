// layer_attention's forward: the T maps are read once, side by side, and o is written with its moments.
#pragma once

#include "layer_attention/block.cuh"

namespace dla::layer_attention {

// Bytes of shared memory: the weights and what they take, later the moments of every warp.
template <class T, class A = Acc<T>>
inline int64_t forward_shared(const Forward<T>& a, int channels) {
    const int64_t tables = (a.range.count * channels + attend_shared(a.attention, channels)) * sizeof(A);
    const int64_t moments = kMaxThreads / kWarp * channels * sizeof(Moments<A>);
    return tables > moments ? tables : moments;
}

// The moments of o as a thread sees them, a step at a time.
template <class A, class P>
struct Gathered {
    A mean[P::kChannels] = {}, deviations[P::kChannels] = {};
    A count = 0;

    __device__ __forceinline__ void add(const A (&o)[kDepth][P::N], int vectors) {
        if (vectors == 0) return;
        const A values = A(vectors) * (P::kRows ? 1 : P::N), each = reciprocal(values);
        const A share = values * reciprocal(count + values);
        A total[P::kChannels] = {}, squares[P::kChannels] = {};
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
#pragma unroll
            for (int e = 0; e < P::N; ++e) total[e % P::kChannels] += i < vectors ? o[i][e] : A(0);
        }
#pragma unroll
        for (int c = 0; c < P::kChannels; ++c) total[c] *= each;
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
#pragma unroll
            for (int e = 0; e < P::N; ++e) {
                const A centred = o[i][e] - total[e % P::kChannels];
                squares[e % P::kChannels] += i < vectors ? centred * centred : A(0);
            }
        }
#pragma unroll
        for (int c = 0; c < P::kChannels; ++c) {
            const A apart = total[c] - mean[c];
            mean[c] += apart * share;
            deviations[c] += squares[c] + apart * apart * (count * share);
        }
        count += values;
    }
};

// Merges the moments of the lanes that share channels, then of the warps of a team, and writes the result, or a part.
template <class T, class P, class A = Acc<T>>
__device__ void finish_moments(const Forward<T>& a, const Plan& plan, const P& p, const Gathered<A, P>& found,
                               Moments<A>* shared) {
    const int warp = threadIdx.x / kWarp, warps = plan.team / kWarp, width = plan.lanes * P::kChannels;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < P::kChannels; ++e) {
        Moments<A> m{found.count, found.mean[e], found.deviations[e]};
        for (int offset = kWarp / 2; offset >= plan.lanes; offset /= 2) {
            m.merge({__shfl_down_sync(kAllLanes, m.count, offset), __shfl_down_sync(kAllLanes, m.mean, offset),
                     __shfl_down_sync(kAllLanes, m.deviations, offset)});
        }
        if (threadIdx.x % kWarp < plan.lanes) shared[warp * width + p.lane * P::kChannels + e] = m;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < p.channels; i += blockDim.x) {
        const int64_t c = p.c0 + i;
        if (c >= a.shape.C) continue;
        const Moments<A>* of = shared + i / width * warps * width + i % width;
        Moments<A> all = of[0];
        for (int w = 1; w < warps; ++w) all.merge(of[w * width]);
        if (plan.runs > 1) {
            reinterpret_cast<Moments<A>*>(a.parts)[(int64_t(p.b) * plan.runs + p.run) * a.shape.C + c] = all;
        } else {
            a.mean[p.b * a.shape.C + c] = all.mean;
            a.var[p.b * a.shape.C + c] = all.var();
        }
    }
}

template <class T, class P, bool kFolded>
__global__ void __launch_bounds__(kMaxThreads, sizeof(T) == 8 ? 1 : 2)
    forward(const __grid_constant__ Forward<T> a, const __grid_constant__ Plan plan) {
    using A = Acc<T>;
    const P p(plan, a.shape);
    A* const weights = shared_memory<A>();
    attend(a.attention, a.shape, p.b, p.c0, p.channels, a.range, weights + a.range.count * p.channels, weights);

    Gathered<A, P> found;
    for (int step = 0; step < plan.steps; ++step) {
        const int at = p.at + step * p.stride * kDepth;
        if (at >= p.end) break;
        A o[kDepth][P::N] = {};
        if (a.before) p.template load_all<A>({a.before.data, a.before.batch, a.before.channel, a.before.pixel}, at, o);
        p.each_map(a.values, a.range.count, at, [&](int m, const A(&value)[kDepth][P::N]) {
            A weight[P::kChannels];
            p.load_channels(weights + m * p.channels, weight);
#pragma unroll
            for (int i = 0; i < kDepth; ++i) {
#pragma unroll
                for (int e = 0; e < P::N; ++e) o[i][e] += weight[e % P::kChannels] * value[i][e];
            }
        });
        if (a.after) {
            p.store_all(a.after, at, o);
            continue;
        }
        if constexpr (kFolded) {
            A x[kDepth][P::N];
            p.load_all(a.x, at, x);
#pragma unroll
            for (int c = 0; c < P::kChannels; ++c) {
                const A scale = a.norm.weight[p.c + c] / sqrt(a.norm.var[p.c + c] + a.norm.eps);
                const A shift = a.norm.bias[p.c + c] - a.norm.mean[p.c + c] * scale;
#pragma unroll
                for (int i = 0; i < kDepth; ++i) {
#pragma unroll
                    for (int e = c; e < P::N; e += P::kChannels) {
                        const A normed = o[i][e] * scale + shift;
                        o[i][e] = x[i][e] + (normed <= A(0) ? A(0) : normed);  // a NaN passes, as in torch
                    }
                }
            }
        } else {
            found.add(o, min(kDepth, (p.end - at + p.stride - 1) / p.stride));
        }
        p.store_all(a.out, at, o);
    }
    if (!kFolded && !a.after) finish_moments(a, plan, p, found, shared_memory<Moments<A>>());
}

}  // namespace dla::layer_attention
