// What gap_dsu's CUDA kernels take; a null pointer stands for what is not there.
#pragma once

#include "common/cuda/dsu.h"

namespace dla {

template <class T>
struct Pool {
    Shape shape;
    Map<const T> x;
    bool channels_last;
    Acc<T>* y;  // [B, C]
};

template <class A>
struct GapDsuForward {
    Dsu<A> dsu;
    int64_t B;
    const A *y, *h, *c, *carried;  // [B, C]
    bool of_context;
    A *new_h, *new_c, *gate;  // [B, C]
    A* hidden;                // [B, hidden], scratch
};

template <class A>
struct GapDsuBackward {
    Dsu<A> dsu;
    int64_t B;
    const A *grad_of_y, *grad_new_h, *grad_new_c, *grad_gate;  // [B, C]
    const A *y, *h, *c, *carried;                              // [B, C]
    bool of_context;
    A *grad_y, *grad_h, *grad_c, *grad_carried;  // [B, C]
    A* grad_weights;
    A* scratch;  // gap_dsu_scratch() values
};

template <class T>
void gap_pool(const Pool<T>&, cudaStream_t);
template <class A>
void gap_dsu_forward(const GapDsuForward<A>&, cudaStream_t);
template <class A>
int64_t gap_dsu_scratch(const GapDsuBackward<A>&);
template <class A>
void gap_dsu_backward(const GapDsuBackward<A>&, cudaStream_t);

}  // namespace dla
