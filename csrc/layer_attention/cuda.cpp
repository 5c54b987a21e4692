// layer_attention on CUDA: the library ops around the kernels.
#include "layer_attention/cuda.h"

#include <algorithm>
#include <tuple>

#include "light_update/value_map.h"

namespace dla {
namespace {

using layer_attention::kMaps;

template <class T>
bool all_in_vectors(const Shape& s, bool channels_last, const std::vector<Tensor>& maps) {
    return std::all_of(maps.begin(), maps.end(), [&](const Tensor& map) {
        return map.numel() == 0 || layer_attention::in_vectors(s, channels_last, map_of<const T>(map));
    });
}

// Room for a map's sums between launches, in the accumulators' type and the maps' layout.
Tensor new_sums(const Tensor& like, const Tensor& state, bool needed) {
    return new_tensor(state, {needed ? like.numel() : 0});
}

template <class A>
Map<A> sums_map(const Tensor& sums, const Shape& s, bool channels_last) {
    A* data = mutable_data_of<A>(sums);
    return {data, s.C * s.HW(), channels_last ? 1 : s.HW(), channels_last ? s.C : 1};
}

// Copies up to kMaps maps from `first` on; returns how many.
template <class T>
int fill(Map<const T> (&to)[kMaps], const std::vector<Tensor>& from, size_t first) {
    int count = 0;
    for (; count < kMaps && first + count < from.size(); ++count) to[count] = map_of<const T>(from[first + count]);
    return count;
}

// What o's forward and its folded form share.
struct Values {
    Tensor q, k, gates, first;
    bool channels_last;
    std::vector<Tensor> maps;
    Shape shape;

    Values(const Tensor& q_, const Tensor& k_, const std::vector<Tensor>& values, const Tensor& gates_,
           const Tensor& like)
        : q(dense(q_)),
          k(dense(k_)),
          gates(dense(gates_)),
          first(walkable(like)),
          channels_last(is_channels_last(first)),
          maps(in_layout(values, channels_last)),
          shape(shape_of(first)) {}

    template <class A>
    layer_attention::Attention<A> attention(int64_t head_dim) const {
        return {data_of<A>(q), data_of<A>(k), data_of<A>(gates), static_cast<int64_t>(maps.size()), head_dim};
    }

    // One launch for every kMaps layers; `args` holds all else. `out` and what folding reads decide on vectors too.
    template <class T>
    void attend(layer_attention::Forward<T>& args, int64_t head_dim, const std::vector<Tensor>& others,
                cudaStream_t stream) const {
        using A = Acc<T>;
        const bool vectors =
            all_in_vectors<T>(shape, channels_last, maps) && all_in_vectors<T>(shape, channels_last, others);
        const auto plan = layer_attention::plan<T>(shape, channels_last, vectors, layer_attention::kForwardBytes);
        const Tensor parts = new_tensor(q, {args.x ? 0 : 3 * shape.B * shape.C * plan.runs});
        const Tensor sums = new_sums(first, q, maps.size() > kMaps);
        const auto between = sums_map<A>(sums, shape, channels_last);
        args.shape = shape;
        args.attention = attention<A>(head_dim);
        args.parts = mutable_data_of<A>(parts);
        for (size_t m = 0; m < maps.size(); m += kMaps) {
            args.range = {static_cast<int64_t>(m), fill(args.values, maps, m)};
            args.before = m > 0 ? between : Map<A>{};
            args.after = m + kMaps < maps.size() ? between : Map<A>{};
            layer_attention::launch(args, plan, channels_last, stream);
        }
    }
};

template <class A>
layer_attention::Filters<A> filters_of(const Tensor& features, const Tensor& gates, const Tensor& query_weight,
                                       const Tensor& key_weights) {
    return {features.size(0),     features.size(1),         features.size(2),
            query_weight.numel(), key_weights.size(0),      data_of<A>(features),
            data_of<A>(gates),    data_of<A>(query_weight), data_of<A>(key_weights)};
}

// q [B, C], k [B, T, C] and the last layer's key.
struct Projected {
    Tensor q, k, key;

    Projected(const Tensor& features_, const Tensor& gates_, const Tensor& query_weight_, const Tensor& key_weights_,
              const Tensor& x, cudaStream_t stream)
        : q(new_tensor(features_, {features_.size(0), features_.size(2)})),
          k(new_tensor(features_, features_.sizes())),
          key(new_tensor(q, q.sizes())) {
        const Tensor features = dense(features_), gates = dense(gates_);
        const Tensor query_weight = dense(query_weight_), key_weights = dense(key_weights_);
        on_cuda_dtype(x, [&](auto* type) {
            using A = Acc<std::remove_pointer_t<decltype(type)>>;
            layer_attention::launch(filters_of<A>(features, gates, query_weight, key_weights), mutable_data_of<A>(q),
                                    mutable_data_of<A>(k), mutable_data_of<A>(key), stream);
        });
    }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cuda_layer_attention_forward(
    const Tensor& features, const Tensor& gates, const Tensor& query_weight, const Tensor& key_weights, const Tensor& x,
    const Tensor& value_weight, std::vector<Tensor> values, int64_t head_dim) {
    const OnDevice on(x);
    const Projected made(features, gates, query_weight, key_weights, x, on.stream());
    const auto [value, pooled] = cuda_value_map(x, value_weight);
    values.push_back(value);
    const Values in(made.q, made.k, values, gates, value);
    const Shape& s = in.shape;
    const Tensor o = new_like(in.first);
    const Tensor mean = new_tensor(in.q, {s.B, s.C}), var = new_tensor(in.q, {s.B, s.C});
    on_cuda_dtype(o, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        layer_attention::Forward<T> args = {};
        args.out = map_of<T>(o);
        args.mean = mutable_data_of<A>(mean);
        args.var = mutable_data_of<A>(var);
        in.attend(args, head_dim, {o}, on.stream());
    });
    return {o, mean, var, value, pooled, made.key, made.q, made.k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_layer_attention_folded(
    const Tensor& features, const Tensor& gates, const Tensor& query_weight, const Tensor& key_weights,
    const Tensor& x_, const Tensor& value_weight, std::vector<Tensor> values, const Tensor& mean_, const Tensor& var_,
    const Tensor& weight_, const Tensor& bias_, double eps, int64_t head_dim) {
    const OnDevice on(x_);
    const Projected made(features, gates, query_weight, key_weights, x_, on.stream());
    const auto [value, pooled] = cuda_value_map(x_, value_weight);
    values.push_back(value);
    const Values in(made.q, made.k, values, gates, x_);
    const Tensor mean = dense(mean_), var = dense(var_), weight = dense(weight_), bias = dense(bias_);
    const Tensor out = new_like(in.first);
    on_cuda_dtype(out, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        layer_attention::Forward<T> args = {};
        args.x = map_of<const T>(in.first);
        args.norm = {data_of<A>(mean), data_of<A>(var), data_of<A>(weight), data_of<A>(bias), static_cast<A>(eps)};
        args.out = map_of<T>(out);
        in.attend(args, head_dim, {out, in.first}, on.stream());
    });
    return {out, value, pooled, made.key};
}

// Gradients of x, features, gates, query_weight, key_weights and value_weight, the first and the last through the value
// map of this layer and the later ones that `later_grads` and `later_weights` tell of, empty where they are not needed;
// o's gradient and the weights [B, T, C].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cuda_layer_attention_backward(
    const Tensor& grad_out_, const std::optional<Tensor>& grad_read, const std::optional<Tensor>& grad_pooled,
    const std::optional<Tensor>& grad_key_, const Tensor& o, const Tensor& mean_, const Tensor& var_,
    const Tensor& weight_, const Tensor& bias_, const std::optional<Tensor>& sum_weight_,
    const std::optional<Tensor>& sum_bias_, const std::optional<Tensor>& keep_, double eps, int64_t count,
    const Tensor& q, const Tensor& k, const Tensor& features_, const Tensor& gates, const Tensor& query_weight_,
    const Tensor& key_weights_, const Tensor& x, const Tensor& value_weight, const std::vector<Tensor>& values,
    const std::vector<Tensor>& later_grads, const std::vector<Tensor>& later_weights_, int64_t head_dim, bool need_x,
    bool need_value) {
    const OnDevice on(o);
    const Values in(q, k, values, gates, o);
    const Shape& s = in.shape;
    const bool channels_last = in.channels_last;
    const Tensor grad_out = in_layout(grad_out_, channels_last);
    const auto later = need_value ? in_layout(later_grads, channels_last) : std::vector<Tensor>{};
    std::vector<Tensor> later_weights;
    for (const Tensor& weights : later_weights_) later_weights.push_back(dense(weights));
    const Tensor mean = dense(mean_), var = dense(var_), weight = dense(weight_), bias = dense(bias_);
    const auto sum_weight = dense(sum_weight_), sum_bias = dense(sum_bias_), keep = dense(keep_);
    const Tensor features = dense(features_), query_weight = dense(query_weight_), key_weights = dense(key_weights_);
    const auto grad_key = dense(grad_key_);
    const Tensor grad_q = new_like(in.q), grad_k = new_like(in.k);
    const Tensor grad_features = new_like(features), grad_gates = new_like(in.gates), weights = new_like(in.gates);
    const Tensor grad_query_weight = new_like(query_weight), grad_key_weights = new_like(key_weights);
    const Tensor grad_o = new_like(in.first), grad_value = map_or_empty(need_value, in.first);
    on_cuda_dtype(grad_o, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const bool vectors = all_in_vectors<T>(s, channels_last, in.maps) &&
                             all_in_vectors<T>(s, channels_last, later) &&
                             all_in_vectors<T>(s, channels_last, {in.first, grad_out, grad_o, grad_value});
        const auto plan = layer_attention::plan<T>(s, channels_last, vectors, layer_attention::kBackwardBytes);
        const size_t layers = in.maps.size(), most = std::max(layers, later.size());
        const Tensor parts = new_tensor(in.q, {s.B * s.C * plan.runs * static_cast<int64_t>(layers)});
        const Tensor sums = new_sums(in.first, in.q, need_value && most > kMaps);
        const auto between = sums_map<A>(sums, s, channels_last);
        layer_attention::Backward<T> args = {};
        args.shape = s;
        args.attention = in.attention<A>(head_dim);
        args.grad_out = map_of<const T>(grad_out);
        args.o = map_of<const T>(in.first);
        args.norm = {data_of<A>(mean), data_of<A>(var), data_of<A>(weight), data_of<A>(bias), static_cast<A>(eps)};
        args.sum_weight = data_of<A>(sum_weight);
        args.sum_bias = data_of<A>(sum_bias);
        args.keep = data_of<A>(keep);
        args.count = static_cast<A>(count);
        args.parts = mutable_data_of<A>(parts);
        args.grad_key = data_of<A>(grad_key);
        args.grad_q = mutable_data_of<A>(grad_q);
        args.grad_k = mutable_data_of<A>(grad_k);
        args.grad_gates = mutable_data_of<A>(grad_gates);
        args.weights = mutable_data_of<A>(weights);
        for (size_t m = 0; m < most; m += kMaps) {
            const bool ends = m + kMaps >= most;
            args.range = {static_cast<int64_t>(m), fill(args.values, in.maps, m)};
            args.later_count = fill(args.later, later, m);
            for (int j = 0; j < args.later_count; ++j) {
                const Tensor& of = later_weights[m + j];
                args.later_weights[j] = data_of<A>(of) + (layers - 1) * s.C;
                args.later_batch[j] = of.size(1) * s.C;
            }
            args.before = need_value && m > 0 ? between : Map<A>{};
            args.after = need_value && !ends ? between : Map<A>{};
            args.grad_o = m == 0 ? map_of<T>(grad_o) : Map<T>{};
            args.grad_value = need_value && ends ? map_of<T>(grad_value) : Map<T>{};
            layer_attention::launch(args, plan, channels_last, on.stream());
        }
        layer_attention::finish(args, plan, on.stream());
        const layer_attention::FilterGradients<A> grads{data_of<A>(grad_q),
                                                        data_of<A>(grad_k),
                                                        mutable_data_of<A>(grad_features),
                                                        mutable_data_of<A>(grad_gates),
                                                        mutable_data_of<A>(grad_query_weight),
                                                        mutable_data_of<A>(grad_key_weights)};
        layer_attention::launch(filters_of<A>(features, in.gates, query_weight, key_weights), grads, on.stream());
    });
    Tensor grad_x = grad_value, grad_value_weight = new_tensor(value_weight, {0});
    if (need_value) {
        std::tie(grad_x, grad_value_weight) =
            cuda_value_map_backward(grad_out, grad_value, grad_read, grad_pooled, x, value_weight, need_x);
    }
    return {grad_x, grad_features, grad_gates, grad_query_weight, grad_key_weights, grad_value_weight, grad_o, weights};
}

DLA_CUDA_OPS(m) {
    m.impl("layer_attention_forward", TORCH_BOX(&cuda_layer_attention_forward));
    m.impl("layer_attention_folded", TORCH_BOX(&cuda_layer_attention_folded));
    m.impl("layer_attention_backward", TORCH_BOX(&cuda_layer_attention_backward));
}

}  // namespace dla
