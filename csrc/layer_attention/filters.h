// What layer_attention's projections take, on the CPU and on the GPU.
#pragma once

#include "common/shape.h"

namespace dla::layer_attention {

// What queries and keys are made of. The filters slide along the channels: the query's over the last layer's features,
// a key's over those of its layer times the gate. With a single filter, the last layer's, the others are keys already,
// refreshed ones.
template <class A>
struct Filters {
    int64_t B, layers, C, K, filters;
    const A *features, *gates;            // [B, layers, C]
    const A *query_weight, *key_weights;  // [K], [filters, K]

    DLA_HOST_DEVICE int64_t row(int64_t b, int64_t m) const { return (b * layers + m) * C; }
    DLA_HOST_DEVICE const A* key_filter(int64_t m) const {
        const int64_t at = m - (layers - filters);
        return at < 0 ? nullptr : key_weights + at * K;
    }
};

}  // namespace dla::layer_attention
