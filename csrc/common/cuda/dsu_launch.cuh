// How the phases of the Dynamic Sharing Unit are launched and shared: all of them in one launch. A block has kDsuRows
// rows, so that a weight that it reads serves as many; what one phase leaves for the next lies in global memory. A
// large unit's weights would keep a few blocks busy for long: there several blocks (gridDim.y) share the outputs of a
// phase, and all blocks are launched together, with a barrier of the grid between two phases. How the outputs are
// shared changes no sum. Where a large unit has many rows, its phases are products of matrices, in tiles through shared
// memory, which all blocks share: the shapes alone say which form a call takes.
#pragma once

#include <algorithm>

#include "common/cuda/dsu_tile.cuh"
#include "common/cuda/launch.cuh"

namespace dla {

constexpr int kDsuRows = 4;

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

}  // namespace dla
