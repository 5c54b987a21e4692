// CUDA's bfloat16 with the conversions of torch's.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

struct __nv_bfloat16 {
    unsigned short bits;
};

inline float __bfloat162float(__nv_bfloat16 v) { return c10::detail::f32_from_bits(v.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {c10::detail::round_to_nearest_even(v)}; }
