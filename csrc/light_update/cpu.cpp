// light_update on the CPU: the library ops around the kernels.
#include <cmath>
#include <tuple>

#include "common/runs.h"
#include "common/tensor.h"

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
    Map<T> out;
    Acc<T>*mean, *var;  // [B, C]
};

// For every sample, tap and channel the sum of x (9) and of carried (9) times o's gradient, shifted by the tap. All
// gradients but the maps' follow from these, so the value map is needed neither then nor now.
constexpr int kProducts = 18;

template <class T>
struct LightUpdateBackward : LightUpdateWeights<Acc<T>> {
    Shape shape;
    Map<const T> grad_o, o;                    // o is null where its variance has no gradient
    const Acc<T>*grad_mean, *grad_var, *mean;  // [B, C]; the first two may be null
    Map<const T> x, carried;
    Map<T> grad_x, grad_carried;  // either may be null
    Acc<T>* products;             // [B, 18, C]
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

#define DLA_KERNELS "light_update/kernels.h"
#include "common/each_isa.h"

namespace dla {
namespace {

// sigmoid(q k^T / sqrt(head_dim)) for all channels of a head, [B, C].
template <class A>
Scratch<A> attention_of(const Shape& s, const A* q, const A* k, int64_t head_dim) {
    Scratch<A> attention(s.B * s.C);
    for (int64_t i = 0; i < s.B * s.C; i += head_dim) {
        A score = 0;
        for (int64_t j = i; j < i + head_dim; ++j) score += q[j] * k[j];
        std::fill_n(&attention[i], head_dim, A(1) / (A(1) + std::exp(-score / std::sqrt(A(head_dim)))));
    }
    return attention;
}

// The gradients of all vectors and filters, from the products; pointers to those that are not there are null.
template <class A>
struct VectorGradients {
    A *q, *k, *value_weight, *carry_scale, *gate, *carry_weight;

    void from(const LightUpdateWeights<A>& w, const Shape& s, const A* products, const A* q_, const A* k_,
              int64_t head_dim) const {
        std::fill_n(value_weight, 9 * s.C, A(0));
        if (carry_scale) std::fill_n(carry_scale, s.C, A(0));
        if (carry_weight) std::fill_n(carry_weight, 9 * s.C, A(0));
        const Scratch<A> of_attention(s.C);
        for (int64_t b = 0; b < s.B; ++b) {
            const A* x = products + b * kProducts * s.C;
            const A* carried = x + 9 * s.C;
            std::fill_n(of_attention.get(), s.C, A(0));
            for (int t = 0; t < 9; ++t) {
                for (int64_t c = 0; c < s.C; ++c) {
                    of_attention[c] += w.value_weight[c * 9 + t] * x[t * s.C + c];
                    value_weight[c * 9 + t] += w.attention[b * s.C + c] * x[t * s.C + c];
                }
            }
            for (int64_t c = 0; carry_scale && c < s.C; ++c) {
                const A centre = carried[4 * s.C + c];
                if (gate) gate[b * s.C + c] = w.carry_scale[c] * centre;
                carry_scale[c] += (w.gate ? w.gate[b * s.C + c] : A(1)) * centre;
                for (int t = 0; carry_weight && t < 9; ++t) {
                    carry_scale[c] += w.carry_weight[c * 9 + t] * carried[t * s.C + c];
                    carry_weight[c * 9 + t] += w.carry_scale[c] * carried[t * s.C + c];
                }
            }
            for (int64_t c = 0; c < s.C; c += head_dim) {
                A grad = 0;
                for (int64_t j = c; j < c + head_dim; ++j) grad += of_attention[j];
                const A attention = w.attention[b * s.C + c];
                grad *= attention * (A(1) - attention) / std::sqrt(A(head_dim));
                for (int64_t j = b * s.C + c; j < b * s.C + c + head_dim; ++j) {
                    q[j] = grad * k_[j];
                    k[j] = grad * q_[j];
                }
            }
        }
    }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> light_update_forward(const Tensor& x_, const Tensor& q_, const Tensor& k_,
                                                        const Tensor& value_weight_,
                                                        const std::optional<Tensor>& carried_,
                                                        const std::optional<Tensor>& carry_scale_,
                                                        const std::optional<Tensor>& gate_,
                                                        const std::optional<Tensor>& carry_weight_, int64_t head_dim) {
    const Tensor x = walkable(x_), q = dense(q_), k = dense(k_), value_weight = dense(value_weight_);
    const bool channels_last = is_channels_last(x);
    std::optional<Tensor> carried;
    if (carried_) carried = in_layout(*carried_, channels_last);
    const auto carry_scale = dense(carry_scale_), gate = dense(gate_), carry_weight = dense(carry_weight_);
    const Shape s = shape_of(x);
    const Tensor out = torch::stable::empty_like(x), mean = new_tensor(q, {s.B, s.C}), var = new_tensor(q, {s.B, s.C});
    on_dtype(x, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const Scratch<A> attention = attention_of(s, data_of<A>(q), data_of<A>(k), head_dim);
        const LightUpdateForward<T> args{{attention.get(), data_of<A>(value_weight), data_of<A>(carry_scale),
                                          data_of<A>(gate), data_of<A>(carry_weight)},
                                         s,
                                         map_of<const T>(x),
                                         carried ? map_of<const T>(*carried) : Map<const T>{},
                                         map_of<T>(out),
                                         mutable_data_of<A>(mean),
                                         mutable_data_of<A>(var)};
        if (s.B * s.C > 0) DLA_ON_ISA(forward<T>(args, channels_last));
    });
    return {out, mean, var};
}

// Gradients of x, q, k, value_weight, carried, carry_scale, gate and carry_weight; an empty tensor stands for one that
// is not there or not needed. x and carried may be missing where no vector's gradient is needed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> light_update_backward(
    const Tensor& grad_o_, const std::optional<Tensor>& grad_mean_, const std::optional<Tensor>& grad_var_,
    const Tensor& o_, const Tensor& mean_, const std::optional<Tensor>& x_, const Tensor& q_, const Tensor& k_,
    const Tensor& value_weight_, const std::optional<Tensor>& carried_, const std::optional<Tensor>& carry_scale_,
    const std::optional<Tensor>& gate_, const std::optional<Tensor>& carry_weight_, int64_t head_dim, bool need_x,
    bool need_carried) {
    const Tensor o = walkable(o_), mean = dense(mean_), q = dense(q_), k = dense(k_);
    const Tensor value_weight = dense(value_weight_);
    const bool channels_last = is_channels_last(o);
    const Tensor grad_o = in_layout(grad_o_, channels_last);
    const auto grad_mean = dense(grad_mean_), grad_var = dense(grad_var_);
    const auto carry_scale = dense(carry_scale_), gate = dense(gate_), carry_weight = dense(carry_weight_);
    // A map that is missing wants no products: those with any map at hand are computed in its place, and not used.
    const Tensor x = x_ ? in_layout(*x_, channels_last) : grad_o;
    const Tensor carried = carried_ ? in_layout(*carried_, channels_last) : grad_o;
    const Shape s = shape_of(grad_o);
    const auto map_if = [&](bool need) { return need ? torch::stable::empty_like(o) : new_tensor(o, {0}); };
    const auto like = [&](const std::optional<Tensor>& t) {
        return t ? torch::stable::empty_like(*t) : new_tensor(q, {0});
    };
    const Tensor grad_x = map_if(need_x), grad_carried = map_if(need_carried);
    const Tensor grad_q = like(q), grad_k = like(k), grad_value_weight = like(value_weight);
    const Tensor grad_carry_scale = like(carry_scale), grad_gate = like(gate), grad_carry_weight = like(carry_weight);
    on_dtype(grad_o, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const A *q_data = data_of<A>(q), *k_data = data_of<A>(k);
        const Scratch<A> attention = attention_of(s, q_data, k_data, head_dim), products(s.B * kProducts * s.C);
        const LightUpdateBackward<T> args{{attention.get(), data_of<A>(value_weight), data_of<A>(carry_scale),
                                           data_of<A>(gate), data_of<A>(carry_weight)},
                                          s,
                                          map_of<const T>(grad_o),
                                          grad_var ? map_of<const T>(o) : Map<const T>{},
                                          data_of<A>(grad_mean),
                                          data_of<A>(grad_var),
                                          data_of<A>(mean),
                                          map_of<const T>(x),
                                          map_of<const T>(carried),
                                          need_x ? map_of<T>(grad_x) : Map<T>{},
                                          need_carried ? map_of<T>(grad_carried) : Map<T>{},
                                          products.get()};
        if (s.B * s.C > 0) DLA_ON_ISA(backward<T>(args, channels_last));
        const auto data_if = [](const std::optional<Tensor>& there, const Tensor& t) {
            return there ? mutable_data_of<A>(t) : nullptr;
        };
        const VectorGradients<A> grads{mutable_data_of<A>(grad_q),
                                       mutable_data_of<A>(grad_k),
                                       mutable_data_of<A>(grad_value_weight),
                                       data_if(carry_scale, grad_carry_scale),
                                       data_if(gate, grad_gate),
                                       data_if(carry_weight, grad_carry_weight)};
        grads.from(args, s, products.get(), q_data, k_data, head_dim);
    });
    return {grad_x, grad_q, grad_k, grad_value_weight, grad_carried, grad_carry_scale, grad_gate, grad_carry_weight};
}

STABLE_TORCH_LIBRARY_FRAGMENT(dla_kernels, m) {
    m.def(
        "light_update_forward(Tensor x, Tensor q, Tensor k, Tensor value_weight, Tensor? carried, Tensor? carry_scale, "
        "Tensor? gate, Tensor? carry_weight, int head_dim) -> (Tensor, Tensor, Tensor)");
    m.def(
        "light_update_backward(Tensor grad_o, Tensor? grad_mean, Tensor? grad_var, Tensor o, Tensor mean, Tensor? x, "
        "Tensor q, Tensor k, Tensor value_weight, Tensor? carried, Tensor? carry_scale, Tensor? gate, "
        "Tensor? carry_weight, int head_dim, bool need_x, bool need_carried) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dla_kernels, CPU, m) {
    m.impl("light_update_forward", TORCH_BOX(&light_update_forward));
    m.impl("light_update_backward", TORCH_BOX(&light_update_backward));
}

}  // namespace dla
