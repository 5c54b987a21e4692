// norm_residual on the CPU: the library ops around the kernels.
#include <tuple>

#include "common/runs.h"
#include "common/tensor.h"

namespace dla {

// Where the ReLU stands: nowhere, after the normalisation, or after the addition.
enum class Relu : int64_t { none, branch, sum };

template <class T>
struct NormResidualForward {
    Shape shape;
    Map<const T> x, o;
    Map<T> out;
    const Acc<T>*mean, *scale, *bias;  // [C]
    const Acc<T>* keep;                // [B] or null
    Acc<T>* y;                         // [B, C]
    Relu relu;
};

template <class T>
struct NormResidualBackward {
    Shape shape;
    Map<const T> grad_out, o, out;     // out may be null but where the ReLU follows the addition
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

// BatchNorm's statistics of each channel, and its factor.
template <class A>
struct Statistics {
    Scratch<A> mean, var, inverse_std, scale;

    // From those of `rows` samples, [rows, C], by the law of total variance; one row is taken as it is.
    Statistics(int64_t rows, int64_t C, const A* means, const A* vars, const A* weight, double eps)
        : mean(C, A(0)), var(C, A(0)), inverse_std(C), scale(C) {
        for (int64_t b = 0; b < rows; ++b) {
            for (int64_t c = 0; c < C; ++c) mean[c] += means[b * C + c] / A(rows);
        }
        for (int64_t b = 0; b < rows; ++b) {
            for (int64_t c = 0; c < C; ++c) {
                const A apart = means[b * C + c] - mean[c];
                var[c] += (vars[b * C + c] + apart * apart) / A(rows);
            }
        }
        for (int64_t c = 0; c < C; ++c) {
            inverse_std[c] = A(1) / std::sqrt(var[c] + A(eps));
            scale[c] = weight[c] * inverse_std[c];
        }
    }
};

int64_t rows_of(const Tensor& mean) { return mean.dim() == 2 ? mean.size(0) : 1; }

}  // namespace

// out, its GAP, and the statistics of each channel: those given, or o's own where `mean` is missing.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_residual_forward(
    const Tensor& x_, const Tensor& o_, const std::optional<Tensor>& mean_, const std::optional<Tensor>& var_,
    const Tensor& weight_, const Tensor& bias_, const std::optional<Tensor>& keep_, double eps, int64_t relu) {
    const Tensor x = walkable(x_), o = in_layout(o_, is_channels_last(x));
    const Tensor weight = dense(weight_), bias = dense(bias_);
    const auto keep = dense(keep_);
    const Shape s = shape_of(x);
    const Tensor mean = mean_ ? dense(*mean_) : new_tensor(weight, {s.B, s.C});
    const Tensor var = mean_ ? dense(*var_) : new_tensor(weight, {s.B, s.C});
    const Tensor out = torch::stable::empty_like(x), y = new_tensor(weight, {s.B, s.C});
    const Tensor used_mean = new_tensor(weight, {s.C}), used_var = new_tensor(weight, {s.C});
    on_dtype(x, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        if (!mean_) {
            A *means = mutable_data_of<A>(mean), *vars = mutable_data_of<A>(var);
            if (is_channels_last(x)) {
                DLA_ON_ISA(moments_rows<T>(map_of<const T>(o), s, means, vars));
            } else {
                DLA_ON_ISA(moments_planes<T>(map_of<const T>(o), s, means, vars));
            }
        }
        const Statistics<A> stats(rows_of(mean), s.C, data_of<A>(mean), data_of<A>(var), data_of<A>(weight), eps);
        std::copy_n(stats.mean.get(), s.C, mutable_data_of<A>(used_mean));
        std::copy_n(stats.var.get(), s.C, mutable_data_of<A>(used_var));
        const NormResidualForward<T> args{s,
                                          map_of<const T>(x),
                                          map_of<const T>(o),
                                          map_of<T>(out),
                                          stats.mean.get(),
                                          stats.scale.get(),
                                          data_of<A>(bias),
                                          data_of<A>(keep),
                                          mutable_data_of<A>(y),
                                          static_cast<Relu>(relu)};
        if (is_channels_last(x)) {
            DLA_ON_ISA(forward_rows<T>(args));
        } else {
            DLA_ON_ISA(forward_planes<T>(args));
        }
    });
    return {out, y, used_mean, used_var};
}

// Gradients of x, o, mean, var, weight, bias and keep; an empty tensor stands for one that is not needed. With
// `own_statistics`, mean and var are those of o, and what flows through them is part of o's gradient.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_residual_backward(
    const Tensor& grad_out_, const std::optional<Tensor>& grad_y_, const Tensor& o_, const std::optional<Tensor>& out_,
    const Tensor& mean_, const Tensor& var_, bool own_statistics, const Tensor& weight_, const Tensor& bias_,
    const std::optional<Tensor>& keep_, double eps, int64_t relu, bool need_x, bool need_o, bool need_keep) {
    const Tensor o = walkable(o_), grad_out = in_layout(grad_out_, is_channels_last(o));
    const Tensor out = out_ ? in_layout(*out_, is_channels_last(o)) : o;
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
        const A *means = data_of<A>(mean), *weights = data_of<A>(weight);
        const int64_t rows = rows_of(mean);
        const Statistics<A> stats(rows, s.C, means, data_of<A>(var), weights, eps);
        const Scratch<A> grad(s.B * s.C), grad_normed(s.B * s.C), keeps(need_keep ? s.B * s.C : 0);
        NormResidualBackward<T> args{s,
                                     map_of<const T>(grad_out),
                                     map_of<const T>(o),
                                     map_of<const T>(out),
                                     data_of<A>(grad_y),
                                     need_x ? map_of<T>(grad_x) : Map<T>{},
                                     need_o && !own_statistics ? map_of<T>(grad_o) : Map<T>{},
                                     stats.mean.get(),
                                     stats.scale.get(),
                                     data_of<A>(bias),
                                     nullptr,
                                     nullptr,
                                     data_of<A>(keep),
                                     static_cast<Relu>(relu),
                                     grad.get(),
                                     grad_normed.get(),
                                     need_keep ? keeps.get() : nullptr};
        const auto run = [&] {
            if (is_channels_last(o)) {
                DLA_ON_ISA(backward_rows<T>(args));
            } else {
                DLA_ON_ISA(backward_planes<T>(args));
            }
        };
        run();
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
        const Scratch<A> slope(s.C), offset(s.C);
        const A count = A(s.B * s.HW());
        for (int64_t c = 0; c < s.C; ++c) {
            const A inverse_std = stats.inverse_std[c];
            dweight[c] *= inverse_std;
            const A of_mean = -stats.scale[c] * dbias[c];
            const A of_var = A(-0.5) * inverse_std * inverse_std * weights[c] * dweight[c];
            slope[c] = A(2) * of_var / count;
            offset[c] = of_mean / count;
            for (int64_t b = 0; b < rows; ++b) {
                const int64_t i = b * s.C + c;
                dvar[i] = of_var / A(rows);
                // A sample's mean moves the merged variance too; a single row is the merged one.
                dmean[i] = of_mean / A(rows) + dvar[i] * A(2) * (means[i] - stats.mean[c]);
            }
        }
        if (need_o && own_statistics) {
            // The second pass: only now are the sums known that every pixel's gradient takes its part of.
            args.grad_x = {};
            args.grad_o = map_of<T>(grad_o);
            args.slope = slope.get();
            args.offset = offset.get();
            args.grad = args.grad_normed = args.grad_keep = nullptr;
            run();
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
        "norm_residual_forward(Tensor x, Tensor o, Tensor? mean, Tensor? var, Tensor weight, Tensor bias, Tensor? "
        "keep, "
        "float eps, int relu) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "norm_residual_backward(Tensor grad_out, Tensor? grad_y, Tensor o, Tensor? out, Tensor mean, Tensor var, "
        "bool own_statistics, Tensor weight, Tensor bias, Tensor? keep, float eps, int relu, bool need_x, bool need_o, "
        "bool need_keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dla_kernels, CPU, m) {
    m.impl("norm_residual_forward", TORCH_BOX(&norm_residual_forward));
    m.impl("norm_residual_backward", TORCH_BOX(&norm_residual_backward));
}

}  // namespace dla
