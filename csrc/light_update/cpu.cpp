// light_update on the CPU: the library ops around the kernels.
#include <cmath>
#include <tuple>

#include "common/normalisation.h"
#include "common/runs.h"
#include "common/tensor.h"
#include "light_update/args.h"

#define DLA_KERNELS "light_update/kernels.h"
#include "common/each_isa.h"

namespace dla {
namespace {

// The same with the memory that it takes.
template <class A>
struct Attention : LightUpdateAttention<A> {
    Scratch<A> memory;  // [3, B, C]

    Attention(const Shape& s, const Tensor& y, const Tensor& query_weight, const Tensor& key_weight, int64_t head_dim)
        : LightUpdateAttention<A>{s,
                                  query_weight.size(2),
                                  head_dim,
                                  data_of<A>(y),
                                  data_of<A>(query_weight),
                                  data_of<A>(key_weight),
                                  nullptr,
                                  nullptr,
                                  nullptr},
          memory(3 * s.B * s.C) {
        this->q = memory.get();
        this->k = this->q + s.B * s.C;
        this->weights = this->k + s.B * s.C;
        DLA_ON_ISA(attend<A>(*this));
    }
};

// All arguments but x, ready for the kernels.
struct Inputs {
    Tensor y, query_weight, key_weight, value_weight;
    std::optional<Tensor> carried, carry_scale, gate, carry_weight;

    Inputs(const Tensor& y, const Tensor& query_weight, const Tensor& key_weight, const Tensor& value_weight,
           const std::optional<Tensor>& carried, const std::optional<Tensor>& carry_scale,
           const std::optional<Tensor>& gate, const std::optional<Tensor>& carry_weight, bool channels_last)
        : y(dense(y)),
          query_weight(dense(query_weight)),
          key_weight(dense(key_weight)),
          value_weight(dense(value_weight)),
          carried(in_layout(carried, channels_last)),
          carry_scale(dense(carry_scale)),
          gate(dense(gate)),
          carry_weight(dense(carry_weight)) {}

    template <class A>
    LightUpdateWeights<A> weights(const Attention<A>& attention) const {
        return {attention.weights, data_of<A>(value_weight), data_of<A>(carry_scale), data_of<A>(gate),
                data_of<A>(carry_weight)};
    }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> light_update_forward(const Tensor& x_, const Tensor& y, const Tensor& query_weight,
                                                        const Tensor& key_weight, const Tensor& value_weight,
                                                        const std::optional<Tensor>& carried,
                                                        const std::optional<Tensor>& carry_scale,
                                                        const std::optional<Tensor>& gate,
                                                        const std::optional<Tensor>& carry_weight, int64_t head_dim) {
    const Tensor x = walkable(x_);
    const bool channels_last = is_channels_last(x);
    const Inputs in(y, query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight, channels_last);
    const Shape s = shape_of(x);
    const Tensor o = new_like(x), mean = new_tensor(y, {s.B, s.C}), var = new_tensor(y, {s.B, s.C});
    on_dtype(x, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const Attention<A> attention(s, in.y, in.query_weight, in.key_weight, head_dim);
        const LightUpdateForward<T> args{in.weights(attention),  s,
                                         map_of<const T>(x),     map_if<const T>(in.carried),
                                         map_of<T>(o),           mutable_data_of<A>(mean),
                                         mutable_data_of<A>(var)};
        if (s.B * s.C > 0) DLA_ON_ISA(forward<T>(args, channels_last));
    });
    return {o, mean, var};
}

namespace {

// In inference the block's output, in `out`, and o, where `o` is not empty: their GAPs.
std::tuple<Tensor, Tensor> fold(const Tensor& x, const Tensor& out, const Tensor& o, const Tensor& y,
                                const Tensor& query_weight, const Tensor& key_weight, const Tensor& value_weight,
                                const std::optional<Tensor>& carried, const std::optional<Tensor>& carry_scale,
                                const std::optional<Tensor>& gate, const std::optional<Tensor>& carry_weight,
                                const Tensor& mean_, const Tensor& var_, const Tensor& weight_, const Tensor& bias_,
                                double eps, int64_t head_dim) {
    const bool channels_last = is_channels_last(x);
    const Inputs in(y, query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight, channels_last);
    const Tensor mean = dense(mean_), var = dense(var_), weight = dense(weight_), bias = dense(bias_);
    const Shape s = shape_of(x);
    const Tensor out_mean = new_tensor(y, {s.B, s.C}), o_mean = new_tensor(y, {s.B, s.C});
    on_dtype(x, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const Attention<A> attention(s, in.y, in.query_weight, in.key_weight, head_dim);
        const FoldedNorm<A> norm(s.C, data_of<A>(mean), data_of<A>(var), data_of<A>(weight), data_of<A>(bias), eps);
        const LightUpdateForward<T> args{in.weights(attention),
                                         s,
                                         map_of<const T>(x),
                                         map_if<const T>(in.carried),
                                         map_if<T>(o),
                                         mutable_data_of<A>(o_mean),
                                         nullptr,
                                         map_of<T>(out),
                                         mutable_data_of<A>(out_mean),
                                         norm.scale.get(),
                                         norm.shift.get()};
        if (s.B * s.C > 0) DLA_ON_ISA(forward<T>(args, channels_last));
    });
    return {out_mean, o_mean};
}

}  // namespace

// In inference: the block's output, its GAP, o where it is needed, and o's GAP.
std::tuple<Tensor, Tensor, Tensor, Tensor> light_update_folded(
    const Tensor& x_, const Tensor& y, const Tensor& query_weight, const Tensor& key_weight, const Tensor& value_weight,
    const std::optional<Tensor>& carried, const std::optional<Tensor>& carry_scale, const std::optional<Tensor>& gate,
    const std::optional<Tensor>& carry_weight, const Tensor& mean, const Tensor& var, const Tensor& weight,
    const Tensor& bias, double eps, int64_t head_dim, bool need_o) {
    const Tensor x = walkable(x_), out = new_like(x), o = map_or_empty(need_o, x);
    const auto [out_mean, o_mean] = fold(x, out, o, y, query_weight, key_weight, value_weight, carried, carry_scale,
                                         gate, carry_weight, mean, var, weight, bias, eps, head_dim);
    return {out, out_mean, o, o_mean};
}

// The same with the block's output over x, and with over_carried o over what is carried, which then is not returned.
// Both must be contiguous: runs of channels_last rows read each other's. Nor can o go where a filter reads.
std::tuple<Tensor, Tensor, Tensor> light_update_folded_(
    const Tensor& x, const Tensor& y, const Tensor& query_weight, const Tensor& key_weight, const Tensor& value_weight,
    const std::optional<Tensor>& carried, const std::optional<Tensor>& carry_scale, const std::optional<Tensor>& gate,
    const std::optional<Tensor>& carry_weight, const Tensor& mean, const Tensor& var, const Tensor& weight,
    const Tensor& bias, double eps, int64_t head_dim, bool need_o, bool over_carried) {
    const Tensor own = map_or_empty(need_o && !over_carried, x);
    const auto [out_mean, o_mean] =
        fold(x, x, over_carried ? *carried : own, y, query_weight, key_weight, value_weight, carried, carry_scale, gate,
             carry_weight, mean, var, weight, bias, eps, head_dim);
    return {out_mean, own, o_mean};
}

// The backward of the whole block, out = x + keep * BatchNorm(o), from the gradients of out, its GAP, o and its GAP:
// those of x, y, query_weight, key_weight, value_weight, carried, carry_scale, gate and carry_weight; an empty tensor
// stands for one that is not there or not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> light_update_backward(
    const Tensor& grad_out_, const std::optional<Tensor>& grad_out_mean_, const std::optional<Tensor>& grad_o_,
    const std::optional<Tensor>& grad_o_mean_, const Tensor& o_, const Tensor& mean_, const Tensor& var_,
    const Tensor& weight_, const std::optional<Tensor>& sum_weight_, const std::optional<Tensor>& sum_bias_,
    const std::optional<Tensor>& keep_, double eps, int64_t count, const Tensor& x_, const Tensor& y,
    const Tensor& query_weight, const Tensor& key_weight, const Tensor& value_weight,
    const std::optional<Tensor>& carried, const std::optional<Tensor>& carry_scale, const std::optional<Tensor>& gate,
    const std::optional<Tensor>& carry_weight, int64_t head_dim, bool need_x, bool need_carried) {
    const Tensor o = walkable(o_);
    const bool channels_last = is_channels_last(o);
    const Tensor grad_out = in_layout(grad_out_, channels_last), x = in_layout(x_, channels_last);
    const auto grad_o = in_layout(grad_o_, channels_last);
    const Inputs in(y, query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight, channels_last);
    const auto grad_out_mean = dense(grad_out_mean_), grad_o_mean = dense(grad_o_mean_);
    const auto sum_weight = dense(sum_weight_), sum_bias = dense(sum_bias_), keep = dense(keep_);
    const Tensor mean = dense(mean_), var = dense(var_), weight = dense(weight_);
    const Shape s = shape_of(o);
    const auto like = [&](const std::optional<Tensor>& t) { return t ? new_like(*t) : new_tensor(y, {0}); };
    const Tensor grad_x = map_or_empty(need_x, o), grad_carried = map_or_empty(need_carried, o);
    const Tensor grad_y = like(in.y), grad_query_weight = like(in.query_weight), grad_key_weight = like(in.key_weight);
    const Tensor grad_value_weight = like(in.value_weight), grad_carry_scale = like(in.carry_scale);
    const Tensor grad_gate = like(in.gate), grad_carry_weight = like(in.carry_weight);
    on_dtype(o, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const Attention<A> attention(s, in.y, in.query_weight, in.key_weight, head_dim);
        const NormGradient<A> norm(s.C, data_of<A>(mean), data_of<A>(var), data_of<A>(weight), data_of<A>(sum_weight),
                                   data_of<A>(sum_bias), eps, count);
        const int64_t size = s.B * s.C;
        const A *of_out = data_of<A>(grad_out_mean), *of_o = data_of<A>(grad_o_mean), *kept = data_of<A>(keep);
        const Scratch<A> factor(size), offset(size), residual(size), grad_attention(size), products(kProducts * size);
        for (int64_t i = 0; i < size; ++i) {
            const int64_t c = i % s.C;
            factor[i] = norm.scale[c] * (kept ? kept[i / s.C] : A(1));
            residual[i] = of_out ? of_out[i] / A(s.HW()) : A(0);
            offset[i] = factor[i] * residual[i] + norm.offset[c] + (of_o ? of_o[i] / A(s.HW()) : A(0));
        }
        const LightUpdateBackward<T> args{in.weights(attention),
                                          s,
                                          map_of<const T>(grad_out),
                                          map_if<const T>(grad_o),
                                          map_of<const T>(o),
                                          factor.get(),
                                          offset.get(),
                                          residual.get(),
                                          norm.slope.get(),
                                          norm.mean,
                                          map_of<const T>(x),
                                          map_if<const T>(in.carried),
                                          map_if<T>(grad_x),
                                          map_if<T>(grad_carried),
                                          products.get()};
        if (size > 0) DLA_ON_ISA(backward<T>(args, channels_last));
        const auto data_if = [](const std::optional<Tensor>& there, const Tensor& t) {
            return there ? mutable_data_of<A>(t) : nullptr;
        };
        const LightUpdateGradients<A> grads{grad_attention.get(), mutable_data_of<A>(grad_value_weight),
                                            data_if(in.carry_scale, grad_carry_scale), data_if(in.gate, grad_gate),
                                            data_if(in.carry_weight, grad_carry_weight)};
        DLA_ON_ISA(filter_gradients<A>(args, s, products.get(), grads));
        DLA_ON_ISA(attend_backward<A>(attention, grad_attention.get(), mutable_data_of<A>(grad_y),
                                      mutable_data_of<A>(grad_query_weight), mutable_data_of<A>(grad_key_weight)));
    });
    return {grad_x,       grad_y,           grad_query_weight, grad_key_weight,  grad_value_weight,
            grad_carried, grad_carry_scale, grad_gate,         grad_carry_weight};
}

STABLE_TORCH_LIBRARY_FRAGMENT(dla_kernels, m) {
    m.def(
        "light_update_forward(Tensor x, Tensor y, Tensor query_weight, Tensor key_weight, Tensor value_weight, "
        "Tensor? carried, Tensor? carry_scale, Tensor? gate, Tensor? carry_weight, int head_dim) -> "
        "(Tensor, Tensor, Tensor)");
    m.def(
        "light_update_folded(Tensor x, Tensor y, Tensor query_weight, Tensor key_weight, Tensor value_weight, "
        "Tensor? carried, Tensor? carry_scale, Tensor? gate, Tensor? carry_weight, Tensor mean, Tensor var, "
        "Tensor weight, Tensor bias, float eps, int head_dim, bool need_o) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "light_update_folded_(Tensor(a!) x, Tensor y, Tensor query_weight, Tensor key_weight, Tensor value_weight, "
        "Tensor(b!)? carried, Tensor? carry_scale, Tensor? gate, Tensor? carry_weight, Tensor mean, Tensor var, "
        "Tensor weight, Tensor bias, float eps, int head_dim, bool need_o, bool over_carried) -> "
        "(Tensor, Tensor, Tensor)");
    m.def(
        "light_update_backward(Tensor grad_out, Tensor? grad_out_mean, Tensor? grad_o, Tensor? grad_o_mean, Tensor o, "
        "Tensor mean, Tensor var, Tensor weight, Tensor? sum_weight, Tensor? sum_bias, Tensor? keep, float eps, "
        "SymInt count, Tensor x, Tensor y, Tensor query_weight, Tensor key_weight, Tensor value_weight, "
        "Tensor? carried, Tensor? carry_scale, Tensor? gate, Tensor? carry_weight, int head_dim, bool need_x, "
        "bool need_carried) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dla_kernels, CPU, m) {
    m.impl("light_update_forward", TORCH_BOX(&light_update_forward));
    m.impl("light_update_folded", TORCH_BOX(&light_update_folded));
    m.impl("light_update_folded_", TORCH_BOX(&light_update_folded_));
    m.impl("light_update_backward", TORCH_BOX(&light_update_backward));
}

}  // namespace dla
