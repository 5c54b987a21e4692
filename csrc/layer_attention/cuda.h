// What the host and the CUDA kernels of layer_attention share.
#pragma once

#include "layer_attention/filters.h"

struct CUstream_st;

namespace dla::layer_attention {

// Maps of one kind that a launch takes, all by value: two such tables and the rest stay within the 4 KiB of parameters
// that every CUDA has, and ResNet-152's longest stage fits. More maps take more launches, which add up in scratch.
constexpr int kMaps = 36;

// A launch's part of the layers: `count` of them from `first` on.
struct Range {
    int64_t first = 0;
    int count = 0;
};

template <class A>
struct Attention {
    const A *q, *k, *gates;  // [B, C], [B, layers, C] twice
    int64_t layers, head_dim;
};

template <class A>
struct FilterGradients {
    const A *q, *k;                 // the given ones
    A *grad_features, *grad_gates;  // [B, layers, C]; the latter is added to
    A *grad_query_weight, *grad_key_weights;
};

// BatchNorm with its statistics, [C] each.
template <class A>
struct Norm {
    const A *mean, *var, *weight, *bias;
    A eps;
};

template <class T>
struct Forward {
    using A = Acc<T>;
    Shape shape;
    Attention<A> attention;
    Range range;
    Map<const T> values[kMaps];
    Map<A> before, after;  // sums of earlier launches, and for later ones; null where there are none
    Map<const T> x;        // with BatchNorm folded, else null
    Norm<A> norm;          // the same
    Map<T> out;            // o, or what a block makes of it
    A *mean, *var;         // [B, C], o's
    A* parts;              // scratch, 3 for every part of a map and channel
};

template <class T>
struct Backward {
    using A = Acc<T>;
    Shape shape;
    Attention<A> attention;
    Range range;
    Map<const T> values[kMaps];
    // Gradients that reach o in later layers, and this layer's weights there: [B, .., C], `batch` between samples.
    int later_count;
    Map<const T> later[kMaps];
    const A* later_weights[kMaps];
    int64_t later_batch[kMaps];
    Map<A> before, after;  // of the value map's gradient
    Map<const T> grad_out, o;
    Norm<A> norm;
    const A *sum_weight, *sum_bias, *keep;  // [C] twice, [B], or null
    A count;
    Map<T> grad_o, grad_value;  // null where they are not written, or not by this launch
    A* parts;                   // scratch, [B, runs, layers, C]: sums of o's gradient times the values
    const A* grad_key;          // [B, C], the gradient that the last key gets elsewhere, or null
    A *grad_q, *grad_k, *grad_gates, *weights;
};

// How a block cuts a map: `teams` of `team` threads, each with `lanes` vectors of channels side by side in
// channels_last and a plane of its own in NCHW. A thread takes kDepth vectors in each of `steps` steps down the map.
struct Plan {
    int lanes, team, teams, steps;
    bool vectors;
    unsigned chunks, runs;  // blocks along C, and down the map

    DLA_HOST_DEVICE int threads() const { return team * teams; }
    DLA_HOST_DEVICE int64_t blocks() const { return int64_t(chunks) * runs; }  // of a sample
};

// Bytes of adjacent channels that a block reads side by side in channels_last. Backward keeps sums of every layer for
// them, and has no room for as many.
constexpr int kForwardBytes = 256, kBackwardBytes = 128;

// Decided by shape and type, and by whether all maps can be read in vectors.
template <class T>
Plan plan(const Shape& shape, bool channels_last, bool vectors, int bytes);

template <class T>
bool in_vectors(const Shape& shape, bool channels_last, const Map<const T>& map);

template <class T>
void launch(const Forward<T>& args, const Plan& plan, bool channels_last, CUstream_st* stream);
template <class T>
void launch(const Backward<T>& args, const Plan& plan, bool channels_last, CUstream_st* stream);
template <class A>
void launch(const Filters<A>& args, A* q, A* k, A* key, CUstream_st* stream);
template <class A>
void launch(const Filters<A>& args, const FilterGradients<A>& grads, CUstream_st* stream);
// The vectors' gradients, once all launches of the above have left their parts.
template <class T>
void finish(const Backward<T>& args, const Plan& plan, CUstream_st* stream);

}  // namespace dla::layer_attention
