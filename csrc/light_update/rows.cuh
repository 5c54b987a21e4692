// light_update on channels_last maps. A block holds some 128 bytes of channels of up to 32 columns and walks down the
// rows; a ring of rows in shared memory is filled ahead of it by 16-byte copies, so that each map crosses the bus once.
#pragma once

#include "light_update/block.cuh"

namespace dla::light_update {

// Channels of a thread: a 32-bit word of 16-bit maps; one for float64, whose accumulators take two registers each.
template <class T>
constexpr int kLaneOfRows = sizeof(T) == 8 ? 1 : 2;

// Copies a thread's share of one row and of its neighbouring columns into a slot of a ring, [columns + 2, kPitch].
// Zeros stand outside the map and beyond its channels. Offsets within a sample fit in 32 bits: the launch has seen to
// it.
template <class T, int kPitch, bool kAligned>
struct RowCopy {
    int pixel, vector, at, step;  // `pixel` of a row is the first to copy, to element `at` of the slot
    int items, left;              // pixels to copy, `step` apart; channels of the vector that are in the map
    unsigned wanted;              // a bit for each item, whether its column is in the map
    bool first;                   // the first of these bits

    __device__ RowCopy(const Tiling& t, const Shape& s, const Place& p) {
        const int vectors = t.lanes * kLaneOfRows<T> / kVector<T>, thread = threadIdx.x, from = thread / vectors;
        vector = thread % vectors * kVector<T>;
        pixel = p.column + from - 1;
        at = from * kPitch + vector;
        step = t.lanes * t.strips * t.maps / vectors;
        items = p.active && from < t.columns + 2 ? (t.columns + 1 - from) / step + 1 : 0;
        left = min(kVector<T>, static_cast<int>(s.C) - p.c - vector);
        wanted = 0;
        for (int i = 0; i < items; ++i) {
            const int column = pixel + i * step;
            wanted |= static_cast<unsigned>(column >= 0 && column < s.W && left > 0) << i;
        }
        first = wanted & 1;
    }

    // `from` is where the first pixel's vector lies, `distance` is between pixels.
    __device__ __forceinline__ void operator()(const T* from, int distance, bool in_map, T* slot) const {
        T* to = slot + at;
        if constexpr (kAligned) {
            if (items > 0) copy_async(to, from, in_map && first);
#pragma unroll 1
            for (int i = 1; i < items; ++i) {
                copy_async(to + i * step * kPitch, from + i * step * distance, in_map && (wanted >> i & 1));
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < items; ++i) {
#pragma unroll 1
                for (int e = 0; e < kVector<T>; ++e) {
                    const bool there = in_map && (wanted >> i & 1) && e < left;
                    to[i * step * kPitch + e] = there ? from[i * step * distance + e] : narrow<T>(0);
                }
            }
        }
    }
};

// A strip's row with its neighbouring columns, out of a slot.
template <int kPitch, int kWidth, int kLane, class T, class A>
__device__ __forceinline__ void load_row(const T* slot, A (&to)[kWidth][kLane]) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) load<kLane>(slot + j * kPitch, to[j]);
}

// Stores a strip's row from `to` on; `distance` is between its columns.
template <bool kAligned, int kWidth, int kLane, class T>
__device__ __forceinline__ void store_row(T* to, int distance, const Acc<T> (&values)[kWidth][kLane], int columns,
                                          int channels) {
    if constexpr (kAligned) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            if (j < columns) store<kLane>(to, values[j]);
            to += distance;
        }
    } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
#pragma unroll
            for (int e = 0; e < kLane; ++e) {
                if (j < columns && e < channels) to[e] = narrow<T>(values[j][e]);
            }
            to += distance;
        }
    }
}

// Channels of a block: 128 bytes of every pixel.
template <class T>
constexpr int kForwardChannels = 128 / sizeof(T);
// Rows of the ring: two ahead, the one at hand and the one above it.
constexpr int kForwardSlots = 4;

template <class T, Carry kCarry, bool kFolded, bool kAligned>
__global__ void __launch_bounds__(kRowThreads, sizeof(T) == 8 ? 1 : 2)
    forward_rows(const __grid_constant__ Forward<T> a, const __grid_constant__ Tiling t) {
    using A = Acc<T>;
    constexpr int kLane = kLaneOfRows<T>, kPitch = kForwardChannels<T>;
    const int channels = t.lanes * kLane, slot = (t.columns + 2) * kPitch;
    const Shape& s = a.shape;
    const int H = static_cast<int>(s.H), W = static_cast<int>(s.W), C = static_cast<int>(s.C);
    const Place p(t, s, channels, true);
    const RowCopy<T, kPitch, kAligned> copy(t, s, p);
    T* const ring_x = shared_memory<T>();
    T* const ring_carried = ring_x + kForwardSlots * slot;
    A* const attention = reinterpret_cast<A*>(ring_x + (kCarry == Carry::none ? 1 : 2) * kForwardSlots * slot);
    const int top = max(p.first - 1, 0), of_x = static_cast<int>(a.x.pixel),
              of_carried = static_cast<int>(a.carried.pixel);
    const T* next_x = a.x.at(p.b, p.c, 0) + ((top * W + copy.pixel) * of_x + copy.vector);
    const T* next_carried = a.carried.at(p.b, p.c, 0) + ((top * W + copy.pixel) * of_carried + copy.vector);
    const auto copy_row = [&](int row) {
        if (row <= p.last) {  // which is below the map where the block's rows are its last
            const int into = row % kForwardSlots * slot;
            copy(next_x, of_x, row < H, ring_x + into);
            if constexpr (kCarry != Carry::none) copy(next_carried, of_carried, row < H, ring_carried + into);
        }
        next_x += W * of_x;
        if constexpr (kCarry != Carry::none) next_carried += W * of_carried;
        end_copies();
    };
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
        const auto put = [&](const Map<T>& map) {
            const int distance = static_cast<int>(map.pixel);
            store_row<kAligned>(map.at(p.b, c, 0) + pixel * distance, distance, strip.done, valid, room);
        };
        if (!kFolded || a.o) put(a.o);
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
            put(a.out);
        } else {
            found.add(strip.done);
        }
    }
    finish_moments<kFolded>(a, t, p, found, shared_memory<Moments<A>>());
}

}  // namespace dla::light_update
