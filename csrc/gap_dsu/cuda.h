// What gap_dsu's CUDA kernels take; a null pointer stands for what is not there.
#pragma once

#include "common/cuda/dsu.h"

namespace dla {

enum class MapType { float32, float64, float16, bfloat16 };

// A map of which GAP is taken, of any type.
struct Pool {
    Shape shape;
    MapType type;
    const void* x = nullptr;
    int64_t batch, channel, pixel;  // strides
    bool channels_last;
    bool vectors;  // whether it can be read in vectors

    template <class T>
    DLA_HOST_DEVICE Map<const T> map() const {
        return {static_cast<const T*>(x), batch, channel, pixel};
    }
};

template <class A>
struct GapDsuForward {
    Dsu<A> dsu;
    int64_t B;
    Pool pool;                     // of which y is taken, unless it is given
    A *pooled, *parts;             // [B, C], y where it is not given; scratch, gap_dsu_forward_scratch() values
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

// Sets pool.vectors, too.
template <class A>
int64_t gap_dsu_forward_scratch(GapDsuForward<A>&);
template <class A>
void gap_dsu_forward(const GapDsuForward<A>&, cudaStream_t);
template <class A>
int64_t gap_dsu_scratch(const GapDsuBackward<A>&);
template <class A>
void gap_dsu_backward(const GapDsuBackward<A>&, cudaStream_t);

}  // namespace dla
