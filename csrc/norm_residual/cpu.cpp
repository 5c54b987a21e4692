// norm_residual on the CPU: the library ops around the kernels.
#include <tuple>

#include "common/runs.h"
#include "common/tensor.h"

namespace dla {

template <class T>
struct NormResidualForward {
    Shape shape;
    Map<const T> x, o;
    Map<T> out;
    const Acc<T>*mean, *scale, *bias;  // [C]
    const Acc<T>* keep;                // [B] or null
    Acc<T>* y;                         // [B, C]
    bool relu;
};

template <class T>
struct NormResidualBackward {
    Shape shape;
    Map<const T> grad_out, o;
    const Acc<T>* grad_y;              // [B, C] or null
    Map<T> grad_x, grad_o;             // either may be null
    const Acc<T>*mean, *scale, *bias;  // [C]
    const Acc<T>* keep;                // [B] or null
    bool relu;
    // Sums over H, W, [B, C] each, g being the gradient of the normalised map: of g, of g * (o - mean), and of the
    // gradient of `out` times the normalised map (null where keep wants none).
    Acc<T>*grad, *grad_normed, *grad_keep;
};

}  // namespace dla

#define DLA_KERNELS "norm_residual/kernels.h"
#include "common/each_isa.h"

namespace dla {
namespace {

// BatchNorm's statistics of each channel: those given, or those of every sample merged by the law of total variance.
template <class A>
struct Statistics {
    Scratch<A> mean, inverse_std, scale;

    Statistics(int64_t B, int64_t C, bool per_sample, const A* means, const A* vars, const A* weight, double eps)
        : mean(C, A(0)), inverse_std(C, A(0)), scale(C) {
        const int64_t rows = per_sample ? B : 1;
        for (int64_t b = 0; b < rows; ++b) {
            for (int64_t c = 0; c < C; ++c) mean[c] += means[b * C + c] / A(rows);
        }
        for (int64_t b = 0; b < rows; ++b) {
            for (int64_t c = 0; c < C; ++c) {
                const A apart = means[b * C + c] - mean[c];
                inverse_std[c] += (vars[b * C + c] + apart * apart) / A(rows);
            }
        }
        for (int64_t c = 0; c < C; ++c) {
            inverse_std[c] = A(1) / std::sqrt(inverse_std[c] + A(eps));
            scale[c] = weight[c] * inverse_std[c];
        }
    }
};

}  // namespace

std::tuple<Tensor, Tensor> norm_residual_forward(const Tensor& x_, const Tensor& o_, const Tensor& mean_,
                                                 const Tensor& var_, const Tensor& weight_, const Tensor& bias_,
                                                 const std::optional<Tensor>& keep_, double eps, bool relu) {
    const Tensor x = walkable(x_), o = in_layout(o_, is_channels_last(x));
    const Tensor mean = dense(mean_), var = dense(var_), weight = dense(weight_), bias = dense(bias_);
    const auto keep = dense(keep_);
    const Shape s = shape_of(x);
    const Tensor out = torch::stable::empty_like(x), y = new_tensor(mean, {s.B, s.C});
    on_dtype(x, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const Statistics<A> stats(s.B, s.C, mean.dim() == 2, data_of<A>(mean), data_of<A>(var), data_of<A>(weight),
                                  eps);
        const NormResidualForward<T> args{s,
                                          map_of<const T>(x),
                                          map_of<const T>(o),
                                          map_of<T>(out),
                                          stats.mean.get(),
                                          stats.scale.get(),
                                          data_of<A>(bias),
                                          data_of<A>(keep),
                                          mutable_data_of<A>(y),
                                          relu};
        if (is_channels_last(x)) {
            DLA_ON_ISA(forward_rows<T>(args));
        } else {
            DLA_ON_ISA(forward_planes<T>(args));
        }
    });
    return {out, y};
}

// Gradients of x, o, mean, var, weight, bias and keep; an empty tensor stands for one that is not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_residual_backward(
    const Tensor& grad_out_, const std::optional<Tensor>& grad_y_, const Tensor& o_, const Tensor& mean_,
    const Tensor& var_, const Tensor& weight_, const Tensor& bias_, const std::optional<Tensor>& keep_, double eps,
    bool relu, bool need_x, bool need_o, bool need_keep) {
    const Tensor o = walkable(o_), grad_out = in_layout(grad_out_, is_channels_last(o));
    const Tensor mean = dense(mean_), var = dense(var_), weight = dense(weight_), bias = dense(bias_);
    const auto keep = dense(keep_), grad_y = dense(grad_y_);
    const Shape s = shape_of(o);
    const auto map_if = [&](bool need) { return need ? torch::stable::empty_like(o) : new_tensor(o, {0}); };
    const Tensor grad_x = map_if(need_x), grad_o = map_if(need_o);
    const Tensor grad_mean = torch::stable::empty_like(mean), grad_var = torch::stable::empty_like(var);
    const Tensor grad_weight = torch::stable::empty_like(weight), grad_bias = torch::stable::empty_like(bias);
    const Tensor grad_keep = new_tensor(mean, {need_keep ? s.B : 0});
    on_dtype(o, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const bool per_sample = mean.dim() == 2;
        const A *means = data_of<A>(mean), *weights = data_of<A>(weight);
        const Statistics<A> stats(s.B, s.C, per_sample, means, data_of<A>(var), weights, eps);
        const Scratch<A> grad(s.B * s.C), grad_normed(s.B * s.C), keeps(need_keep ? s.B * s.C : 0);
        const NormResidualBackward<T> args{s,
                                           map_of<const T>(grad_out),
                                           map_of<const T>(o),
                                           data_of<A>(grad_y),
                                           need_x ? map_of<T>(grad_x) : Map<T>{},
                                           need_o ? map_of<T>(grad_o) : Map<T>{},
                                           stats.mean.get(),
                                           stats.scale.get(),
                                           data_of<A>(bias),
                                           data_of<A>(keep),
                                           relu,
                                           grad.get(),
                                           grad_normed.get(),
                                           need_keep ? keeps.get() : nullptr};
        if (is_channels_last(o)) {
            DLA_ON_ISA(backward_rows<T>(args));
        } else {
            DLA_ON_ISA(backward_planes<T>(args));
        }
        A *dmean = mutable_data_of<A>(grad_mean), *dvar = mutable_data_of<A>(grad_var);
        A *dweight = mutable_data_of<A>(grad_weight), *dbias = mutable_data_of<A>(grad_bias);
        std::fill_n(dweight, s.C, A(0));
        std::fill_n(dbias, s.C, A(0));
        for (int64_t b = 0; b < s.B; ++b) {
            for (int64_t c = 0; c < s.C; ++c) {
                dbias[c] += grad[b * s.C + c];
                dweight[c] += grad_normed[b * s.C + c];
            }
        }
        const int64_t rows = per_sample ? s.B : 1;
        for (int64_t c = 0; c < s.C; ++c) {
            const A inverse_std = stats.inverse_std[c];
            dweight[c] *= inverse_std;
            const A of_mean = -stats.scale[c] * dbias[c] / A(rows);
            const A of_var = A(-0.5) * inverse_std * inverse_std * weights[c] * dweight[c] / A(rows);
            for (int64_t b = 0; b < rows; ++b) {
                const int64_t i = b * s.C + c;
                dvar[i] = of_var;
                dmean[i] = of_mean + (per_sample ? of_var * A(2) * (means[i] - stats.mean[c]) : A(0));
            }
        }
        for (int64_t b = 0; need_keep && b < s.B; ++b) {
            A total = 0;
            for (int64_t c = 0; c < s.C; ++c) total += keeps[b * s.C + c];
            mutable_data_of<A>(grad_keep)[b] = total;
        }
    });
    return {grad_x, grad_o, grad_mean, grad_var, grad_weight, grad_bias, grad_keep};
}

STABLE_TORCH_LIBRARY_FRAGMENT(dla_kernels, m) {
    m.def(
        "norm_residual_forward(Tensor x, Tensor o, Tensor mean, Tensor var, Tensor weight, Tensor bias, Tensor? keep, "
        "float eps, bool relu) -> (Tensor, Tensor)");
    m.def(
        "norm_residual_backward(Tensor grad_out, Tensor? grad_y, Tensor o, Tensor mean, Tensor var, Tensor weight, "
        "Tensor bias, Tensor? keep, float eps, bool relu, bool need_x, bool need_o, bool need_keep) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dla_kernels, CPU, m) {
    m.impl("norm_residual_forward", TORCH_BOX(&norm_residual_forward));
    m.impl("norm_residual_backward", TORCH_BOX(&norm_residual_backward));
}

}  // namespace dla
