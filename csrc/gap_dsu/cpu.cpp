// gap_dsu on the CPU: the library ops around the kernels.
#include <tuple>

#include "common/dsu_args.h"
#include "common/runs.h"

namespace dla {

template <class A>
struct GapDsu {
    Dsu<A> dsu;
    const A *y, *h, *c;  // [B, C]
    const A* carried;    // [B, C] or null
    bool of_context;     // whether the context of the carry's step gates it, or its hidden state
};

template <class A>
struct GapDsuForward : GapDsu<A> {
    A *new_h, *new_c;  // [B, C]
    A* gate;           // [B, C] or null
};

template <class A>
struct GapDsuBackward : GapDsu<A> {
    const A *grad_of_y, *grad_new_h, *grad_new_c, *grad_gate;  // [B, C], each may be null
    Dsu<A> grads;
    A* grad_weights;  // all of grads, and their number
    int64_t size;
    A *grad_y, *grad_h, *grad_c, *grad_carried;  // [B, C]
};

}  // namespace dla

#define DLA_KERNELS "gap_dsu/kernels.h"
#include "common/each_isa.h"

namespace dla {

// x is a map, or its GAP [B, C], which then is not returned; the new hidden state and context; the carry's gate.
std::tuple<Tensor, Tensor, Tensor, Tensor> gap_dsu_forward(const Tensor& x_, const Tensor& h_, const Tensor& c_,
                                                           const std::optional<Tensor>& carried_,
                                                           const Tensor& weights_, bool joint, int64_t activation,
                                                           bool of_context) {
    const Tensor h = dense(h_), c = dense(c_), weights = dense(weights_);
    const auto carried = dense(carried_);
    const bool pooled = x_.dim() == 2;
    const Tensor x = pooled ? dense(x_) : walkable(x_);
    const Tensor y = pooled ? new_tensor(h, {0}) : new_like(h);
    const Tensor new_h = new_like(h), new_c = new_like(c);
    const Tensor gate = carried ? new_like(h) : new_tensor(h, {0});
    on_dtype(x, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        if (!pooled) {
            const Shape s = shape_of(x);
            const auto map = map_of<const T>(x);
            if (is_channels_last(x)) {
                DLA_ON_ISA(pool_rows<T>(s, map, mutable_data_of<A>(y)));
            } else {
                DLA_ON_ISA(pool_planes<T>(s, map, mutable_data_of<A>(y)));
            }
        }
        const GapDsuForward<A> args{
            {dsu_of<A>(h.size(0), 1, h.size(1), weights, joint, activation), data_of<A>(pooled ? x : y), data_of<A>(h),
             data_of<A>(c), data_of<A>(carried), of_context},
            mutable_data_of<A>(new_h),
            mutable_data_of<A>(new_c),
            carried ? mutable_data_of<A>(gate) : nullptr};
        DLA_ON_ISA(forward<A>(args));
    });
    return {y, new_h, new_c, gate};
}

// Gradients of the GAP, of h, c and carried, and of the weights. That of a map is its GAP's, divided by H W, at every
// pixel.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gap_dsu_backward(
    const std::optional<Tensor>& grad_y_, const std::optional<Tensor>& grad_h_, const std::optional<Tensor>& grad_c_,
    const std::optional<Tensor>& grad_gate_, const Tensor& y_, const Tensor& h_, const Tensor& c_,
    const std::optional<Tensor>& carried_, const Tensor& weights_, bool joint, int64_t activation, bool of_context) {
    const auto grad_of_y = dense(grad_y_), grad_new_h = dense(grad_h_), grad_new_c = dense(grad_c_);
    const auto grad_gate = dense(grad_gate_), carried = dense(carried_);
    const Tensor y = dense(y_), h = dense(h_), c = dense(c_), weights = dense(weights_);
    const Tensor grad_y = new_like(y), grad_h = new_like(h);
    const Tensor grad_c = new_like(c), grad_weights = new_like(weights);
    const Tensor grad_carried = carried ? new_like(h) : new_tensor(h, {0});
    on_dtype(y, [&](auto* type) {
        using A = Acc<std::remove_pointer_t<decltype(type)>>;
        const int64_t B = y.size(0), C = y.size(1);
        const GapDsuBackward<A> args{{dsu_of<A>(B, 1, C, weights, joint, activation), data_of<A>(y), data_of<A>(h),
                                      data_of<A>(c), data_of<A>(carried), of_context},
                                     data_of<A>(grad_of_y),
                                     data_of<A>(grad_new_h),
                                     data_of<A>(grad_new_c),
                                     data_of<A>(grad_gate),
                                     dsu_of<A>(B, 1, C, grad_weights, joint, activation),
                                     mutable_data_of<A>(grad_weights),
                                     grad_weights.numel(),
                                     mutable_data_of<A>(grad_y),
                                     mutable_data_of<A>(grad_h),
                                     mutable_data_of<A>(grad_c),
                                     carried ? mutable_data_of<A>(grad_carried) : nullptr};
        DLA_ON_ISA(backward<A>(args));
    });
    return {grad_y, grad_h, grad_c, grad_carried, grad_weights};
}

STABLE_TORCH_LIBRARY_FRAGMENT(dla_kernels, m) {
    m.def(
        "gap_dsu_forward(Tensor x, Tensor h, Tensor c, Tensor? carried, Tensor weights, bool joint, int activation, "
        "bool of_context) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "gap_dsu_backward(Tensor? grad_y, Tensor? grad_h, Tensor? grad_c, Tensor? grad_gate, Tensor y, Tensor h, "
        "Tensor c, Tensor? carried, Tensor weights, bool joint, int activation, bool of_context) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dla_kernels, CPU, m) {
    m.impl("gap_dsu_forward", TORCH_BOX(&gap_dsu_forward));
    m.impl("gap_dsu_backward", TORCH_BOX(&gap_dsu_backward));
}

}  // namespace dla
