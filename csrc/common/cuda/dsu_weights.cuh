// The gradient of the Dynamic Sharing Unit's weights.
#pragma once

#include "common/cuda/dsu.cuh"

namespace dla {

// out[i, j] = sum over the rows m of p[m, i] q[m / T, j], and bias[i] = sum of p[m, i]: a part of the weights'
// gradient, in tiles. From row `turn` on, q's rows are those of q_later.
template <class A>
struct DsuProduct {
    const A *p, *q, *q_later;
    int64_t p_pitch, q_pitch, I, J;
    int64_t turn, T;
    A* out;
    int64_t pitch;
    A* bias;

    static constexpr int kSide = 32;
    using Tile = DsuSquare<A>;
    // The bias is a column more, of ones.
    DLA_HOST_DEVICE int64_t columns() const { return ceil_div(J + (bias ? 1 : 0), kSide); }
    DLA_HOST_DEVICE int64_t tiles() const { return ceil_div(I, kSide) * columns(); }
};

// All of them: those of a joint unit are three.
template <class A>
struct DsuProducts {
    DsuProduct<A> parts[4];
    int64_t M;
    int count;

    // Of M rows whose hidden units are s and whose y and h are given, with the gradients of both layers' outputs.
    DsuProducts(const Dsu<A>& d, int64_t M, int64_t turn, int64_t T, const A* grad_gates, const A* s, const A* grad_s,
                const A* y, const A* y_later, const A* h, const A* h_later, A* grads)
        : M(M), count(d.joint ? 3 : 4) {
        const int64_t C = d.C, R = d.R, H = d.hidden();
        const auto bias = [&](int64_t at) { return at < 0 ? nullptr : grads + at; };
        const auto reduce = [&](const DsuBranch& to, int64_t first, const A* q, const A* later, int64_t T) {
            return DsuProduct<A>{grad_s + first,      q, later, H, C, R, C, turn, T, grads + to.reduce, to.pitch,
                                 bias(to.reduce_bias)};
        };
        const auto expand = [&](const DsuBranch& to, int64_t first) {
            return DsuProduct<A>{grad_gates, s + first,           nullptr, 3 * C, H, 3 * C, R, M, 1, grads + to.expand,
                                 R,          bias(to.expand_bias)};
        };
        parts[0] = reduce(d.y(), 0, y, y_later, 1);
        parts[1] = reduce(d.h(), d.joint ? 0 : R, h, h_later, T);
        parts[2] = expand(d.y(), 0);
        parts[3] = d.joint ? DsuProduct<A>{} : expand(d.h(), R);
    }

    DLA_HOST_DEVICE int64_t tiles() const {
        int64_t total = 0;
        for (int k = 0; k < count; ++k) total += parts[k].tiles();
        return total;
    }
};

template <class A>
constexpr int kProductShared = DsuProduct<A>::Tile::kShared;

template <class A>
__device__ void dsu_product_tile(const DsuProducts<A>& all, int64_t tile, A* shared) {
    constexpr int kSide = DsuProduct<A>::kSide;
    int part = 0;
    while (tile >= all.parts[part].tiles()) tile -= all.parts[part++].tiles();
    const DsuProduct<A>& a = all.parts[part];
    const int64_t i0 = tile / a.columns() * kSide, j0 = tile % a.columns() * kSide;
    const auto p = [&](int i) {
        const A* from = a.p + i0 + i;
        return [&a, from, inside = i0 + i < a.I](int64_t m) { return inside ? from[m * a.p_pitch] : A(0); };
    };
    const auto q = [&](int j) {
        return [&a, j = j0 + j](int64_t m) {
            if (j >= a.J) return A(a.bias && j == a.J ? 1 : 0);
            const int64_t row = m < a.turn ? dsu_sample(m, a.T) : m - a.turn;
            return (m < a.turn ? a.q : a.q_later)[row * a.q_pitch + j];
        };
    };
    DsuProduct<A>::Tile::template run<false, false>(all.M, p, q, shared, [&](const auto& sum) {
        for (int n = thread_here(); n < kSide * kSide; n += kDsuThreads<A>) {
            const int64_t i = i0 + n / kSide, j = j0 + n % kSide;
            if (i >= a.I) continue;
            if (j < a.J) a.out[i * a.pitch + j] = sum(n / kSide, n % kSide);
            if (a.bias && j == a.J) a.bias[i] = sum(n / kSide, n % kSide);
        }
    });
}

}  // namespace dla
