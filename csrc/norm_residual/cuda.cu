// norm_residual on the GPU. Every kernel reads and writes each map once; see common/cuda/walk.cuh for how.
#include "common/cuda/launch.cuh"
#include "common/cuda/parts.cuh"
#include "common/cuda/walk.cuh"
#include "norm_residual/cuda.h"

namespace dla {
namespace {

constexpr int kThreads = WalkPlan::kThreads;

// Vectors that a thread has in flight in the kernels that read several maps: two, but one where a vector's channels
// already fill the registers.
template <class W>
constexpr int kUnroll = W::kChannels > 4 ? 1 : 2;

template <class A>
__device__ __forceinline__ A rectify(A v) {
    return v <= A(0) ? A(0) : v;  // a NaN passes, as in torch
}

// Welford's update: every element of a vector has moments of its own, all of the same count.
template <class W, class T>
__global__ void __launch_bounds__(kThreads) moments(const NormMoments<T> a, const WalkPlan plan) {
    using A = Acc<T>;
    const W walk(a.shape, plan);
    auto* shared = shared_memory<Moments<A>>();
    const int warp = threadIdx.x / kWarp, lane = walk.lane;
    walk.each_sample([&](int64_t b) {
        A count = 0, mean[W::N] = {}, deviations[W::N] = {};
        const T* o = a.o.at(b, walk.c, 0);
        walk.template each_vector<4>([&](unsigned p) { return fetch<W::N>(o + p * a.o.pixel); },
                                     [&](unsigned, const Word<T, W::N>& word) {
                                         A value[W::N];
                                         unpack<T>(word, value);
                                         count += A(1);
                                         const A share = A(1) / count;
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
        for (int i = 0; i < W::kChannels; ++i) merged[i] = warp_merge<W::kLanes>(merged[i]);
        bool writes = threadIdx.x % kWarp < W::kLanes;
        if (plan.team > kWarp) {
            if (writes) {
#pragma unroll
                for (int i = 0; i < W::kChannels; ++i) shared[(warp * W::kLanes + lane) * W::kChannels + i] = merged[i];
            }
            __syncthreads();
            writes = writes && warp == 0;
            for (int w = 1; writes && w < kThreads / kWarp; ++w) {
#pragma unroll
                for (int i = 0; i < W::kChannels; ++i) {
                    merged[i].merge(shared[(w * W::kLanes + lane) * W::kChannels + i]);
                }
            }
            __syncthreads();
        }
        if (writes && walk.inside() && plan.runs > 1) {
            auto* to = reinterpret_cast<Moments<A>*>(a.parts) + (b * plan.runs + walk.run) * a.shape.C + walk.c;
#pragma unroll
            for (int i = 0; i < W::kChannels; ++i) to[i] = merged[i];
        } else if (writes && walk.inside()) {
#pragma unroll
            for (int i = 0; i < W::kChannels; ++i) {
                a.mean[b * a.shape.C + walk.c + i] = merged[i].mean;
                a.var[b * a.shape.C + walk.c + i] = merged[i].var();
            }
        }
    });
}

// The statistics of the thread's channels from those of `rows` samples, [rows, C], by the law of total variance.
template <class W, class A = typename W::A>
__device__ __forceinline__ void merge_samples(const W& walk, const A* means, const A* vars, int64_t rows, A* shared,
                                              A (&mean)[W::kChannels], A (&var)[W::kChannels]) {
    const int64_t C = walk.s.C;
    const int first = threadIdx.x / W::kLanes, step = kThreads / W::kLanes;
    const bool inside = walk.inside();
    const auto average = [&](A(&v)[W::kChannels], const auto& value) {
#pragma unroll
        for (int i = 0; i < W::kChannels; ++i) v[i] = 0;
        for (int64_t b = first; inside && b < rows; b += step) {
#pragma unroll
            for (int i = 0; i < W::kChannels; ++i) v[i] += value(b * C + walk.c + i, i);
        }
        W::block_sums(v, shared);
#pragma unroll
        for (int i = 0; i < W::kChannels; ++i) v[i] /= A(rows);
    };
    if (rows == 1) {
#pragma unroll
        for (int i = 0; i < W::kChannels; ++i) {
            mean[i] = inside ? means[walk.c + i] : A(0);
            var[i] = inside ? vars[walk.c + i] : A(0);
        }
        return;
    }
    average(mean, [&](int64_t at, int) { return means[at]; });
    average(var, [&](int64_t at, int i) {
        const A apart = means[at] - mean[i];
        return vars[at] + apart * apart;
    });
}

template <class T, int N>
struct Pair {
    Word<T, N> x, o;
};

template <class W, class T>
__global__ void __launch_bounds__(kThreads) forward(const NormForward<T> a, const WalkPlan plan) {
    using A = Acc<T>;
    const W walk(a.shape, plan);
    A* shared = shared_memory<A>();
    A mean[W::kChannels], scale[W::kChannels], bias[W::kChannels];
    merge_samples(walk, a.mean, a.var, a.rows, shared, mean, scale);
#pragma unroll
    for (int i = 0; i < W::kChannels; ++i) {
        const int64_t c = walk.c + i;
        if (walk.part() == 0 && threadIdx.x < W::kLanes && walk.inside()) {
            a.used_mean[c] = mean[i];
            a.used_var[c] = scale[i];
        }
        scale[i] = walk.inside() ? a.weight[c] / sqrt(scale[i] + a.eps) : A(0);
        bias[i] = walk.inside() ? a.bias[c] : A(0);
    }
    walk.each_sample([&](int64_t b) {
        const A keep = a.keep ? a.keep[b] : A(1);
        const T *x = a.x.at(b, walk.c, 0), *o = a.o.at(b, walk.c, 0);
        T* out = a.out.at(b, walk.c, 0);
        A total[W::kChannels] = {};
        const auto get = [&](unsigned p) {
            return Pair<T, W::N>{x ? fetch<W::N>(x + p * a.x.pixel) : Word<T, W::N>{}, fetch<W::N>(o + p * a.o.pixel)};
        };
        walk.template each_vector<4>(get, [&](unsigned p, const Pair<T, W::N>& words) {
            A residual[W::N], value[W::N];
            unpack<T>(words.x, residual);
            unpack<T>(words.o, value);
#pragma unroll
            for (int i = 0; i < W::N; ++i) {
                const int j = W::kRows ? i : 0;
                A normed = (value[i] - mean[j]) * scale[j] + bias[j];
                if (a.relu == Relu::branch) normed = rectify(normed);
                A sum = residual[i] + keep * normed;
                if (a.relu == Relu::sum) sum = rectify(sum);
                total[j] += sum;
                value[i] = sum;
            }
            store(out + p * a.out.pixel, value);
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

// What one vector gives: the gradient of the sum, that of the normalised map, o - mean, and what keep multiplied.
template <class W, class A = typename W::A>
struct Gradient {
    A of_sum[W::N], of_normed[W::N], centred[W::N], branch[W::N];
};

// The gradient that reaches a sample's channels through GAP, at every pixel.
template <class W, class T, class A = Acc<T>>
__device__ __forceinline__ void through_gap(const W& walk, const NormGradient<T>& a, int64_t b, A (&g)[W::kChannels]) {
#pragma unroll
    for (int i = 0; i < W::kChannels; ++i) {
        g[i] = a.grad_y && walk.inside() ? a.grad_y[b * a.shape.C + walk.c + i] / A(a.shape.HW()) : A(0);
    }
}

// What a gradient reads of one vector, and where it reads.
template <class T, int N>
struct GradientWords {
    Word<T, N> grad_out, o, out;
};

template <class W, class T>
struct GradientSource {
    const T *grad_out, *o, *out;
    const NormGradient<T>& a;

    __device__ __forceinline__ GradientSource(const NormGradient<T>& a, const W& walk, int64_t b)
        : grad_out(a.grad_out.at(b, walk.c, 0)), o(a.o.at(b, walk.c, 0)), out(a.out.at(b, walk.c, 0)), a(a) {}

    __device__ __forceinline__ GradientWords<T, W::N> operator()(unsigned p) const {
        GradientWords<T, W::N> words;
        words.grad_out = fetch<W::N>(grad_out + p * a.grad_out.pixel);
        words.o = fetch<W::N>(o + p * a.o.pixel);
        if (a.relu == Relu::sum) words.out = fetch<W::N>(out + p * a.out.pixel);
        return words;
    }
};

template <class W, class T, class A = Acc<T>>
__device__ __forceinline__ Gradient<W> gradient(const NormGradient<T>& a, const Channels<W>& of,
                                                const A (&gap)[W::kChannels], A keep,
                                                const GradientWords<T, W::N>& words) {
    Gradient<W> g;
    unpack<T>(words.grad_out, g.of_sum);
    unpack<T>(words.o, g.centred);
    A value[W::N] = {};
    if (a.relu == Relu::sum) unpack<T>(words.out, value);
#pragma unroll
    for (int i = 0; i < W::N; ++i) {
        const int j = W::kRows ? i : 0;
        g.of_sum[i] += gap[j];
        if (a.relu == Relu::sum && value[i] <= A(0)) g.of_sum[i] = 0;
        g.centred[i] -= of.mean[j];
        g.branch[i] = g.centred[i] * of.scale[j] + of.bias[j];
        g.of_normed[i] = keep * g.of_sum[i];
        if (a.relu == Relu::branch && g.branch[i] <= A(0)) g.branch[i] = g.of_normed[i] = 0;
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

template <class W, class T>
__global__ void __launch_bounds__(kThreads) sums(const NormSums<T> a, const WalkPlan plan, const Partials<Acc<T>> to) {
    using A = Acc<T>;
    const W walk(a.shape, plan);
    A* shared = shared_memory<A>();
    const Channels<W> of(walk, a);
    A of_bias[W::kChannels] = {}, of_weight[W::kChannels] = {};
    walk.each_sample([&](int64_t b) {
        const A keep = a.keep ? a.keep[b] : A(1);
        A gap[W::kChannels], of_keep = 0;
        through_gap(walk, a, b, gap);
        const GradientSource<W, T> source(a, walk, b);
        walk.template each_vector<2>(source, [&](unsigned, const GradientWords<T, W::N>& words) {
            const auto g = gradient(a, of, gap, keep, words);
#pragma unroll
            for (int i = 0; i < W::N; ++i) {
                const int j = W::kRows ? i : 0;
                of_bias[j] += g.of_normed[i];
                of_weight[j] += g.of_normed[i] * g.centred[i];
                of_keep += g.of_sum[i] * g.branch[i];
            }
        });
        if (a.grad_keep) {
            of_keep = plan.team > kWarp ? block_sum(of_keep, shared) : warp_sum(of_keep);
            if (threadIdx.x % plan.team == 0) to.keep[(b * plan.tiles + walk.tile) * plan.runs + walk.run] = of_keep;
        }
    });
    W::block_sums(of_bias, shared);
    W::block_sums(of_weight, shared);
    if (threadIdx.x < W::kLanes && walk.inside()) {
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

template <class W, class T>
__global__ void __launch_bounds__(kThreads) backward(const NormBackward<T> a, const WalkPlan plan) {
    using A = Acc<T>;
    const W walk(a.shape, plan);
    const Channels<W> of(walk, a);
    // grad_o = scale * (g - offset - slope * (o - mean))
    A slope[W::kChannels] = {}, offset[W::kChannels] = {};
#pragma unroll
    for (int i = 0; i < W::kChannels; ++i) {
        if (!a.sum_weight || !walk.inside()) continue;
        slope[i] = a.sum_weight[walk.c + i] * inverse_std(a, walk.c + i) / a.count;
        offset[i] = a.sum_bias[walk.c + i] / a.count;
    }
    walk.each_sample([&](int64_t b) {
        const A keep = a.keep ? a.keep[b] : A(1);
        T *grad_x = a.grad_x.at(b, walk.c, 0), *grad_o = a.grad_o.at(b, walk.c, 0);
        A gap[W::kChannels];
        through_gap(walk, a, b, gap);
        const GradientSource<W, T> source(a, walk, b);
        walk.template each_vector<2>(source, [&](unsigned p, const GradientWords<T, W::N>& words) {
            auto g = gradient(a, of, gap, keep, words);
            if (a.grad_x) store(grad_x + p * a.grad_x.pixel, g.of_sum);
#pragma unroll
            for (int i = 0; i < W::N; ++i) {
                const int j = W::kRows ? i : 0;
                g.centred[i] = of.scale[j] * (g.of_normed[i] - offset[j] - slope[j] * g.centred[i]);
            }
            store(grad_o + p * a.grad_o.pixel, g.centred);
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
        launch(moments<W, T>, plan.grid(), kThreads, W::kShared * sizeof(Moments<A>), stream, a, plan);
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
    on_plan<NormForward<T>, T>(a, {a.x, a.o, to_const(a.out)}, [&](auto* type, const WalkPlan& plan) {
        using W = std::remove_pointer_t<decltype(type)>;
        launch(forward<W, T>, plan.grid(), kThreads, W::kShared * sizeof(A), stream, a, plan);
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
        launch(sums<W, T>, plan.grid(), kThreads, W::kShared * sizeof(Acc<T>), stream, a, plan, partials);
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
                   launch(backward<W, T>, plan.grid(), kThreads, 0, stream, a, plan);
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
