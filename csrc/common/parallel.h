// torch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace dla {

// Runs body(begin, end) over [0, tasks), where a task handles about `elements` elements; short work stays on this
// thread.
template <class Body>
void parallel(int64_t tasks, int64_t elements, const Body& body) {
    constexpr int64_t kGrain = 1 << 15;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
    if (tasks > 0) torch::stable::parallel_for(0, tasks, grain, body);
}

}  // namespace dla
