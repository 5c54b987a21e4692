// refresh_gates on the CPU: the library ops around the kernels.
#include <tuple>

#include "common/dsu_args.h"

namespace dla {

template <class A>
struct RefreshGates {
    Dsu<A> dsu;
    const A *features, *gates;  // [B, T, C]
    const A *h, *c;             // [B, C]
    bool of_context;            // whether the new context gates a layer, or the new hidden state
};

template <class A>
struct RefreshGatesForward : RefreshGates<A> {
    A* out;  // [B, T, C]
};

template <class A>
struct RefreshGatesBackward : RefreshGates<A> {
    const A* grad;  // [B, T, C]
    Dsu<A> grads;
    A *grad_features, *grad_gates;  // [B, T, C]
    A *grad_h, *grad_c;             // [B, C]
};

}  // namespace dla

#define DLA_KERNELS "refresh_gates/kernels.h"
#include "common/each_isa.h"

namespace dla {

Tensor refresh_gates_forward(const Tensor& features_, const Tensor& gates_, const Tensor& h_, const Tensor& c_,
                             const Tensor& weights_, bool joint, int64_t activation, bool of_context) {
    const Tensor features = dense(features_), gates = dense(gates_), h = dense(h_), c = dense(c_);
    const Tensor weights = dense(weights_);
    const Tensor out = new_like(gates);
    on_dtype(features, [&](auto* type) {
        using A = Acc<std::remove_pointer_t<decltype(type)>>;
        const auto dsu = dsu_of<A>(gates.size(0), gates.size(1), gates.size(2), weights, joint, activation);
        const RefreshGatesForward<A> args{
            {dsu, data_of<A>(features), data_of<A>(gates), data_of<A>(h), data_of<A>(c), of_context},
            mutable_data_of<A>(out)};
        DLA_ON_ISA(forward<A>(args));
    });
    return out;
}

// Gradients of features, gates, h and c, and of the weights.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> refresh_gates_backward(const Tensor& grad_, const Tensor& features_,
                                                                          const Tensor& gates_, const Tensor& h_,
                                                                          const Tensor& c_, const Tensor& weights_,
                                                                          bool joint, int64_t activation,
                                                                          bool of_context) {
    const Tensor grad = dense(grad_), features = dense(features_), gates = dense(gates_), h = dense(h_), c = dense(c_);
    const Tensor weights = dense(weights_), grad_weights = new_like(weights);
    const Tensor grad_features = new_like(features), grad_gates = new_like(gates);
    const Tensor grad_h = new_like(h), grad_c = new_like(c);
    on_dtype(features, [&](auto* type) {
        using A = Acc<std::remove_pointer_t<decltype(type)>>;
        const int64_t B = gates.size(0), T = gates.size(1), C = gates.size(2);
        const auto dsu = dsu_of<A>(B, T, C, weights, joint, activation);
        const RefreshGatesBackward<A> args{
            {dsu, data_of<A>(features), data_of<A>(gates), data_of<A>(h), data_of<A>(c), of_context},
            data_of<A>(grad),
            dsu_of<A>(B, T, C, grad_weights, joint, activation),
            mutable_data_of<A>(grad_features),
            mutable_data_of<A>(grad_gates),
            mutable_data_of<A>(grad_h),
            mutable_data_of<A>(grad_c)};
        DLA_ON_ISA(backward<A>(args));
    });
    return {grad_features, grad_gates, grad_h, grad_c, grad_weights};
}

STABLE_TORCH_LIBRARY_FRAGMENT(dla_kernels, m) {
    m.def(
        "refresh_gates_forward(Tensor features, Tensor gates, Tensor h, Tensor c, Tensor weights, bool joint, "
        "int activation, bool of_context) -> Tensor");
    m.def(
        "refresh_gates_backward(Tensor grad, Tensor features, Tensor gates, Tensor h, Tensor c, Tensor weights, "
        "bool joint, int activation, bool of_context) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dla_kernels, CPU, m) {
    m.impl("refresh_gates_forward", TORCH_BOX(&refresh_gates_forward));
    m.impl("refresh_gates_backward", TORCH_BOX(&refresh_gates_backward));
}

}  // namespace dla
