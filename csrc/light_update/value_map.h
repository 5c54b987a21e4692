// A value map on CUDA and its backward, for layer_attention.
#pragma once

#include <optional>
#include <tuple>

#include "common/cuda/host.h"

namespace dla {

// depthwise3x3(x, weight), and its mean over H, W.
std::tuple<Tensor, Tensor> cuda_value_map(const Tensor& x, const Tensor& weight);

// The gradients of x, empty where it is not needed, and of weight: from that of x so far, those of the value map, by
// the layers and where it is read elsewhere, and that of its mean. x's takes the layout of `grad`.
std::tuple<Tensor, Tensor> cuda_value_map_backward(const Tensor& grad_x, const Tensor& grad,
                                                   const std::optional<Tensor>& grad_read,
                                                   const std::optional<Tensor>& grad_mean, const Tensor& x,
                                                   const Tensor& weight, bool need_x);

}  // namespace dla
