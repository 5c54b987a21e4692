// light_update's backward on channels_last maps: o's gradient of three rows in a ring of accumulators, the maps in
// rings that are filled two rows ahead.
#pragma once

#include "light_update/backward.cuh"
#include "light_update/rows.cuh"

namespace dla::light_update {

// Rows of the rings: of o's gradient three in use and the one that is being written; of grad_out, which the gradient
// of x takes up again a row later, two in use and two ahead; of all others one in use and two ahead.
constexpr int kGradientSlots = 4, kGradOutSlots = 4, kBackwardSlots = 3;

// A thread's strip is wider than in forward: it has one map's filter to hold, and more to share out.
constexpr int kWideColumns = 8;
// Channels of a block: 64 bytes of every pixel, two whole sectors.
template <class T>
constexpr int kBackwardChannels = 64 / sizeof(T);

// Bytes of shared memory while a block walks; `others` are the maps besides grad_out.
template <class T>
DLA_HOST_DEVICE inline int64_t backward_rows_shared(int64_t columns, int others) {
    const int64_t slot = (columns + 2) * kBackwardChannels<T>;
    return slot * (kGradientSlots * sizeof(Acc<T>) + (kGradOutSlots + kBackwardSlots * others) * sizeof(T)) +
           4 * kBackwardChannels<T> * sizeof(Acc<T>) + 5 * sizeof(const T*);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kRowThreads, sizeof(T) == 8 ? 1 : 2)
    backward_rows(const __grid_constant__ Backward<T> a, const __grid_constant__ Tiling t) {
    using A = Acc<T>;
    constexpr int kLane = kLaneOfRows<T>, kPitch = kBackwardChannels<T>;
    const int channels = t.lanes * kLane, slot = (t.columns + 2) * kPitch;
    const Shape& s = a.shape;
    const int H = static_cast<int>(s.H), W = static_cast<int>(s.W), C = static_cast<int>(s.C);
    const Place p(t, s, channels, true);
    const RowCopy<T, kPitch, kAligned, kWideColumns> copy(t, s, p);

    A* const ring = shared_memory<A>();
    A* const lines = ring + kGradientSlots * slot;  // [4, kPitch]
    T* const ring_out = reinterpret_cast<T*>(lines + 4 * kPitch);
    T* const ring_o = ring_out + kGradOutSlots * slot;
    T* const ring_x = ring_o + kBackwardSlots * slot;
    T* const ring_carried = ring_x + kBackwardSlots * slot;
    T* const ring_grad_o = ring_x + t.maps * kBackwardSlots * slot;

    // Where the block's channels begin in each map: five pointers that no register has to keep.
    const T** const bases = reinterpret_cast<const T**>(ring_grad_o + (a.grad_o ? kBackwardSlots * slot : 0));
    const auto base = [&](const Map<const T>& map) { return map ? map.at(p.b, p.c, 0) : nullptr; };
    if (threadIdx.x == 0) {
        bases[0] = base(a.grad_out);
        bases[1] = base(a.o);
        bases[2] = base(a.grad_o);
        bases[3] = base(a.x);
        bases[4] = base(a.carried);
    }
    __syncthreads();

    // What step k needs: o's gradient of row first - 1 + k; x and carried belong to the row above, whose turn it then
    // is.
    const auto copy_rows = [&](int k) {
        const int row = p.first - 1 + k, into = k % kBackwardSlots * slot;
        const auto one = [&](int i, const Map<const T>& map, int from_row, T* to) {
            const int distance = static_cast<int>(map.pixel);
            copy(bases[i] + ((from_row * W + copy.pixel) * distance + copy.vector), distance, true, to);
        };
        if (row >= 0 && row < H && row <= p.last) {
            one(0, a.grad_out, row, ring_out + k % kGradOutSlots * slot);
            one(1, a.o, row, ring_o + into);
            if (a.grad_o) one(2, a.grad_o, row, ring_grad_o + into);
        }
        if (k > 1 && row <= p.last) {
            one(3, a.x, row - 1, ring_x + into);
            if (t.maps > 1) one(4, a.carried, row - 1, ring_carried + into);
        }
        end_copies();
    };
    copy_rows(0);
    copy_rows(1);

    A* const attention = ring;  // until the ring is used
    attend(a.vectors, s.C, p.b, p.c, min(channels, C - p.c), attention);
    const int c = p.c + p.lane * kLane;
    Side<A, kLane> side(a, p, c, attention);
    for (int i = threadIdx.x; i < channels; i += blockDim.x) {
        const OutputGradient<A> line(a, p.b, min(p.c + i, C - 1));
        lines[i] = line.of_grad;
        lines[kPitch + i] = line.of_o;
        lines[2 * kPitch + i] = line.mean;
        lines[3 * kPitch + i] = line.offset;
    }
    __syncthreads();

    // Each thread turns what it has copied itself into o's gradient, so only the gradient needs a barrier.
    const auto take_row = [&](int k) {
        const int row = p.first - 1 + k;
        A* const to = ring + k % kGradientSlots * slot;
        const unsigned mask = row >= 0 && row < H ? copy.wanted : 0;
#pragma unroll 1
        for (int i = 0; i < copy.items; ++i) {
            const int from = copy.at + i * copy.step * kPitch;
#pragma unroll
            for (int half = 0; half < kVector<T>; half += kVector<A>) {
                A grad[kVector<A>] = {};
                if (mask >> i & 1) {
                    const A* line = lines + copy.vector + half;
                    A o[kVector<A>], factor[kVector<A>], more[kVector<A>];
                    load<kVector<A>>(ring_o + k % kBackwardSlots * slot + from + half, o);
                    load<kVector<A>>(line + 2 * kPitch, factor);
#pragma unroll
                    for (int e = 0; e < kVector<A>; ++e) o[e] -= factor[e];
                    load<kVector<A>>(line + kPitch, factor);
                    load<kVector<A>>(line + 3 * kPitch, more);
#pragma unroll
                    for (int e = 0; e < kVector<A>; ++e) o[e] = factor[e] * o[e] + more[e];
                    if (a.weight) load<kVector<A>>(ring_out + k % kGradOutSlots * slot + from + half, grad);
                    load<kVector<A>>(line, factor);
#pragma unroll
                    for (int e = 0; e < kVector<A>; ++e) grad[e] = factor[e] * grad[e] + o[e];
                    if (a.grad_o) {
                        load<kVector<A>>(ring_grad_o + k % kBackwardSlots * slot + from + half, more);
#pragma unroll
                        for (int e = 0; e < kVector<A>; ++e) grad[e] += more[e];
                    }
                }
                store<kVector<A>>(to + from + half, grad);
            }
        }
    };

    const int first_column = p.strip * kWideColumns, room = min(C - c, kLane);
    const int valid = p.active && c < C ? min(kWideColumns, p.columns - first_column) : 0;
    const int at = first_column * kPitch + p.lane * kLane;
    const Map<T>& grad_of_map = p.map ? a.grad_carried : a.grad_x;
    T* const grads = grad_of_map ? grad_of_map.at(p.b, c, 0) : nullptr;
    const int distance = static_cast<int>(grad_of_map.pixel);
    const T* const ring_map = p.map ? ring_carried : ring_x;
    const int steps = p.last - p.first + 2;
    for (int k = 0; k < steps; ++k) {
        await_copies<1>();
        take_row(k);
        __syncthreads();
        copy_rows(k + 2);
        if (k < 2) continue;
        A values[kWideColumns][kLane], grad_map[kWideColumns][kLane] = {};
        load_row<kPitch>(ring_map + k % kBackwardSlots * slot + at + kPitch, values);
        if (!p.map) {
            load_row<kPitch>(ring_out + (k - 1) % kGradOutSlots * slot + at + kPitch, grad_map);
#pragma unroll
            for (int j = 0; j < kWideColumns; ++j) {
#pragma unroll
                for (int e = 0; e < kLane; ++e) grad_map[j][e] += side.offset[e];
            }
        }
#pragma unroll
        for (int dy = 0; dy < 3; ++dy) {
            A grad_o[kWideColumns + 2][kLane];
            load_row<kPitch>(ring + (k - dy) % kGradientSlots * slot + at, grad_o);
            side.template add<kWideColumns>(dy, grad_o, values, grad_map);
        }
        if (!grads) continue;
        const int pixel = (p.first + k - 2) * W + p.column + first_column;
        store_row<kAligned, false>(grads + pixel * distance, distance, grad_map, valid, room);
    }
    finish_products(a, t, p, side.products, shared_memory<A>());
}

}  // namespace dla::light_update
