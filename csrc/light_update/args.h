// What light_update's kernels on the CPU take.
#pragma once

#include "common/types.h"

namespace dla {

// How what is carried enters: not at all, times one factor for each channel, or through a 3x3 filter.
enum class Carry { none, scaled, filtered };

// What forward and backward share; the pointers to the carry's vectors are null where it has none.
template <class A>
struct LightUpdateWeights {
    const A* attention;     // [B, C]
    const A* value_weight;  // [C, 9]
    const A* carry_scale;   // [C]
    const A* gate;          // [B, C]
    const A* carry_weight;  // [C, 9]
};

template <class T>
struct LightUpdateForward : LightUpdateWeights<Acc<T>> {
    Shape shape;
    Map<const T> x, carried;
    Map<T> o;                    // null where it is not needed
    Acc<T>*mean, *var;           // [B, C] of o; no variance where BatchNorm is folded
    Map<T> out;                  // x + scale * o + shift where BatchNorm is folded, else null
    Acc<T>* out_mean;            // [B, C]
    const Acc<T>*scale, *shift;  // [C]
};

// For every sample, tap and channel the sum of x (9) and of carried (9) times o's gradient, shifted by the tap. All
// gradients but the maps' follow from these, so the value map is needed neither then nor now.
constexpr int kProducts = 18;

template <class T>
struct LightUpdateBackward : LightUpdateWeights<Acc<T>> {
    Shape shape;
    // The gradient of o is factor * grad_out + slope * (o - mean) + offset, plus grad_o, which may be null, as factor
    // in channels_last; that of x takes grad_out + residual besides what flows through the filters.
    Map<const T> grad_out, grad_o, o;
    const Acc<T>*factor, *offset, *residual;  // [B, C]
    const Acc<T>*slope, *mean;                // [C]
    Map<const T> x, carried;
    Map<T> grad_x, grad_carried;  // either may be null
    Acc<T>* products;             // [B, 18, C]
};

// The attention of each head, for all of its channels, and what it is made of.
template <class A>
struct LightUpdateAttention {
    Shape shape;
    int64_t K, head_dim;
    const A *y, *query_weight, *key_weight;
    A *q, *k, *weights;  // [B, C]
};

// Where the gradients of all filters and vectors go; null where there is no such filter or vector.
template <class A>
struct LightUpdateGradients {
    A *attention, *value_weight, *carry_scale, *gate, *carry_weight;
};

// o is one 3x3 filter over x plus one over carried: attention, lambda and gate are folded into them.
template <class Args>
inline auto x_filter(const Args& a, int64_t b, int64_t c, int t) {
    return a.attention[b * a.shape.C + c] * a.value_weight[c * 9 + t];
}

template <class Args>
inline auto carried_filter(const Args& a, int64_t b, int64_t c, int t) {
    using A = std::remove_cv_t<std::remove_reference_t<decltype(*a.attention)>>;
    if (!a.carry_scale) return A(0);
    const A gate = t != 4 ? A(0) : a.gate ? a.gate[b * a.shape.C + c] : A(1);
    return a.carry_scale[c] * (gate + (a.carry_weight ? a.carry_weight[c * 9 + t] : A(0)));
}

}  // namespace dla
