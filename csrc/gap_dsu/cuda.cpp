// gap_dsu on the GPU: the library ops around the kernels.
#include "gap_dsu/cuda.h"

#include <tuple>

#include "common/cuda/dsu_host.h"

namespace dla {
namespace {

Pool pool_of(const Tensor& x) {
    Pool pool = {};
    on_cuda_dtype(x, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto map = map_of<const T>(x);
        constexpr auto kType = std::is_same_v<T, float>    ? MapType::float32
                               : std::is_same_v<T, double> ? MapType::float64
                               : std::is_same_v<T, __half> ? MapType::float16
                                                           : MapType::bfloat16;
        pool = {shape_of(x), kType, map.data, map.batch, map.channel, map.pixel, is_channels_last(x), false};
    });
    return pool;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_gap_dsu_forward(const Tensor& x_, const Tensor& h_, const Tensor& c_,
                                                                const std::optional<Tensor>& carried_,
                                                                const Tensor& weights_, bool joint, int64_t activation,
                                                                bool of_context) {
    const OnDevice on(x_);
    const Tensor h = dense(h_), c = dense(c_), weights = dense(weights_);
    const auto carried = dense(carried_);
    const bool pooled = x_.dim() == 2;
    const Tensor x = pooled ? dense(x_) : walkable(x_);
    const int64_t B = h.size(0), C = h.size(1);
    const Tensor y = pooled ? new_tensor(h, {0}) : new_like(h);
    const Tensor new_h = new_like(h), new_c = new_like(c);
    const Tensor gate = carried ? new_like(h) : new_tensor(h, {0});
    if (B == 0) return {y, new_h, new_c, gate};
    const Pool pool = pooled ? Pool{} : pool_of(x);
    on_state_dtype(h, [&](auto* type) {
        using A = std::remove_pointer_t<decltype(type)>;
        const auto dsu = dsu_of<A>(weights, C, joint, activation);
        const Tensor hidden = new_tensor(h, {B, dsu.hidden()});
        GapDsuForward<A> args{dsu,
                              B,
                              pool,
                              mutable_data_if<A>(y),
                              nullptr,
                              data_of<A>(pooled ? x : y),
                              data_of<A>(h),
                              data_of<A>(c),
                              data_of<A>(carried),
                              of_context,
                              mutable_data_of<A>(new_h),
                              mutable_data_of<A>(new_c),
                              mutable_data_if<A>(gate),
                              mutable_data_of<A>(hidden)};
        const Tensor parts = new_tensor(h, {gap_dsu_forward_scratch(args)});
        args.parts = mutable_data_of<A>(parts);
        gap_dsu_forward<A>(args, on.stream());
    });
    return {y, new_h, new_c, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cuda_gap_dsu_backward(
    const std::optional<Tensor>& grad_y_, const std::optional<Tensor>& grad_h_, const std::optional<Tensor>& grad_c_,
    const std::optional<Tensor>& grad_gate_, const Tensor& y_, const Tensor& h_, const Tensor& c_,
    const std::optional<Tensor>& carried_, const Tensor& weights_, bool joint, int64_t activation, bool of_context) {
    const OnDevice on(y_);
    const auto grad_of_y = dense(grad_y_), grad_new_h = dense(grad_h_), grad_new_c = dense(grad_c_);
    const auto grad_gate = dense(grad_gate_), carried = dense(carried_);
    const Tensor y = dense(y_), h = dense(h_), c = dense(c_), weights = dense(weights_);
    const int64_t B = y.size(0), C = y.size(1);
    const Tensor grad_y = new_like(y), grad_h = new_like(h);
    const Tensor grad_c = new_like(c), grad_weights = new_like(weights);
    const Tensor grad_carried = carried ? new_like(y) : new_tensor(y, {0});
    on_state_dtype(y, [&](auto* type) {
        using A = std::remove_pointer_t<decltype(type)>;
        GapDsuBackward<A> args{dsu_of<A>(weights, C, joint, activation),
                               B,
                               data_of<A>(grad_of_y),
                               data_of<A>(grad_new_h),
                               data_of<A>(grad_new_c),
                               data_of<A>(grad_gate),
                               data_of<A>(y),
                               data_of<A>(h),
                               data_of<A>(c),
                               data_of<A>(carried),
                               of_context,
                               mutable_data_of<A>(grad_y),
                               mutable_data_of<A>(grad_h),
                               mutable_data_of<A>(grad_c),
                               mutable_data_if<A>(grad_carried),
                               mutable_data_of<A>(grad_weights),
                               nullptr};
        const Tensor scratch = new_tensor(y, {gap_dsu_scratch(args)});
        args.scratch = mutable_data_of<A>(scratch);
        gap_dsu_backward<A>(args, on.stream());
    });
    return {grad_y, grad_h, grad_c, grad_carried, grad_weights};
}

DLA_CUDA_OPS(m) {
    m.impl("gap_dsu_forward", TORCH_BOX(&cuda_gap_dsu_forward));
    m.impl("gap_dsu_backward", TORCH_BOX(&cuda_gap_dsu_backward));
}

}  // namespace dla
