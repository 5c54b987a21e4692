// norm_residual on the GPU. Every kernel reads and writes each map once; see common/cuda/walk.cuh for how.
#include "common/cuda/launch.cuh"
#include "common/cuda/parts.cuh"
#include "common/cuda/walk.cuh"
#include "norm_residual/cuda.h"

namespace dla {
namespace {

constexpr int kThreads = WalkPlan::kThreads;

template <class A>
__device__ __forceinline__ A rectify(A v) {
    return v <= A(0) ? A(0) : v;  // a NaN passes, as in torch
}

// Welford's update: every element of a vector has moments of its own, all of the same count.
template <class W, class T>
__global__ void __launch_bounds__(kThreads, W::N == 1 ? 4 : 0) moments(const NormMoments<T> a, const WalkPlan plan) {
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
        for (int i = threadIdx.x; i < channels; i += kThreads) {
            Moments<A> all = shared[i];
            for (int w = 1; w < kThreads / kWarp; ++w) all.merge(shared[w * channels + i]);
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

template <class W, class T, Relu kRelu>
__global__ void __launch_bounds__(kThreads, W::N * sizeof(T) == 16 ? 3 : 1)
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
__global__ void __launch_bounds__(kThreads, 2)
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
__global__ void __launch_bounds__(kThreads)
    finish(const NormSums<T> a, const WalkPlan plan, const Partials<Acc<T>> from) {
    using A = Acc<T>;
    constexpr int kWarps = kThreads / kWarp;
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
    shared[kThreads + threadIdx.x] = bias;
    __syncthreads();
    if (warp > 0 || c >= C) return;
    for (int w = 1; w < kWarps; ++w) {
        weight += shared[w * kWarp + lane];
        bias += shared[kThreads + w * kWarp + lane];
    }
    a.grad_weight[c] = weight;
    a.grad_bias[c] = bias;
}

template <class W, class T, Relu kRelu>
__global__ void __launch_bounds__(kThreads, 2) backward(const NormBackward<T> a, const WalkPlan plan) {
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

// One block: it reads the number of batches before it writes it.
template <class T, class A>
__global__ void __launch_bounds__(kThreads) running_stats(const RunningStats<T, A> a) {
    using Wide = std::conditional_t<std::is_same_v<A, float>, Acc<T>, double>;
    const int64_t batches = a.batches ? *a.batches + 1 : 1;
    __syncthreads();
    if (a.batches && threadIdx.x == 0) *a.batches = batches;
    const Wide momentum = Wide(a.momentum == a.momentum ? a.momentum : 1.0 / double(batches));
    const Wide unbiased = Wide(double(a.count) / double(a.count - 1));
    const auto update = [&](T& running, Wide value) {
        running = narrow<T>(static_cast<Acc<T>>((Wide(1) - momentum) * Wide(widen(running)) + momentum * value));
    };
    for (int64_t c = threadIdx.x; c < a.C; c += kThreads) {
        update(a.running_mean[c * a.mean_stride], a.mean[c]);
        update(a.running_var[c * a.var_stride], a.var[c] * unbiased);
    }
}

}  // namespace

// Calls body with the Walk of these maps and its plan.
template <class Args, class T, class Body>
void on_plan(const Args& a, std::initializer_list<Map<const T>> maps, const Body& body) {
    on_walk<T>(a.channels_last, a.shape, maps, [&](auto* type) {
        using W = std::remove_pointer_t<decltype(type)>;
        body(type, W::plan(a.shape));
    });
}

// Calls body with where the ReLU stands as a constant.
template <class Body>
void on_relu(Relu relu, const Body& body) {
    switch (relu) {
        case Relu::none:
            return body(std::integral_constant<Relu, Relu::none>{});
        case Relu::branch:
            return body(std::integral_constant<Relu, Relu::branch>{});
        case Relu::sum:
            return body(std::integral_constant<Relu, Relu::sum>{});
    }
}

template <class T>
int64_t norm_moments_scratch(const NormMoments<T>& a) {
    int64_t runs = 1;
    on_plan<NormMoments<T>, T>(a, {a.o}, [&](auto*, const WalkPlan& plan) { runs = plan.runs; });
    return runs > 1 ? 3 * a.shape.B * runs * a.shape.C : 0;
}

template <class T>
void norm_moments(const NormMoments<T>& a, cudaStream_t stream) {
    using A = Acc<T>;
    on_plan<NormMoments<T>, T>(a, {a.o}, [&](auto* type, const WalkPlan& plan) {
        using W = std::remove_pointer_t<decltype(type)>;
        launch(moments<W, T>, plan.grid(), kThreads, W::kShared * sizeof(Moments<A>) + W::template kRing<1>, stream, a,
               plan);
        if (plan.runs == 1) return;
        launch_join(join_moments<A>, a.shape.B, a.shape.C, stream, reinterpret_cast<const Moments<A>*>(a.parts),
                    plan.runs, a.shape.B, a.shape.C, a.mean, a.var);
    });
}

template <class T>
int64_t norm_forward_scratch(const NormForward<T>& a) {
    int64_t runs = 1;
    on_plan<NormForward<T>, T>(a, {a.x, a.o, to_const(a.out)}, [&](auto*, const WalkPlan& plan) { runs = plan.runs; });
    return runs > 1 ? a.shape.B * runs * a.shape.C : 0;
}

template <class T>
void norm_forward(const NormForward<T>& a, cudaStream_t stream) {
    using A = Acc<T>;
    if (a.rows > 1) {
        const dim3 blocks(static_cast<unsigned>(ceil_div(a.shape.C, kWarp)));
        launch(merge_samples<T>, blocks, kMergeThreads, kMergeThreads * sizeof(A), stream, a);
    }
    on_plan<NormForward<T>, T>(a, {a.x, a.o, to_const(a.out)}, [&](auto* type, const WalkPlan& plan) {
        using W = std::remove_pointer_t<decltype(type)>;
        on_relu(a.relu, [&](auto relu) {
            launch(forward<W, T, decltype(relu)::value>, plan.grid(), kThreads,
                   W::kShared * sizeof(A) + W::template kRing<2>, stream, a, plan);
        });
        if (plan.runs == 1 || a.shape.B == 0) return;
        launch_join(join_means<A>, a.shape.B, a.shape.C, stream, static_cast<const A*>(a.parts), plan.runs, a.shape.B,
                    a.shape.C, A(a.shape.HW()), a.y);
    });
}

template <class T, class Body>
void on_sums_plan(const NormSums<T>& a, const Body& body) {
    on_plan<NormSums<T>, T>(a, {a.grad_out, a.o, a.out}, body);
}

template <class T>
int64_t norm_sums_scratch(const NormSums<T>& a) {
    int64_t size = 0;
    on_sums_plan(
        a, [&](auto*, const WalkPlan& plan) { size = Partials<Acc<T>>::size(a.shape, plan, a.grad_keep != nullptr); });
    return size;
}

template <class T>
void norm_sums(const NormSums<T>& a, cudaStream_t stream) {
    on_sums_plan(a, [&](auto* type, const WalkPlan& plan) {
        using W = std::remove_pointer_t<decltype(type)>;
        Partials<Acc<T>> partials(a.scratch, a.shape, plan);
        // A single part's sums are the result.
        const bool done = plan.parts() == 1 && !a.grad_keep;
        if (done) {
            partials.weight = a.grad_weight;
            partials.bias = a.grad_bias;
        }
        on_relu(a.relu, [&](auto relu) {
            constexpr Relu kRelu = decltype(relu)::value;
            launch(sums<W, T, kRelu>, plan.grid(), kThreads,
                   W::kShared * sizeof(Acc<T>) + W::template kRing<kGradientMaps<kRelu>>, stream, a, plan, partials);
        });
        if (done) return;
        const int64_t blocks = ceil_div(a.shape.C, kWarp) + (a.grad_keep ? ceil_div(a.shape.B, kThreads / kWarp) : 0);
        launch(finish<T>, dim3(static_cast<unsigned>(blocks)), kThreads, 2 * kThreads * sizeof(Acc<T>), stream, a, plan,
               partials);
    });
}

template <class T>
void norm_backward(const NormBackward<T>& a, cudaStream_t stream) {
    on_walk<T>(a.channels_last, a.shape, {a.grad_out, a.o, a.out, to_const(a.grad_x), to_const(a.grad_o)},
               [&](auto* type) {
                   using W = std::remove_pointer_t<decltype(type)>;
                   const WalkPlan plan = W::plan(a.shape);
                   on_relu(a.relu, [&](auto relu) {
                       constexpr Relu kRelu = decltype(relu)::value;
                       launch(backward<W, T, kRelu>, plan.grid(), kThreads, W::template kRing<kGradientMaps<kRelu>>,
                              stream, a, plan);
                   });
               });
}

template <class T, class A>
void update_running_stats(const RunningStats<T, A>& a, cudaStream_t stream) {
    launch(running_stats<T, A>, dim3(1), kThreads, 0, stream, a);
}

#define DLA_INSTANTIATE(T)                                                           \
    template int64_t norm_moments_scratch(const NormMoments<T>&);                    \
    template int64_t norm_forward_scratch(const NormForward<T>&);                    \
    template void norm_moments(const NormMoments<T>&, cudaStream_t);                 \
    template void norm_forward(const NormForward<T>&, cudaStream_t);                 \
    template int64_t norm_sums_scratch(const NormSums<T>&);                          \
    template void norm_sums(const NormSums<T>&, cudaStream_t);                       \
    template void norm_backward(const NormBackward<T>&, cudaStream_t);               \
    template void update_running_stats(const RunningStats<T, float>&, cudaStream_t); \
    template void update_running_stats(const RunningStats<T, double>&, cudaStream_t);
DLA_INSTANTIATE(float)
DLA_INSTANTIATE(double)
DLA_INSTANTIATE(__half)
DLA_INSTANTIATE(__nv_bfloat16)

}  // namespace dla
