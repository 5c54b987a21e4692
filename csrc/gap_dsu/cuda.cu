// gap_dsu on the GPU: GAP in a pass of its own where it is not given, then one or two steps of the DSU.
#include "common/cuda/dsu.cuh"
#include "common/cuda/walk.cuh"
#include "gap_dsu/cuda.h"

namespace dla {
namespace {

template <class W, class T>
__global__ void __launch_bounds__(WalkPlan::kThreads) pool(const Pool<T> a, const WalkPlan plan) {
    using A = Acc<T>;
    const W walk(a.shape, plan);
    A* shared = shared_memory<A>();
    walk.each_sample([&](int64_t b) {
        const T* x = a.x.at(b, walk.c, 0);
        A total[W::kChannels] = {};
        walk.template each_vector<4>([&](unsigned p) { return fetch<W::N>(x + p * a.x.pixel); },
                                     [&](unsigned, const Word<T, W::N>& word) {
                                         A value[W::N];
                                         unpack<T>(word, value);
#pragma unroll
                                         for (int i = 0; i < W::N; ++i) total[W::kRows ? i : 0] += value[i];
                                     });
        walk.team_sums(total, shared);
        if (walk.walker == 0 && walk.inside()) {
#pragma unroll
            for (int i = 0; i < W::kChannels; ++i) a.y[b * a.shape.C + walk.c + i] = total[i] / A(a.shape.HW());
        }
    });
}

template <class A>
__global__ void __launch_bounds__(kDsuThreads<A>, 1) forward(const GapDsuForward<A> a, const DsuPhases phases) {
    const Dsu<A>& d = a.dsu;
    const DsuRows rows(a.B);
    phases.run(0, [&] { dsu_reduce(d, rows, a.y, a.h, 1, a.hidden); });
    phases.run(1, [&] {
        dsu_expand(d, rows, a.hidden, [&](int64_t row, int64_t j, A input, A forget, A candidate) {
            const int64_t at = row * d.C + j;
            const A context = forget * a.c[at] + input * candidate;
            a.new_c[at] = context;
            a.new_h[at] = activate(d.activation, context);
        });
    });
    phases.run(2, [&] { dsu_reduce(d, rows, a.carried, static_cast<const A*>(a.new_h), 1, a.hidden); });
    phases.run(3, [&] {
        dsu_expand(d, rows, a.hidden, [&](int64_t row, int64_t j, A input, A forget, A candidate) {
            const int64_t at = row * d.C + j;
            const A context = forget * a.new_c[at] + input * candidate;
            a.gate[at] = a.of_context ? context : activate(d.activation, context);
        });
    });
}

// What the backward keeps for itself. With a second step the rows are 2 B: the first step's, then the second's.
template <class A>
struct Scratch {
    A *hidden, *grad_hidden, *grad_gates;  // [M, hidden] twice, [M, 3C]
    A *new_h, *new_c;                      // [B, C], the state between the steps
    A *from_h, *from_c;                    // [B, C], its gradient through the second step

    explicit Scratch(const GapDsuBackward<A>& a) {
        const int64_t B = a.B, M = a.carried ? 2 * B : B, H = a.dsu.hidden(), C = a.dsu.C;
        hidden = a.scratch;
        grad_hidden = hidden + M * H;
        grad_gates = grad_hidden + M * H;
        new_h = grad_gates + M * 3 * C;
        new_c = new_h + B * C;
        from_h = new_c + B * C;
        from_c = from_h + B * C;
    }

    static int64_t size(const GapDsuBackward<A>& a) {
        const int64_t M = a.carried ? 2 * a.B : a.B, C = a.dsu.C;
        return M * (2 * a.dsu.hidden() + 3 * C) + (a.carried ? 4 * a.B * C : 0);
    }
};

template <class A>
struct Backward {
    GapDsuBackward<A> args;
    Scratch<A> at;
};

// The phases of the backward: the steps again, then back through the second one, then through the first.
enum : int { kReduce, kState, kReduceSecond, kGateSecond, kHiddenSecond, kInputSecond, kGate, kHidden, kInput };
constexpr DsuPhases kOneStep = {1u << kReduce | 1u << kGate | 1u << kHidden | 1u << kInput};
constexpr DsuPhases kTwoSteps = {(1u << (kInput + 1)) - 1};

template <class A>
__global__ void __launch_bounds__(kDsuThreads<A>, 1) backward(const Backward<A> both, const DsuPhases phases) {
    const GapDsuBackward<A>& a = both.args;
    const Scratch<A>& at = both.at;
    const Dsu<A>& d = a.dsu;
    const DsuRows rows(a.B);
    const int64_t C = d.C, second_gates = a.B * 3 * C, second_hidden = a.B * d.hidden();
    A* shared = shared_memory<A>();
    const auto or_zero = [](const A* from, int64_t i) { return from ? from[i] : A(0); };
    phases.run(kReduce, [&] { dsu_reduce(d, rows, a.y, a.h, 1, at.hidden); });
    phases.run(kState, [&] {
        dsu_expand(d, rows, at.hidden, [&](int64_t row, int64_t j, A input, A forget, A candidate) {
            const int64_t i = row * C + j;
            const A context = forget * a.c[i] + input * candidate;
            at.new_c[i] = context;
            at.new_h[i] = activate(d.activation, context);
        });
    });
    phases.run(kReduceSecond,
               [&] { dsu_reduce(d, rows, a.carried, static_cast<const A*>(at.new_h), 1, at.hidden + second_hidden); });
    phases.run(kGateSecond, [&] {
        dsu_expand(d, rows, at.hidden + second_hidden, [&](int64_t row, int64_t j, A input, A forget, A candidate) {
            const int64_t i = row * C + j;
            const A before = at.new_c[i], context = forget * before + input * candidate;
            A grad = or_zero(a.grad_gate, i);
            if (!a.of_context) grad *= activation_slope(d.activation, context);
            dsu_gate_gradients(d, row, j, grad, before, input, forget, candidate, at.grad_gates + second_gates);
            at.from_c[i] = grad * forget;
        });
    });
    phases.run(kHiddenSecond, [&] {
        dsu_hidden_gradients(d, rows, at.grad_gates + second_gates, at.hidden + second_hidden,
                             at.grad_hidden + second_hidden, shared);
    });
    phases.run(kInputSecond, [&] {
        dsu_input_gradients<true>(d, rows, at.grad_hidden + second_hidden,
                                  [&](int64_t row, int64_t j, A of_carried, A of_h) {
                                      a.grad_carried[row * C + j] = of_carried;
                                      at.from_h[row * C + j] = of_h;
                                  });
    });
    phases.run(kGate, [&] {
        dsu_expand(d, rows, at.hidden, [&](int64_t row, int64_t j, A input, A forget, A candidate) {
            const int64_t i = row * C + j;
            const A before = a.c[i], context = forget * before + input * candidate;
            const A of_h = or_zero(a.grad_new_h, i) + (a.carried ? at.from_h[i] : A(0));
            const A of_c = or_zero(a.grad_new_c, i) + (a.carried ? at.from_c[i] : A(0));
            const A grad = of_c + of_h * activation_slope(d.activation, context);
            dsu_gate_gradients(d, row, j, grad, before, input, forget, candidate, at.grad_gates);
            a.grad_c[i] = grad * forget;
        });
    });
    phases.run(kHidden, [&] { dsu_hidden_gradients(d, rows, at.grad_gates, at.hidden, at.grad_hidden, shared); });
    phases.run(kInput, [&] {
        dsu_input_gradients<true>(d, rows, at.grad_hidden, [&](int64_t row, int64_t j, A of_y, A of_h) {
            a.grad_y[row * C + j] = of_y + or_zero(a.grad_of_y, row * C + j);
            a.grad_h[row * C + j] = of_h;
        });
    });
}

template <class A>
__global__ void __launch_bounds__(kProductThreads) weights(const DsuProducts<A> all) {
    dsu_product_tile(all, blockIdx.x, shared_memory<A>());
}

}  // namespace

template <class T>
void gap_pool(const Pool<T>& a, cudaStream_t stream) {
    on_walk<T>(a.channels_last, a.shape, {a.x}, [&](auto* type) {
        using W = std::remove_pointer_t<decltype(type)>;
        const WalkPlan plan = W::plan(a.shape);
        launch(pool<W, T>, plan.grid(), WalkPlan::kThreads, W::kShared * sizeof(Acc<T>), stream, a, plan);
    });
}

template <class A>
void gap_dsu_forward(const GapDsuForward<A>& a, cudaStream_t stream) {
    launch_phases<A>(forward<A>, a, a.B, DsuPhases{a.carried ? 15u : 3u}, a.dsu.size(), 0, stream);
}

template <class A>
int64_t gap_dsu_scratch(const GapDsuBackward<A>& a) {
    return Scratch<A>::size(a);
}

template <class A>
void gap_dsu_backward(const GapDsuBackward<A>& a, cudaStream_t stream) {
    const Scratch<A> at(a);
    launch_phases<A>(backward<A>, Backward<A>{a, at}, a.B, a.carried ? kTwoSteps : kOneStep, a.dsu.size(),
                     kDsuShared<A> * sizeof(A), stream);
    const DsuProducts<A> products(a.dsu, a.carried ? 2 * a.B : a.B, a.B, 1, at.grad_gates, at.hidden, at.grad_hidden,
                                  a.y, a.carried, a.h, at.new_h, a.grad_weights);
    launch(weights<A>, dim3(static_cast<unsigned>(products.tiles())), kProductThreads, kProductShared * sizeof(A),
           stream, products);
}

template void gap_pool(const Pool<float>&, cudaStream_t);
template void gap_pool(const Pool<double>&, cudaStream_t);
template void gap_pool(const Pool<__half>&, cudaStream_t);
template void gap_pool(const Pool<__nv_bfloat16>&, cudaStream_t);
template void gap_dsu_forward(const GapDsuForward<float>&, cudaStream_t);
template void gap_dsu_forward(const GapDsuForward<double>&, cudaStream_t);
template int64_t gap_dsu_scratch(const GapDsuBackward<float>&);
template int64_t gap_dsu_scratch(const GapDsuBackward<double>&);
template void gap_dsu_backward(const GapDsuBackward<float>&, cudaStream_t);
template void gap_dsu_backward(const GapDsuBackward<double>&, cudaStream_t);

}  // namespace dla
