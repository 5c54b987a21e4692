// Sums over runs of rows.
#pragma once

#include "common/types.h"

namespace dla {

// partials [B, count, width] -> totals [B, width], added in order.
template <class A>
void add_runs(const Shape& s, int64_t count, int64_t width, const A* partials, A* totals) {
    for (int64_t b = 0; b < s.B; ++b) {
        A* total = totals + b * width;
        std::fill_n(total, width, A(0));
        for (int64_t k = 0; k < count; ++k) {
            const A* partial = partials + (b * count + k) * width;
            for (int64_t i = 0; i < width; ++i) total[i] += partial[i];
        }
    }
}

}  // namespace dla
