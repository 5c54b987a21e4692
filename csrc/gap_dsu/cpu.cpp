// gap_dsu on the CPU: the library ops around the kernels.
#include <tuple>

#include "common/dsu_args.h"
#include "common/runs.h"

namespace dla {

template <class A>
struct GapDsuForward {
    Dsu<A> dsu;
    const A *y, *h, *c;  // [B, C]
    A *new_h, *new_c;    // [B, C]
};

template <class A>
struct GapDsuBackward {
    Dsu<A> dsu;
    const A *grad_of_y, *grad_new_h, *grad_new_c;  // [B, C], each may be null
    const A *y, *h, *c;                            // [B, C]
    Dsu<A> grads;
    A *grad_y, *grad_h, *grad_c;  // [B, C]
};

}  // namespace dla

#define DLA_KERNELS "gap_dsu/kernels.h"
#include "common/each_isa.h"

namespace dla {

// x is a map, or its GAP [B, C]; returns the GAP, the new hidden state and the new context.
std::tuple<Tensor, Tensor, Tensor> gap_dsu_forward(const Tensor& x_, const Tensor& h_, const Tensor& c_,
                                                   const std::vector<Tensor>& weights_, int64_t activation) {
    const Tensor h = dense(h_), c = dense(c_);
    const auto weights = all_dense(weights_);
    const Tensor new_h = torch::stable::empty_like(h), new_c = torch::stable::empty_like(c);
    const bool pooled = x_.dim() == 2;
    const Tensor y = pooled ? torch::stable::clone(dense(x_)) : torch::stable::empty_like(h);
    const Tensor x = pooled ? y : walkable(x_);
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
        const GapDsuForward<A> args{dsu_of<A>(h.size(0), 1, h.size(1), weights, activation),
                                    data_of<A>(y),
                                    data_of<A>(h),
                                    data_of<A>(c),
                                    mutable_data_of<A>(new_h),
                                    mutable_data_of<A>(new_c)};
        DLA_ON_ISA(forward<A>(args));
    });
    return {y, new_h, new_c};
}

// Gradients of the GAP, of h and c, and of the weights. That of a map is its GAP's, divided by H W, at every pixel.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> gap_dsu_backward(
    const std::optional<Tensor>& grad_y_, const std::optional<Tensor>& grad_h_, const std::optional<Tensor>& grad_c_,
    const Tensor& y_, const Tensor& h_, const Tensor& c_, const std::vector<Tensor>& weights_, int64_t activation) {
    const auto grad_of_y = dense(grad_y_), grad_new_h = dense(grad_h_), grad_new_c = dense(grad_c_);
    const Tensor y = dense(y_), h = dense(h_), c = dense(c_);
    const auto weights = all_dense(weights_);
    const auto grad_weights = all_empty_like(weights);
    const Tensor grad_y = torch::stable::empty_like(y), grad_h = torch::stable::empty_like(h);
    const Tensor grad_c = torch::stable::empty_like(c);
    on_dtype(y, [&](auto* type) {
        using A = Acc<std::remove_pointer_t<decltype(type)>>;
        const int64_t B = y.size(0), C = y.size(1);
        const GapDsuBackward<A> args{dsu_of<A>(B, 1, C, weights, activation),
                                     data_of<A>(grad_of_y),
                                     data_of<A>(grad_new_h),
                                     data_of<A>(grad_new_c),
                                     data_of<A>(y),
                                     data_of<A>(h),
                                     data_of<A>(c),
                                     dsu_of<A>(B, 1, C, grad_weights, activation),
                                     mutable_data_of<A>(grad_y),
                                     mutable_data_of<A>(grad_h),
                                     mutable_data_of<A>(grad_c)};
        DLA_ON_ISA(backward<A>(args));
    });
    return {grad_y, grad_h, grad_c, grad_weights};
}

STABLE_TORCH_LIBRARY_FRAGMENT(dla_kernels, m) {
    m.def(
        "gap_dsu_forward(Tensor x, Tensor h, Tensor c, Tensor[] weights, int activation) -> (Tensor, Tensor, Tensor)");
    m.def(
        "gap_dsu_backward(Tensor? grad_y, Tensor? grad_h, Tensor? grad_c, Tensor y, Tensor h, Tensor c, "
        "Tensor[] weights, int activation) -> (Tensor, Tensor, Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(dla_kernels, CPU, m) {
    m.impl("gap_dsu_forward", TORCH_BOX(&gap_dsu_forward));
    m.impl("gap_dsu_backward", TORCH_BOX(&gap_dsu_backward));
}

}  // namespace dla
