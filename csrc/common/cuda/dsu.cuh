// The Dynamic Sharing Unit's phases, forward and backward, each for a block's rows and for tiles of all rows.
#pragma once

#include "common/cuda/dsu.h"
#include "common/cuda/dsu_launch.cuh"
#include "common/cuda/reduce.cuh"

namespace dla {

template <class A>
constexpr int kDsuWarps = kDsuThreads<A> / kWarp;
// Lanes for a sum over the hidden units, of which there are few; 4 sums at once in a warp.
constexpr int kDsuSpan = 8;
// Weights in flight in a thread: 16 bytes of them.
template <class A>
constexpr int kDsuUnroll = 16 / sizeof(A);

// The sample of a row, of T each. More rows than 32 bits count fit into no memory; a division of 64 bits would take
// longer than a load.
__device__ __forceinline__ int64_t dsu_sample(int64_t row, int64_t T) {
    return T == 1 ? row : static_cast<unsigned>(row) / static_cast<unsigned>(T);
}

template <class A>
__device__ __forceinline__ A sigmoid(A v) {
    return A(1) / (A(1) + exp(-v));
}

template <class A>
__device__ __forceinline__ A activate(DsuActivation activation, A v) {
    switch (activation) {
        case DsuActivation::tanh:
            return tanh(v);
        case DsuActivation::relu:
            return v <= A(0) ? A(0) : v;  // a NaN passes, as in torch
        case DsuActivation::sigmoid:
            return sigmoid(v);
        default:
            return v;
    }
}

// The activation's derivative at v.
template <class A>
__device__ __forceinline__ A activation_slope(DsuActivation activation, A v) {
    const A value = activate(activation, v);
    switch (activation) {
        case DsuActivation::tanh:
            return A(1) - value * value;
        case DsuActivation::relu:
            return v <= A(0) ? A(0) : A(1);
        case DsuActivation::sigmoid:
            return value * (A(1) - value);
        default:
            return A(1);
    }
}

// sums[part][i] += what falls to this lane of kSpan of x[i] . weights[part].
template <int kSpan, int kParts, class A>
__device__ __forceinline__ void dot(const A* const (&weights)[kParts], const A* const (&x)[kDsuRows], int K,
                                    A (&sums)[kParts][kDsuRows]) {
    constexpr int N = kVector<A>;
    const int lane = threadIdx.x % kSpan;
    uintptr_t low_bits = static_cast<uintptr_t>(K * sizeof(A));
#pragma unroll
    for (int i = 0; i < kDsuRows; ++i) low_bits |= reinterpret_cast<uintptr_t>(x[i]);
#pragma unroll
    for (int part = 0; part < kParts; ++part) low_bits |= reinterpret_cast<uintptr_t>(weights[part]);
    const auto run = [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
#pragma unroll(kParts > 1 ? 1 : 2)
        for (int k = lane * kWidth; k < K; k += kSpan * kWidth) {
            A w[kParts][kWidth];
#pragma unroll
            for (int part = 0; part < kParts; ++part) load(weights[part] + k, w[part]);
#pragma unroll
            for (int i = 0; i < kDsuRows; ++i) {
                A v[kWidth];
                load(x[i] + k, v);
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
#pragma unroll
                    for (int j = 0; j < kWidth; ++j) sums[part][i] += w[part][j] * v[j];
                }
            }
        }
    };
    low_bits % 16 == 0 ? run(std::integral_constant<int, N>()) : run(std::integral_constant<int, 1>());
}

// v[i], with all of v in registers.
template <class A>
__device__ __forceinline__ A select(const A (&v)[kDsuRows], int i) {
    A value = v[0];
#pragma unroll
    for (int k = 1; k < kDsuRows; ++k) value = i == k ? v[k] : value;
    return value;
}

// y [M, C] and h [M / T, C] -> s [M, hidden], behind the ReLU. A warp for each unit.
template <class A>
__device__ void dsu_reduce(const Dsu<A>& d, const DsuRows& rows, const A* y, const A* h, int64_t T, A* s, A*) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, hidden = d.hidden(), R = d.R;
    const A *y_rows[kDsuRows], *h_rows[kDsuRows];
#pragma unroll
    for (int i = 0; i < kDsuRows; ++i) {
        y_rows[i] = y + rows.row(i) * d.C;
        h_rows[i] = h + rows.row(i) / T * d.C;
    }
    for (int n = blockIdx.y * kDsuWarps<A> + warp; n < hidden; n += gridDim.y * kDsuWarps<A>) {
        const bool of_y = n < R, of_h = d.joint || !of_y;
        const int64_t k = of_y ? n : n - R;
        A sums[1][kDsuRows] = {};
        if (of_y) dot<kWarp, 1>({d.weights + d.y().reduce + k * d.y().pitch}, y_rows, d.C, sums);
        if (of_h) dot<kWarp, 1>({d.weights + d.h().reduce + k * d.h().pitch}, h_rows, d.C, sums);
        const A bias = d.joint ? A(0) : d.weights[(of_y ? d.y().reduce_bias : d.h().reduce_bias) + k];
#pragma unroll
        for (int i = 0; i < kDsuRows; ++i) sums[0][i] = warp_sum(sums[0][i]) + bias;
        const A v = select(sums[0], lane);
        if (lane < kDsuRows && rows.has(lane)) s[rows.row(lane) * hidden + n] = v <= A(0) ? A(0) : v;
    }
}

template <class A>
__device__ void dsu_reduce(const Dsu<A>& d, const DsuAllRows& rows, const A* y, const A* h, int64_t T, A* s,
                           A* shared) {
    constexpr int kSide = kDsuTileUnits;
    const int64_t C = d.C, R = d.R, M = rows.count, of_branch = ceil_div(R, kSide);
    rows.each_tile(M, kSide, of_branch * (d.joint ? 1 : 2), [&](int64_t m0, int64_t column) {
        const bool second = column >= of_branch;  // a split unit's h
        const int64_t n0 = column % of_branch * kSide;
        // A joint unit's weights have h's part before y's.
        const bool from_h = d.joint || second;
        const int64_t of_h = from_h ? C : 0, first = from_h ? d.h().reduce : d.y().reduce;
        const int64_t K = d.joint ? 2 * C : C, pitch = d.y().pitch;
        const auto p = [&](int i) {
            const int64_t m = m0 + i;
            const A *h_row = h + dsu_sample(m, T) * C, *y_row = y + m * C - of_h;
            return [=, inside = m < M](int64_t k) { return inside ? (k < of_h ? h_row : y_row)[k] : A(0); };
        };
        const auto q = [&](int j) {
            const A* row = d.weights + first + (n0 + j) * pitch;
            return [row, inside = n0 + j < R](int64_t k) { return inside ? row[k] : A(0); };
        };
        DsuUnits<A>::template run<true, true>(K, p, q, shared, [&](const auto& sum) {
            for (int at = thread_here(); at < kSide * kSide; at += kDsuThreads<A>) {
                const int64_t m = m0 + at / kSide, n = n0 + at % kSide;
                if (m >= M || n >= R) continue;
                const A bias = d.joint ? A(0) : d.weights[(second ? d.h().reduce_bias : d.y().reduce_bias) + n];
                const A v = sum(at / kSide, at % kSide) + bias;
                s[m * d.hidden() + (second ? R : 0) + n] = v <= A(0) ? A(0) : v;
            }
        });
    });
}

// s -> body(row, channel, input gate, forget gate, candidate), each behind its sigmoid or tanh.
template <class A, class Body>
__device__ __forceinline__ void dsu_expand(const Dsu<A>& d, const DsuRows& rows, const A* s, A*, const Body& body) {
    constexpr int kAtOnce = kDsuThreads<A> / kDsuSpan;
    const int C = d.C, R = d.R;
    const int64_t starts[3] = {d.input(), d.forget(), d.candidate()};
    for (int first = blockIdx.y * kAtOnce; first < C; first += gridDim.y * kAtOnce) {
        const int j = first + threadIdx.x / kDsuSpan, inside = min(j, C - 1);
        A gates[3][kDsuRows] = {};
        // Of y's units, and of h's where they have their own.
#pragma unroll 1
        for (int64_t from = 0; from < d.hidden(); from += R) {
            const A* weights = d.weights + (from == 0 ? d.y().expand : d.h().expand) + int64_t(inside) * R;
            const A* x[kDsuRows];
#pragma unroll
            for (int i = 0; i < kDsuRows; ++i) x[i] = s + rows.row(i) * d.hidden() + from;
            dot<kDsuSpan, 3>({weights + starts[0] * R, weights + starts[1] * R, weights + starts[2] * R}, x, R, gates);
        }
#pragma unroll
        for (int part = 0; part < 3; ++part) {
            const int64_t n = starts[part] + inside;
            A bias = d.weights[d.y().expand_bias + n];
            if (!d.joint) bias += d.weights[d.h().expand_bias + n];
#pragma unroll
            for (int i = 0; i < kDsuRows; ++i) gates[part][i] = warp_sum<1, kDsuSpan>(gates[part][i]) + bias;
        }
        // A lane for each row: every lane of the span has all sums.
        const int own = threadIdx.x % kDsuSpan;
        A mine[3];
#pragma unroll
        for (int part = 0; part < 3; ++part) mine[part] = select(gates[part], own);
        if (own < kDsuRows && j < C && rows.has(own)) {
            body(rows.row(own), int64_t(j), sigmoid(mine[0]), sigmoid(mine[1]), tanh(mine[2]));
        }
    }
}

template <class A, class Body>
__device__ __forceinline__ void dsu_expand(const Dsu<A>& d, const DsuAllRows& rows, const A* s, A* shared,
                                           const Body& body) {
    constexpr int kRows = kDsuTileRows, kEach = kDsuTileGates;
    const int64_t C = d.C, R = d.R, M = rows.count, hidden = d.hidden();
    rows.each_tile(M, kRows, ceil_div(C, kEach), [&](int64_t m0, int64_t column) {
        const int64_t c0 = column * kEach;
        // Of the gate `part` and the tile's channel c.
        const auto unit = [&](int part, int c) {
            return (part == 0 ? d.input() : part == 1 ? d.forget() : d.candidate()) + c0 + c;
        };
        const auto p = [&](int i) {
            const A* row = s + (m0 + i) * hidden;
            return [row, inside = m0 + i < M](int64_t k) { return inside ? row[k] : A(0); };
        };
        const auto q = [&](int j) {
            const int64_t at = unit(j / kEach, j % kEach) * R;
            const int64_t of_y = d.y().expand + at, of_h = d.h().expand + at - R;
            return [=, weights = d.weights, inside = c0 + j % kEach < C](int64_t k) {
                return inside ? weights[(k < R ? of_y : of_h) + k] : A(0);
            };
        };
        DsuGates<A>::template run<true, true>(hidden, p, q, shared, [&](const auto& sum) {
            for (int at = thread_here(); at < kRows * kEach; at += kDsuThreads<A>) {
                const int i = at / kEach, c = at % kEach;
                if (m0 + i >= M || c0 + c >= C) continue;
                A gates[3];
#pragma unroll
                for (int part = 0; part < 3; ++part) {
                    const int64_t n = unit(part, c);
                    A bias = d.weights[d.y().expand_bias + n];
                    if (!d.joint) bias += d.weights[d.h().expand_bias + n];
                    gates[part] = sum(i, part * kEach + c) + bias;
                }
                body(m0 + i, c0 + c, sigmoid(gates[0]), sigmoid(gates[1]), tanh(gates[2]));
            }
        });
    });
}

// The gradient of the context of (row, j) -> those of the gates [M, 3C] before their sigmoids and tanh.
template <class A>
__device__ __forceinline__ void dsu_gate_gradients(const Dsu<A>& d, int64_t row, int64_t j, A grad, A before, A input,
                                                   A forget, A candidate, A* grad_gates) {
    A* to = grad_gates + row * 3 * d.C + j;
    to[d.input()] = grad * candidate * input * (A(1) - input);
    to[d.forget()] = grad * before * forget * (A(1) - forget);
    to[d.candidate()] = grad * input * (A(1) - candidate * candidate);
}

// Values of shared memory for dsu_hidden_gradients.
template <class A>
constexpr int kDsuShared = kDsuWarps<A> * kDsuRows * kDsuSpan;

// Gradients of the gates [M, 3C] -> of the hidden units [M, hidden] before the ReLU. The warps share the sums, so that
// every weight is read once, in whole sectors.
template <class A>
__device__ void dsu_hidden_gradients(const Dsu<A>& d, const DsuRows& rows, const A* grad_gates, const A* s, A* grad_s,
                                     A* shared) {
    constexpr int kParts = kDsuThreads<A> / kDsuSpan;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, at = threadIdx.x % kDsuSpan;
    const int hidden = d.hidden(), gates = 3 * d.C, R = d.R;
    const A* of[kDsuRows];
#pragma unroll
    for (int i = 0; i < kDsuRows; ++i) of[i] = grad_gates + rows.row(i) * gates;
    for (int first = blockIdx.y * kDsuSpan; first < hidden; first += gridDim.y * kDsuSpan) {
        const int n = first + at;
        const A* weight = d.weights + (n < R ? d.y().expand + n : d.h().expand + n - R);
        A sums[kDsuRows] = {};
        if (n < hidden) {
#pragma unroll kDsuUnroll < A>
            for (int g = threadIdx.x / kDsuSpan; g < gates; g += kParts) {
                const A w = weight[int64_t(g) * R];
#pragma unroll
                for (int i = 0; i < kDsuRows; ++i) sums[i] += w * of[i][g];
            }
        }
#pragma unroll
        for (int i = 0; i < kDsuRows; ++i) {
            sums[i] = warp_sum<kDsuSpan>(sums[i]);
            if (lane < kDsuSpan) shared[(warp * kDsuRows + i) * kDsuSpan + at] = sums[i];
        }
        __syncthreads();
        const int i = threadIdx.x / kDsuSpan;
        if (i < kDsuRows && rows.has(i) && n < hidden) {
            A total = 0;
            for (int w = 0; w < kDsuWarps<A>; ++w) total += shared[(w * kDsuRows + i) * kDsuSpan + at];
            const int64_t to = rows.row(i) * hidden + n;
            grad_s[to] = s[to] <= A(0) ? A(0) : total;
        }
        __syncthreads();
    }
}

template <class A>
__device__ void dsu_hidden_gradients(const Dsu<A>& d, const DsuAllRows& rows, const A* grad_gates, const A* s,
                                     A* grad_s, A* shared) {
    constexpr int kSide = kDsuTileUnits;
    const int64_t R = d.R, M = rows.count, hidden = d.hidden(), gates = 3 * d.C;
    rows.each_tile(M, kSide, ceil_div(hidden, kSide), [&](int64_t m0, int64_t column) {
        const int64_t n0 = column * kSide;
        const auto p = [&](int i) {
            const A* row = grad_gates + (m0 + i) * gates;
            return [row, inside = m0 + i < M](int64_t k) { return inside ? row[k] : A(0); };
        };
        const auto q = [&](int j) {
            const int64_t n = n0 + j;
            const A* column = d.weights + (n < R ? d.y().expand + n : d.h().expand + n - R);
            return [column, R, inside = n < hidden](int64_t k) { return inside ? column[k * R] : A(0); };
        };
        DsuUnits<A>::template run<true, false>(gates, p, q, shared, [&](const auto& sum) {
            for (int at = thread_here(); at < kSide * kSide; at += kDsuThreads<A>) {
                const int64_t m = m0 + at / kSide, n = n0 + at % kSide;
                if (m >= M || n >= hidden) continue;
                const A total = sum(at / kSide, at % kSide);
                grad_s[m * hidden + n] = s[m * hidden + n] <= A(0) ? A(0) : total;
            }
        });
    });
}

// Gradients of the hidden units -> of_y(row, channel, gradient of y), and of_h the same of h where kOfH.
template <bool kOfH, class A, class OfY, class OfH>
__device__ __forceinline__ void dsu_input_gradients(const Dsu<A>& d, const DsuRows& rows, const A* grad_s, A*,
                                                    const OfY& give_y, const OfH& give_h) {
    const int R = d.R, C = d.C;
    const A* of[kDsuRows];
#pragma unroll
    for (int i = 0; i < kDsuRows; ++i) of[i] = grad_s + rows.row(i) * d.hidden();
    const DsuBranch y = d.y(), h = d.h();
    const int own = d.joint ? 0 : R;  // where h's units begin
    for (int c = blockIdx.y * kDsuThreads<A> + threadIdx.x; c < C; c += gridDim.y * kDsuThreads<A>) {
        A of_y[kDsuRows] = {}, of_h[kDsuRows] = {};
#pragma unroll kDsuUnroll < A>
        for (int n = 0; n < R; ++n) {
            const A w = d.weights[y.reduce + n * y.pitch + c];
            const A v = kOfH ? d.weights[h.reduce + n * h.pitch + c] : A(0);
#pragma unroll
            for (int i = 0; i < kDsuRows; ++i) {
                of_y[i] += w * of[i][n];
                if (kOfH) of_h[i] += v * of[i][own + n];
            }
        }
#pragma unroll
        for (int i = 0; i < kDsuRows; ++i) {
            if (!rows.has(i)) continue;
            give_y(rows.row(i), int64_t(c), of_y[i]);
            if (kOfH) give_h(rows.row(i), int64_t(c), of_h[i]);
        }
    }
}

// For `count` rows, whose gradient of a branch's unit k is p(row, k): give(row, channel, gradient of its input).
template <class A, class P, class Give>
__device__ __forceinline__ void dsu_input_gradients(const Dsu<A>& d, const DsuBranch& of, int64_t count, const P& p,
                                                    A* shared, const Give& give) {
    constexpr int kSide = kDsuTileRows;
    const int64_t C = d.C;
    DsuAllRows::each_tile(count, kSide, ceil_div(C, kSide), [&](int64_t m0, int64_t column) {
        const int64_t c0 = column * kSide;
        const auto of_row = [&](int i) {
            return [&p, m = m0 + i, inside = m0 + i < count](int64_t k) { return inside ? p(m, k) : A(0); };
        };
        const auto q = [&](int j) {
            const A* column = d.weights + of.reduce + c0 + j;
            return [column, pitch = of.pitch, inside = c0 + j < C](int64_t k) {
                return inside ? column[k * pitch] : A(0);
            };
        };
        DsuSquare<A>::template run<true, false>(d.R, of_row, q, shared, [&](const auto& sum) {
            for (int at = thread_here(); at < kSide * kSide; at += kDsuThreads<A>) {
                const int64_t m = m0 + at / kSide, c = c0 + at % kSide;
                if (m < count && c < C) give(m, c, sum(at / kSide, at % kSide));
            }
        });
    });
}

template <bool kOfH, class A, class OfY, class OfH>
__device__ __forceinline__ void dsu_input_gradients(const Dsu<A>& d, const DsuAllRows& rows, const A* grad_s, A* shared,
                                                    const OfY& give_y, const OfH& give_h) {
    const int64_t hidden = d.hidden(), own = d.joint ? 0 : d.R;
    const auto p = [&](int64_t m, int64_t k) { return grad_s[m * hidden + k]; };
    dsu_input_gradients(d, d.y(), rows.count, p, shared, give_y);
    if (!kOfH) return;
    const auto p_of_h = [&](int64_t m, int64_t k) { return grad_s[m * hidden + own + k]; };
    dsu_input_gradients(d, d.h(), rows.count, p_of_h, shared, give_h);
}

}  // namespace dla
