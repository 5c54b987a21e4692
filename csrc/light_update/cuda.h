// What the host and the CUDA kernels of light_update share.
#pragma once

#include "common/shape.h"

struct CUstream_st;

namespace dla::light_update {

// The vectors and filters as the op takes them; the carry's are null where it has none. y may be null, the attention is
// 1 then: o is a value map.
template <class A>
struct Vectors {
    const A *y, *query_weight, *key_weight;  // [B, C], [taps] each
    const A* value_weight;                   // [C, 9]
    const A *carry_scale, *gate;             // [C], [B, C]
    const A* carry_weight;                   // [C, 9]
    int64_t taps, head_dim;
};

// The sums over o's gradient that all gradients of vectors and filters follow from: 9 with x and 9 with carried.
constexpr int kProducts = 18;

template <class T>
struct Forward {
    using A = Acc<T>;
    Shape shape;
    Vectors<A> vectors;
    Map<const T> x, carried;
    Map<T> o, out;    // o may be null where out is there, and out is null but where BatchNorm is folded
    A *mean, *other;  // [B, C]: o's mean; o's variance, or the mean of out where that is there
    const A *norm_mean, *norm_var, *norm_weight, *norm_bias;  // [C], with out
    A eps;
    A* parts;  // scratch, 3 for every part of a map and channel
};

template <class T>
struct Backward {
    using A = Acc<T>;
    Shape shape;
    Vectors<A> vectors;
    Map<const T> grad_out, grad_o, o, x, carried;  // grad_o may be null, and carried
    const A *grad_out_mean, *grad_o_mean;          // [B, C] or null
    // [C]; the last two may be null, and all of a value map, of which o is the gradient itself.
    const A *mean, *var, *weight, *sum_weight, *sum_bias;
    const A* keep;  // [B] or null
    A eps, count;
    Map<T> grad_x, grad_carried;  // either may be null
    A* parts;                     // scratch, kProducts for every part of a map and channel
    A* rows;                      // scratch, row_length() for every sample
    // [B, C], [taps] twice, [C, 9], [C], [B, C], [C, 9]; the carry's may be null, and of a value map the first three.
    A *grad_y, *grad_query_weight, *grad_key_weight, *grad_value_weight, *grad_carry_scale, *grad_gate,
        *grad_carry_weight;

    // A sample's share in the gradients of filters and of the carry's scale, then three vectors.
    DLA_HOST_DEVICE int64_t summed() const { return 19 * shape.C + 2 * vectors.taps; }
    DLA_HOST_DEVICE int64_t row_length() const { return summed() + 3 * shape.C; }
};

// How a block cuts a map. It holds `lanes` vectors of adjacent channels in channels_last, `lanes` planes in NCHW. Its
// threads stand in strips of columns, in NCHW also in `groups` bands of rows. `maps` are those that backward has
// products of.
struct Tiling {
    int lanes, strips, groups, maps, rows, columns;
    int chunks, tiles, runs;  // blocks along C, W and H
    int shared;               // bytes

    DLA_HOST_DEVICE int members() const { return strips * groups; }
    DLA_HOST_DEVICE int parts() const { return tiles * runs; }
    DLA_HOST_DEVICE int64_t blocks() const { return int64_t(chunks) * parts(); }  // of a sample
};

// Decided by shape and type alone, so that sums always run in the same order. `maps` are those that backward has
// products of, 0 in forward.
template <class T>
Tiling tiling(const Shape& shape, bool channels_last, int maps);

template <class T>
void launch(const Forward<T>& args, const Tiling& tiling, bool channels_last, CUstream_st* stream);
template <class T>
void launch(const Backward<T>& args, const Tiling& tiling, bool channels_last, CUstream_st* stream);

}  // namespace dla::light_update
