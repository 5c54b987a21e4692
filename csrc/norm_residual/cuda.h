// What norm_residual's CUDA kernels take. Vectors are [C] unless another shape is given; a null pointer or map stands
// for what is not there or not needed.
#pragma once

#include "common/shape.h"

typedef struct CUstream_st* cudaStream_t;

namespace dla {

// Where the ReLU stands: nowhere, after the normalisation, or after the addition.
enum class Relu : int64_t { none, branch, sum };

template <class T>
struct NormMoments {
    Shape shape;
    Map<const T> o;
    bool channels_last;
    Acc<T>*mean, *var;  // [B, C]
    Acc<T>* parts;      // scratch, norm_moments_scratch() values
};

template <class T>
struct NormForward {
    Shape shape;
    Map<const T> x, o;
    Map<T> out;
    bool channels_last;
    const Acc<T>*mean, *var;  // [rows, C]: of every sample, or already merged where rows is 1
    int64_t rows;
    const Acc<T>*weight, *bias;
    const Acc<T>* keep;  // [B]
    Acc<T>* y;           // [B, C]
    Acc<T>* parts;       // scratch, norm_forward_scratch() values
    Acc<T>*used_mean, *used_var;
    Acc<T> eps;
    Relu relu;
};

template <class T>
struct NormGradient {
    Shape shape;
    Map<const T> grad_out, o, out;  // out where the ReLU follows the addition
    bool channels_last;
    const Acc<T>* grad_y;  // [B, C]
    const Acc<T>*mean, *var, *weight, *bias;
    const Acc<T>* keep;  // [B]
    Acc<T> eps;
    Relu relu;
};

template <class T>
struct NormSums : NormGradient<T> {
    Acc<T>*grad_weight, *grad_bias;
    Acc<T>* grad_keep;  // [B]
    Acc<T>* scratch;    // norm_sums_scratch() values
};

template <class T>
struct NormBackward : NormGradient<T> {
    const Acc<T>*sum_weight, *sum_bias;
    Acc<T> count;
    Map<T> grad_x, grad_o;
};

// The running statistics may be of any dtype, `stride` apart.
template <class T, class A>
struct RunningStats {
    T *running_mean, *running_var;
    int64_t mean_stride, var_stride;
    int64_t* batches;  // [1]
    const A *mean, *var;
    int64_t C;
    double momentum;  // NaN: 1 / batches
    int64_t count;
};

template <class T>
int64_t norm_moments_scratch(const NormMoments<T>&);
template <class T>
void norm_moments(const NormMoments<T>&, cudaStream_t);
template <class T>
int64_t norm_forward_scratch(const NormForward<T>&);
template <class T>
void norm_forward(const NormForward<T>&, cudaStream_t);
template <class T>
int64_t norm_sums_scratch(const NormSums<T>&);
template <class T>
void norm_sums(const NormSums<T>&, cudaStream_t);
template <class T>
void norm_backward(const NormBackward<T>&, cudaStream_t);
template <class T, class A>
void update_running_stats(const RunningStats<T, A>&, cudaStream_t);

}  // namespace dla
