// norm_residual on the CPU: the library ops around the kernels.
#include <tuple>

#include "common/normalisation.h"
#include "common/runs.h"
#include "common/tensor.h"

namespace dla {

// Where the ReLU stands: nowhere, after the normalisation, or after the addition.
enum class Relu : int64_t { none, branch, sum };

template <class T>
struct NormResidualForward {
    Shape shape;
    Map<const T> x, o;  // x may be null
    Map<T> out;
    const Acc<T>*mean, *scale, *bias;  // [C]
    const Acc<T>* keep;                // [B] or null
    Acc<T>* y;                         // [B, C]
    Relu relu;
};

template <class T>
struct NormResidualBackward {
    Shape shape;
    Map<const T> grad_out, o, out;     // out is o but where the ReLU follows the addition
    const Acc<T>* grad_y;              // [B, C] or null
    Map<T> grad_x, grad_o;             // either may be null
    const Acc<T>*mean, *scale, *bias;  // [C]
    const Acc<T>*slope, *offset;  // [C] or null: what reaches o through its own statistics, slope * (o - mean) + offset
    const Acc<T>* keep;           // [B] or null
    Relu relu;
    // Sums over H, W, [B, C] each or null, g being the gradient of the normalised map: of g, of g * (o - mean), and of
    // the gradient of the sum times what keep was multiplied with.
    Acc<T>*grad, *grad_normed, *grad_keep;
};

}  // namespace dla

#define DLA_KERNELS "norm_residual/kernels.h"
#include "common/each_isa.h"

namespace dla {
namespace {

template <class T>
NormResidualBackward<T> backward_args(const Tensor& grad_out, const std::optional<Tensor>& grad_y, const Tensor& o,
                                      const std::optional<Tensor>& out, const Normalisation<Acc<T>>& norm,
                                      const Tensor& bias, const std::optional<Tensor>& keep, int64_t relu) {
    using A = Acc<T>;
    NormResidualBackward<T> args{};
    args.shape = shape_of(o);
    args.grad_out = map_of<const T>(grad_out);
    args.o = map_of<const T>(o);
    args.out = map_of<const T>(out ? *out : o);
    args.grad_y = data_of<A>(grad_y);
    args.mean = norm.mean;
    args.scale = norm.scale.get();
    args.bias = data_of<A>(bias);
    args.keep = data_of<A>(keep);
    args.relu = static_cast<Relu>(relu);
    return args;
}

template <class T>
void run_backward(const NormResidualBackward<T>& args, bool channels_last) {
    if (channels_last) {
        DLA_ON_ISA(backward_rows<T>(args));
    } else {
        DLA_ON_ISA(backward_planes<T>(args));
    }
}

// out from maps of one layout; returns its GAP and the statistics that were used. The layout is not asked of out: of
// one pixel a dense map counts as channels_last whatever the others are.
std::tuple<Tensor, Tensor, Tensor> normalise(const std::optional<Tensor>& x, const Tensor& o, const Tensor& out,
                                             const Tensor& mean_, const Tensor& var_, const Tensor& weight_,
                                             const Tensor& bias_, const std::optional<Tensor>& keep_, double eps,
                                             int64_t relu, bool channels_last) {
    const Tensor mean = dense(mean_), var = dense(var_), weight = dense(weight_), bias = dense(bias_);
    const auto keep = dense(keep_);
    const Shape s = shape_of(o);
    const Tensor y = new_tensor(weight, {s.B, s.C});
    const Tensor used_mean = new_tensor(weight, {s.C}), used_var = new_tensor(weight, {s.C});
    on_dtype(o, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        A *m = mutable_data_of<A>(used_mean), *v = mutable_data_of<A>(used_var);
        merge_samples(mean.dim() == 2 ? s.B : 1, s.C, data_of<A>(mean), data_of<A>(var), m, v);
        const Normalisation<A> norm(s.C, m, v, data_of<A>(weight), eps);
        const NormResidualForward<T> args{s,
                                          x ? map_of<const T>(*x) : Map<const T>{},
                                          map_of<const T>(o),
                                          map_of<T>(out),
                                          norm.mean,
                                          norm.scale.get(),
                                          data_of<A>(bias),
                                          data_of<A>(keep),
                                          mutable_data_of<A>(y),
                                          static_cast<Relu>(relu)};
        if (channels_last) {
            DLA_ON_ISA(forward_rows<T>(args));
        } else {
            DLA_ON_ISA(forward_planes<T>(args));
        }
    });
    return {y, used_mean, used_var};
}

}  // namespace

std::tuple<Tensor, Tensor> norm_residual_moments(const Tensor& o_) {
    const Tensor o = walkable(o_);
    const Shape s = shape_of(o);
    const Tensor mean = new_state(o, {s.B, s.C}), var = new_state(o, {s.B, s.C});
    on_dtype(o, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        if (is_channels_last(o)) {
            DLA_ON_ISA(moments_rows<T>(map_of<const T>(o), s, mutable_data_of<A>(mean), mutable_data_of<A>(var)));
        } else {
            DLA_ON_ISA(moments_planes<T>(map_of<const T>(o), s, mutable_data_of<A>(mean), mutable_data_of<A>(var)));
        }
    });
    return {mean, var};
}

// out, its GAP, and the statistics of each channel that were used: those given, or merged from those of every sample.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_residual_forward(const std::optional<Tensor>& x_, const Tensor& o_,
                                                                 const Tensor& mean, const Tensor& var,
                                                                 const Tensor& weight, const Tensor& bias,
                                                                 const std::optional<Tensor>& keep, double eps,
                                                                 int64_t relu) {
    const Tensor first = walkable(x_ ? *x_ : o_), out = new_like(first);
    const bool channels_last = is_channels_last(first);
    const auto [y, used_mean, used_var] =
        normalise(x_ ? std::optional<Tensor>(first) : std::nullopt, in_layout(o_, channels_last), out, mean, var,
                  weight, bias, keep, eps, relu, channels_last);
    return {out, y, used_mean, used_var};
}

// The same over o, which must be dense and in one of the layouts; returns the GAP alone.
Tensor norm_residual_forward_(const std::optional<Tensor>& x, const Tensor& o, const Tensor& mean, const Tensor& var,
                              const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& keep, double eps,
                              int64_t relu) {
    const bool channels_last = is_channels_last(o);
    return std::get<0>(
        normalise(in_layout(x, channels_last), o, o, mean, var, weight, bias, keep, eps, relu, channels_last));
}

// The first pass of the backward: gradients of weight, bias and keep, which are sums over all pixels.
std::tuple<Tensor, Tensor, Tensor> norm_residual_sums(const Tensor& grad_out_, const std::optional<Tensor>& grad_y_,
                                                      const Tensor& o_, const std::optional<Tensor>& out_,
                                                      const Tensor& mean_, const Tensor& var_, const Tensor& weight_,
                                                      const Tensor& bias_, const std::optional<Tensor>& keep_,
                                                      double eps, int64_t relu, bool need_keep) {
    const Tensor o = walkable(o_), grad_out = in_layout(grad_out_, is_channels_last(o));
    const auto out = in_layout(out_, is_channels_last(o)), keep = dense(keep_), grad_y = dense(grad_y_);
    const Tensor mean = dense(mean_), var = dense(var_), weight = dense(weight_), bias = dense(bias_);
    const Shape s = shape_of(o);
    const Tensor grad_weight = new_like(weight), grad_bias = new_like(bias);
    const Tensor grad_keep = new_tensor(mean, {need_keep ? s.B : 0});
    on_dtype(o, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const Normalisation<A> norm(s.C, data_of<A>(mean), data_of<A>(var), data_of<A>(weight), eps);
        const Scratch<A> grad(s.B * s.C), grad_normed(s.B * s.C), keeps(need_keep ? s.B * s.C : 0);
        auto args = backward_args<T>(grad_out, grad_y, o, out, norm, bias, keep, relu);
        args.grad = grad.get();
        args.grad_normed = grad_normed.get();
        args.grad_keep = need_keep ? keeps.get() : nullptr;
        run_backward(args, is_channels_last(o));
        A *dweight = mutable_data_of<A>(grad_weight), *dbias = mutable_data_of<A>(grad_bias);
        std::fill_n(dweight, s.C, A(0));
        std::fill_n(dbias, s.C, A(0));
        for (int64_t b = 0; b < s.B; ++b) {
            for (int64_t c = 0; c < s.C; ++c) {
                dbias[c] += grad[b * s.C + c];
                dweight[c] += grad_normed[b * s.C + c];
            }
        }
        for (int64_t c = 0; c < s.C; ++c) dweight[c] *= norm.inverse_std[c];
        for (int64_t b = 0; need_keep && b < s.B; ++b) {
            A total = 0;
            for (int64_t c = 0; c < s.C; ++c) total += keeps[b * s.C + c];
            mutable_data_of<A>(grad_keep)[b] = total;
        }
    });
    return {grad_weight, grad_bias, grad_keep};
}

// The second: gradients of x, an empty tensor where it is not needed, and of o. With the sums of the first pass those
// that flow through o's own statistics, taken over `count` values, are part of o's.
std::tuple<Tensor, Tensor> norm_residual_backward(const Tensor& grad_out_, const std::optional<Tensor>& grad_y_,
                                                  const Tensor& o_, const std::optional<Tensor>& out_,
                                                  const Tensor& mean_, const Tensor& var_, const Tensor& weight_,
                                                  const Tensor& bias_, const std::optional<Tensor>& sum_weight_,
                                                  const std::optional<Tensor>& sum_bias_,
                                                  const std::optional<Tensor>& keep_, double eps, int64_t relu,
                                                  int64_t count, bool need_x) {
    const Tensor o = walkable(o_), grad_out = in_layout(grad_out_, is_channels_last(o));
    const auto out = in_layout(out_, is_channels_last(o)), keep = dense(keep_), grad_y = dense(grad_y_);
    const auto sum_weight = dense(sum_weight_), sum_bias = dense(sum_bias_);
    const Tensor mean = dense(mean_), var = dense(var_), weight = dense(weight_), bias = dense(bias_);
    const Tensor grad_x = map_or_empty(need_x, o);
    const Tensor grad_o = new_like(o);
    on_dtype(o, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const NormGradient<A> norm(o.size(1), data_of<A>(mean), data_of<A>(var), data_of<A>(weight),
                                   data_of<A>(sum_weight), data_of<A>(sum_bias), eps, count);
        auto args = backward_args<T>(grad_out, grad_y, o, out, norm, bias, keep, relu);
        if (need_x) args.grad_x = map_of<T>(grad_x);
        args.grad_o = map_of<T>(grad_o);
        args.slope = norm.slope.get();
        args.offset = norm.offset.get();
        run_backward(args, is_channels_last(o));
    });
    return {grad_x, grad_o};
}

// As torch's BatchNorm: the variance unbiased, without a momentum the plain average over all batches.
void norm_residual_update_running_stats(const Tensor& running_mean, const Tensor& running_var,
                                        const std::optional<Tensor>& num_batches_tracked, const Tensor& mean_,
                                        const Tensor& var_, std::optional<double> momentum, int64_t count) {
    const Tensor mean = dense(mean_), var = dense(var_);
    if (num_batches_tracked) {
        const int64_t batches = ++*static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
        if (!momentum) momentum = 1.0 / static_cast<double>(batches);
    }
    const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
    on_dtype(mean, [&](auto* state) {
        using A = Acc<std::remove_pointer_t<decltype(state)>>;
        const auto update = [&](const Tensor& running, const A* now, A factor) {
            on_dtype(running, [&](auto* type) {
                using R = std::remove_pointer_t<decltype(type)>;
                R* at = mutable_data_of<R>(running);
                for (int64_t c = 0; c < running.numel(); ++c) {
                    at[c] = static_cast<R>(static_cast<A>(at[c]) * A(1 - *momentum) + now[c] * factor);
                }
            });
        };
        update(running_mean, data_of<A>(mean), A(*momentum));
        update(running_var, data_of<A>(var), A(*momentum * unbiased));
    });
}

STABLE_TORCH_LIBRARY_FRAGMENT(dla_kernels, m) {
    m.def("norm_residual_moments(Tensor o) -> (Tensor, Tensor)");
    m.def(
        "norm_residual_forward(Tensor? x, Tensor o, Tensor mean, Tensor var, Tensor weight, Tensor bias, Tensor? keep, "
        "float eps, int relu) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "norm_residual_forward_(Tensor? x, Tensor(a!) o, Tensor mean, Tensor var, Tensor weight, Tensor bias, "
        "Tensor? keep, float eps, int relu) -> Tensor");
    m.def(
        "norm_residual_sums(Tensor grad_out, Tensor? grad_y, Tensor o, Tensor? out, Tensor mean, Tensor var, "
        "Tensor weight, Tensor bias, Tensor? keep, float eps, int relu, bool need_keep) -> (Tensor, Tensor, Tensor)");
    m.def(
        "norm_residual_backward(Tensor grad_out, Tensor? grad_y, Tensor o, Tensor? out, Tensor mean, Tensor var, "
        "Tensor weight, Tensor bias, Tensor? sum_weight, Tensor? sum_bias, Tensor? keep, float eps, int relu, "
        "SymInt count, bool need_x) -> (Tensor, Tensor)");
    m.def(
        "norm_residual_update_running_stats(Tensor(a!) running_mean, Tensor(b!) running_var, "
        "Tensor(c!)? num_batches_tracked, Tensor mean, Tensor var, float? momentum, SymInt count) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dla_kernels, CPU, m) {
    m.impl("norm_residual_moments", TORCH_BOX(&norm_residual_moments));
    m.impl("norm_residual_forward", TORCH_BOX(&norm_residual_forward));
    m.impl("norm_residual_forward_", TORCH_BOX(&norm_residual_forward_));
    m.impl("norm_residual_sums", TORCH_BOX(&norm_residual_sums));
    m.impl("norm_residual_backward", TORCH_BOX(&norm_residual_backward));
    m.impl("norm_residual_update_running_stats", TORCH_BOX(&norm_residual_update_running_stats));
}

}  // namespace dla
