// Elements in memory and in registers: maps hold T, kernels compute in Acc<T>.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "common/shape.h"

namespace dla {

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T narrow(Acc<T> v) {
    if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(v);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __float2bfloat16_rn(v);
    } else {
        return v;
    }
}

// Elements of a 16-byte access, the widest there is.
template <class T>
constexpr int kVector = 16 / sizeof(T);

template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
    using type = unsigned short;
};
template <>
struct WordOf<4> {
    using type = unsigned;
};
template <>
struct WordOf<8> {
    using type = uint2;
};
template <>
struct WordOf<16> {
    using type = uint4;
};

// N elements as they lie in memory, moved as one access; the address must be a multiple of their size.
template <class T, int N>
using Word = typename WordOf<N * sizeof(T)>::type;

template <int N, class T>
__device__ __forceinline__ Word<T, N> fetch(const T* from) {
    return *reinterpret_cast<const Word<T, N>*>(from);
}

// Two adjacent bfloat16 are the upper halves of two float32: one instruction for each.
__device__ __forceinline__ void widen_pair(unsigned pair, float& low, float& high) {
    const unsigned first = pair << 16, second = pair & 0xffff0000u;
    memcpy(&low, &first, sizeof low);
    memcpy(&high, &second, sizeof high);
}

template <class T, int N>
__device__ __forceinline__ void unpack(const Word<T, N>& word, Acc<T> (&to)[N]) {
    if constexpr (std::is_same_v<T, __nv_bfloat16> && N % 2 == 0) {
        unsigned pairs[N / 2];
        memcpy(pairs, &word, sizeof word);
#pragma unroll
        for (int i = 0; i < N; i += 2) widen_pair(pairs[i / 2], to[i], to[i + 1]);
    } else {
        T parts[N];
        memcpy(parts, &word, sizeof word);
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = widen(parts[i]);
    }
}

template <int N, class T>
__device__ __forceinline__ void load(const T* from, Acc<T> (&to)[N]) {
    unpack<T>(fetch<N>(from), to);
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const Acc<T> (&from)[N]) {
    T parts[N];
#pragma unroll
    for (int i = 0; i < N; ++i) parts[i] = narrow<T>(from[i]);
    Word<T, N> word;
    memcpy(&word, parts, sizeof word);
    *reinterpret_cast<Word<T, N>*>(to) = word;
}

// Whether vectors of N elements along its adjacent axis (of `length`) cover this map: decided at the launch. A map that
// is not there never objects.
template <int N, class T>
bool in_vectors(const Map<T>& map, int64_t length) {
    const int64_t other = map.pixel == 1 ? map.channel : map.pixel;
    return !map || (length % N == 0 && map.batch % N == 0 && other % N == 0 &&
                    reinterpret_cast<uintptr_t>(map.data) % (N * sizeof(T)) == 0);
}

}  // namespace dla
