// What the hosts of CUDA kernels share: tensors are common/tensor.h's, the element types are CUDA's, of which a host
// only needs the names.
#pragma once

#include "common/cuda/stream.h"
#include "common/tensor.h"

struct __half;
struct __nv_bfloat16;

namespace dla {

// Calls body with a null pointer to the element type of the CUDA kernels.
template <class Body>
void on_cuda_dtype(const Tensor& x, const Body& body) {
    on_dtype_of<__nv_bfloat16, __half>(x, body);
}

template <class A>
A* mutable_data_if(const Tensor& x) {
    return x.numel() > 0 ? mutable_data_of<A>(x) : nullptr;
}

}  // namespace dla
