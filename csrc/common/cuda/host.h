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

// A map like this one, or the empty tensor that stands for one that is not needed.
inline Tensor map_or_empty(bool need, const Tensor& like) { return need ? new_like(like) : new_tensor(like, {0}); }

template <class T>
Map<T> map_if(const Tensor& x) {
    return x.numel() > 0 ? map_of<T>(x) : Map<T>{};
}

template <class T>
Map<T> map_if(const std::optional<Tensor>& x) {
    return x ? map_if<T>(*x) : Map<T>{};
}

template <class A>
A* mutable_data_if(const Tensor& x) {
    return x.numel() > 0 ? mutable_data_of<A>(x) : nullptr;
}

}  // namespace dla
