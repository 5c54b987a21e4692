// norm_residual on the GPU: the library ops around the kernels.
#include "norm_residual/cuda.h"

#include <cmath>
#include <tuple>

#include "common/cuda/host.h"

namespace dla {
namespace {

// A gradient's arguments, each as the kernels take it.
struct Gradient {
    Tensor o, grad_out, mean, var, weight, bias;
    std::optional<Tensor> grad_y, out, keep;
    bool channels_last;

    Gradient(const Tensor& grad_out_, const std::optional<Tensor>& grad_y_, const Tensor& o_,
             const std::optional<Tensor>& out_, const Tensor& mean_, const Tensor& var_, const Tensor& weight_,
             const Tensor& bias_, const std::optional<Tensor>& keep_)
        : o(walkable(o_)),
          grad_out(in_layout(grad_out_, is_channels_last(o))),
          mean(dense(mean_)),
          var(dense(var_)),
          weight(dense(weight_)),
          bias(dense(bias_)),
          grad_y(dense(grad_y_)),
          out(in_layout(out_, is_channels_last(o))),
          keep(dense(keep_)),
          channels_last(is_channels_last(o)) {}

    template <class T>
    NormGradient<T> args(double eps, int64_t relu) const {
        using A = Acc<T>;
        return {shape_of(o),
                map_of<const T>(grad_out),
                map_of<const T>(o),
                map_if<const T>(out),
                channels_last,
                data_of<A>(grad_y),
                data_of<A>(mean),
                data_of<A>(var),
                data_of<A>(weight),
                data_of<A>(bias),
                data_of<A>(keep),
                A(eps),
                static_cast<Relu>(relu)};
    }
};

}  // namespace

std::tuple<Tensor, Tensor> cuda_norm_moments(const Tensor& o_) {
    const OnDevice on(o_);
    const Tensor o = walkable(o_);
    const Shape s = shape_of(o);
    const Tensor mean = new_state(o, {s.B, s.C}), var = new_state(o, {s.B, s.C});
    if (s.B == 0) return {mean, var};
    on_cuda_dtype(o, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        NormMoments<T> args{
            s, map_of<const T>(o), is_channels_last(o), mutable_data_of<A>(mean), mutable_data_of<A>(var), nullptr};
        const Tensor parts = new_tensor(mean, {norm_moments_scratch(args)});
        args.parts = mutable_data_of<A>(parts);
        norm_moments<T>(args, on.stream());
    });
    return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_norm_forward(const std::optional<Tensor>& x_, const Tensor& o_,
                                                             const Tensor& mean_, const Tensor& var_,
                                                             const Tensor& weight_, const Tensor& bias_,
                                                             const std::optional<Tensor>& keep_, double eps,
                                                             int64_t relu) {
    const OnDevice on(o_);
    const Tensor first = walkable(x_ ? *x_ : o_);
    const bool channels_last = is_channels_last(first);
    const Tensor o = in_layout(o_, channels_last);
    const Tensor mean = dense(mean_), var = dense(var_), weight = dense(weight_), bias = dense(bias_);
    const auto keep = dense(keep_);
    const Shape s = shape_of(o);
    const Tensor out = new_like(first), y = new_tensor(weight, {s.B, s.C});
    const Tensor used_mean = new_tensor(weight, {s.C}), used_var = new_tensor(weight, {s.C});
    const int64_t rows = mean.dim() == 2 ? mean.size(0) : 1;
    on_cuda_dtype(o, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        // Without samples there is nothing to walk, but given statistics are still the ones used.
        NormForward<T> args{s,
                            x_ ? map_of<const T>(first) : Map<const T>{},
                            map_of<const T>(o),
                            map_of<T>(out),
                            channels_last,
                            data_of<A>(mean),
                            data_of<A>(var),
                            rows,
                            data_of<A>(weight),
                            data_of<A>(bias),
                            data_of<A>(keep),
                            mutable_data_of<A>(y),
                            nullptr,
                            mutable_data_of<A>(used_mean),
                            mutable_data_of<A>(used_var),
                            A(eps),
                            static_cast<Relu>(relu)};
        const Tensor parts = new_tensor(weight, {norm_forward_scratch(args)});
        args.parts = mutable_data_of<A>(parts);
        norm_forward<T>(args, on.stream());
    });
    return {out, y, used_mean, used_var};
}

std::tuple<Tensor, Tensor, Tensor> cuda_norm_sums(const Tensor& grad_out_, const std::optional<Tensor>& grad_y_,
                                                  const Tensor& o_, const std::optional<Tensor>& out_,
                                                  const Tensor& mean_, const Tensor& var_, const Tensor& weight_,
                                                  const Tensor& bias_, const std::optional<Tensor>& keep_, double eps,
                                                  int64_t relu, bool need_keep) {
    const OnDevice on(o_);
    const Gradient g(grad_out_, grad_y_, o_, out_, mean_, var_, weight_, bias_, keep_);
    const Shape s = shape_of(g.o);
    const Tensor grad_weight = new_like(g.weight), grad_bias = new_like(g.bias);
    const Tensor grad_keep = new_tensor(g.mean, {need_keep ? s.B : 0});
    on_cuda_dtype(g.o, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        NormSums<T> args{g.args<T>(eps, relu), mutable_data_of<A>(grad_weight), mutable_data_of<A>(grad_bias),
                         mutable_data_if<A>(grad_keep), nullptr};
        const Tensor scratch = new_tensor(g.mean, {norm_sums_scratch(args)});
        args.scratch = mutable_data_of<A>(scratch);
        norm_sums<T>(args, on.stream());
    });
    return {grad_weight, grad_bias, grad_keep};
}

std::tuple<Tensor, Tensor> cuda_norm_backward(const Tensor& grad_out_, const std::optional<Tensor>& grad_y_,
                                              const Tensor& o_, const std::optional<Tensor>& out_, const Tensor& mean_,
                                              const Tensor& var_, const Tensor& weight_, const Tensor& bias_,
                                              const std::optional<Tensor>& sum_weight_,
                                              const std::optional<Tensor>& sum_bias_,
                                              const std::optional<Tensor>& keep_, double eps, int64_t relu,
                                              int64_t count, bool need_x) {
    const OnDevice on(o_);
    const Gradient g(grad_out_, grad_y_, o_, out_, mean_, var_, weight_, bias_, keep_);
    const auto sum_weight = dense(sum_weight_), sum_bias = dense(sum_bias_);
    const Tensor grad_x = map_or_empty(need_x, g.o), grad_o = new_like(g.o);
    if (grad_o.numel() == 0) return {grad_x, grad_o};
    on_cuda_dtype(g.o, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        norm_backward<T>({g.args<T>(eps, relu), data_of<A>(sum_weight), data_of<A>(sum_bias), A(count),
                          map_if<T>(grad_x), map_of<T>(grad_o)},
                         on.stream());
    });
    return {grad_x, grad_o};
}

void cuda_update_running_stats(Tensor running_mean, Tensor running_var, std::optional<Tensor> num_batches_tracked,
                               const Tensor& mean_, const Tensor& var_, std::optional<double> momentum, int64_t count) {
    const OnDevice on(running_mean);
    const Tensor mean = dense(mean_), var = dense(var_);
    on_cuda_dtype(running_mean, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        on_cuda_dtype(mean, [&](auto* state) {
            using A = std::remove_pointer_t<decltype(state)>;
            if constexpr (std::is_same_v<A, float> || std::is_same_v<A, double>) {
                update_running_stats<T, A>(
                    {mutable_data_of<T>(running_mean), mutable_data_of<T>(running_var), running_mean.stride(0),
                     running_var.stride(0),
                     num_batches_tracked ? mutable_data_of<int64_t>(*num_batches_tracked) : nullptr, data_of<A>(mean),
                     data_of<A>(var), mean.size(0), momentum.value_or(std::nan("")), count},
                    on.stream());
            }
        });
    });
}

DLA_CUDA_OPS(m) {
    m.impl("norm_residual_moments", TORCH_BOX(&cuda_norm_moments));
    m.impl("norm_residual_forward", TORCH_BOX(&cuda_norm_forward));
    m.impl("norm_residual_sums", TORCH_BOX(&cuda_norm_sums));
    m.impl("norm_residual_backward", TORCH_BOX(&cuda_norm_backward));
    m.impl("norm_residual_update_running_stats", TORCH_BOX(&cuda_update_running_stats));
}

}  // namespace dla
