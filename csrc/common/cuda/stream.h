// Where a CUDA op runs, and where it is registered. The tests' CPU build has its own version of this file.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

typedef struct CUstream_st* cudaStream_t;

#define DLA_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(dla_kernels, CUDA, m)

namespace dla {

// Makes the tensor's device the current one while it lives, and tells torch's current stream there.
class OnDevice {
  public:
    explicit OnDevice(const torch::stable::Tensor& x) : guard_(x.get_device()) {
        void* stream = nullptr;
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &stream) == 0, "no current CUDA stream");
        stream_ = static_cast<cudaStream_t>(stream);
    }
    cudaStream_t stream() const { return stream_; }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_ = nullptr;
};

}  // namespace dla
