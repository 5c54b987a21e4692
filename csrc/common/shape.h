// Plain types that hosts and kernels share, on the CPU and on the GPU: no header of torch, none of CUDA.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define DLA_HOST_DEVICE __host__ __device__
#else
#define DLA_HOST_DEVICE
#endif

namespace dla {

// Sums over a map, and the recurrent state beside it: float64 for float64 maps, else float32.
template <class T>
using Acc = std::conditional_t<std::is_same_v<std::remove_const_t<T>, double>, double, float>;

struct Shape {
    int64_t B, C, H, W;
    DLA_HOST_DEVICE int64_t HW() const { return H * W; }
};

// A map [B, C, H, W] whose rows follow each other without gaps. Either its pixels are adjacent (pixel == 1, NCHW) or
// its channels are (channel == 1, channels_last); batch and the other stride are free, so slices need no copy.
template <class T>
struct Map {
    T* data = nullptr;
    int64_t batch = 0, channel = 0, pixel = 0;

    DLA_HOST_DEVICE T* at(int64_t b, int64_t c, int64_t p) const { return data + b * batch + c * channel + p * pixel; }
    DLA_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

DLA_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DLA_HOST_DEVICE inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace dla
