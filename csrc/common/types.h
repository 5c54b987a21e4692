// Plain types that hosts and kernels share: no torch beyond its header-only number types.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace dla {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// Sums over a map, and the recurrent state beside it: float64 for float64 maps, else float32.
template <class T>
using Acc = std::conditional_t<std::is_same_v<std::remove_const_t<T>, double>, double, float>;

struct Shape {
    int64_t B, C, H, W;
    int64_t HW() const { return H * W; }
};

// A map [B, C, H, W] whose rows follow each other without gaps. Either its pixels are adjacent (pixel == 1, NCHW) or
// its channels are (channel == 1, channels_last); batch and the other stride are free, so slices need no copy.
template <class T>
struct Map {
    T* data = nullptr;
    int64_t batch = 0, channel = 0, pixel = 0;

    T* at(int64_t b, int64_t c, int64_t p) const { return data + b * batch + c * channel + p * pixel; }
    explicit operator bool() const { return data != nullptr; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Channels_last maps are cut into runs of whole rows. The cut depends on the shape alone, never on the number of
// threads, so that sums over the runs, added in order, always have the same bits.
struct RowRuns {
    int64_t rows, count;

    explicit RowRuns(const Shape& s)
        : rows(std::max<int64_t>(4, ceil_div(kElements, std::max<int64_t>(1, s.W * s.C)))),
          count(ceil_div(s.H, rows)) {}

    static constexpr int64_t kElements = 1 << 15;  // 128 KiB of float32: little beside a map, much beside a task switch
};

// Uninitialised scratch memory.
template <class A>
class Scratch {
  public:
    explicit Scratch(int64_t size) : data_(new A[std::max<int64_t>(size, 1)]) {}
    Scratch(int64_t size, A value) : Scratch(size) { std::fill_n(data_.get(), size, value); }
    A* get() const { return data_.get(); }
    A& operator[](int64_t i) const { return data_[i]; }

  private:
    std::unique_ptr<A[]> data_;
};

}  // namespace dla
