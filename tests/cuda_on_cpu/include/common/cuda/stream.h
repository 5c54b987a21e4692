// Stands before csrc/common/cuda/stream.h: here the current device is the CPU, it has no streams, and the ops are
// registered for CPU tensors in a library of their own.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

typedef struct CUstream_st* cudaStream_t;

#define DLA_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(dla_kernels_cuda_on_cpu, CPU, m)

namespace dla {

class OnDevice {
  public:
    explicit OnDevice(const torch::stable::Tensor&) {}
    cudaStream_t stream() const { return nullptr; }
};

}  // namespace dla
