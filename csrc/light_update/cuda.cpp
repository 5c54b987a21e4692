// light_update on CUDA: the library ops around the kernels.
#include "light_update/cuda.h"

#include <tuple>

#include "light_update/value_map.h"

namespace dla {
namespace {

// The vectors of the op, dense, and what kernels take of them.
struct Dense {
    std::optional<Tensor> y, query_weight, key_weight;
    Tensor value_weight;
    std::optional<Tensor> carry_scale, gate, carry_weight;

    Dense(const std::optional<Tensor>& y, const std::optional<Tensor>& query_weight,
          const std::optional<Tensor>& key_weight, const Tensor& value_weight, const std::optional<Tensor>& carry_scale,
          const std::optional<Tensor>& gate, const std::optional<Tensor>& carry_weight)
        : y(dense(y)),
          query_weight(dense(query_weight)),
          key_weight(dense(key_weight)),
          value_weight(dense(value_weight)),
          carry_scale(dense(carry_scale)),
          gate(dense(gate)),
          carry_weight(dense(carry_weight)) {}

    template <class A>
    light_update::Vectors<A> vectors(int64_t head_dim) const {
        return {data_of<A>(y),
                data_of<A>(query_weight),
                data_of<A>(key_weight),
                data_of<A>(value_weight),
                data_of<A>(carry_scale),
                data_of<A>(gate),
                data_of<A>(carry_weight),
                query_weight ? query_weight->numel() : 0,
                head_dim};
    }
};

// One launch over x and what is carried; fill(args, type) says where its results go.
template <class Fill>
void launch_forward(const Tensor& x, const std::optional<Tensor>& carried_, const Dense& in, int64_t head_dim,
                    cudaStream_t stream, const Fill& fill) {
    const Shape s = shape_of(x);
    const bool channels_last = is_channels_last(x);
    const auto carried = in_layout(carried_, channels_last);
    on_cuda_dtype(x, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const auto tiling = light_update::tiling<T>(s, channels_last, 0);
        const Tensor parts = new_tensor(in.value_weight, {tiling.parts() > 1 ? 3 * s.B * tiling.parts() * s.C : 0});
        light_update::Forward<T> args = {};
        args.shape = s;
        args.vectors = in.vectors<A>(head_dim);
        args.x = map_of<const T>(x);
        args.carried = map_if<const T>(carried);
        args.parts = mutable_data_of<A>(parts);
        fill(args, type);
        light_update::launch(args, tiling, channels_last, stream);
    });
}

// o, its mean and its variance.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x_, const std::optional<Tensor>& carried, const Dense& in,
                                           int64_t head_dim) {
    const OnDevice device(x_);
    const Tensor x = walkable(x_), o = new_like(x);
    const Tensor mean = new_tensor(in.value_weight, {x.size(0), x.size(1)}), var = new_like(mean);
    launch_forward(x, carried, in, head_dim, device.stream(), [&](auto& args, auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        args.o = map_of<T>(o);
        args.mean = mutable_data_of<Acc<T>>(mean);
        args.other = mutable_data_of<Acc<T>>(var);
    });
    return {o, mean, var};
}

// The launches over o's gradient, x and what is carried, all maps in one layout; fill(args, type) says what o's
// gradient is made of besides and where the results go.
template <class Fill>
void launch_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_o, const Tensor& o, const Tensor& x,
                     const std::optional<Tensor>& carried, const Dense& in, int64_t head_dim, cudaStream_t stream,
                     const Fill& fill) {
    const Shape s = shape_of(o);
    const bool channels_last = is_channels_last(o);
    on_cuda_dtype(o, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const auto tiling = light_update::tiling<T>(s, channels_last, carried ? 2 : 1);
        light_update::Backward<T> args = {};
        args.shape = s;
        args.vectors = in.vectors<A>(head_dim);
        const Tensor parts = new_tensor(in.value_weight, {s.B * tiling.parts() * light_update::kProducts * s.C});
        const Tensor rows = new_tensor(in.value_weight, {s.B * args.row_length()});
        args.grad_out = map_of<const T>(grad_out);
        args.grad_o = map_if<const T>(grad_o);
        args.o = map_of<const T>(o);
        args.x = map_of<const T>(x);
        args.carried = map_if<const T>(carried);
        args.parts = mutable_data_of<A>(parts);
        args.rows = mutable_data_of<A>(rows);
        fill(args, type);
        light_update::launch(args, tiling, channels_last, stream);
    });
}

}  // namespace

std::tuple<Tensor, Tensor> cuda_value_map(const Tensor& x, const Tensor& weight) {
    const auto [value, mean, var] = forward(x, {}, Dense({}, {}, {}, weight, {}, {}, {}), x.size(1));
    return {value, mean};
}

std::tuple<Tensor, Tensor> cuda_value_map_backward(const Tensor& grad_x_, const Tensor& grad,
                                                   const std::optional<Tensor>& grad_read_,
                                                   const std::optional<Tensor>& grad_mean_, const Tensor& x_,
                                                   const Tensor& weight, bool need_x) {
    const OnDevice device(grad);
    const bool channels_last = is_channels_last(grad);
    const Tensor so_far = in_layout(grad_x_, channels_last), x = in_layout(x_, channels_last);
    const auto grad_read = in_layout(grad_read_, channels_last), grad_mean = dense(grad_mean_);
    const Dense in({}, {}, {}, weight, {}, {}, {});
    const Tensor grad_x = map_or_empty(need_x, grad), grad_weight = new_like(in.value_weight);
    launch_backward(so_far, grad_read, grad, x, {}, in, x.size(1), device.stream(), [&](auto& args, auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        args.grad_o_mean = data_of<A>(grad_mean);
        args.grad_x = map_if<T>(grad_x);
        args.grad_value_weight = mutable_data_of<A>(grad_weight);
    });
    return {grad_x, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor> cuda_light_update_forward(
    const Tensor& x, const Tensor& y, const Tensor& query_weight, const Tensor& key_weight, const Tensor& value_weight,
    const std::optional<Tensor>& carried, const std::optional<Tensor>& carry_scale, const std::optional<Tensor>& gate,
    const std::optional<Tensor>& carry_weight, int64_t head_dim) {
    return forward(x, carried, Dense(y, query_weight, key_weight, value_weight, carry_scale, gate, carry_weight),
                   head_dim);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_light_update_folded(
    const Tensor& x_, const Tensor& y, const Tensor& query_weight, const Tensor& key_weight, const Tensor& value_weight,
    const std::optional<Tensor>& carried, const std::optional<Tensor>& carry_scale, const std::optional<Tensor>& gate,
    const std::optional<Tensor>& carry_weight, const Tensor& mean_, const Tensor& var_, const Tensor& weight_,
    const Tensor& bias_, double eps, int64_t head_dim, bool need_o) {
    const OnDevice device(x_);
    const Tensor x = walkable(x_), mean = dense(mean_), var = dense(var_), weight = dense(weight_), bias = dense(bias_);
    const Dense in(y, query_weight, key_weight, value_weight, carry_scale, gate, carry_weight);
    const Tensor out = new_like(x), o = map_or_empty(need_o, x);
    const Tensor out_mean = new_tensor(mean, {x.size(0), x.size(1)}), o_mean = new_like(out_mean);
    launch_forward(x, carried, in, head_dim, device.stream(), [&](auto& args, auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        args.o = map_if<T>(o);
        args.out = map_of<T>(out);
        args.mean = mutable_data_of<A>(o_mean);
        args.other = mutable_data_of<A>(out_mean);
        args.norm_mean = data_of<A>(mean);
        args.norm_var = data_of<A>(var);
        args.norm_weight = data_of<A>(weight);
        args.norm_bias = data_of<A>(bias);
        args.eps = static_cast<A>(eps);
    });
    return {out, out_mean, o, o_mean};
}

// Gradients of x, y, query_weight, key_weight, value_weight, carried, carry_scale, gate and carry_weight; an empty
// tensor stands for one that is not there or not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cuda_light_update_backward(
    const Tensor& grad_out_, const std::optional<Tensor>& grad_out_mean_, const std::optional<Tensor>& grad_o_,
    const std::optional<Tensor>& grad_o_mean_, const Tensor& o_, const Tensor& mean_, const Tensor& var_,
    const Tensor& weight_, const std::optional<Tensor>& sum_weight_, const std::optional<Tensor>& sum_bias_,
    const std::optional<Tensor>& keep_, double eps, int64_t count, const Tensor& x_, const Tensor& y,
    const Tensor& query_weight, const Tensor& key_weight, const Tensor& value_weight,
    const std::optional<Tensor>& carried_, const std::optional<Tensor>& carry_scale, const std::optional<Tensor>& gate,
    const std::optional<Tensor>& carry_weight, int64_t head_dim, bool need_x, bool need_carried) {
    const OnDevice device(o_);
    const Tensor o = walkable(o_);
    const bool channels_last = is_channels_last(o);
    const Tensor grad_out = in_layout(grad_out_, channels_last), x = in_layout(x_, channels_last);
    const auto grad_o = in_layout(grad_o_, channels_last), carried = in_layout(carried_, channels_last);
    const auto grad_out_mean = dense(grad_out_mean_), grad_o_mean = dense(grad_o_mean_);
    const auto sum_weight = dense(sum_weight_), sum_bias = dense(sum_bias_), keep = dense(keep_);
    const Tensor mean = dense(mean_), var = dense(var_), weight = dense(weight_);
    const Dense in(y, query_weight, key_weight, value_weight, carry_scale, gate, carry_weight);
    const Shape s = shape_of(o);
    const auto like = [&](const std::optional<Tensor>& t) {
        return t ? new_like(*t) : new_tensor(in.value_weight, {0});
    };
    const Tensor grad_x = map_or_empty(need_x, o), grad_carried = map_or_empty(need_carried && carried, o);
    const Tensor grad_y = like(in.y), grad_query_weight = like(in.query_weight), grad_key_weight = like(in.key_weight);
    const Tensor grad_value_weight = like(in.value_weight), grad_carry_scale = like(in.carry_scale);
    const Tensor grad_gate = like(in.gate), grad_carry_weight = like(in.carry_weight);
    launch_backward(grad_out, grad_o, o, x, carried, in, head_dim, device.stream(), [&](auto& args, auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        args.grad_out_mean = data_of<A>(grad_out_mean);
        args.grad_o_mean = data_of<A>(grad_o_mean);
        args.mean = data_of<A>(mean);
        args.var = data_of<A>(var);
        args.weight = data_of<A>(weight);
        args.sum_weight = data_of<A>(sum_weight);
        args.sum_bias = data_of<A>(sum_bias);
        args.keep = data_of<A>(keep);
        args.eps = static_cast<A>(eps);
        args.count = static_cast<A>(count);
        args.grad_x = map_if<T>(grad_x);
        args.grad_carried = map_if<T>(grad_carried);
        args.grad_y = mutable_data_if<A>(grad_y);
        args.grad_query_weight = mutable_data_if<A>(grad_query_weight);
        args.grad_key_weight = mutable_data_if<A>(grad_key_weight);
        args.grad_value_weight = mutable_data_if<A>(grad_value_weight);
        args.grad_carry_scale = mutable_data_if<A>(grad_carry_scale);
        args.grad_gate = mutable_data_if<A>(grad_gate);
        args.grad_carry_weight = mutable_data_if<A>(grad_carry_weight);
    });
    return {grad_x,       grad_y,           grad_query_weight, grad_key_weight,  grad_value_weight,
            grad_carried, grad_carry_scale, grad_gate,         grad_carry_weight};
}

DLA_CUDA_OPS(m) {
    m.impl("light_update_forward", TORCH_BOX(&cuda_light_update_forward));
    m.impl("light_update_folded", TORCH_BOX(&cuda_light_update_folded));
    m.impl("light_update_backward", TORCH_BOX(&cuda_light_update_backward));
}

}  // namespace dla
