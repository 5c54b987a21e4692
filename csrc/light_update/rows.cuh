// light_update on channels_last maps. A block holds some 128 bytes of channels of up to 32 columns and walks down the
// rows; a ring of rows in shared memory is filled ahead of it by 16-byte copies, so that each map crosses the bus once.
#pragma once

#include "light_update/block.cuh"

namespace dla::light_update {

// Channels of a thread: a 32-bit word of 16-bit maps; one for float64, whose accumulators take two registers each.
template <class T>
constexpr int kLaneOfRows = sizeof(T) == 8 ? 1 : 2;

// Copies a thread's share of one row and of its neighbouring columns into a slot of the ring, [columns + 2, channels].
// Zeros stand outside the map and beyond its channels.
template <class T>
struct RowCopy {
    int b, c, W, column;  // of the block
    int channels, columns, vector, from, step, left;  // left: channels of the vector in the map
    bool aligned;

    __device__ RowCopy(const Tiling& t, const Shape& s, const Place& p, bool aligned)
        : b(p.b), c(p.c), W(static_cast<int>(s.W)), column(p.column), channels(t.lanes * kLaneOfRows<T>), aligned(aligned) {
        const int vectors = channels / kVector<T>;
        vector = static_cast<int>(threadIdx.x) % vectors * kVector<T>;
        from = static_cast<int>(threadIdx.x) / vectors;
        step = t.lanes * t.strips * t.maps / vectors;
        columns = p.active ? t.columns + 2 : 0;
        left = max(0, min(kVector<T>, static_cast<int>(s.C) - c - vector));
    }

    __device__ __forceinline__ void operator()(const Map<const T>& map, int row, T* slot) const {
        for (int j = from; j < columns; j += step) {
            const int at = column + j - 1;
            const bool wanted = at >= 0 && at < W && left > 0;
            const T* source = wanted ? map.at(b, c + vector, int64_t(row) * W + at) : map.data;
            T* to = slot + j * channels + vector;
            if (aligned) {
                copy_async(to, source, wanted);
            } else {
                for (int e = 0; e < kVector<T>; ++e) to[e] = wanted && e < left ? source[e] : narrow<T>(0);
            }
        }
    }
};

// A strip's row with its neighbouring columns, out of a slot.
template <int kLane, class T>
__device__ __forceinline__ void load_row(const T* slot, int channels, Acc<T> (&to)[kColumns + 2][kLane]) {
#pragma unroll
    for (int j = 0; j < kColumns + 2; ++j) load<kLane>(slot + j * channels, to[j]);
}

// Rows of the ring: two ahead, the one at hand and the one above it.
constexpr int kForwardSlots = 4;

template <class T, Carry kCarry, bool kFolded>
__global__ void __launch_bounds__(kRowThreads, sizeof(T) == 8 ? 1 : 2)
    forward_rows(const __grid_constant__ Forward<T> a, const __grid_constant__ Tiling t, bool aligned) {
    using A = Acc<T>;
    constexpr int kLane = kLaneOfRows<T>;
    const int channels = t.lanes * kLane, slot = (t.columns + 2) * channels;
    const Shape& s = a.shape;
    const Place p(t, s, channels, true);
    const RowCopy<T> copy(t, s, p, aligned);
    T* const ring_x = shared_memory<T>();
    T* const ring_carried = ring_x + kForwardSlots * slot;
    A* const attention = reinterpret_cast<A*>(ring_x + (kCarry == Carry::none ? 1 : 2) * kForwardSlots * slot);
    const int H = static_cast<int>(s.H), C = static_cast<int>(s.C);
    const auto copy_row = [&](int row) {
        if (row <= min(p.last, H - 1)) {
            copy(a.x, row, ring_x + row % kForwardSlots * slot);
            if constexpr (kCarry != Carry::none) copy(a.carried, row, ring_carried + row % kForwardSlots * slot);
        }
        end_copies();
    };
    const int top = max(p.first - 1, 0);
    copy_row(top);
    copy_row(top + 1);

    attend(a.vectors, s.C, p.b, p.c, min(channels, C - p.c), attention);
    const int c = p.c + p.lane * kLane;
    A filter_x[9][kLane], filter_carried[kCarry == Carry::filtered ? 9 : 1][kLane];
#pragma unroll
    for (int e = 0; e < kLane; ++e) {
        const int channel = min(c + e, C - 1);  // beyond the last one nothing is stored
#pragma unroll
        for (int k = 0; k < 9; ++k) {
            filter_x[k][e] = x_filter(a.vectors, channel, k, p.c, attention);
            if constexpr (kCarry == Carry::filtered) {
                filter_carried[k][e] = carried_filter(a.vectors, s.C, p.b, channel, k);
            }
        }
        if constexpr (kCarry == Carry::scaled) filter_carried[0][e] = carried_filter(a.vectors, s.C, p.b, channel, 4);
    }

    const int valid = p.active && c < s.C ? min(kColumns, p.columns - p.strip * kColumns) : 0;
    const int at = p.strip * kColumns * channels + p.lane * kLane, room = min(C - c, kLane);
    const int column = p.column + p.strip * kColumns;
    const Fold<A, kLane> fold(a, c);
    Strip<A, kLane> strip;
    Gathered<A, kLane, kFolded> found;
    for (int row = top; row <= p.last; ++row) {
        strip.advance();
        if (row < H) {
            await_copies<1>();
            __syncthreads();
            copy_row(row + 2);
            A values[kColumns + 2][kLane];
            load_row(ring_x + row % kForwardSlots * slot + at, channels, values);
            strip.add(filter_x, values);
            if constexpr (kCarry != Carry::none) {
                load_row(ring_carried + row % kForwardSlots * slot + at, channels, values);
                if constexpr (kCarry == Carry::filtered) {
                    strip.add(filter_carried, values);
                } else {
                    strip.add_centre(filter_carried[0], values);
                }
            }
        }
        if (row <= p.first) continue;
        const int64_t pixel = (row - 1) * s.W + column;
        if (!kFolded || a.o) store_row<kLane>(a.o.at(p.b, c, pixel), a.o.pixel, strip.done, valid, room, aligned);
        if constexpr (kFolded) {
            const T* from = ring_x + (row - 1) % kForwardSlots * slot + channels + at;
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
                A x[kLane];
                load<kLane>(from + j * channels, x);
#pragma unroll
                for (int e = 0; e < kLane; ++e) {
                    const A o = strip.done[j][e];
                    strip.done[j][e] = x[e] + (o * fold.scale[e] + fold.shift[e]);
                    if (j < valid) found.add_pair(e, o, strip.done[j][e]);
                }
            }
            store_row<kLane>(a.out.at(p.b, c, pixel), a.out.pixel, strip.done, valid, room, aligned);
        } else {
            found.add(strip.done, valid);
        }
    }
    finish_moments<kFolded>(a, t, p, found, valid, shared_memory<Moments<A>>());
}

}  // namespace dla::light_update
