// Plain types that the CPU's hosts and kernels share: no torch beyond its header-only number types.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "common/shape.h"

namespace dla {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// Channels_last maps are cut into runs of whole rows. The cut depends on the shape alone, never on the number of
// threads, so that sums over the runs, added in order, always have the same bits.
struct RowRuns {
    int64_t rows, count, height;

    explicit RowRuns(const Shape& s)
        : rows(std::max<int64_t>(4, ceil_div(kElements, std::max<int64_t>(1, s.W * s.C)))),
          count(ceil_div(s.H, rows)),
          height(s.H) {}

    struct Run {
        int64_t b, first, last;
    };
    // The rows of run k of all samples'.
    Run run(int64_t k) const {
        const int64_t first = k % count * rows;
        return {k / count, first, std::min(height, first + rows)};
    }

    static constexpr int64_t kElements = 1 << 15;  // 128 KiB of float32: little beside a map, much beside a task switch
};

// Uninitialised scratch memory, from the beginning of a cache line on.
template <class A>
class Scratch {
  public:
    explicit Scratch(int64_t size)
        : data_(static_cast<A*>(::operator new(std::max<int64_t>(size, 1) * sizeof(A), kLine))) {}
    Scratch(int64_t size, A value) : Scratch(size) { std::fill_n(data_.get(), size, value); }
    A* get() const { return data_.get(); }
    A& operator[](int64_t i) const { return data_[i]; }

  private:
    static constexpr std::align_val_t kLine{64};
    struct Free {
        void operator()(A* data) const { ::operator delete(data, kLine); }
    };
    std::unique_ptr<A[], Free> data_;
};

}  // namespace dla
