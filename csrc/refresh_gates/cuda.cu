// refresh_gates on the GPU: the DSU over all prior layers of all samples at once.
#include "common/cuda/dsu.cuh"
#include "common/cuda/dsu_weights.cuh"
#include "refresh_gates/cuda.h"

namespace dla {
namespace {

// The features behind their gates, which the unit takes as y.
template <class A, class Rows>
__device__ void gate_features(const RefreshGates<A>& a, const Rows& rows, A* product) {
    const int64_t begin = rows.first * a.dsu.C, end = min(rows.first + rows.size(), rows.count) * a.dsu.C;
    const int64_t first = begin + rows.block() * kDsuThreads<A> + threadIdx.x;
    for (int64_t i = first; i < end; i += rows.blocks() * kDsuThreads<A>) {
        product[i] = a.features[i] * a.gates[i];
    }
}

template <class A, class Rows>
__global__ void __launch_bounds__(kDsuThreads<A>, 1)
    forward(const __grid_constant__ RefreshGatesForward<A> a, const DsuPhases phases) {
    const Dsu<A>& d = a.dsu;
    const Rows rows(a.M());
    A* shared = shared_memory<A>();
    phases.run(0, [&] { gate_features(a, rows, a.product); });
    phases.run(1, [&] { dsu_reduce(d, rows, static_cast<const A*>(a.product), a.h, a.T, a.hidden, shared); });
    phases.run(2, [&] {
        dsu_expand(d, rows, a.hidden, shared, [&](int64_t row, int64_t j, A input, A forget, A candidate) {
            const A context = forget * a.c[row / a.T * d.C + j] + input * candidate;
            const A gate = a.of_context ? context : activate(d.activation, context);
            a.out[row * d.C + j] = a.gates[row * d.C + j] * gate;
        });
    });
}

template <class A>
struct Scratch {
    A *product, *hidden, *grad_hidden, *grad_gates, *grad_c;  // [M, C], [M, hidden] twice, [M, 3C], [M, C]

    explicit Scratch(const RefreshGatesBackward<A>& a) {
        const int64_t M = a.M(), H = a.dsu.hidden(), C = a.dsu.C;
        product = a.scratch;
        hidden = product + M * C;
        grad_hidden = hidden + M * H;
        grad_gates = grad_hidden + M * H;
        grad_c = grad_gates + M * 3 * C;
    }

    static int64_t size(const RefreshGatesBackward<A>& a) { return a.M() * (5 * a.dsu.C + 2 * a.dsu.hidden()); }
};

template <class A>
struct Backward {
    RefreshGatesBackward<A> args;
    Scratch<A> at;
    DsuProducts<A> products;
};

// The gradients of a sample's h and c, sums over its T rows; `shared` holds R values.
template <class A>
__device__ void state_gradients(const RefreshGatesBackward<A>& a, const Scratch<A>& at, int64_t b, A* shared) {
    const Dsu<A>& d = a.dsu;
    const int64_t C = d.C, R = d.R, H = d.hidden(), own = d.joint ? 0 : R;
    for (int64_t n = threadIdx.x; n < R; n += blockDim.x) {
        A total = 0;
        for (int64_t t = 0; t < a.T; ++t) total += at.grad_hidden[(b * a.T + t) * H + own + n];
        shared[n] = total;
    }
    __syncthreads();
    const DsuBranch h = d.h();
    for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
        A of_h = 0, of_c = 0;
#pragma unroll 4
        for (int64_t n = 0; n < R; ++n) of_h += d.weights[h.reduce + n * h.pitch + c] * shared[n];
        for (int64_t t = 0; t < a.T; ++t) of_c += at.grad_c[(b * a.T + t) * C + c];
        a.grad_h[b * C + c] = of_h;
        a.grad_c[b * C + c] = of_c;
    }
    __syncthreads();
}

// Those of all samples, which all blocks share.
template <class A>
__device__ void state_gradients_in_tiles(const RefreshGatesBackward<A>& a, const Scratch<A>& at, A* shared) {
    const Dsu<A>& d = a.dsu;
    const int64_t C = d.C, H = d.hidden(), own = d.joint ? 0 : d.R;
    const auto p = [&](int64_t b, int64_t k) {
        A total = 0;
        for (int64_t t = 0; t < a.T; ++t) total += at.grad_hidden[(b * a.T + t) * H + own + k];
        return total;
    };
    dsu_input_gradients(d, d.h(), a.B, p, shared, [&](int64_t b, int64_t c, A of_h) {
        A of_c = 0;
        for (int64_t t = 0; t < a.T; ++t) of_c += at.grad_c[(b * a.T + t) * C + c];
        a.grad_h[b * C + c] = of_h;
        a.grad_c[b * C + c] = of_c;
    });
}

// The last phase: tiles of the weights' gradient, then samples, where they have no phase of their own.
constexpr int kFinish = 5;

template <class A, class Rows>
__global__ void __launch_bounds__(kDsuThreads<A>, 1)
    backward(const __grid_constant__ Backward<A> both, const DsuPhases phases) {
    const RefreshGatesBackward<A>& a = both.args;
    const Scratch<A>& at = both.at;
    const Dsu<A>& d = a.dsu;
    A* shared = shared_memory<A>();
    Rows::each_group(a.M(), [&](const Rows& rows) {
        phases.run(0, [&] { gate_features(a, rows, at.product); });
        phases.run(1, [&] { dsu_reduce(d, rows, static_cast<const A*>(at.product), a.h, a.T, at.hidden, shared); });
        phases.run(2, [&] {
            dsu_expand(d, rows, at.hidden, shared, [&](int64_t row, int64_t j, A input, A forget, A candidate) {
                const int64_t i = row * d.C + j;
                const A before = a.c[row / a.T * d.C + j], context = forget * before + input * candidate;
                A grad = a.grad[i] * a.gates[i];
                a.grad_gates[i] = a.grad[i] * (a.of_context ? context : activate(d.activation, context));
                if (!a.of_context) grad *= activation_slope(d.activation, context);
                dsu_gate_gradients(d, row, j, grad, before, input, forget, candidate, at.grad_gates);
                at.grad_c[i] = grad * forget;
            });
        });
        phases.run(3, [&] { dsu_hidden_gradients(d, rows, at.grad_gates, at.hidden, at.grad_hidden, shared); });
        phases.run(4, [&] {
            dsu_input_gradients<false>(
                d, rows, at.grad_hidden, shared,
                [&](int64_t row, int64_t j, A of_product) {
                    const int64_t i = row * d.C + j;
                    a.grad_features[i] = of_product * a.gates[i];
                    a.grad_gates[i] += of_product * a.features[i];
                },
                [](int64_t, int64_t, A) {});
            if constexpr (Rows::kTiled) state_gradients_in_tiles(a, at, shared);
        });
    });
    const int64_t tiles = both.products.tiles(), samples = Rows::kTiled ? 0 : a.B;
    phases.run_pieces(kFinish, tiles + samples, [&](int64_t i) {
        i < tiles ? dsu_product_tile(both.products, i, shared) : state_gradients(a, at, i - tiles, shared);
    });
}

}  // namespace

template <class A>
void refresh_gates_forward(const RefreshGatesForward<A>& a, cudaStream_t stream) {
    launch_phases<A>(forward<A, DsuRows>, forward<A, DsuAllRows>, a, {a.M(), a.dsu.size(), 0, 0, 0}, DsuPhases{7}, 0,
                     stream);
}

template <class A>
int64_t refresh_gates_scratch(const RefreshGatesBackward<A>& a) {
    return Scratch<A>::size(a);
}

template <class A>
void refresh_gates_backward(const RefreshGatesBackward<A>& a, cudaStream_t stream) {
    const Scratch<A> at(a);
    const DsuProducts<A> products(a.dsu, a.M(), a.M(), a.T, at.grad_gates, at.hidden, at.grad_hidden, at.product,
                                  nullptr, a.h, nullptr, a.grad_weights);
    const int64_t shared = std::max<int64_t>({kDsuShared<A>, kProductShared<A>, a.dsu.R}) * sizeof(A);
    launch_phases<A>(backward<A, DsuRows>, backward<A, DsuAllRows>, Backward<A>{a, at, products},
                     {a.M(), a.dsu.size(), 0, products.tiles() + a.B, kFinish}, DsuPhases{63}, shared, stream);
}

template void refresh_gates_forward(const RefreshGatesForward<float>&, cudaStream_t);
template void refresh_gates_forward(const RefreshGatesForward<double>&, cudaStream_t);
template int64_t refresh_gates_scratch(const RefreshGatesBackward<float>&);
template int64_t refresh_gates_scratch(const RefreshGatesBackward<double>&);
template void refresh_gates_backward(const RefreshGatesBackward<float>&, cudaStream_t);
template void refresh_gates_backward(const RefreshGatesBackward<double>&, cudaStream_t);

}  // namespace dla
