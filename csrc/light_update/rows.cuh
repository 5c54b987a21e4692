// light_update on channels_last maps. A block holds 128 bytes of channels of a few strips of columns and walks down the
// rows. Each strip has a ring of rows in shared memory of its own, filled ahead of it by 16-byte copies of the strip's
// own threads, which lie in one warp: on the way down no warp waits for another. Neighbouring strips share a column
// through L2, so that each map crosses the bus once.
#pragma once

#include "light_update/block.cuh"

namespace dla::light_update {

// Channels of a thread: a 32-bit word of 16-bit maps; one for float64, whose accumulators take two registers each.
template <class T>
constexpr int kLaneOfRows = sizeof(T) == 8 ? 1 : 2;
// A strip of forward is this wide where such strips make up the map's width, else of kColumns: the wider one reads and
// widens fewer of its neighbours' columns.
constexpr int kWholeColumns = 7;
// Strips of a block, which only their last sums bring together: a warp each, or less where there are few channels.
constexpr int kRowStrips = 4;
constexpr int kRowThreads = kRowStrips * kWarp;

// Copies a thread's share of kCount pixels of a row into a slot of its strip's ring, [kCount, kPitch]. Zeros stand
// outside the map and beyond its channels. Offsets within a sample fit in 32 bits: the launch has seen to it.
template <class T, int kPitch, int kLane, int kCount, bool kAligned>
struct RowCopy {
    static constexpr int kStep = kVector<T> / kLane, kItems = (kCount + kStep - 1) / kStep;
    int of_strip, vector;  // the first pixel to copy, the next is kStep on; the first channel
    int left;              // channels of the vector that are in the map
    unsigned wanted;       // a bit for each item, whether its column is in the map

    // `column` is that of the first pixel.
    __device__ RowCopy(const Tiling& t, const Shape& s, const Place& p, int column) {
        const int vectors = t.lanes / kStep;
        of_strip = p.lane / vectors;
        vector = p.lane % vectors * kVector<T>;
        left = min(kVector<T>, static_cast<int>(s.C) - p.c - vector);
        wanted = 0;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            const int at = column + of_strip + i * kStep;
            wanted |= static_cast<unsigned>(at >= 0 && at < s.W && left > 0) << i;
        }
    }

    // `from` is where the first pixel's vector lies, `distance` is between pixels.
    __device__ __forceinline__ void operator()(const T* from, int distance, bool in_map, T* slot) const {
        T* to = slot + of_strip * kPitch + vector;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            const bool mine = (i + 1) * kStep <= kCount || of_strip < kCount - i * kStep;
            const bool there = in_map && (wanted & 1u << i);
            const T* at = from + i * kStep * distance;
            if constexpr (kAligned) {
                copy_async_if(mine, to + i * kStep * kPitch, at, there);
            } else {
#pragma unroll 1
                for (int e = 0; mine && e < kVector<T>; ++e) {
                    to[i * kStep * kPitch + e] = there && e < left ? at[e] : narrow<T>(0);
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
        T* const at = to + j * distance;
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
// Rows on their way: some 50 KiB on a multiprocessor, whatever the maps.
template <Carry kCarry>
constexpr int kForwardAhead = kCarry == Carry::none ? 3 : 2;
// Rows of a ring: those, the one at hand and, where out is made of it, the one above it.
template <Carry kCarry, bool kFolded>
constexpr int kForwardSlots = kForwardAhead<kCarry> + (kFolded ? 2 : 1);

// Blocks that share a multiprocessor's registers, more of them for what counts elements alone: 128 for each thread.
template <class T, bool kAligned>
constexpr int kForwardResident = sizeof(T) == 8 ? 2
                                 : kAligned     ? 4
                                                : 3;

// Bytes of shared memory while a block walks.
template <class T, Carry kCarry, bool kFolded>
DLA_HOST_DEVICE inline int64_t forward_rows_shared(const Tiling& t) {
    const int64_t slots = t.columns + 2 * t.strips;
    return (kCarry == Carry::none ? 1 : 2) * kForwardSlots<kCarry, kFolded> * slots * kForwardChannels<T> *
               int64_t(sizeof(T)) +
           kForwardChannels<T> * int64_t(sizeof(Acc<T>));
}

template <class T, Carry kCarry, bool kFolded, bool kAligned, int kWidth>
__global__ void __launch_bounds__(kRowThreads, (kForwardResident<T, kAligned>))
    forward_rows(const __grid_constant__ Forward<T> a, const __grid_constant__ Tiling t) {
    using A = Acc<T>;
    constexpr int kLane = kLaneOfRows<T>, kPitch = kForwardChannels<T>;
    constexpr int kAhead = kForwardAhead<kCarry>, kSlots = kForwardSlots<kCarry, kFolded>;
    constexpr bool kWhole = kWidth == kWholeColumns;
    constexpr int kSlot = (kWidth + 2) * kPitch, kRing = kSlots * kSlot;
    const int channels = t.lanes * kLane;
    const Shape& s = a.shape;
    const int H = static_cast<int>(s.H), W = static_cast<int>(s.W), C = static_cast<int>(s.C);
    const Place p(t, s, channels);
    const int column = p.column + p.strip * kWidth;
    const RowCopy<T, kPitch, kLane, kWidth + 2, kAligned> copy(t, s, p, column - 1);
    T* const ring_x = shared_memory<T>() + p.strip * kRing;
    T* const ring_carried = ring_x + t.strips * kRing;
    A* const attention = reinterpret_cast<A*>(shared_memory<T>() + (kCarry == Carry::none ? 1 : 2) * t.strips * kRing);
    const int top = max(p.first - 1, 0), of_x = static_cast<int>(a.x.pixel),
              of_carried = static_cast<int>(a.carried.pixel), pixel = top * W + column - 1 + copy.of_strip;
    const T* next_x = a.x.at(p.b, p.c, 0) + (pixel * of_x + copy.vector);
    const T* next_carried = a.carried.at(p.b, p.c, 0) + (pixel * of_carried + copy.vector);
    const auto after = [](int in_ring) { return in_ring == kRing - kSlot ? 0 : in_ring + kSlot; };
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

    const int valid = c < C ? min(kWidth, p.columns - p.strip * kWidth) : 0, room = min(C - c, kLane);
    const int at = p.lane * kLane;
    const auto start = [&](const Map<T>& map) {
        if (!map) return static_cast<T*>(nullptr);
        return map.at(p.b, c, 0) + (p.first * W + column) * static_cast<int>(map.pixel);
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
        __syncwarp();
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
