// A value map on CUDA, for layer_attention.
#pragma once

#include <tuple>

#include "common/cuda/host.h"

namespace dla {

// depthwise3x3(x, weight), and its mean over H, W.
std::tuple<Tensor, Tensor> cuda_value_map(const Tensor& x, const Tensor& weight);

}  // namespace dla
