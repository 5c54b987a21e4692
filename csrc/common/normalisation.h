// BatchNorm over the channels, as vectors of C: what forward and backward of a normalised map need. Hosts only.
#pragma once

#include <cmath>

#include "common/types.h"

namespace dla {

// Statistics of `rows` samples, [rows, C], into those of the batch, by the law of total variance; one row is taken as
// it is.
template <class A>
void merge_samples(int64_t rows, int64_t C, const A* means, const A* vars, A* mean, A* var) {
    std::fill_n(mean, C, A(0));
    std::fill_n(var, C, A(0));
    for (int64_t b = 0; b < rows; ++b) {
        for (int64_t c = 0; c < C; ++c) mean[c] += means[b * C + c] / A(rows);
    }
    for (int64_t b = 0; b < rows; ++b) {
        for (int64_t c = 0; c < C; ++c) {
            const A apart = means[b * C + c] - mean[c];
            var[c] += (vars[b * C + c] + apart * apart) / A(rows);
        }
    }
}

// The normalised map is (o - mean) * scale + bias.
template <class A>
struct Normalisation {
    const A* mean;
    Scratch<A> inverse_std, scale;

    Normalisation(int64_t C, const A* mean, const A* var, const A* weight, double eps)
        : mean(mean), inverse_std(C), scale(C) {
        for (int64_t c = 0; c < C; ++c) {
            inverse_std[c] = A(1) / std::sqrt(var[c] + A(eps));
            scale[c] = weight[c] * inverse_std[c];
        }
    }
};

// The normalised map is o * scale + shift.
template <class A>
struct FoldedNorm : Normalisation<A> {
    Scratch<A> shift;

    FoldedNorm(int64_t C, const A* mean, const A* var, const A* weight, const A* bias, double eps)
        : Normalisation<A>(C, mean, var, weight, eps), shift(C) {
        for (int64_t c = 0; c < C; ++c) shift[c] = bias[c] - mean[c] * this->scale[c];
    }
};

// The gradient of o is scale * (that of the normalised map) + slope * (o - mean) + offset. The last two are what flows
// through the statistics, taken over `count` values, from the gradients of weight and bias; without them there are
// none, the statistics being constants.
template <class A>
struct NormGradient : Normalisation<A> {
    Scratch<A> slope, offset;

    NormGradient(int64_t C, const A* mean, const A* var, const A* weight, const A* grad_weight, const A* grad_bias,
                 double eps, int64_t count)
        : Normalisation<A>(C, mean, var, weight, eps), slope(C, A(0)), offset(C, A(0)) {
        for (int64_t c = 0; grad_weight && c < C; ++c) {
            slope[c] = -this->scale[c] * this->inverse_std[c] * grad_weight[c] / A(count);
            offset[c] = -this->scale[c] * grad_bias[c] / A(count);
        }
    }
};

}  // namespace dla
