// What the Dynamic Sharing Unit's kernels take: its weights, by what they do.
#pragma once

#include <array>

#include "common/tensor.h"

namespace dla {

// In the order of dla_kernels.common.ACTIVATIONS.
enum class Activation { identity, tanh, relu, sigmoid };

// A linear layer [out, in], rows `pitch` apart; null where the unit's form has none.
template <class A>
struct Linear {
    A* weight = nullptr;
    int64_t pitch = 0;
    A* bias = nullptr;
};

// Both forms of the unit, over M = B * T rows of y and B rows of h and c:
//   joint  s = ReLU(reduce_y y + reduce_h h), gates = expand_y s
//   split  gates = expand_y ReLU(reduce_y y) + expand_h ReLU(reduce_h h)
template <class A>
struct Dsu {
    int64_t B, T, C, reduced_y, reduced_h;
    bool joint;
    Activation activation;
    Linear<A> reduce_y, expand_y, reduce_h, expand_h;

    int64_t M() const { return B * T; }
    // Where the three parts of the gates begin.
    int64_t input() const { return joint ? C : 0; }
    int64_t forget() const { return joint ? 2 * C : C; }
    int64_t candidate() const { return joint ? 0 : 2 * C; }
};

// `weights` as the public ops take them: w1, w2, b2, or w1, b1, w2, b2 of y's branch and then of h's.
template <class A>
Dsu<A> dsu_of(int64_t B, int64_t T, int64_t C, const std::vector<Tensor>& weights, int64_t activation) {
    std::array<A*, 8> w{};
    for (size_t i = 0; i < weights.size(); ++i) w[i] = mutable_data_of<A>(weights[i]);
    const int64_t r = weights[0].size(0);
    const auto sigma = static_cast<Activation>(activation);
    if (weights.size() == 3) {
        return {B, T, C, r, r, true, sigma, {w[0] + C, 2 * C}, {w[1], r, w[2]}, {w[0], 2 * C}, {}};
    }
    const int64_t r_h = weights[4].size(0);
    return {B, T, C, r, r_h, false, sigma, {w[0], C, w[1]}, {w[2], r, w[3]}, {w[4], C, w[5]}, {w[6], r_h, w[7]}};
}

inline std::vector<Tensor> all_dense(const std::vector<Tensor>& tensors) {
    std::vector<Tensor> done;
    for (const Tensor& tensor : tensors) done.push_back(dense(tensor));
    return done;
}

inline std::vector<Tensor> all_empty_like(const std::vector<Tensor>& tensors) {
    std::vector<Tensor> done;
    for (const Tensor& tensor : tensors) done.push_back(torch::stable::empty_like(tensor));
    return done;
}

}  // namespace dla
