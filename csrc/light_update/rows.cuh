// light_update on channels_last maps. A block holds some 128 bytes of channels of up to 32 columns and walks down the
// rows; a ring of rows in shared memory is filled ahead of it by 16-byte copies, so that each map crosses the bus once.
#pragma once

#include "light_update/block.cuh"

namespace dla::light_update {

// Channels of a thread: a 32-bit word of 16-bit maps; one for float64, whose accumulators take two registers each.
template <class T>
constexpr int kLaneOfRows = sizeof(T) == 8 ? 1 : 2;
// A strip of forward is this wide where such strips make up the map's width, else of kColumns: the wider one reads and
// widens fewer of its neighbours' columns.
constexpr int kWholeColumns = 7;

// Copies a thread's share of one row and of its neighbouring columns into a slot of a ring, [columns + 2, kPitch].
// Zeros stand outside the map and beyond its channels. A strip's threads copy kStep pixels at once, so that no thread has
// more than kItems. Offsets within a sample fit in 32 bits: the launch has seen to it.
template <class T, int kPitch, bool kAligned, int kWidth>
struct RowCopy {
    static constexpr int kStep = kVector<T> / kLaneOfRows<T>, kItems = (kWidth + 2 + kStep - 1) / kStep;
    int pixel, vector, at, step;  // `pixel` of a row is the first to copy, to element `at` of the slot
    int items, left;              // pixels to copy, `step` apart; channels of the vector that are in the map
    unsigned wanted;              // a bit for each item, whether its column is in the map

    __device__ RowCopy(const Tiling& t, const Shape& s, const Place& p) {
        const int vectors = t.lanes / kStep, thread = threadIdx.x, from = thread / vectors;
        vector = thread % vectors * kVector<T>;
        pixel = p.column + from - 1;
        at = from * kPitch + vector;
        step = kStep * t.strips * t.maps;
        items = p.active && from < t.columns + 2 ? (t.columns + 1 - from) / step + 1 : 0;
        left = min(kVector<T>, static_cast<int>(s.C) - p.c - vector);
        wanted = 0;
        for (int i = 0; i < items; ++i) {
            const int column = pixel + i * step;
            wanted |= static_cast<unsigned>(column >= 0 && column < s.W && left > 0) << i;
        }
    }

    // `from` is where the first pixel's vector lies, `distance` is between pixels.
    __device__ __forceinline__ void operator()(const T* from, int distance, bool in_map, T* slot) const {
        T* to = slot + at;
        if constexpr (kAligned) {
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
                if (i >= items) break;
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

// Stores a strip's row from `to` on; `distance` is between its columns, all of which are in the map with kWhole.
template <bool kAligned, bool kWhole, int kWidth, int kLane, class T>
__device__ __forceinline__ void store_row(T* to, int distance, const Acc<T> (&values)[kWidth][kLane], int columns,
                                          int channels) {
    if (columns <= 0) return;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        T* const at = to + int64_t(j) * distance;
        const bool there = kWhole || j < columns;
        if constexpr (kAligned) {
            if (there) store<kLane>(at, values[j]);
        } else {
#pragma unroll
            for (int e = 0; e < kLane; ++e) {
                if (there && e < channels) at[e] = narrow<T>(values[j][e]);
            }
        }
    }
}

// Channels of a block: 128 bytes of every pixel.
template <class T>
constexpr int kForwardChannels = 128 / sizeof(T);
// Rows on their way, for latency's sake: some 30 KiB of each block.
template <Carry kCarry>
constexpr int kForwardAhead = kCarry == Carry::none ? 4 : 3;
// Rows of a ring: those, the one at hand and, where out is made of it, the one above it.
template <Carry kCarry, bool kFolded>
constexpr int kForwardSlots = kForwardAhead<kCarry> + (kFolded ? 2 : 1);

// Bytes of shared memory while a block walks.
template <class T, Carry kCarry, bool kFolded>
DLA_HOST_DEVICE inline int64_t forward_rows_shared(int64_t columns) {
    const int64_t slot = (columns + 2) * kForwardChannels<T> * int64_t(sizeof(T));
    return (kCarry == Carry::none ? 1 : 2) * kForwardSlots<kCarry, kFolded> * slot +
           kForwardChannels<T> * int64_t(sizeof(Acc<T>));
}

template <class T, Carry kCarry, bool kFolded, bool kAligned, int kWidth>
__global__ void __launch_bounds__(kMaxThreads, sizeof(T) == 8 ? 1 : 2)
    forward_rows(const __grid_constant__ Forward<T> a, const __grid_constant__ Tiling t) {
    using A = Acc<T>;
    constexpr int kLane = kLaneOfRows<T>, kPitch = kForwardChannels<T>;
    constexpr int kAhead = kForwardAhead<kCarry>, kSlots = kForwardSlots<kCarry, kFolded>;
    constexpr bool kWhole = kWidth == kWholeColumns;
    const int channels = t.lanes * kLane, slot = (t.columns + 2) * kPitch;
    const Shape& s = a.shape;
    const int H = static_cast<int>(s.H), W = static_cast<int>(s.W), C = static_cast<int>(s.C);
    const Place p(t, s, channels, true);
    const RowCopy<T, kPitch, kAligned, kWidth> copy(t, s, p);
    T* const ring_x = shared_memory<T>();
    T* const ring_carried = ring_x + kSlots * slot;
    A* const attention = reinterpret_cast<A*>(ring_x + (kCarry == Carry::none ? 1 : 2) * kSlots * slot);
    const int top = max(p.first - 1, 0), of_x = static_cast<int>(a.x.pixel),
              of_carried = static_cast<int>(a.carried.pixel);
    const T* next_x = a.x.at(p.b, p.c, 0) + ((top * W + copy.pixel) * of_x + copy.vector);
    const T* next_carried = a.carried.at(p.b, p.c, 0) + ((top * W + copy.pixel) * of_carried + copy.vector);
    const auto after = [&](int in_ring) { return in_ring == (kSlots - 1) * slot ? 0 : in_ring + slot; };
    int into = 0;  // where in its ring the next row goes
    const auto copy_row = [&](int row) {
        if (row <= p.last) {  // which is below the map where the block's rows are its last
            copy(next_x, of_x, row < H, ring_x + into);
            if constexpr (kCarry != Carry::none) copy(next_carried, of_carried, row < H, ring_carried + into);
        }
        next_x += W * of_x;
        if constexpr (kCarry != Carry::none) next_carried += W * of_carried;
        into = after(into);
        end_copies();
    };
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) copy_row(top + i);

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

    const int valid = p.active && c < C ? min(kWidth, p.columns - p.strip * kWidth) : 0, room = min(C - c, kLane);
    const int at = p.strip * kWidth * kPitch + p.lane * kLane;
    const auto start = [&](const Map<T>& map) {
        if (!map) return static_cast<T*>(nullptr);
        return map.at(p.b, c, 0) + (p.first * W + p.column + p.strip * kWidth) * static_cast<int>(map.pixel);
    };
    T *to_o = start(a.o), *to_out = kFolded ? start(a.out) : nullptr;
    const Fold<A, kLane> fold(a, c);
    Strip<A, kLane, kWidth> strip;
    Gathered<A, kLane, kFolded, kWidth, kWhole> found(valid);
    const auto put = [&](const Map<T>& map, T*& to) {
        const int distance = static_cast<int>(map.pixel);
        store_row<kAligned, kWhole>(to, distance, strip.done, valid, room);
        to += W * distance;
    };
    int here = 0, above = 0;  // where in its ring the row is
    for (int row = top; row <= p.last; ++row) {
        await_copies<kAhead - 1>();
        __syncthreads();
        copy_row(row + kAhead);
        strip.advance();
        {
            A values[kWidth + 2][kLane];
            load_row<kPitch>(ring_x + here + at, values);
            strip.add(filter_x, values);
        }
        if constexpr (kCarry == Carry::filtered) {
            A values[kWidth + 2][kLane];
            load_row<kPitch>(ring_carried + here + at, values);
            strip.add(filter_carried, values);
        } else if constexpr (kCarry == Carry::scaled) {
            A values[kWidth][kLane];
            load_row<kPitch>(ring_carried + here + at + kPitch, values);
            strip.add_centre(filter_carried[0], values);
        }
        if (row > p.first) {
            if (!kFolded || a.o) put(a.o, to_o);
            if constexpr (kFolded) {
                const T* from = ring_x + above + kPitch + at;
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    A x[kLane];
                    load<kLane>(from + j * kPitch, x);
#pragma unroll
                    for (int e = 0; e < kLane; ++e) {
                        const A o = strip.done[j][e];
                        strip.done[j][e] = x[e] + (o * fold.scale[e] + fold.shift[e]);
                        if (found.has(j)) found.add_pair(e, o, strip.done[j][e]);
                    }
                }
                put(a.out, to_out);
            } else {
                found.add(strip.done);
            }
        }
        above = here;
        here = after(here);
    }
    finish_moments<kFolded>(a, t, p, found, shared_memory<Moments<A>>());
}

}  // namespace dla::light_update
