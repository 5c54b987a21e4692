// layer_attention on the CPU: the library ops around the kernels.
#include <cmath>
#include <limits>
#include <tuple>

#include "common/normalisation.h"
#include "common/runs.h"
#include "common/tensor.h"
#include "layer_attention/filters.h"
#include "light_update/args.h"

namespace dla {

// The attention over the layers, the same for all channels of a head, and what it is made of.
template <class A>
struct LayerAttentionWeights {
    int64_t B, layers, C, head_dim;
    const A *q, *k, *gates;  // [B, C], [B, layers, C] twice
    A *attention, *gated;    // [B, layers, C], alone and times the gates
};

template <class T>
struct LayerAttentionForward {
    Shape shape;
    int64_t layers;
    const Map<const T>* values;  // [layers], the last is that made here
    const Acc<T>* weights;       // [B, layers, C], attention times gate
    Map<const T> x;
    const Acc<T>* value_weight;  // [C, 9]
    Map<T> value;
    Acc<T>* pooled;              // [B, C], the mean of value
    Map<T> o;                    // null where BatchNorm is folded
    Acc<T>*mean, *var;           // [B, C], as o
    Map<T> out;                  // x + ReLU(scale * o + shift) where BatchNorm is folded, else null
    const Acc<T>*scale, *shift;  // [C]
};

template <class T>
struct LayerAttentionBackward {
    Shape shape;
    int64_t layers, later;
    // The gradient of o is keep * scale * grad_out where the normalised map is positive, plus slope * (o - mean) +
    // offset.
    Map<const T> grad_out, o;
    const Acc<T>* keep;                                 // [B] or null
    const Acc<T>*mean, *scale, *bias, *slope, *offset;  // [C]
    const Map<const T>* values;                         // [layers]
    const Acc<T>* weights;                              // [B, layers, C], attention times gate
    const Map<const T>* later_grads;                    // [later], the gradients of later layers' o
    const Acc<T>* later_weights;                        // [B, later, C], theirs for this layer's value map
    Map<T> grad_o;
    Acc<T>* products;  // [B, layers, C], sum over H, W of o's gradient times the values
    // The value map made here goes on to x; null where no gradient of either is needed.
    Map<const T> x;
    const Acc<T>* value_weight;  // [C, 9]
    Map<const T> grad_read;      // the gradient that reaches the value map elsewhere, or null
    const Acc<T>* grad_pooled;   // [B, C], that of its mean, or null
    Map<T> grad_value;           // room for its whole gradient, in channels_last
    Map<T> grad_x;               // may be null
    Acc<T>* value_products;      // [B, 18, C], see LightUpdateBackward: of x alone
};

}  // namespace dla

#define DLA_KERNELS "layer_attention/kernels.h"
#include "common/each_isa.h"

namespace dla {
namespace {

template <class T>
std::vector<Map<T>> maps_of(const std::vector<Tensor>& tensors) {
    std::vector<Map<T>> maps;
    for (const Tensor& tensor : tensors) maps.push_back(map_of<T>(tensor));
    return maps;
}

// What the layers' maps are multiplied with, and what it is made of.
template <class A>
struct Weights : LayerAttentionWeights<A> {
    Scratch<A> memory;  // [2, B, layers, C]

    Weights(const Tensor& q, const Tensor& k, const Tensor& gates, int64_t head_dim)
        : LayerAttentionWeights<A>{k.size(0),     k.size(1),         k.size(2), head_dim, data_of<A>(q),
                                   data_of<A>(k), data_of<A>(gates), nullptr,   nullptr},
          memory(2 * k.numel()) {
        this->attention = memory.get();
        this->gated = this->attention + k.numel();
        DLA_ON_ISA(attend<A>(*this));
    }
};

template <class A>
layer_attention::Filters<A> filters_of(const Tensor& features, const Tensor& gates, const Tensor& query_weight,
                                       const Tensor& key_weights) {
    return {features.size(0),     features.size(1),         features.size(2),
            query_weight.numel(), key_weights.size(0),      data_of<A>(features),
            data_of<A>(gates),    data_of<A>(query_weight), data_of<A>(key_weights)};
}

// What o's forward and its folded form share: queries and keys, and the layers with the value map of the last, which is
// made here.
struct Layers {
    Tensor features, gates, query_weight, key_weights, x, value_weight;
    bool channels_last;
    std::vector<Tensor> values;
    Tensor q, k, key, value, pooled;

    Layers(const Tensor& features_, const Tensor& gates_, const Tensor& query_weight_, const Tensor& key_weights_,
           const Tensor& x_, const Tensor& value_weight_, const std::vector<Tensor>& prior)
        : features(dense(features_)),
          gates(dense(gates_)),
          query_weight(dense(query_weight_)),
          key_weights(dense(key_weights_)),
          x(walkable(x_)),
          value_weight(dense(value_weight_)),
          channels_last(is_channels_last(x)),
          values(in_layout(prior, channels_last)),
          q(new_tensor(features, {features.size(0), features.size(2)})),
          k(new_like(features)),
          key(new_like(q)),
          value(new_like(x)),
          pooled(new_like(q)) {
        values.push_back(value);
    }

    // `args` holds the results that are wanted.
    template <class T, class A = Acc<T>>
    void attend(LayerAttentionForward<T>& args, int64_t head_dim) const {
        const auto filters = filters_of<A>(features, gates, query_weight, key_weights);
        DLA_ON_ISA(project<A>(filters, mutable_data_of<A>(q), mutable_data_of<A>(k)));
        for (int64_t b = 0; b < filters.B; ++b) {
            std::copy_n(data_of<A>(k) + filters.row(b, filters.layers - 1), filters.C,
                        mutable_data_of<A>(key) + b * filters.C);
        }
        const Weights<A> weights(q, k, gates, head_dim);
        const auto maps = maps_of<const T>(values);
        args.shape = shape_of(x);
        args.layers = filters.layers;
        args.values = maps.data();
        args.weights = weights.gated;
        args.x = map_of<const T>(x);
        args.value_weight = data_of<A>(value_weight);
        args.value = map_of<T>(value);
        args.pooled = mutable_data_of<A>(pooled);
        if (channels_last) {
            DLA_ON_ISA(forward_rows<T>(args));
        } else {
            DLA_ON_ISA(forward_planes<T>(args));
        }
    }
};

// The block's output, with BatchNorm folded, in `out`.
void fold(const Layers& in, const Tensor& out, const Tensor& mean_, const Tensor& var_, const Tensor& weight_,
          const Tensor& bias_, double eps, int64_t head_dim) {
    const Tensor mean = dense(mean_), var = dense(var_), weight = dense(weight_), bias = dense(bias_);
    on_dtype(in.x, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const FoldedNorm<A> norm(in.x.size(1), data_of<A>(mean), data_of<A>(var), data_of<A>(weight), data_of<A>(bias),
                                 eps);
        LayerAttentionForward<T> args{};
        args.out = map_of<T>(out);
        args.scale = norm.scale.get();
        args.shift = norm.shift.get();
        in.attend(args, head_dim);
    });
}

}  // namespace

// o and its moments, the layer's own value map, the mean of that and its key; then q [B, C] and k [B, T, C].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_attention_forward(
    const Tensor& features, const Tensor& gates, const Tensor& query_weight, const Tensor& key_weights, const Tensor& x,
    const Tensor& value_weight, const std::vector<Tensor>& prior, int64_t head_dim) {
    const Layers in(features, gates, query_weight, key_weights, x, value_weight, prior);
    const Tensor o = new_like(in.x), mean = new_like(in.q), var = new_like(in.q);
    on_dtype(in.x, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        LayerAttentionForward<T> args{};
        args.o = map_of<T>(o);
        args.mean = mutable_data_of<A>(mean);
        args.var = mutable_data_of<A>(var);
        in.attend(args, head_dim);
    });
    return {o, mean, var, in.value, in.pooled, in.key, in.q, in.k};
}

// In inference: the block's output, the layer's own value map, the mean of that and its key.
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_attention_folded(const Tensor& features, const Tensor& gates,
                                                                  const Tensor& query_weight, const Tensor& key_weights,
                                                                  const Tensor& x, const Tensor& value_weight,
                                                                  const std::vector<Tensor>& prior, const Tensor& mean,
                                                                  const Tensor& var, const Tensor& weight,
                                                                  const Tensor& bias, double eps, int64_t head_dim) {
    const Layers in(features, gates, query_weight, key_weights, x, value_weight, prior);
    const Tensor out = new_like(in.x);
    fold(in, out, mean, var, weight, bias, eps, head_dim);
    return {out, in.value, in.pooled, in.key};
}

// The same with the block's output over x, which must be dense and in one of the layouts. Every pixel of x is read for
// the last time where its output is written, after the value map has been made from its neighbourhood.
std::tuple<Tensor, Tensor, Tensor> layer_attention_folded_(const Tensor& features, const Tensor& gates,
                                                           const Tensor& query_weight, const Tensor& key_weights,
                                                           const Tensor& x, const Tensor& value_weight,
                                                           const std::vector<Tensor>& prior, const Tensor& mean,
                                                           const Tensor& var, const Tensor& weight, const Tensor& bias,
                                                           double eps, int64_t head_dim) {
    const Layers in(features, gates, query_weight, key_weights, x, value_weight, prior);
    fold(in, in.x, mean, var, weight, bias, eps, head_dim);
    return {in.value, in.pooled, in.key};
}

// The backward of the whole block, out = x + keep * ReLU(BatchNorm(o)), from the gradients of out, of the value map
// where it is read elsewhere, of its mean and of the key: those of x, features, gates, query_weight, key_weights and
// value_weight, the first and the last over this layer and all later ones, an empty tensor where they are not needed;
// and that of o and the weights of the layers, which are an earlier layer's part of its value map's gradient.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_attention_backward(
    const Tensor& grad_out_, const std::optional<Tensor>& grad_read_, const std::optional<Tensor>& grad_pooled_,
    const std::optional<Tensor>& grad_key_, const Tensor& o_, const Tensor& mean_, const Tensor& var_,
    const Tensor& weight_, const Tensor& bias_, const std::optional<Tensor>& sum_weight_,
    const std::optional<Tensor>& sum_bias_, const std::optional<Tensor>& keep_, double eps, int64_t count,
    const Tensor& q_, const Tensor& k_, const Tensor& features_, const Tensor& gates_, const Tensor& query_weight_,
    const Tensor& key_weights_, const Tensor& x_, const Tensor& value_weight_, const std::vector<Tensor>& values_,
    const std::vector<Tensor>& later_grads_, const std::vector<Tensor>& later_weights_, int64_t head_dim, bool need_x,
    bool need_value) {
    const Tensor q = dense(q_), k = dense(k_), features = dense(features_), gates = dense(gates_), o = walkable(o_);
    const Tensor query_weight = dense(query_weight_), key_weights = dense(key_weights_);
    const Tensor mean = dense(mean_), var = dense(var_), weight = dense(weight_), bias = dense(bias_);
    const auto sum_weight = dense(sum_weight_), sum_bias = dense(sum_bias_), keep = dense(keep_);
    const bool channels_last = is_channels_last(o);
    const Tensor grad_out = in_layout(grad_out_, channels_last), x = in_layout(x_, channels_last);
    const auto grad_read = in_layout(grad_read_, channels_last);
    const auto grad_pooled = dense(grad_pooled_), grad_key = dense(grad_key_);
    const Tensor value_weight = dense(value_weight_);
    const auto values = in_layout(values_, channels_last), later_grads = in_layout(later_grads_, channels_last);
    const Shape s = shape_of(o);
    const int64_t layers = k.size(1), later = static_cast<int64_t>(later_grads.size());
    const Tensor grad_features = new_like(features), grad_gates = new_like(gates), weights = new_like(gates);
    const Tensor grad_query_weight = new_like(query_weight), grad_key_weights = new_like(key_weights);
    const Tensor grad_o = new_like(o), grad_x = map_or_empty(need_x, o);
    const Tensor grad_value = map_or_empty(need_value && channels_last, o);
    const Tensor grad_value_weight = need_value ? new_like(value_weight) : new_tensor(value_weight, {0});
    on_dtype(o, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const Weights<A> own(q, k, gates, head_dim);
        std::copy_n(own.gated, k.numel(), mutable_data_of<A>(weights));
        const Scratch<A> of_later(s.B * later * s.C);
        for (int64_t l = 0; l < later; ++l) {
            const Tensor dense_weights = dense(later_weights_[l]);
            const int64_t T_l = dense_weights.size(1);
            for (int64_t b = 0; b < s.B; ++b) {
                std::copy_n(data_of<A>(dense_weights) + (b * T_l + layers - 1) * s.C, s.C,
                            &of_later[(b * later + l) * s.C]);
            }
        }
        const NormGradient<A> norm(s.C, data_of<A>(mean), data_of<A>(var), data_of<A>(weight), data_of<A>(sum_weight),
                                   data_of<A>(sum_bias), eps, count);
        const Scratch<A> products(k.numel()), value_products(need_value ? kProducts * s.B * s.C : 0);
        const auto maps = maps_of<const T>(values), later_maps = maps_of<const T>(later_grads);
        const LayerAttentionBackward<T> args{s,
                                             layers,
                                             later,
                                             map_of<const T>(grad_out),
                                             map_of<const T>(o),
                                             data_of<A>(keep),
                                             norm.mean,
                                             norm.scale.get(),
                                             data_of<A>(bias),
                                             norm.slope.get(),
                                             norm.offset.get(),
                                             maps.data(),
                                             own.gated,
                                             later_maps.data(),
                                             of_later.get(),
                                             map_of<T>(grad_o),
                                             products.get(),
                                             need_value ? map_of<const T>(x) : Map<const T>{},
                                             data_of<A>(value_weight),
                                             map_if<const T>(grad_read),
                                             data_of<A>(grad_pooled),
                                             map_if<T>(grad_value),
                                             map_if<T>(grad_x),
                                             value_products.get()};
        if (channels_last) {
            DLA_ON_ISA(backward_rows<T>(args));
        } else {
            DLA_ON_ISA(backward_planes<T>(args));
        }
        const Scratch<A> grad_q(q.numel()), grad_k(k.numel());
        DLA_ON_ISA(attend_backward<A>(own, products.get(), grad_q.get(), grad_k.get(), mutable_data_of<A>(grad_gates)));
        const A* of_key = data_of<A>(grad_key);
        for (int64_t i = 0; of_key && i < s.B * s.C; ++i) {
            grad_k[(i / s.C * layers + layers - 1) * s.C + i % s.C] += of_key[i];
        }
        DLA_ON_ISA(project_backward<A>(filters_of<A>(features, gates, query_weight, key_weights), grad_q.get(),
                                       grad_k.get(), mutable_data_of<A>(grad_features), mutable_data_of<A>(grad_gates),
                                       mutable_data_of<A>(grad_query_weight), mutable_data_of<A>(grad_key_weights)));
        if (!need_value) return;
        const Scratch<A> ones(s.B * s.C, A(1)), unused(s.B * s.C);
        DLA_ON_ISA(filter_gradients<A>({ones.get(), data_of<A>(value_weight)}, s, value_products.get(),
                                       {unused.get(), mutable_data_of<A>(grad_value_weight)}));
    });
    return {grad_x, grad_features, grad_gates, grad_query_weight, grad_key_weights, grad_value_weight, grad_o, weights};
}

STABLE_TORCH_LIBRARY_FRAGMENT(dla_kernels, m) {
    m.def(
        "layer_attention_forward(Tensor features, Tensor gates, Tensor query_weight, Tensor key_weights, Tensor x, "
        "Tensor value_weight, Tensor[] prior, int head_dim) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "layer_attention_folded(Tensor features, Tensor gates, Tensor query_weight, Tensor key_weights, Tensor x, "
        "Tensor value_weight, Tensor[] prior, Tensor mean, Tensor var, Tensor weight, Tensor bias, float eps, "
        "int head_dim) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "layer_attention_folded_(Tensor features, Tensor gates, Tensor query_weight, Tensor key_weights, Tensor(a!) x, "
        "Tensor value_weight, Tensor[] prior, Tensor mean, Tensor var, Tensor weight, Tensor bias, float eps, "
        "int head_dim) -> (Tensor, Tensor, Tensor)");
    m.def(
        "layer_attention_backward(Tensor grad_out, Tensor? grad_read, Tensor? grad_pooled, Tensor? grad_key, Tensor o, "
        "Tensor mean, Tensor var, Tensor weight, Tensor bias, Tensor? sum_weight, Tensor? sum_bias, Tensor? keep, "
        "float eps, SymInt count, Tensor q, Tensor k, Tensor features, Tensor gates, Tensor query_weight, "
        "Tensor key_weights, Tensor x, Tensor value_weight, Tensor[] values, Tensor[] later_grads, "
        "Tensor[] later_weights, int head_dim, bool need_x, bool need_value) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dla_kernels, CPU, m) {
    m.impl("layer_attention_forward", TORCH_BOX(&layer_attention_forward));
    m.impl("layer_attention_folded", TORCH_BOX(&layer_attention_folded));
    m.impl("layer_attention_folded_", TORCH_BOX(&layer_attention_folded_));
    m.impl("layer_attention_backward", TORCH_BOX(&layer_attention_backward));
}

}  // namespace dla
