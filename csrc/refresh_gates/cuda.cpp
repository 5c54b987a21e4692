// refresh_gates on the GPU: the library ops around the kernels.
#include "refresh_gates/cuda.h"

#include <tuple>

#include "common/cuda/dsu_host.h"

namespace dla {
namespace {

struct Arguments {
    Tensor features, gates, h, c, weights;

    Arguments(const Tensor& features, const Tensor& gates, const Tensor& h, const Tensor& c, const Tensor& weights)
        : features(dense(features)), gates(dense(gates)), h(dense(h)), c(dense(c)), weights(dense(weights)) {}

    template <class A>
    RefreshGates<A> args(bool joint, int64_t activation, bool of_context) const {
        return {dsu_of<A>(weights, gates.size(2), joint, activation),
                gates.size(0),
                gates.size(1),
                data_of<A>(features),
                data_of<A>(gates),
                data_of<A>(h),
                data_of<A>(c),
                of_context};
    }
};

}  // namespace

Tensor cuda_refresh_gates_forward(const Tensor& features, const Tensor& gates, const Tensor& h, const Tensor& c,
                                  const Tensor& weights, bool joint, int64_t activation, bool of_context) {
    const OnDevice on(gates);
    const Arguments a(features, gates, h, c, weights);
    const Tensor out = new_like(a.gates);
    if (out.numel() == 0) return out;
    on_state_dtype(a.gates, [&](auto* type) {
        using A = std::remove_pointer_t<decltype(type)>;
        const auto args = a.args<A>(joint, activation, of_context);
        const Tensor product = new_like(a.gates);
        const Tensor hidden = new_tensor(a.gates, {args.M(), args.dsu.hidden()});
        refresh_gates_forward<A>(
            {args, mutable_data_of<A>(out), mutable_data_of<A>(product), mutable_data_of<A>(hidden)}, on.stream());
    });
    return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cuda_refresh_gates_backward(
    const Tensor& grad_, const Tensor& features, const Tensor& gates, const Tensor& h, const Tensor& c,
    const Tensor& weights, bool joint, int64_t activation, bool of_context) {
    const OnDevice on(gates);
    const Arguments a(features, gates, h, c, weights);
    const Tensor grad = dense(grad_);
    const Tensor grad_features = new_like(a.features);
    const Tensor grad_gates = new_like(a.gates);
    const Tensor grad_h = new_like(a.h), grad_c = new_like(a.c);
    const Tensor grad_weights = new_like(a.weights);
    on_state_dtype(a.gates, [&](auto* type) {
        using A = std::remove_pointer_t<decltype(type)>;
        RefreshGatesBackward<A> args{a.args<A>(joint, activation, of_context),
                                     data_of<A>(grad),
                                     mutable_data_of<A>(grad_features),
                                     mutable_data_of<A>(grad_gates),
                                     mutable_data_of<A>(grad_h),
                                     mutable_data_of<A>(grad_c),
                                     mutable_data_of<A>(grad_weights),
                                     nullptr};
        const Tensor scratch = new_tensor(a.gates, {refresh_gates_scratch(args)});
        args.scratch = mutable_data_of<A>(scratch);
        refresh_gates_backward<A>(args, on.stream());
    });
    return {grad_features, grad_gates, grad_h, grad_c, grad_weights};
}

DLA_CUDA_OPS(m) {
    m.impl("refresh_gates_forward", TORCH_BOX(&cuda_refresh_gates_forward));
    m.impl("refresh_gates_backward", TORCH_BOX(&cuda_refresh_gates_backward));
}

}  // namespace dla
