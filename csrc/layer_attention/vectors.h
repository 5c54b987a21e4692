// The vectors of layer_attention on the CPU: queries and keys, the attention over the layers, and their backward.
#include "common/slide.h"

template <class A>
void project(const layer_attention::Filters<A>& a, A* q, A* k) {
    const int64_t C = a.C, K = a.K, layers = a.layers;
    parallel(a.B, 2 * layers * K * C, [&](int64_t begin, int64_t end) {
        const PaddedRow<A> row(C, K);
        for (int64_t b = begin; b < end; ++b) {
            for (int64_t m = 0; m < layers; ++m) {
                const int64_t at = (b * layers + m) * C;
                const A* filter = a.key_filter(m);
                if (!filter) {
                    std::copy_n(a.features + at, C, k + at);
                    continue;
                }
                for (int64_t c = 0; c < C; ++c) row.get()[c] = a.features[at + c] * a.gates[at + c];
                for (int64_t c = 0; c < C; c += kLanes<A>) store<A>(k + at + c, row.filtered(filter, false, c), C - c);
            }
            row.take(a.features + ((b + 1) * layers - 1) * C);
            for (int64_t c = 0; c < C; c += kLanes<A>) {
                store<A>(q + b * C + c, row.filtered(a.query_weight, false, c), C - c);
            }
        }
    });
}

// From the gradients of q and k those of the features and the filters; grad_gates is added to.
template <class A>
void project_backward(const layer_attention::Filters<A>& a, const A* grad_q, const A* grad_k, A* grad_features,
                      A* grad_gates, A* grad_query_weight, A* grad_key_weights) {
    const int64_t C = a.C, K = a.K, layers = a.layers, taps = (a.filters + 1) * K;
    const Scratch<A> partials(a.B * taps, A(0));  // of every sample: of the keys' filters, then of the query's
    parallel(a.B, 4 * layers * K * C, [&](int64_t begin, int64_t end) {
        const PaddedRow<A> input(C, K), grad(C, K);
        for (int64_t b = begin; b < end; ++b) {
            A* partial = &partials[b * taps];
            for (int64_t m = 0; m < layers; ++m) {
                const int64_t at = (b * layers + m) * C;
                const A* filter = a.key_filter(m);
                if (!filter) {
                    std::copy_n(grad_k + at, C, grad_features + at);
                    continue;
                }
                grad.take(grad_k + at);
                for (int64_t c = 0; c < C; ++c) input.get()[c] = a.features[at + c] * a.gates[at + c];
                input.add_filter_gradient(grad, partial + (filter - a.key_weights));
                for (int64_t c = 0; c < C; c += kLanes<A>) {
                    const int64_t n = C - c, i = at + c;
                    const Vec<A> of_gated = grad.filtered(filter, true, c);
                    store<A>(grad_features + i, of_gated * load<A>(a.gates + i, n), n);
                    store<A>(grad_gates + i, load<A>(grad_gates + i, n) + of_gated * load<A>(a.features + i, n), n);
                }
            }
            const int64_t own = ((b + 1) * layers - 1) * C;
            grad.take(grad_q + b * C);
            input.take(a.features + own);
            input.add_filter_gradient(grad, partial + a.filters * K);
            for (int64_t c = 0; c < C; c += kLanes<A>) {
                A* to = grad_features + own + c;
                store<A>(to, load<A>(to, C - c) + grad.filtered(a.query_weight, true, c), C - c);
            }
        }
    });
    std::fill_n(grad_key_weights, a.filters * K, A(0));
    std::fill_n(grad_query_weight, K, A(0));
    for (int64_t b = 0; b < a.B; ++b) {
        const A* partial = &partials[b * taps];
        for (int64_t i = 0; i < a.filters * K; ++i) grad_key_weights[i] += partial[i];
        for (int64_t j = 0; j < K; ++j) grad_query_weight[j] += partial[a.filters * K + j];
    }
}

template <class A>
void attend(const LayerAttentionWeights<A>& a) {
    const int64_t C = a.C, layers = a.layers, D = a.head_dim;
    parallel(a.B, 4 * layers * C, [&](int64_t begin, int64_t end) {
        const Scratch<A> scores(layers);
        for (int64_t b = begin; b < end; ++b) {
            const int64_t sample = b * layers * C;
            for (int64_t c = 0; c < C; c += D) {
                A highest = -std::numeric_limits<A>::infinity(), total = 0;
                for (int64_t m = 0; m < layers; ++m) {
                    scores[m] = dot<A>(a.q + b * C + c, a.k + sample + m * C + c, D) / std::sqrt(A(D));
                    highest = std::max(highest, scores[m]);
                }
                for (int64_t m = 0; m < layers; ++m) total += scores[m] = std::exp(scores[m] - highest);
                for (int64_t m = 0; m < layers; ++m) {
                    std::fill_n(a.attention + sample + m * C + c, D, scores[m] / total);
                }
            }
            for (int64_t i = sample; i < sample + layers * C; ++i) a.gated[i] = a.attention[i] * a.gates[i];
        }
    });
}

// The gradients of q, k and gates, from those of the weights, `products` [B, layers, C].
template <class A>
void attend_backward(const LayerAttentionWeights<A>& a, const A* products, A* grad_q, A* grad_k, A* grad_gates) {
    const int64_t C = a.C, layers = a.layers, D = a.head_dim;
    parallel(a.B, 6 * layers * C, [&](int64_t begin, int64_t end) {
        const Scratch<A> grads(layers);
        for (int64_t b = begin; b < end; ++b) {
            const int64_t sample = b * layers * C;
            for (int64_t i = sample; i < sample + layers * C; ++i) grad_gates[i] = a.attention[i] * products[i];
            std::fill_n(grad_q + b * C, C, A(0));
            for (int64_t c = 0; c < C; c += D) {
                const A* q = a.q + b * C + c;
                A mean = 0;
                for (int64_t m = 0; m < layers; ++m) {
                    const int64_t at = sample + m * C + c;
                    grads[m] = dot<A>(a.gates + at, products + at, D);
                    mean += a.attention[at] * grads[m];
                }
                for (int64_t m = 0; m < layers; ++m) {
                    const int64_t at = sample + m * C + c;
                    const A grad = a.attention[at] * (grads[m] - mean) / std::sqrt(A(D));
                    for (int64_t j = 0; j < D; ++j) {
                        grad_q[b * C + c + j] += grad * a.k[at + j];
                        grad_k[at + j] = grad * q[j];
                    }
                }
            }
        }
    });
}
