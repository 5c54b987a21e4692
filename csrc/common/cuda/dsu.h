// The Dynamic Sharing Unit (Eq. 7, 8, 9) as its CUDA kernels take it: one flat tensor of weights, and where its parts
// are.
#pragma once

#include "common/shape.h"

typedef struct CUstream_st* cudaStream_t;

namespace dla {

// In the order of dla_kernels.common.ACTIVATIONS.
enum class DsuActivation { identity, tanh, relu, sigmoid };

// Offsets of the linear layers that y or h goes through, in their forms
//   joint  s = ReLU(W1 [h, y]), gates = W2 s + b2                           W1 [R, 2C], W2 [3C, R], b2 [3C]
//   split  s = ReLU(W1 y + b1), gates = W2 s + b2, plus the same of h       W1 [R, C], b1 [R], W2 [3C, R], b2 [3C]
// A joint unit has its W2 and b2 with y.
struct DsuBranch {
    int64_t reduce, pitch, reduce_bias, expand, expand_bias;
};

template <class A>
struct Dsu {
    const A* weights;
    int64_t C, R;
    bool joint;
    DsuActivation activation;

    static int64_t reduced(int64_t weights, int64_t C, bool joint) {
        return joint ? (weights - 3 * C) / (5 * C) : (weights - 6 * C) / (8 * C + 2);
    }
    DLA_HOST_DEVICE int64_t size() const { return joint ? 5 * C * R + 3 * C : 8 * C * R + 2 * R + 6 * C; }
    // Units behind the ReLU: a split one has y's, then h's.
    DLA_HOST_DEVICE int64_t hidden() const { return joint ? R : 2 * R; }
    DLA_HOST_DEVICE DsuBranch y() const {
        if (joint) return {C, 2 * C, -1, 2 * C * R, 5 * C * R};
        return {0, C, C * R, C * R + R, 4 * C * R + R};
    }
    DLA_HOST_DEVICE DsuBranch h() const {
        if (joint) return {0, 2 * C, -1, -1, -1};
        const int64_t first = 4 * C * R + R + 3 * C;
        return {first, C, first + C * R, first + C * R + R, first + 4 * C * R + R};
    }
    // Where the parts of the gates begin.
    DLA_HOST_DEVICE int64_t input() const { return joint ? C : 0; }
    DLA_HOST_DEVICE int64_t forget() const { return joint ? 2 * C : C; }
    DLA_HOST_DEVICE int64_t candidate() const { return joint ? 0 : 2 * C; }
};

}  // namespace dla
