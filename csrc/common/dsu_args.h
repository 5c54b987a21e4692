// What the Dynamic Sharing Unit's kernels take: its weights, by what they do.
#pragma once

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
    int64_t B, T, C, R;
    bool joint;
    Activation activation;
    Linear<A> reduce_y, expand_y, reduce_h, expand_h;

    int64_t M() const { return B * T; }
    // Where the three parts of the gates begin.
    int64_t input() const { return joint ? C : 0; }
    int64_t forget() const { return joint ? 2 * C : C; }
    int64_t candidate() const { return joint ? 0 : 2 * C; }
};

// From all weights in one row: w1, w2, b2, or w1, b1, w2, b2 of y's branch and then of h's.
template <class A>
Dsu<A> dsu_of(int64_t B, int64_t T, int64_t C, A* packed, int64_t size, bool joint, int64_t activation) {
    const auto take = [&](int64_t count) {
        A* from = packed;
        packed += count;
        return from;
    };
    const auto sigma = static_cast<Activation>(activation);
    if (joint) {
        const int64_t R = (size - 3 * C) / (5 * C);
        A *w1 = take(2 * C * R), *w2 = take(3 * C * R), *b2 = take(3 * C);
        return {B, T, C, R, true, sigma, {w1 + C, 2 * C}, {w2, R, b2}, {w1, 2 * C}, {}};
    }
    const int64_t R = (size - 6 * C) / (8 * C + 2);
    Linear<A> layers[4];
    for (int i = 0; i < 4; ++i) {
        const bool reduces = i % 2 == 0;
        layers[i] = {take(reduces ? C * R : 3 * C * R), reduces ? C : R, take(reduces ? R : 3 * C)};
    }
    return {B, T, C, R, false, sigma, layers[0], layers[1], layers[2], layers[3]};
}

// The same for reading.
template <class A>
Dsu<A> dsu_of(int64_t B, int64_t T, int64_t C, const Tensor& weights, bool joint, int64_t activation) {
    return dsu_of(B, T, C, static_cast<A*>(const_cast<void*>(weights.const_data_ptr())), weights.numel(), joint,
                  activation);
}

}  // namespace dla
