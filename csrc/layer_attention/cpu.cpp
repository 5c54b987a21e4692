// layer_attention on the CPU: the library ops around the kernels.
#include <cmath>
#include <limits>
#include <tuple>

#include "common/runs.h"
#include "common/tensor.h"

namespace dla {

template <class T>
struct LayerAttentionForward {
    Shape shape;
    int64_t layers;
    const Map<const T>* values;  // [layers]
    const Acc<T>* weights;       // [B, layers, C], attention times gate
    Map<T> out;
    Acc<T>*mean, *var;  // [B, C]
};

template <class T>
struct LayerAttentionBackward {
    Shape shape;
    int64_t layers;
    Map<const T> grad_o, o;                    // o is null where its variance has no gradient
    const Acc<T>*grad_mean, *grad_var, *mean;  // [B, C]; the first two may be null
    const Map<const T>* values;                // [layers]
    const Acc<T>* weights;                     // [B, layers, C], attention times gate
    const Map<T>* grad_values;                 // [layers] or null
    Acc<T>* products;                          // [B, layers, C], sum over H, W of o's gradient times the values
};

}  // namespace dla

#define DLA_KERNELS "layer_attention/kernels.h"
#include "common/each_isa.h"

namespace dla {
namespace {

// Attention over the layers, the same for all channels of a head: [B, layers, C].
template <class A>
Scratch<A> attention_of(int64_t B, int64_t layers, int64_t C, const A* q, const A* k, int64_t head_dim) {
    Scratch<A> attention(B * layers * C);
    const Scratch<A> scores(layers);
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t c = 0; c < C; c += head_dim) {
            A highest = -std::numeric_limits<A>::infinity(), total = 0;
            for (int64_t m = 0; m < layers; ++m) {
                scores[m] = 0;
                const A* key = k + (b * layers + m) * C;
                for (int64_t j = c; j < c + head_dim; ++j) scores[m] += q[b * C + j] * key[j];
                scores[m] /= std::sqrt(A(head_dim));
                highest = std::max(highest, scores[m]);
            }
            for (int64_t m = 0; m < layers; ++m) total += scores[m] = std::exp(scores[m] - highest);
            for (int64_t m = 0; m < layers; ++m) {
                std::fill_n(&attention[(b * layers + m) * C + c], head_dim, scores[m] / total);
            }
        }
    }
    return attention;
}

template <class A>
Scratch<A> gated(const Scratch<A>& attention, const A* gates, int64_t size) {
    Scratch<A> weights(size);
    for (int64_t i = 0; i < size; ++i) weights[i] = attention[i] * gates[i];
    return weights;
}

// The gradients of q, k and gates, from those of the weights (`products`).
template <class A>
void vector_gradients(int64_t B, int64_t layers, int64_t C, int64_t head_dim, const Scratch<A>& attention,
                      const A* products, const A* q, const A* k, const A* gates, A* grad_q, A* grad_k, A* grad_gates) {
    const Scratch<A> grads(layers);
    std::fill_n(grad_q, B * C, A(0));
    for (int64_t i = 0; i < B * layers * C; ++i) grad_gates[i] = attention[i] * products[i];
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t c = 0; c < C; c += head_dim) {
            A mean = 0;
            for (int64_t m = 0; m < layers; ++m) {
                const int64_t at = (b * layers + m) * C + c;
                grads[m] = 0;
                for (int64_t j = at; j < at + head_dim; ++j) grads[m] += gates[j] * products[j];
                mean += attention[at] * grads[m];
            }
            for (int64_t m = 0; m < layers; ++m) {
                const int64_t at = (b * layers + m) * C + c;
                const A grad = attention[at] * (grads[m] - mean) / std::sqrt(A(head_dim));
                for (int64_t j = 0; j < head_dim; ++j) {
                    grad_q[b * C + c + j] += grad * k[at + j];
                    grad_k[at + j] = grad * q[b * C + c + j];
                }
            }
        }
    }
}

std::vector<Tensor> all_in_layout(const std::vector<Tensor>& maps, bool channels_last) {
    std::vector<Tensor> done;
    for (const Tensor& map : maps) done.push_back(in_layout(map, channels_last));
    return done;
}

template <class T>
std::vector<Map<T>> maps_of(const std::vector<Tensor>& tensors) {
    std::vector<Map<T>> maps;
    for (const Tensor& tensor : tensors) maps.push_back(map_of<T>(tensor));
    return maps;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layer_attention_forward(const Tensor& q_, const Tensor& k_,
                                                           const std::vector<Tensor>& values_, const Tensor& gates_,
                                                           int64_t head_dim) {
    const Tensor q = dense(q_), k = dense(k_), gates = dense(gates_), first = walkable(values_[0]);
    const bool channels_last = is_channels_last(first);
    const auto values = all_in_layout(values_, channels_last);
    const Shape s = shape_of(first);
    const int64_t layers = static_cast<int64_t>(values.size());
    const Tensor out = torch::stable::empty_like(first);
    const Tensor mean = new_tensor(q, {s.B, s.C}), var = new_tensor(q, {s.B, s.C});
    on_dtype(first, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const auto attention = attention_of(s.B, layers, s.C, data_of<A>(q), data_of<A>(k), head_dim);
        const auto weights = gated(attention, data_of<A>(gates), s.B * layers * s.C);
        const auto maps = maps_of<const T>(values);
        const LayerAttentionForward<T> args{
            s, layers, maps.data(), weights.get(), map_of<T>(out), mutable_data_of<A>(mean), mutable_data_of<A>(var),
        };
        if (channels_last) {
            DLA_ON_ISA(forward_rows<T>(args));
        } else {
            DLA_ON_ISA(forward_planes<T>(args));
        }
    });
    return {out, mean, var};
}

// Gradients of q, k and gates, then of the values: none where they need none.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> layer_attention_backward(
    const Tensor& grad_o_, const std::optional<Tensor>& grad_mean_, const std::optional<Tensor>& grad_var_,
    const Tensor& o_, const Tensor& mean_, const Tensor& q_, const Tensor& k_, const std::vector<Tensor>& values_,
    const Tensor& gates_, int64_t head_dim, bool need_values) {
    const Tensor q = dense(q_), k = dense(k_), gates = dense(gates_), mean = dense(mean_), o = walkable(o_);
    const bool channels_last = is_channels_last(o);
    const Tensor grad_o = in_layout(grad_o_, channels_last);
    const auto values = all_in_layout(values_, channels_last);
    const auto grad_mean = dense(grad_mean_), grad_var = dense(grad_var_);
    const Shape s = shape_of(grad_o);
    const int64_t layers = static_cast<int64_t>(values.size());
    const Tensor grad_q = torch::stable::empty_like(q), grad_k = torch::stable::empty_like(k);
    const Tensor grad_gates = torch::stable::empty_like(gates);
    std::vector<Tensor> grad_values;
    for (int64_t m = 0; need_values && m < layers; ++m) grad_values.push_back(torch::stable::empty_like(o));
    on_dtype(grad_o, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const A *q_data = data_of<A>(q), *k_data = data_of<A>(k), *gates_data = data_of<A>(gates);
        const auto attention = attention_of(s.B, layers, s.C, q_data, k_data, head_dim);
        const auto weights = gated(attention, gates_data, s.B * layers * s.C);
        const Scratch<A> products(s.B * layers * s.C);
        const auto maps = maps_of<const T>(values);
        const auto grad_maps = maps_of<T>(grad_values);
        const LayerAttentionBackward<T> args{s,
                                             layers,
                                             map_of<const T>(grad_o),
                                             grad_var ? map_of<const T>(o) : Map<const T>{},
                                             data_of<A>(grad_mean),
                                             data_of<A>(grad_var),
                                             data_of<A>(mean),
                                             maps.data(),
                                             weights.get(),
                                             need_values ? grad_maps.data() : nullptr,
                                             products.get()};
        if (channels_last) {
            DLA_ON_ISA(backward_rows<T>(args));
        } else {
            DLA_ON_ISA(backward_planes<T>(args));
        }
        vector_gradients(s.B, layers, s.C, head_dim, attention, products.get(), q_data, k_data, gates_data,
                         mutable_data_of<A>(grad_q), mutable_data_of<A>(grad_k), mutable_data_of<A>(grad_gates));
    });
    return {grad_q, grad_k, grad_gates, grad_values};
}

STABLE_TORCH_LIBRARY_FRAGMENT(dla_kernels, m) {
    m.def(
        "layer_attention_forward(Tensor q, Tensor k, Tensor[] values, Tensor gates, int head_dim) -> "
        "(Tensor, Tensor, Tensor)");
    m.def(
        "layer_attention_backward(Tensor grad_o, Tensor? grad_mean, Tensor? grad_var, Tensor o, Tensor mean, "
        "Tensor q, Tensor k, Tensor[] values, Tensor gates, int head_dim, bool need_values) -> "
        "(Tensor, Tensor, Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(dla_kernels, CPU, m) {
    m.impl("layer_attention_forward", TORCH_BOX(&layer_attention_forward));
    m.impl("layer_attention_backward", TORCH_BOX(&layer_attention_backward));
}

}  // namespace dla
