// CUDA's half with the conversions of torch's.
#pragma once

#include <torch/headeronly/util/Half.h>

struct __half {
    unsigned short bits;
};

inline float __half2float(__half v) { return c10::detail::fp16_ieee_to_fp32_value(v.bits); }
inline __half __float2half_rn(float v) { return {c10::detail::fp16_ieee_from_fp32_value(v)}; }
