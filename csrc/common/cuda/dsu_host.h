// The Dynamic Sharing Unit's weights, from a tensor to what the CUDA kernels take.
#pragma once

#include "common/cuda/dsu.h"
#include "common/cuda/host.h"

namespace dla {

// Calls body with a null pointer to the type of the state.
template <class Body>
void on_state_dtype(const Tensor& x, const Body& body) {
    if (x.scalar_type() == ScalarType::Double) return body(static_cast<double*>(nullptr));
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "the state must be float32 or float64");
    body(static_cast<float*>(nullptr));
}

template <class A>
Dsu<A> dsu_of(const Tensor& weights, int64_t C, bool joint, int64_t activation) {
    const Dsu<A> dsu{data_of<A>(weights), C, Dsu<A>::reduced(weights.numel(), C, joint), joint,
                     static_cast<DsuActivation>(activation)};
    STD_TORCH_CHECK(dsu.size() == weights.numel(), "a DSU of ", C, " channels has no ", weights.numel(), " weights");
    return dsu;
}

}  // namespace dla
