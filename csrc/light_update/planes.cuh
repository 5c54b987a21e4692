// light_update on NCHW maps. A block holds whole planes in shared memory, or bands of the rows of a plane that is too
// large, with a row above and below; where even rows are too long it cuts them too.
#pragma once

#include "light_update/block.cuh"

namespace dla::light_update {

// The rows [top, bottom) of a block's planes as they lie in memory. Each run of adjacent elements keeps its place
// within 16 bytes, so that all but its ends moves in 16-byte copies whatever its address.
template <class T>
struct Slab {
    const T* base;       // of the first run in the map
    int64_t plane, row;  // between planes and rows there
    T* shared;
    int pitch, length;  // of a run
    int runs;
    bool whole;         // whether a run is a band of a whole plane, else a part of one row
    int64_t top, left;  // first row, and column where a run begins

    // Elements that a block's slab takes.
    static __host__ __device__ int pitch_of(const Tiling& t, const Shape& s) {
        const int64_t rows = min(int64_t(t.rows + 2), s.H);
        const int64_t length = t.tiles == 1 ? rows * s.W : t.columns + 2;
        return static_cast<int>(round_up(length, kVector<T>)) + kVector<T>;
    }
    static __host__ __device__ int size_of(const Tiling& t, const Shape& s) {
        return pitch_of(t, s) * (t.tiles == 1 ? t.lanes : t.rows + 2);
    }

    __device__ Slab(const Tiling& t, const Shape& s, const Place& p, const Map<const T>& map, T* shared)
        : plane(map.channel), row(s.W), shared(shared), pitch(pitch_of(t, s)), whole(t.tiles == 1) {
        top = max(p.first - 1, 0);
        left = max(p.column - 1, 0);
        const int64_t bottom = min(int64_t(p.last + 1), s.H), right = min(int64_t(p.column + p.columns + 1), s.W);
        base = map.at(p.b, p.c, top * s.W + left);
        length = static_cast<int>(whole ? (bottom - top) * s.W : right - left);
        runs = static_cast<int>(whole ? min(int64_t(t.lanes), s.C - p.c) : bottom - top);
    }

    __device__ __forceinline__ const T* source(int run) const { return base + run * (whole ? plane : row); }
    static __device__ __forceinline__ int offset(const T* source) {
        return static_cast<int>(reinterpret_cast<uintptr_t>(source) % 16 / sizeof(T));
    }

    // By the whole block; the copies of 16 bytes are still under way.
    __device__ void copy() const {
        const int vectors = pitch / kVector<T>;
        for (int i = threadIdx.x; i < runs * vectors; i += blockDim.x) {
            const T* from = source(i / vectors);
            const int begin = offset(from), end = begin + length, at = i % vectors * kVector<T>;
            T* to = shared + i / vectors * pitch;
            if (at >= begin && at + kVector<T> <= end) {
                copy_async(to + at, from + (at - begin), true);
            } else {
                for (int e = max(at, begin); e < min(at + kVector<T>, end); ++e) to[e] = from[e - begin];
            }
        }
        end_copies();
    }

    // A row of the block's plane `lane`, to be indexed with the map's columns.
    __device__ __forceinline__ const T* at(int lane, int64_t i) const {
        const int run = whole ? lane : static_cast<int>(i - top);
        return shared + run * pitch + offset(source(run)) + (whole ? (i - top) * row : -left);
    }
};

// A strip's row with its neighbouring columns, zeros outside the map.
template <class T>
__device__ __forceinline__ void load_row(const T* row, int column, int W, Acc<T> (&to)[kColumns + 2][1]) {
#pragma unroll
    for (int j = 0; j < kColumns + 2; ++j) {
        const int at = column + j - 1;
        to[j][0] = at >= 0 && at < W ? widen(row[at]) : Acc<T>(0);
    }
}

// Stores a row of a strip; `aligned` where whole strips may be stored at once.
template <class T, class A>
__device__ __forceinline__ void store_strip(T* to, const A (&values)[kColumns][1], int valid, bool aligned) {
    if (aligned) {
        const A all[kColumns] = {values[0][0], values[1][0], values[2][0], values[3][0]};
        if constexpr (sizeof(T) == 8) {
            store<2>(to, {all[0], all[1]});
            store<2>(to + 2, {all[2], all[3]});
        } else {
            store<kColumns>(to, all);
        }
    } else {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            if (j < valid) to[j] = narrow<T>(values[j][0]);
        }
    }
}

template <class T, Carry kCarry, bool kFolded>
__global__ void __launch_bounds__(kMaxThreads, 2)
    forward_planes(const __grid_constant__ Forward<T> a, const __grid_constant__ Tiling t, bool aligned) {
    using A = Acc<T>;
    const Shape& s = a.shape;
    const Place p(t, s, t.lanes, false);
    T* const memory = shared_memory<T>();
    const int size = Slab<T>::size_of(t, s);
    const Slab<T> x(t, s, p, a.x, memory), carried(t, s, p, kCarry == Carry::none ? a.x : a.carried, memory + size);
    A* const attention = reinterpret_cast<A*>(memory + (kCarry == Carry::none ? 1 : 2) * size);
    x.copy();
    if constexpr (kCarry != Carry::none) carried.copy();

    attend(a.vectors, s.C, p.b, p.c, min(int64_t(t.lanes), s.C - p.c), attention);
    const int64_t c = min(int64_t(p.c + p.lane), s.C - 1);
    A filter_x[9][1], filter_carried[kCarry == Carry::filtered ? 9 : 1][1];
#pragma unroll
    for (int k = 0; k < 9; ++k) {
        filter_x[k][0] = x_filter(a.vectors, c, k, p.c, attention);
        if constexpr (kCarry == Carry::filtered) {
            filter_carried[k][0] = carried_filter(a.vectors, s.C, p.b, c, k);
        }
    }
    if constexpr (kCarry == Carry::scaled) filter_carried[0][0] = carried_filter(a.vectors, s.C, p.b, c, 4);
    await_copies<0>();
    __syncthreads();

    const int valid = p.active && p.c + p.lane < s.C ? min(kColumns, p.columns - p.strip * kColumns) : 0;
    const int column = p.column + p.strip * kColumns;
    const int band = (p.last - p.first + t.groups - 1) / t.groups, first = p.first + p.group * band;
    const int last = min(p.last, first + band);
    const Fold<A, 1> fold(a, c);
    const int W = static_cast<int>(s.W);
    Strip<A, 1> strip;
    Gathered<A, 1, kFolded> found(valid);
    for (int row = max(first - 1, 0); valid > 0 && first < last && row <= last; ++row) {
        strip.advance();
        if (row < s.H) {
            A values[kColumns + 2][1];
            load_row(x.at(p.lane, row), column, W, values);
            strip.add(filter_x, values);
            if constexpr (kCarry != Carry::none) {
                load_row(carried.at(p.lane, row), column, W, values);
                if constexpr (kCarry == Carry::filtered) {
                    strip.add(filter_carried, values);
                } else {
                    strip.add_centre(filter_carried[0], values);
                }
            }
        }
        if (row <= first) continue;
        const int64_t pixel = (row - 1) * s.W + column;
        if (!kFolded || a.o) store_strip(a.o.at(p.b, c, pixel), strip.done, valid, aligned);
        if constexpr (kFolded) {
            const T* from = x.at(p.lane, row - 1) + column;
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
                if (j >= valid) break;
                const A o = strip.done[j][0];
                strip.done[j][0] = widen(from[j]) + (o * fold.scale[0] + fold.shift[0]);
                found.add_pair(0, o, strip.done[j][0]);
            }
            store_strip(a.out.at(p.b, c, pixel), strip.done, valid, aligned);
        } else {
            found.add(strip.done);
        }
    }
    finish_moments<kFolded>(a, t, p, found, shared_memory<Moments<A>>());
}

}  // namespace dla::light_update
