// What refresh_gates' CUDA kernels take. M = B T rows of features and gates, T of them with the same h and c.
#pragma once

#include "common/cuda/dsu.h"

namespace dla {

template <class A>
struct RefreshGates {
    Dsu<A> dsu;
    int64_t B, T;
    const A *features, *gates;  // [M, C]
    const A *h, *c;             // [B, C]
    bool of_context;            // whether the new context gates a layer, or the new hidden state

    DLA_HOST_DEVICE int64_t M() const { return B * T; }
};

template <class A>
struct RefreshGatesForward : RefreshGates<A> {
    A* out;               // [M, C]
    A *product, *hidden;  // [M, C] and [M, hidden], scratch
};

template <class A>
struct RefreshGatesBackward : RefreshGates<A> {
    const A* grad;                  // [M, C]
    A *grad_features, *grad_gates;  // [M, C]
    A *grad_h, *grad_c;             // [B, C]
    A* grad_weights;
    A* scratch;  // refresh_gates_scratch() values
};

template <class A>
void refresh_gates_forward(const RefreshGatesForward<A>&, cudaStream_t);
template <class A>
int64_t refresh_gates_scratch(const RefreshGatesBackward<A>&);
template <class A>
void refresh_gates_backward(const RefreshGatesBackward<A>&, cudaStream_t);

}  // namespace dla
