// The Dynamic Sharing Unit's phases, forward and backward, all of them in one launch. A block has kDsuRows rows, so
// that a weight that it reads serves as many; what one phase leaves for the next lies in global memory. A large unit's
// weights would keep a few blocks busy for long: there several blocks (gridDim.y) share the outputs of a phase, and all
// blocks are launched together, with a barrier of the grid between two phases. How the outputs are shared changes no
// sum. Where a large unit has many rows, its phases are products of matrices, in tiles through shared memory, which all
// blocks share: the shapes alone say which form a call takes.
#pragma once

#include <algorithm>

#include "common/cuda/dsu.h"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vector.cuh"

namespace dla {

// As many as leave 168 registers for each; fewer of float64, which takes twice as many.
template <class A>
constexpr int kDsuThreads = sizeof(A) == 8 ? 256 : 384;
template <class A>
constexpr int kDsuWarps = kDsuThreads<A> / kWarp;
constexpr int kDsuRows = 4;
// Lanes for a sum over the hidden units, of which there are few; 4 sums at once in a warp.
constexpr int kDsuSpan = 8;
// Weights in flight in a thread: 16 bytes of them.
template <class A>
constexpr int kDsuUnroll = 16 / sizeof(A);

// The phases of one launch, a bit for each. They stand one after the other, not in a loop, out of which the compiler
// would move every phase's addresses into registers.
struct DsuPhases {
    unsigned set;
    bool across = false;  // whether a phase takes what other blocks left

    // For the block's rows.
    template <class Body>
    __device__ __forceinline__ void run(int phase, const Body& body) const {
        if (!(set >> phase & 1)) return;
        if (set & ((1u << phase) - 1)) across ? grid_barrier() : __syncthreads();
        body();
    }

    // The last one, body(piece) for each of so many pieces, which the blocks share and which take all rows.
    template <class Body>
    __device__ __forceinline__ void run_pieces(int phase, int64_t pieces, const Body& body) const {
        if (!(set >> phase & 1)) return;
        if (set & ((1u << phase) - 1)) grid_barrier();
        for (int64_t i = blockIdx.x + int64_t(blockIdx.y) * gridDim.x; i < pieces; i += gridDim.x * gridDim.y) body(i);
    }
};

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

// What a launch is made for: its rows, values that a row's phases read in common (weights) and alone (a map), and
// the pieces of the phase `last`, where there is one.
struct DsuWork {
    int64_t rows, weights, of_row, pieces;
    int last;
};

// 256 KiB of float32: what one multiprocessor reads in a few microseconds, about the cost of two barriers.
constexpr int64_t kDsuSmall = 1 << 16;
// From so many weights and rows on a unit's phases go in tiles: with fewer most blocks would have none.
constexpr int64_t kDsuTiledWeights = 1 << 15, kDsuTiledRows = 64;

// `groups` takes DsuRows and so much shared memory, `tiles` DsuAllRows and as much as they need.
template <class A, class Args>
void launch_phases(void (*groups)(Args, DsuPhases), void (*tiles)(Args, DsuPhases), const Args& args,
                   const DsuWork& work, DsuPhases phases, size_t shared, cudaStream_t stream) {
    constexpr int64_t kSlice = 1 << 14;
    const bool tiled = work.weights >= kDsuTiledWeights && work.rows >= kDsuTiledRows;
    const int64_t values = work.weights + kDsuRows * work.of_row, all_groups = ceil_div(work.rows, kDsuRows);
    int64_t slices = values <= kDsuSmall || tiled ? 1 : std::min<int64_t>(64, ceil_div(values, kSlice));
    const auto run = [&](bool together, int64_t x, int64_t y, DsuPhases phases) {
        if (x == 0) return;
        const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y));
        launch_as(together, tiled ? tiles : groups, grid, kDsuThreads<A>,
                  tiled ? std::max(shared, kDsuTiledShared<A> * sizeof(A)) : shared, stream, args, phases);
    };
    const int64_t most = blocks_together();
    if (most == 0) {  // a launch for each phase
        for (unsigned bit = 1; bit <= phases.set; bit *= 2) {
            const bool last = work.pieces > 0 && bit == 1u << work.last;
            if (phases.set & bit) run(false, last ? work.pieces : all_groups, last ? 1 : slices, DsuPhases{bit});
        }
        return;
    }
    phases.across = true;
    if (tiled) return run(true, most, 1, phases);
    slices = std::max<int64_t>(1, std::min(slices, most / std::max<int64_t>(1, all_groups)));
    if (slices > 1) return run(true, all_groups, slices, phases);
    phases.across = false;
    // Without a last phase the blocks wait for nobody, so that any number will do.
    const int64_t blocks = work.pieces > 0 ? std::min(most, std::max(all_groups, work.pieces)) : all_groups;
    run(work.pieces > 0, blocks, 1, phases);
}

// A block's rows; beyond the last one it takes the last again, and does not store.
struct DsuRows {
    int64_t first, count;

    __device__ explicit DsuRows(int64_t count, int64_t group = blockIdx.x) : first(group * kDsuRows), count(count) {}

    // Calls body(rows) for each group of rows that the block has: one, where blocks share a group.
    template <class Body>
    static __device__ __forceinline__ void each_group(int64_t count, const Body& body) {
        // A wider counter costs a register too many on sm_80.
        for (unsigned group = blockIdx.x; int64_t(group) * kDsuRows < count; group += gridDim.x) {
            body(DsuRows(count, group));
        }
    }
    __device__ __forceinline__ int64_t row(int i) const { return min(first + i, count - 1); }
    __device__ __forceinline__ bool has(int i) const { return first + i < count; }
    static constexpr bool kTiled = false;
    static __device__ __forceinline__ int64_t size() { return kDsuRows; }
    // This one of the blocks that share the rows, and how many these are.
    static __device__ __forceinline__ unsigned block() { return blockIdx.y; }
    static __device__ __forceinline__ unsigned blocks() { return gridDim.y; }
};

// All rows, which all blocks share.
struct DsuAllRows {
    int64_t first = 0, count;

    __device__ explicit DsuAllRows(int64_t count) : count(count) {}

    template <class Body>
    static __device__ __forceinline__ void each_group(int64_t count, const Body& body) {
        body(DsuAllRows(count));
    }
    __device__ __forceinline__ int64_t row(int64_t i) const { return i; }
    __device__ __forceinline__ bool has(int64_t i) const { return i < count; }
    static constexpr bool kTiled = true;
    __device__ __forceinline__ int64_t size() const { return count; }
    static __device__ __forceinline__ unsigned block() { return blockIdx.x; }
    static __device__ __forceinline__ unsigned blocks() { return gridDim.x; }

    // body(first row, column tile) for this block's tiles of so many rows.
    template <class Body>
    static __device__ __forceinline__ void each_tile(int64_t count, int side, int64_t columns, const Body& body) {
        const int64_t tiles = ceil_div(count, side) * columns;
        for (int64_t tile = block(); tile < tiles; tile += blocks()) body(tile / columns * side, tile % columns);
    }
};

// The sample of a row, of T each. More rows than 32 bits count fit into no memory; a division of 64 bits would take
// longer than a load.
__device__ __forceinline__ int64_t dsu_sample(int64_t row, int64_t T) {
    return T == 1 ? row : static_cast<unsigned>(row) / static_cast<unsigned>(T);
}

template <class A>
__device__ __forceinline__ A sigmoid(A v) {
    return A(1) / (A(1) + exp(-v));
}

template <class A>
__device__ __forceinline__ A activate(DsuActivation activation, A v) {
    switch (activation) {
        case DsuActivation::tanh:
            return tanh(v);
        case DsuActivation::relu:
            return v <= A(0) ? A(0) : v;  // a NaN passes, as in torch
        case DsuActivation::sigmoid:
            return sigmoid(v);
        default:
            return v;
    }
}

// The activation's derivative at v.
template <class A>
__device__ __forceinline__ A activation_slope(DsuActivation activation, A v) {
    const A value = activate(activation, v);
    switch (activation) {
        case DsuActivation::tanh:
            return A(1) - value * value;
        case DsuActivation::relu:
            return v <= A(0) ? A(0) : A(1);
        case DsuActivation::sigmoid:
            return value * (A(1) - value);
        default:
            return A(1);
    }
}

// sums[part][i] += what falls to this lane of kSpan of x[i] . weights[part].
template <int kSpan, int kParts, class A>
__device__ __forceinline__ void dot(const A* const (&weights)[kParts], const A* const (&x)[kDsuRows], int K,
                                    A (&sums)[kParts][kDsuRows]) {
    constexpr int N = kVector<A>;
    const int lane = threadIdx.x % kSpan;
    uintptr_t low_bits = static_cast<uintptr_t>(K * sizeof(A));
#pragma unroll
    for (int i = 0; i < kDsuRows; ++i) low_bits |= reinterpret_cast<uintptr_t>(x[i]);
#pragma unroll
    for (int part = 0; part < kParts; ++part) low_bits |= reinterpret_cast<uintptr_t>(weights[part]);
    const auto run = [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
#pragma unroll(kParts > 1 ? 1 : 2)
        for (int k = lane * kWidth; k < K; k += kSpan * kWidth) {
            A w[kParts][kWidth];
#pragma unroll
            for (int part = 0; part < kParts; ++part) load(weights[part] + k, w[part]);
#pragma unroll
            for (int i = 0; i < kDsuRows; ++i) {
                A v[kWidth];
                load(x[i] + k, v);
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
#pragma unroll
                    for (int j = 0; j < kWidth; ++j) sums[part][i] += w[part][j] * v[j];
                }
            }
        }
    };
    low_bits % 16 == 0 ? run(std::integral_constant<int, N>()) : run(std::integral_constant<int, 1>());
}

// v[i], with all of v in registers.
template <class A>
__device__ __forceinline__ A select(const A (&v)[kDsuRows], int i) {
    A value = v[0];
#pragma unroll
    for (int k = 1; k < kDsuRows; ++k) value = i == k ? v[k] : value;
    return value;
}

// y [M, C] and h [M / T, C] -> s [M, hidden], behind the ReLU. A warp for each unit.
template <class A>
__device__ void dsu_reduce(const Dsu<A>& d, const DsuRows& rows, const A* y, const A* h, int64_t T, A* s, A*) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, hidden = d.hidden(), R = d.R;
    const A *y_rows[kDsuRows], *h_rows[kDsuRows];
#pragma unroll
    for (int i = 0; i < kDsuRows; ++i) {
        y_rows[i] = y + rows.row(i) * d.C;
        h_rows[i] = h + rows.row(i) / T * d.C;
    }
    for (int n = blockIdx.y * kDsuWarps<A> + warp; n < hidden; n += gridDim.y * kDsuWarps<A>) {
        const bool of_y = n < R, of_h = d.joint || !of_y;
        const int64_t k = of_y ? n : n - R;
        A sums[1][kDsuRows] = {};
        if (of_y) dot<kWarp, 1>({d.weights + d.y().reduce + k * d.y().pitch}, y_rows, d.C, sums);
        if (of_h) dot<kWarp, 1>({d.weights + d.h().reduce + k * d.h().pitch}, h_rows, d.C, sums);
        const A bias = d.joint ? A(0) : d.weights[(of_y ? d.y().reduce_bias : d.h().reduce_bias) + k];
#pragma unroll
        for (int i = 0; i < kDsuRows; ++i) sums[0][i] = warp_sum(sums[0][i]) + bias;
        const A v = select(sums[0], lane);
        if (lane < kDsuRows && rows.has(lane)) s[rows.row(lane) * hidden + n] = v <= A(0) ? A(0) : v;
    }
}

template <class A>
__device__ void dsu_reduce(const Dsu<A>& d, const DsuAllRows& rows, const A* y, const A* h, int64_t T, A* s,
                           A* shared) {
    constexpr int kSide = kDsuTileUnits;
    const int64_t C = d.C, R = d.R, M = rows.count, of_branch = ceil_div(R, kSide);
    rows.each_tile(M, kSide, of_branch * (d.joint ? 1 : 2), [&](int64_t m0, int64_t column) {
        const bool second = column >= of_branch;  // a split unit's h
        const int64_t n0 = column % of_branch * kSide;
        // A joint unit's weights have h's part before y's.
        const bool from_h = d.joint || second;
        const int64_t of_h = from_h ? C : 0, first = from_h ? d.h().reduce : d.y().reduce;
        const int64_t K = d.joint ? 2 * C : C, pitch = d.y().pitch;
        const auto p = [&](int i) {
            const int64_t m = m0 + i;
            const A *h_row = h + dsu_sample(m, T) * C, *y_row = y + m * C - of_h;
            return [=, inside = m < M](int64_t k) { return inside ? (k < of_h ? h_row : y_row)[k] : A(0); };
        };
        const auto q = [&](int j) {
            const A* row = d.weights + first + (n0 + j) * pitch;
            return [row, inside = n0 + j < R](int64_t k) { return inside ? row[k] : A(0); };
        };
        DsuUnits<A>::template run<true, true>(K, p, q, shared, [&](const auto& sum) {
            for (int at = thread_here(); at < kSide * kSide; at += kDsuThreads<A>) {
                const int64_t m = m0 + at / kSide, n = n0 + at % kSide;
                if (m >= M || n >= R) continue;
                const A bias = d.joint ? A(0) : d.weights[(second ? d.h().reduce_bias : d.y().reduce_bias) + n];
                const A v = sum(at / kSide, at % kSide) + bias;
                s[m * d.hidden() + (second ? R : 0) + n] = v <= A(0) ? A(0) : v;
            }
        });
    });
}

// s -> body(row, channel, input gate, forget gate, candidate), each behind its sigmoid or tanh.
template <class A, class Body>
__device__ __forceinline__ void dsu_expand(const Dsu<A>& d, const DsuRows& rows, const A* s, A*, const Body& body) {
    constexpr int kAtOnce = kDsuThreads<A> / kDsuSpan;
    const int C = d.C, R = d.R;
    const int64_t starts[3] = {d.input(), d.forget(), d.candidate()};
    for (int first = blockIdx.y * kAtOnce; first < C; first += gridDim.y * kAtOnce) {
        const int j = first + threadIdx.x / kDsuSpan, inside = min(j, C - 1);
        A gates[3][kDsuRows] = {};
        // Of y's units, and of h's where they have their own.
#pragma unroll 1
        for (int64_t from = 0; from < d.hidden(); from += R) {
            const A* weights = d.weights + (from == 0 ? d.y().expand : d.h().expand) + int64_t(inside) * R;
            const A* x[kDsuRows];
#pragma unroll
            for (int i = 0; i < kDsuRows; ++i) x[i] = s + rows.row(i) * d.hidden() + from;
            dot<kDsuSpan, 3>({weights + starts[0] * R, weights + starts[1] * R, weights + starts[2] * R}, x, R, gates);
        }
#pragma unroll
        for (int part = 0; part < 3; ++part) {
            const int64_t n = starts[part] + inside;
            A bias = d.weights[d.y().expand_bias + n];
            if (!d.joint) bias += d.weights[d.h().expand_bias + n];
#pragma unroll
            for (int i = 0; i < kDsuRows; ++i) gates[part][i] = warp_sum<1, kDsuSpan>(gates[part][i]) + bias;
        }
        // A lane for each row: every lane of the span has all sums.
        const int own = threadIdx.x % kDsuSpan;
        A mine[3];
#pragma unroll
        for (int part = 0; part < 3; ++part) mine[part] = select(gates[part], own);
        if (own < kDsuRows && j < C && rows.has(own)) {
            body(rows.row(own), int64_t(j), sigmoid(mine[0]), sigmoid(mine[1]), tanh(mine[2]));
        }
    }
}

template <class A, class Body>
__device__ __forceinline__ void dsu_expand(const Dsu<A>& d, const DsuAllRows& rows, const A* s, A* shared,
                                           const Body& body) {
    constexpr int kRows = kDsuTileRows, kEach = kDsuTileGates;
    const int64_t C = d.C, R = d.R, M = rows.count, hidden = d.hidden();
    rows.each_tile(M, kRows, ceil_div(C, kEach), [&](int64_t m0, int64_t column) {
        const int64_t c0 = column * kEach;
        // Of the gate `part` and the tile's channel c.
        const auto unit = [&](int part, int c) {
            return (part == 0 ? d.input() : part == 1 ? d.forget() : d.candidate()) + c0 + c;
        };
        const auto p = [&](int i) {
            const A* row = s + (m0 + i) * hidden;
            return [row, inside = m0 + i < M](int64_t k) { return inside ? row[k] : A(0); };
        };
        const auto q = [&](int j) {
            const int64_t at = unit(j / kEach, j % kEach) * R;
            const int64_t of_y = d.y().expand + at, of_h = d.h().expand + at - R;
            return [=, weights = d.weights, inside = c0 + j % kEach < C](int64_t k) {
                return inside ? weights[(k < R ? of_y : of_h) + k] : A(0);
            };
        };
        DsuGates<A>::template run<true, true>(hidden, p, q, shared, [&](const auto& sum) {
            for (int at = thread_here(); at < kRows * kEach; at += kDsuThreads<A>) {
                const int i = at / kEach, c = at % kEach;
                if (m0 + i >= M || c0 + c >= C) continue;
                A gates[3];
#pragma unroll
                for (int part = 0; part < 3; ++part) {
                    const int64_t n = unit(part, c);
                    A bias = d.weights[d.y().expand_bias + n];
                    if (!d.joint) bias += d.weights[d.h().expand_bias + n];
                    gates[part] = sum(i, part * kEach + c) + bias;
                }
                body(m0 + i, c0 + c, sigmoid(gates[0]), sigmoid(gates[1]), tanh(gates[2]));
            }
        });
    });
}

// The gradient of the context of (row, j) -> those of the gates [M, 3C] before their sigmoids and tanh.
template <class A>
__device__ __forceinline__ void dsu_gate_gradients(const Dsu<A>& d, int64_t row, int64_t j, A grad, A before, A input,
                                                   A forget, A candidate, A* grad_gates) {
    A* to = grad_gates + row * 3 * d.C + j;
    to[d.input()] = grad * candidate * input * (A(1) - input);
    to[d.forget()] = grad * before * forget * (A(1) - forget);
    to[d.candidate()] = grad * input * (A(1) - candidate * candidate);
}

// Values of shared memory for dsu_hidden_gradients.
template <class A>
constexpr int kDsuShared = kDsuWarps<A> * kDsuRows * kDsuSpan;

// Gradients of the gates [M, 3C] -> of the hidden units [M, hidden] before the ReLU. The warps share the sums, so that
// every weight is read once, in whole sectors.
template <class A>
__device__ void dsu_hidden_gradients(const Dsu<A>& d, const DsuRows& rows, const A* grad_gates, const A* s, A* grad_s,
                                     A* shared) {
    constexpr int kParts = kDsuThreads<A> / kDsuSpan;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, at = threadIdx.x % kDsuSpan;
    const int hidden = d.hidden(), gates = 3 * d.C, R = d.R;
    const A* of[kDsuRows];
#pragma unroll
    for (int i = 0; i < kDsuRows; ++i) of[i] = grad_gates + rows.row(i) * gates;
    for (int first = blockIdx.y * kDsuSpan; first < hidden; first += gridDim.y * kDsuSpan) {
        const int n = first + at;
        const A* weight = d.weights + (n < R ? d.y().expand + n : d.h().expand + n - R);
        A sums[kDsuRows] = {};
        if (n < hidden) {
#pragma unroll kDsuUnroll < A>
            for (int g = threadIdx.x / kDsuSpan; g < gates; g += kParts) {
                const A w = weight[int64_t(g) * R];
#pragma unroll
                for (int i = 0; i < kDsuRows; ++i) sums[i] += w * of[i][g];
            }
        }
#pragma unroll
        for (int i = 0; i < kDsuRows; ++i) {
            sums[i] = warp_sum<kDsuSpan>(sums[i]);
            if (lane < kDsuSpan) shared[(warp * kDsuRows + i) * kDsuSpan + at] = sums[i];
        }
        __syncthreads();
        const int i = threadIdx.x / kDsuSpan;
        if (i < kDsuRows && rows.has(i) && n < hidden) {
            A total = 0;
            for (int w = 0; w < kDsuWarps<A>; ++w) total += shared[(w * kDsuRows + i) * kDsuSpan + at];
            const int64_t to = rows.row(i) * hidden + n;
            grad_s[to] = s[to] <= A(0) ? A(0) : total;
        }
        __syncthreads();
    }
}

template <class A>
__device__ void dsu_hidden_gradients(const Dsu<A>& d, const DsuAllRows& rows, const A* grad_gates, const A* s,
                                     A* grad_s, A* shared) {
    constexpr int kSide = kDsuTileUnits;
    const int64_t R = d.R, M = rows.count, hidden = d.hidden(), gates = 3 * d.C;
    rows.each_tile(M, kSide, ceil_div(hidden, kSide), [&](int64_t m0, int64_t column) {
        const int64_t n0 = column * kSide;
        const auto p = [&](int i) {
            const A* row = grad_gates + (m0 + i) * gates;
            return [row, inside = m0 + i < M](int64_t k) { return inside ? row[k] : A(0); };
        };
        const auto q = [&](int j) {
            const int64_t n = n0 + j;
            const A* column = d.weights + (n < R ? d.y().expand + n : d.h().expand + n - R);
            return [column, R, inside = n < hidden](int64_t k) { return inside ? column[k * R] : A(0); };
        };
        DsuUnits<A>::template run<true, false>(gates, p, q, shared, [&](const auto& sum) {
            for (int at = thread_here(); at < kSide * kSide; at += kDsuThreads<A>) {
                const int64_t m = m0 + at / kSide, n = n0 + at % kSide;
                if (m >= M || n >= hidden) continue;
                const A total = sum(at / kSide, at % kSide);
                grad_s[m * hidden + n] = s[m * hidden + n] <= A(0) ? A(0) : total;
            }
        });
    });
}

// Gradients of the hidden units -> of_y(row, channel, gradient of y), and of_h the same of h where kOfH.
template <bool kOfH, class A, class OfY, class OfH>
__device__ __forceinline__ void dsu_input_gradients(const Dsu<A>& d, const DsuRows& rows, const A* grad_s, A*,
                                                    const OfY& give_y, const OfH& give_h) {
    const int R = d.R, C = d.C;
    const A* of[kDsuRows];
#pragma unroll
    for (int i = 0; i < kDsuRows; ++i) of[i] = grad_s + rows.row(i) * d.hidden();
    const DsuBranch y = d.y(), h = d.h();
    const int own = d.joint ? 0 : R;  // where h's units begin
    for (int c = blockIdx.y * kDsuThreads<A> + threadIdx.x; c < C; c += gridDim.y * kDsuThreads<A>) {
        A of_y[kDsuRows] = {}, of_h[kDsuRows] = {};
#pragma unroll kDsuUnroll < A>
        for (int n = 0; n < R; ++n) {
            const A w = d.weights[y.reduce + n * y.pitch + c];
            const A v = kOfH ? d.weights[h.reduce + n * h.pitch + c] : A(0);
#pragma unroll
            for (int i = 0; i < kDsuRows; ++i) {
                of_y[i] += w * of[i][n];
                if (kOfH) of_h[i] += v * of[i][own + n];
            }
        }
#pragma unroll
        for (int i = 0; i < kDsuRows; ++i) {
            if (!rows.has(i)) continue;
            give_y(rows.row(i), int64_t(c), of_y[i]);
            if (kOfH) give_h(rows.row(i), int64_t(c), of_h[i]);
        }
    }
}

// For `count` rows, whose gradient of a branch's unit k is p(row, k): give(row, channel, gradient of its input).
template <class A, class P, class Give>
__device__ __forceinline__ void dsu_input_gradients(const Dsu<A>& d, const DsuBranch& of, int64_t count, const P& p,
                                                    A* shared, const Give& give) {
    constexpr int kSide = kDsuTileRows;
    const int64_t C = d.C;
    DsuAllRows::each_tile(count, kSide, ceil_div(C, kSide), [&](int64_t m0, int64_t column) {
        const int64_t c0 = column * kSide;
        const auto of_row = [&](int i) {
            return [&p, m = m0 + i, inside = m0 + i < count](int64_t k) { return inside ? p(m, k) : A(0); };
        };
        const auto q = [&](int j) {
            const A* column = d.weights + of.reduce + c0 + j;
            return [column, pitch = of.pitch, inside = c0 + j < C](int64_t k) {
                return inside ? column[k * pitch] : A(0);
            };
        };
        DsuSquare<A>::template run<true, false>(d.R, of_row, q, shared, [&](const auto& sum) {
            for (int at = thread_here(); at < kSide * kSide; at += kDsuThreads<A>) {
                const int64_t m = m0 + at / kSide, c = c0 + at % kSide;
                if (m < count && c < C) give(m, c, sum(at / kSide, at % kSide));
            }
        });
    });
}

template <bool kOfH, class A, class OfY, class OfH>
__device__ __forceinline__ void dsu_input_gradients(const Dsu<A>& d, const DsuAllRows& rows, const A* grad_s, A* shared,
                                                    const OfY& give_y, const OfH& give_h) {
    const int64_t hidden = d.hidden(), own = d.joint ? 0 : d.R;
    const auto p = [&](int64_t m, int64_t k) { return grad_s[m * hidden + k]; };
    dsu_input_gradients(d, d.y(), rows.count, p, shared, give_y);
    if (!kOfH) return;
    const auto p_of_h = [&](int64_t m, int64_t k) { return grad_s[m * hidden + own + k]; };
    dsu_input_gradients(d, d.h(), rows.count, p_of_h, shared, give_h);
}

// out[i, j] = sum over the rows m of p[m, i] q[m / T, j], and bias[i] = sum of p[m, i]: a part of the weights'
// gradient, in tiles. From row `turn` on, q's rows are those of q_later.
template <class A>
struct DsuProduct {
    const A *p, *q, *q_later;
    int64_t p_pitch, q_pitch, I, J;
    int64_t turn, T;
    A* out;
    int64_t pitch;
    A* bias;

    static constexpr int kSide = 32;
    using Tile = DsuSquare<A>;
    // The bias is a column more, of ones.
    DLA_HOST_DEVICE int64_t columns() const { return ceil_div(J + (bias ? 1 : 0), kSide); }
    DLA_HOST_DEVICE int64_t tiles() const { return ceil_div(I, kSide) * columns(); }
};

// All of them: those of a joint unit are three.
template <class A>
struct DsuProducts {
    DsuProduct<A> parts[4];
    int64_t M;
    int count;

    // Of M rows whose hidden units are s and whose y and h are given, with the gradients of both layers' outputs.
    DsuProducts(const Dsu<A>& d, int64_t M, int64_t turn, int64_t T, const A* grad_gates, const A* s, const A* grad_s,
                const A* y, const A* y_later, const A* h, const A* h_later, A* grads)
        : M(M), count(d.joint ? 3 : 4) {
        const int64_t C = d.C, R = d.R, H = d.hidden();
        const auto bias = [&](int64_t at) { return at < 0 ? nullptr : grads + at; };
        const auto reduce = [&](const DsuBranch& to, int64_t first, const A* q, const A* later, int64_t T) {
            return DsuProduct<A>{grad_s + first,      q, later, H, C, R, C, turn, T, grads + to.reduce, to.pitch,
                                 bias(to.reduce_bias)};
        };
        const auto expand = [&](const DsuBranch& to, int64_t first) {
            return DsuProduct<A>{grad_gates, s + first,           nullptr, 3 * C, H, 3 * C, R, M, 1, grads + to.expand,
                                 R,          bias(to.expand_bias)};
        };
        parts[0] = reduce(d.y(), 0, y, y_later, 1);
        parts[1] = reduce(d.h(), d.joint ? 0 : R, h, h_later, T);
        parts[2] = expand(d.y(), 0);
        parts[3] = d.joint ? DsuProduct<A>{} : expand(d.h(), R);
    }

    DLA_HOST_DEVICE int64_t tiles() const {
        int64_t total = 0;
        for (int k = 0; k < count; ++k) total += parts[k].tiles();
        return total;
    }
};

template <class A>
constexpr int kProductShared = DsuProduct<A>::Tile::kShared;

template <class A>
__device__ void dsu_product_tile(const DsuProducts<A>& all, int64_t tile, A* shared) {
    constexpr int kSide = DsuProduct<A>::kSide;
    int part = 0;
    while (tile >= all.parts[part].tiles()) tile -= all.parts[part++].tiles();
    const DsuProduct<A>& a = all.parts[part];
    const int64_t i0 = tile / a.columns() * kSide, j0 = tile % a.columns() * kSide;
    const auto p = [&](int i) {
        const A* from = a.p + i0 + i;
        return [&a, from, inside = i0 + i < a.I](int64_t m) { return inside ? from[m * a.p_pitch] : A(0); };
    };
    const auto q = [&](int j) {
        return [&a, j = j0 + j](int64_t m) {
            if (j >= a.J) return A(a.bias && j == a.J ? 1 : 0);
            const int64_t row = m < a.turn ? dsu_sample(m, a.T) : m - a.turn;
            return (m < a.turn ? a.q : a.q_later)[row * a.q_pitch + j];
        };
    };
    DsuProduct<A>::Tile::template run<false, false>(all.M, p, q, shared, [&](const auto& sum) {
        for (int n = thread_here(); n < kSide * kSide; n += kDsuThreads<A>) {
            const int64_t i = i0 + n / kSide, j = j0 + n % kSide;
            if (i >= a.I) continue;
            if (j < a.J) a.out[i * a.pitch + j] = sum(n / kSide, n % kSide);
            if (a.bias && j == a.J) a.bias[i] = sum(n / kSide, n % kSide);
        }
    });
}

}  // namespace dla
