// The vectors of light_update on the CPU: the attention of each head, and its backward.
#include "common/slide.h"

template <class A>
void attend(const LightUpdateAttention<A>& a) {
    const auto [B, C, H, W] = a.shape;
    parallel(B, 2 * a.K * C, [&, C = C](int64_t begin, int64_t end) {
        const PaddedRow<A> y(C, a.K);
        for (int64_t b = begin; b < end; ++b) {
            y.take(a.y + b * C);
            A *q = a.q + b * C, *k = a.k + b * C, *weights = a.weights + b * C;
            for (int64_t c = 0; c < C; c += kLanes<A>) {
                store<A>(q + c, y.filtered(a.query_weight, false, c), C - c);
                store<A>(k + c, y.filtered(a.key_weight, false, c), C - c);
            }
            for (int64_t c = 0; c < C; c += a.head_dim) {
                const A score = dot<A>(q + c, k + c, a.head_dim) / std::sqrt(A(a.head_dim));
                std::fill_n(weights + c, a.head_dim, A(1) / (A(1) + std::exp(-score)));
            }
        }
    });
}

// grad [B, C], of each channel's weight -> those of y, query_weight and key_weight.
template <class A>
void attend_backward(const LightUpdateAttention<A>& a, const A* grad, A* grad_y, A* grad_query_weight,
                     A* grad_key_weight) {
    const auto [B, C, H, W] = a.shape;
    const Scratch<A> partials(2 * B * a.K, A(0));
    parallel(B, 4 * a.K * C, [&, C = C](int64_t begin, int64_t end) {
        const PaddedRow<A> y(C, a.K), of_q(C, a.K), of_k(C, a.K);
        for (int64_t b = begin; b < end; ++b) {
            const int64_t at = b * C;
            y.take(a.y + at);
            for (int64_t c = 0; c < C; c += a.head_dim) {
                A of_score = 0;
                for (int64_t j = at + c; j < at + c + a.head_dim; ++j) of_score += grad[j];
                of_score *= a.weights[at + c] * (A(1) - a.weights[at + c]) / std::sqrt(A(a.head_dim));
                for (int64_t j = c; j < c + a.head_dim; ++j) {
                    of_q.get()[j] = of_score * a.k[at + j];
                    of_k.get()[j] = of_score * a.q[at + j];
                }
            }
            for (int64_t c = 0; c < C; c += kLanes<A>) {
                store<A>(grad_y + at + c, of_q.filtered(a.query_weight, true, c) + of_k.filtered(a.key_weight, true, c),
                         C - c);
            }
            y.add_filter_gradient(of_q, &partials[2 * b * a.K]);
            y.add_filter_gradient(of_k, &partials[(2 * b + 1) * a.K]);
        }
    });
    std::fill_n(grad_query_weight, a.K, A(0));
    std::fill_n(grad_key_weight, a.K, A(0));
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t j = 0; j < a.K; ++j) {
            grad_query_weight[j] += partials[2 * b * a.K + j];
            grad_key_weight[j] += partials[(2 * b + 1) * a.K + j];
        }
    }
}
