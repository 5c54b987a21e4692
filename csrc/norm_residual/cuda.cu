// norm_residual on CUDA: the launches. Every kernel reads and writes each map once; see common/cuda/walk.cuh for how.
#include "common/cuda/launch.cuh"
#include "norm_residual/backward.cuh"
#include "norm_residual/forward.cuh"
#include "norm_residual/moments.cuh"

namespace dla {
using namespace norm_residual;  // the kernels

namespace {

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

}  // namespace

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
        launch(moments<W, T>, plan.grid(), kWalkThreads, W::kShared * sizeof(Moments<A>) + W::template kRing<1>, stream,
               a, plan);
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
            launch(forward<W, T, decltype(relu)::value>, plan.grid(), kWalkThreads,
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
            launch(sums<W, T, kRelu>, plan.grid(), kWalkThreads,
                   W::kShared * sizeof(Acc<T>) + W::template kRing<kGradientMaps<kRelu>>, stream, a, plan, partials);
        });
        if (done) return;
        const int64_t blocks =
            ceil_div(a.shape.C, kWarp) + (a.grad_keep ? ceil_div(a.shape.B, kWalkThreads / kWarp) : 0);
        launch(finish<T>, dim3(static_cast<unsigned>(blocks)), kWalkThreads, 2 * kWalkThreads * sizeof(Acc<T>), stream,
               a, plan, partials);
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
                       launch(backward<W, T, kRelu>, plan.grid(), kWalkThreads, W::template kRing<kGradientMaps<kRelu>>,
                              stream, a, plan);
                   });
               });
}

template <class T, class A>
void update_running_stats(const RunningStats<T, A>& a, cudaStream_t stream) {
    launch(running_stats<T, A>, dim3(1), kWalkThreads, 0, stream, a);
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
