// light_update on channels_last maps. A block holds some 128 bytes of channels of up to 32 columns and walks down the
// rows; a ring of rows in shared memory is filled ahead of it by 16-byte copies, so that each map crosses the bus once.
#pragma once

#include "light_update/block.cuh"

namespace dla::light_update {

// Channels of a thread: a 32-bit word of 16-bit maps; one for float64, whose accumulators take two registers each.
template <class T>
constexpr int kLaneOfRows = sizeof(T) == 8 ? 1 : 2;

// Copies a thread's share of one row and of its neighbouring columns into a slot of a ring, [columns + 2, kPitch].
// Zeros stand outside the map and beyond its channels. Offsets within a sample fit in 32 bits: the launch has seen to it.
template <class T, int kPitch>
struct RowCopy {
    int b, c, W, pixel, at, step;  // `pixel` of a row is the first to copy, to element `at` of the slot
    int items, left;               // pixels to copy, `step` apart; channels of the vector that are in the map
    unsigned wanted;               // a bit for each item, whether its column is in the map
    bool aligned;

    __device__ RowCopy(const Tiling& t, const Shape& s, const Place& p, bool aligned)
        : b(p.b), W(static_cast<int>(s.W)), aligned(aligned) {
        const int vectors = t.lanes * kLaneOfRows<T> / kVector<T>, thread = threadIdx.x;
        const int vector = thread % vectors * kVector<T>, from = thread / vectors;
        c = p.c + vector;
        pixel = p.column + from - 1;
        at = from * kPitch + vector;
        step = t.lanes * t.strips * t.maps / vectors;
        items = p.active && from < t.columns + 2 ? (t.columns + 1 - from) / step + 1 : 0;
        left = min(kVector<T>, static_cast<int>(s.C) - c);
        wanted = 0;
        for (int i = 0; i < items; ++i) {
            const int column = pixel + i * step;
            wanted |= static_cast<unsigned>(column >= 0 && column < W && left > 0) << i;
        }
    }

    __device__ __forceinline__ void operator()(const Map<const T>& map, int row, bool in_map, T* slot) const {
        const int distance = static_cast<int>(map.pixel), apart = step * distance;
        const T* from = map.at(b, c, 0) + (row * W + pixel) * distance;
        const unsigned mask = in_map ? wanted : 0;
        T* to = slot + at;
        if (aligned) {
            for (int i = 0; i < items; ++i) {
                copy_async(to + i * step * kPitch, from + i * apart, mask >> i & 1);
            }
        } else {
            for (int i = 0; i < items; ++i) {
                for (int e = 0; e < kVector<T>; ++e) {
                    to[i * step * kPitch + e] = (mask >> i & 1) && e < left ? from[i * apart + e] : narrow<T>(0);
                }
            }
        }
    }
};

// A strip's row with its neighbouring columns, out of a slot.
template <int kPitch, int kLane, class T>
__device__ __forceinline__ void load_row(const T* slot, Acc<T> (&to)[kColumns + 2][kLane]) {
#pragma unroll
    for (int j = 0; j < kColumns + 2; ++j) load<kLane>(slot + j * kPitch, to[j]);
}

// Stores a strip's row, from `pixel` of the map on.
template <int kLane, class T>
__device__ __forceinline__ void store_row(const Map<T>& map, int b, int c, int pixel,
                                          const Acc<T> (&values)[kColumns][kLane], int columns, int channels,
                                          bool aligned) {
    const int distance = static_cast<int>(map.pixel);
    T* to = map.at(b, c, 0) + pixel * distance;
    if (aligned) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            if (j < columns) store<kLane>(to + j * distance, values[j]);
        }
    } else {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
#pragma unroll
            for (int e = 0; e < kLane; ++e) {
                if (j < columns && e < channels) to[j * distance + e] = narrow<T>(values[j][e]);
            }
        }
    }
}

// Channels of a block: 128 bytes of every pixel.
template <class T>
constexpr int kForwardChannels = 128 / sizeof(T);
// Rows of the ring: two ahead, the one at hand and the one above it.
constexpr int kForwardSlots = 4;

template <class T, Carry kCarry, bool kFolded>
__global__ void __launch_bounds__(kRowThreads, sizeof(T) == 8 ? 1 : 2)
    forward_rows(const __grid_constant__ Forward<T> a, const __grid_constant__ Tiling t, bool aligned) {
    using A = Acc<T>;
    constexpr int kLane = kLaneOfRows<T>, kPitch = kForwardChannels<T>;
    const int channels = t.lanes * kLane, slot = (t.columns + 2) * kPitch;
    const Shape& s = a.shape;
    const int H = static_cast<int>(s.H), W = static_cast<int>(s.W), C = static_cast<int>(s.C);
    const Place p(t, s, channels, true);
    const RowCopy<T, kPitch> copy(t, s, p, aligned);
    T* const ring_x = shared_memory<T>();
    T* const ring_carried = ring_x + kForwardSlots * slot;
    A* const attention = reinterpret_cast<A*>(ring_x + (kCarry == Carry::none ? 1 : 2) * kForwardSlots * slot);
    const auto copy_row = [&](int row) {
        if (row <= p.last) {  // which is below the map where the block's rows are its last
            copy(a.x, row, row < H, ring_x + row % kForwardSlots * slot);
            if constexpr (kCarry != Carry::none) copy(a.carried, row, row < H, ring_carried + row % kForwardSlots * slot);
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

    const int valid = p.active && c < C ? min(kColumns, p.columns - p.strip * kColumns) : 0, room = min(C - c, kLane);
    const int at = p.strip * kColumns * kPitch + p.lane * kLane, column = p.column + p.strip * kColumns;
    const Fold<A, kLane> fold(a, c);
    Strip<A, kLane> strip;
    Gathered<A, kLane, kFolded> found(valid);
    for (int row = top; row <= p.last; ++row) {
        await_copies<1>();
        __syncthreads();
        copy_row(row + 2);
        strip.advance();
        A values[kColumns + 2][kLane];
        load_row<kPitch>(ring_x + row % kForwardSlots * slot + at, values);
        strip.add(filter_x, values);
        if constexpr (kCarry != Carry::none) {
            load_row<kPitch>(ring_carried + row % kForwardSlots * slot + at, values);
            if constexpr (kCarry == Carry::filtered) {
                strip.add(filter_carried, values);
            } else {
                strip.add_centre(filter_carried[0], values);
            }
        }
        if (row <= p.first) continue;
        const int pixel = (row - 1) * W + column;
        if (!kFolded || a.o) store_row(a.o, p.b, c, pixel, strip.done, valid, room, aligned);
        if constexpr (kFolded) {
            const T* from = ring_x + (row - 1) % kForwardSlots * slot + kPitch + at;
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
                A x[kLane];
                load<kLane>(from + j * kPitch, x);
#pragma unroll
                for (int e = 0; e < kLane; ++e) {
                    const A o = strip.done[j][e];
                    strip.done[j][e] = x[e] + (o * fold.scale[e] + fold.shift[e]);
                    if (j < valid) found.add_pair(e, o, strip.done[j][e]);
                }
            }
            store_row(a.out, p.b, c, pixel, strip.done, valid, room, aligned);
        } else {
            found.add(strip.done);
        }
    }
    finish_moments<kFolded>(a, t, p, found, shared_memory<Moments<A>>());
}

}  // namespace dla::light_update
