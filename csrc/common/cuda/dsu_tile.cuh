// The Dynamic Sharing Unit's products of matrices, in tiles through shared memory.
#pragma once

#include <algorithm>

#include "common/cuda/vector.cuh"

namespace dla {

// As many as leave 168 registers for each; fewer of float64, which takes twice as many.
template <class A>
constexpr int kDsuThreads = sizeof(A) == 8 ? 256 : 384;

// threadIdx.x, but what follows from it is computed where it stands: else the compiler would keep every phase's
// addresses in registers through all of them.
__device__ __forceinline__ unsigned thread_here() {
    unsigned thread = threadIdx.x;
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(thread));
#endif
    return thread;
}

// Sums over k < K of p(i)(k) q(j)(k), for kI values of i and kJ of j. A chunk of kChunk k lies in shared memory while
// the next one is on its way into registers. A thread has 4 by 4 sums, 16 FMAs for two vectors of float32 from shared
// memory; kThreads threads have a tile, and the block's groups of so many share the k of a chunk, one after the other.
template <class A, int kI, int kJ, int kChunk>
struct DsuTile {
    static constexpr int kSide = 4, kAll = kDsuThreads<A>, kThreads = kI * kJ / (kSide * kSide);
    static constexpr int kGroups = kAll / kThreads;
    // Vectors stay aligned, and 8 k by 4 lanes of a transposed store meet different banks.
    static constexpr int kPitchI = kI + 4, kPitchJ = kJ + 4;
    static constexpr int kShared = std::max(kChunk * (kPitchI + kPitchJ), kGroups * kI * kJ);
    static_assert(kChunk % 8 == 0 && kChunk * kI % kAll == 0 && kChunk * kJ % kAll == 0 && kGroups > 0);

    // A chunk of one operand: where k is what lies side by side, 8 lanes take a sector of it, else a row's lanes do.
    template <int kWide, bool kAlong>
    struct Operand {
        A next[kChunk * kWide / kAll];

        // Lanes side by side along k, and values of i beside them.
        static constexpr int kRun = kAlong ? 8 : 1, kLines = kAll / kRun;

        // k and i of the thread's value `at`. Where the lines are whole multiples of kWide, i is the same for all.
        static __device__ __forceinline__ int k_of(unsigned thread, int at) {
            const unsigned line = thread / kRun;
            if (kLines % kWide == 0) return (line / kWide + at * (kLines / kWide)) * kRun + thread % kRun;
            return (line + at * kLines) / kWide * kRun + thread % kRun;
        }
        static __device__ __forceinline__ int i_of(unsigned thread, int at) {
            return (thread / kRun + (kLines % kWide == 0 ? 0 : at * kLines)) % kWide;
        }
        template <class From>
        __device__ __forceinline__ void read(const From& from, int64_t k0, int64_t K) {
            const unsigned thread = thread_here();
            const auto first = from(i_of(thread, 0));
#pragma unroll
            for (int at = 0; at < kChunk * kWide / kAll; ++at) {
                const int64_t k = k0 + k_of(thread, at);
                if (k >= K) {
                    next[at] = A(0);
                } else {
                    next[at] = kLines % kWide == 0 ? first(k) : from(i_of(thread, at))(k);
                }
            }
        }
        __device__ __forceinline__ void write(A* shared) const {
            const unsigned thread = thread_here();
#pragma unroll
            for (int at = 0; at < kChunk * kWide / kAll; ++at) {
                shared[k_of(thread, at) * (kWide + 4) + i_of(thread, at)] = next[at];
            }
        }
    };

    static __device__ __forceinline__ void read_side(const A* from, A (&to)[kSide]) {
        constexpr int N = kVector<A>;
#pragma unroll
        for (int i = 0; i < kSide; i += N) {
            A part[N];
            load(from + i, part);
#pragma unroll
            for (int k = 0; k < N; ++k) to[i + k] = part[k];
        }
    }

    // Then calls finish(sum), where sum(i, j) is one of them, for any thread.
    template <bool kPAlong, bool kQAlong, class P, class Q, class Finish>
    static __device__ __forceinline__ void run(int64_t K, const P& p, const Q& q, A* shared, const Finish& finish) {
        const int thread = thread_here(), group = thread / kThreads, place = thread % kThreads;
        const int i0 = place / (kJ / kSide) * kSide, j0 = place % (kJ / kSide) * kSide;
        A *p_chunk = shared, *q_chunk = shared + kChunk * kPitchI;
        Operand<kI, kPAlong> of_p;
        Operand<kJ, kQAlong> of_q;
        A sums[kSide][kSide] = {};
        of_p.read(p, 0, K);
        of_q.read(q, 0, K);
#pragma unroll 1
        for (int64_t k0 = 0; k0 < K; k0 += kChunk) {
            of_p.write(p_chunk);
            of_q.write(q_chunk);
            __syncthreads();
            if (k0 + kChunk < K) {
                of_p.read(p, k0 + kChunk, K);
                of_q.read(q, k0 + kChunk, K);
            }
            const int end = group < kGroups ? static_cast<int>(min(K - k0, int64_t(kChunk))) : 0;
#pragma unroll 4
            for (int k = group; k < end; k += kGroups) {
                A u[kSide], v[kSide];
                read_side(p_chunk + k * kPitchI + i0, u);
                read_side(q_chunk + k * kPitchJ + j0, v);
#pragma unroll
                for (int i = 0; i < kSide; ++i) {
#pragma unroll
                    for (int j = 0; j < kSide; ++j) sums[i][j] += u[i] * v[j];
                }
            }
            __syncthreads();
        }
        if (group < kGroups) {
#pragma unroll
            for (int i = 0; i < kSide; ++i) {
#pragma unroll
                for (int j = 0; j < kSide; ++j) shared[group * kI * kJ + (i0 + i) * kJ + j0 + j] = sums[i][j];
            }
        }
        __syncthreads();
        finish([&](int i, int j) {
            A total = 0;
#pragma unroll
            for (int n = 0; n < kGroups; ++n) total += shared[n * kI * kJ + i * kJ + j];
            return total;
        });
        __syncthreads();
    }
};

// Outputs of rows and channels; of rows and hidden units, few and with long sums; of rows and three gates of a channel.
template <class A>
using DsuSquare = DsuTile<A, 32, 32, 96>;
template <class A>
using DsuUnits = DsuTile<A, 16, 16, 192>;
constexpr int kDsuTileRows = 32, kDsuTileGates = 16, kDsuTileUnits = 16;
template <class A>
using DsuGates = DsuTile<A, kDsuTileRows, 3 * kDsuTileGates, 48>;
template <class A>
constexpr int kDsuTiledShared = std::max({DsuSquare<A>::kShared, DsuUnits<A>::kShared, DsuGates<A>::kShared});

}  // namespace dla
