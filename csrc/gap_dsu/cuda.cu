// gap_dsu on the GPU: GAP where it is not given, then one or two steps of the DSU.
#include "common/cuda/dsu.cuh"
#include "common/cuda/dsu_weights.cuh"
#include "common/cuda/parts.cuh"
#include "common/cuda/walk.cuh"
#include "gap_dsu/cuda.h"

namespace dla {
namespace {

// Adds a thread's vectors of a map to its channels' sums.
template <class W, class T, class A = Acc<T>>
struct Add {
    A (&total)[W::kChannels];

    __device__ __forceinline__ void operator()(int, const Word<T, W::N> (&words)[1]) const {
        A value[W::N];
        unpack<T>(words[0], value);
#pragma unroll
        for (int i = 0; i < W::N; ++i) total[W::kRows ? i : 0] += value[i];
    }
};

template <class W, class A>
__device__ __forceinline__ void write(const W& walk, const A (&total)[W::kChannels], A pixels, A* to) {
    if (walk.walker > 0 || !walk.inside()) return;
#pragma unroll
    for (int i = 0; i < W::kChannels; ++i) to[walk.c + i] = total[i] / pixels;
}

// In a launch of its own, where a sample's tiles are few and large: a block's threads share one.
template <class W, class T, class A = Acc<T>>
__global__ void __launch_bounds__(kWalkThreads) pool(const Pool a, A* y, A* parts, const WalkPlan plan) {
    const W walk(a.shape, plan);
    const int64_t C = a.shape.C;
    walk.each_sample([&](int64_t b) {
        A* const shared = shared_memory<A>();
        A total[W::kChannels] = {};
        const Cursor<const T> maps[] = {walk.cursor(a.map<T>(), b)};
        walk.each_vector(maps, shared + W::kShared, Add<W, T>{total});
        walk.team_sums(total, shared);
        if (plan.runs > 1) {
            write(walk, total, A(1), parts + (b * plan.runs + walk.run) * C);
        } else {
            write(walk, total, A(a.shape.HW()), y + b * C);
        }
    });
}

// A phase of the step's launch: a warp for each tile of the rows' samples. As few warps are resident as its registers
// allow, so each has 128 bytes of a lane under way.
template <class A, class Rows>
struct PoolRows {
    const Pool& a;
    const Rows& rows;
    A* y;

    template <class W, class T>
    __device__ __forceinline__ void operator()(W*, T*) const {
        constexpr int kAtOnce = sizeof(Word<T, W::N>) < 8 ? 16 : 128 / sizeof(Word<T, W::N>);
        const WalkPlan plan(a.shape, W::lanes(a.shape.C), W::kChannels);
        const int64_t first = rows.block() * kDsuWarps<A> + threadIdx.x / kWarp;
        for (int64_t k = first; k < plan.tiles * rows.size(); k += rows.blocks() * kDsuWarps<A>) {
            const int64_t i = k % rows.size();
            if (!rows.has(i)) continue;
            const W walk(a.shape, plan, static_cast<int>(k / rows.size()), 0);
            A total[W::kChannels] = {};
            const Cursor<const T> maps[] = {walk.cursor(a.map<T>(), rows.row(i))};
            walk.template each_vector<kAtOnce>(maps, Add<W, T>{total});
            walk.warp_sums(total);
            write(walk, total, A(a.shape.HW()), y + rows.row(i) * a.shape.C);
        }
    }
};

// Calls body with null pointers to the map's Walk and element type; types whose state is not A are left out.
#pragma nv_exec_check_disable
template <class T, class Body>
DLA_HOST_DEVICE __forceinline__ void on_walk_of(const Pool& a, const Body& body) {
    constexpr int N = kWalkVector<T>;
    T* const type = nullptr;
    if (a.channels_last) {
        a.vectors ? body(static_cast<Walk<T, N, true>*>(nullptr), type)
                  : body(static_cast<Walk<T, 1, true>*>(nullptr), type);
    } else {
        a.vectors ? body(static_cast<Walk<T, N, false>*>(nullptr), type)
                  : body(static_cast<Walk<T, 1, false>*>(nullptr), type);
    }
}

#pragma nv_exec_check_disable
template <class A, class Body>
DLA_HOST_DEVICE __forceinline__ void on_map(const Pool& a, const Body& body) {
    if constexpr (std::is_same_v<A, double>) {
        on_walk_of<double>(a, body);
    } else if (a.type == MapType::float32) {
        on_walk_of<float>(a, body);
    } else if (a.type == MapType::float16) {
        on_walk_of<__half>(a, body);
    } else {
        on_walk_of<__nv_bfloat16>(a, body);
    }
}

enum : int { kPool, kReduceState, kExpandState, kReduceGate, kExpandGate };

template <class A, class Rows>
__global__ void __launch_bounds__(kDsuThreads<A>, 1)
    forward(const __grid_constant__ GapDsuForward<A> a, const DsuPhases phases) {
    const Dsu<A>& d = a.dsu;
    const Rows rows(a.B);
    A* shared = shared_memory<A>();
    phases.run(kPool, [&] { on_map<A>(a.pool, PoolRows<A, Rows>{a.pool, rows, a.pooled}); });
    phases.run(kReduceState, [&] { dsu_reduce(d, rows, a.y, a.h, 1, a.hidden, shared); });
    phases.run(kExpandState, [&] {
        dsu_expand(d, rows, a.hidden, shared, [&](int64_t row, int64_t j, A input, A forget, A candidate) {
            const int64_t at = row * d.C + j;
            const A context = forget * a.c[at] + input * candidate;
            a.new_c[at] = context;
            a.new_h[at] = activate(d.activation, context);
        });
    });
    phases.run(kReduceGate,
               [&] { dsu_reduce(d, rows, a.carried, static_cast<const A*>(a.new_h), 1, a.hidden, shared); });
    phases.run(kExpandGate, [&] {
        dsu_expand(d, rows, a.hidden, shared, [&](int64_t row, int64_t j, A input, A forget, A candidate) {
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
    DsuProducts<A> products;
};

// The phases of the backward: the steps again, then back through the second one, then through the first, and at last
// the weights' gradient, which sums over all rows.
enum : int {
    kReduce,
    kState,
    kReduceSecond,
    kGateSecond,
    kHiddenSecond,
    kInputSecond,
    kGate,
    kHidden,
    kInput,
    kWeights
};
constexpr DsuPhases kOneStep = {1u << kReduce | 1u << kGate | 1u << kHidden | 1u << kInput | 1u << kWeights};
constexpr DsuPhases kTwoSteps = {(1u << (kWeights + 1)) - 1};

template <class A, class Rows>
__global__ void __launch_bounds__(kDsuThreads<A>, 1)
    backward(const __grid_constant__ Backward<A> both, const DsuPhases phases) {
    const GapDsuBackward<A>& a = both.args;
    const Scratch<A>& at = both.at;
    const Dsu<A>& d = a.dsu;
    const int64_t C = d.C, second_gates = a.B * 3 * C, second_hidden = a.B * d.hidden();
    A* shared = shared_memory<A>();
    const auto or_zero = [](const A* from, int64_t i) { return from ? from[i] : A(0); };
    Rows::each_group(a.B, [&](const Rows& rows) {
        phases.run(kReduce, [&] { dsu_reduce(d, rows, a.y, a.h, 1, at.hidden, shared); });
        phases.run(kState, [&] {
            dsu_expand(d, rows, at.hidden, shared, [&](int64_t row, int64_t j, A input, A forget, A candidate) {
                const int64_t i = row * C + j;
                const A context = forget * a.c[i] + input * candidate;
                at.new_c[i] = context;
                at.new_h[i] = activate(d.activation, context);
            });
        });
        phases.run(kReduceSecond, [&] {
            dsu_reduce(d, rows, a.carried, static_cast<const A*>(at.new_h), 1, at.hidden + second_hidden, shared);
        });
        phases.run(kGateSecond, [&] {
            dsu_expand(d, rows, at.hidden + second_hidden, shared,
                       [&](int64_t row, int64_t j, A input, A forget, A candidate) {
                           const int64_t i = row * C + j;
                           const A before = at.new_c[i], context = forget * before + input * candidate;
                           A grad = or_zero(a.grad_gate, i);
                           if (!a.of_context) grad *= activation_slope(d.activation, context);
                           dsu_gate_gradients(d, row, j, grad, before, input, forget, candidate,
                                              at.grad_gates + second_gates);
                           at.from_c[i] = grad * forget;
                       });
        });
        phases.run(kHiddenSecond, [&] {
            dsu_hidden_gradients(d, rows, at.grad_gates + second_gates, at.hidden + second_hidden,
                                 at.grad_hidden + second_hidden, shared);
        });
        phases.run(kInputSecond, [&] {
            dsu_input_gradients<true>(
                d, rows, at.grad_hidden + second_hidden, shared,
                [&](int64_t row, int64_t j, A of_carried) { a.grad_carried[row * C + j] = of_carried; },
                [&](int64_t row, int64_t j, A of_h) { at.from_h[row * C + j] = of_h; });
        });
        phases.run(kGate, [&] {
            dsu_expand(d, rows, at.hidden, shared, [&](int64_t row, int64_t j, A input, A forget, A candidate) {
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
            dsu_input_gradients<true>(
                d, rows, at.grad_hidden, shared,
                [&](int64_t row, int64_t j, A of_y) {
                    a.grad_y[row * C + j] = of_y + or_zero(a.grad_of_y, row * C + j);
                },
                [&](int64_t row, int64_t j, A of_h) { a.grad_h[row * C + j] = of_h; });
        });
    });
    phases.run_pieces(kWeights, both.products.tiles(),
                      [&](int64_t tile) { dsu_product_tile(both.products, tile, shared); });
}

}  // namespace

// Whether GAP is a launch of its own. The step's warps are few, and done soon only where tiles are small.
bool pools_apart(const Shape& s) { return s.HW() > 256; }

template <class A>
int64_t gap_dsu_forward_scratch(GapDsuForward<A>& a) {
    Pool& p = a.pool;
    if (!p.x) return 0;
    on_map<A>(p, [&](auto*, auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        p.vectors = in_vectors<kWalkVector<T>>(p.map<T>(), p.channels_last ? p.shape.C : p.shape.HW());
    });
    int64_t runs = 1;
    on_map<A>(p, [&](auto* walk, auto* type) {
        using W = std::remove_pointer_t<decltype(walk)>;
        const WalkPlan plan = W::plan(p.shape);
        W::check(p.map<std::remove_pointer_t<decltype(type)>>());
        if (pools_apart(p.shape)) runs = plan.runs;
    });
    return runs > 1 ? a.B * runs * a.dsu.C : 0;
}

template <class A>
void gap_dsu_forward(const GapDsuForward<A>& a, cudaStream_t stream) {
    const Shape& s = a.pool.shape;
    unsigned phases = 1u << kReduceState | 1u << kExpandState;
    if (a.carried) phases |= 1u << kReduceGate | 1u << kExpandGate;
    if (a.pool.x) {
        on_map<A>(a.pool, [&](auto* walk, auto* type) {
            using W = std::remove_pointer_t<decltype(walk)>;
            using T = std::remove_pointer_t<decltype(type)>;
            const WalkPlan plan = W::plan(s);
            if (!pools_apart(s)) {
                phases |= 1u << kPool;
                return;
            }
            launch(pool<W, T>, plan.grid(), kWalkThreads, W::kShared * sizeof(A) + W::template kRing<1>, stream, a.pool,
                   a.pooled, a.parts, plan);
            if (plan.runs == 1) return;
            launch_join(join_means<A>, s.B, s.C, stream, static_cast<const A*>(a.parts), plan.runs, s.B, s.C, A(s.HW()),
                        a.pooled);
        });
    }
    const int64_t of_row = phases & 1u << kPool ? s.C * s.HW() : 0;
    launch_phases<A>(forward<A, DsuRows>, forward<A, DsuAllRows>, a, {a.B, a.dsu.size(), of_row, 0, 0},
                     DsuPhases{phases}, 0, stream);
}

template <class A>
int64_t gap_dsu_scratch(const GapDsuBackward<A>& a) {
    return Scratch<A>::size(a);
}

template <class A>
void gap_dsu_backward(const GapDsuBackward<A>& a, cudaStream_t stream) {
    const Scratch<A> at(a);
    const DsuProducts<A> products(a.dsu, a.carried ? 2 * a.B : a.B, a.B, 1, at.grad_gates, at.hidden, at.grad_hidden,
                                  a.y, a.carried, a.h, at.new_h, a.grad_weights);
    launch_phases<A>(backward<A, DsuRows>, backward<A, DsuAllRows>, Backward<A>{a, at, products},
                     {a.B, a.dsu.size(), 0, products.tiles(), kWeights}, a.carried ? kTwoSteps : kOneStep,
                     std::max(kDsuShared<A>, kProductShared<A>) * sizeof(A), stream);
}

template int64_t gap_dsu_forward_scratch(GapDsuForward<float>&);
template int64_t gap_dsu_forward_scratch(GapDsuForward<double>&);
template void gap_dsu_forward(const GapDsuForward<float>&, cudaStream_t);
template void gap_dsu_forward(const GapDsuForward<double>&, cudaStream_t);
template int64_t gap_dsu_scratch(const GapDsuBackward<float>&);
template int64_t gap_dsu_scratch(const GapDsuBackward<double>&);
template void gap_dsu_backward(const GapDsuBackward<float>&, cudaStream_t);
template void gap_dsu_backward(const GapDsuBackward<double>&, cudaStream_t);

}  // namespace dla
