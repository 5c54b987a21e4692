// torch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "common/isa.h"

namespace dla {

// Runs body(begin, end) over [0, tasks), where a task handles about `elements` elements; short work stays on this
// thread. What was written past the caches is there for all threads when it returns.
template <class Body>
void parallel(int64_t tasks, int64_t elements, const Body& body) {
    constexpr int64_t kGrain = 1 << 15;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
    if (tasks == 0) return;
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
        body(begin, end);
#if DLA_MULTI_ISA
        _mm_sfence();
#endif
    });
}

}  // namespace dla
