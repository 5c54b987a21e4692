// light_update's backward on channels_last maps: o's gradient of three rows in a ring of accumulators, the maps in rings
// that are filled one row ahead.
#pragma once

#include "light_update/backward.cuh"
#include "light_update/rows.cuh"

namespace dla::light_update {

// Rows of the rings: of o's gradient three in use and the one that is being written; of grad_out, which the gradient
// of x takes up again a row later, two in use and one ahead; of all others one in use and one ahead.
constexpr int kGradientSlots = 4, kGradOutSlots = 3, kBackwardSlots = 2;

// Bytes of shared memory while a block walks; `maps` other than grad_out.
template <class T>
DLA_HOST_DEVICE inline int64_t backward_rows_shared(int64_t channels, int64_t columns, int maps) {
    const int64_t slot = (columns + 2) * channels;
    return slot * (kGradientSlots * sizeof(Acc<T>) + (kGradOutSlots + kBackwardSlots * maps) * sizeof(T)) +
           (channels * (4 + kProducts + 1) + 1) * sizeof(Acc<T>);
}

template <class T, Carry kCarry>
__global__ void __launch_bounds__(kMaxThreads, sizeof(T) == 8 ? 1 : 2)
    backward_rows(const __grid_constant__ Backward<T> a, const __grid_constant__ Tiling t, bool aligned) {
    using A = Acc<T>;
    constexpr int kLane = kLaneOfRows<T>;
    constexpr bool kCarried = kCarry != Carry::none, kCentre = kCarry == Carry::scaled;
    const int channels = t.lanes * kLane, slot = (t.columns + 2) * channels;
    const Shape& s = a.shape;
    const Place p(t, s, channels, true);
    const RowCopy<T> copy(t, s, p, aligned);

    A* const ring = shared_memory<A>();
    A* const lines = ring + kGradientSlots * slot;  // [4, channels]
    A* const filters = lines + 4 * channels;
    T* const ring_out = reinterpret_cast<T*>(filters + kProducts * channels);
    T* const ring_o = ring_out + kGradOutSlots * slot;
    T* const ring_x = ring_o + kBackwardSlots * slot;
    T* const ring_carried = ring_x + kBackwardSlots * slot;
    T* const ring_grad_o = ring_carried + (kCarried ? kBackwardSlots * slot : 0);
    A* const attention = ring;  // until the ring is used

    // What step k needs: o's gradient of row first - 1 + k; x and carried belong to the row above, whose turn it then is.
    const auto copy_rows = [&](int k) {
        const int64_t row = p.first - 1 + k;
        if (row >= 0 && row < s.H && row <= p.last) {
            copy(a.grad_out, row, ring_out + k % kGradOutSlots * slot);
            copy(a.o, row, ring_o + k % kBackwardSlots * slot);
            if (a.grad_o) copy(a.grad_o, row, ring_grad_o + k % kBackwardSlots * slot);
        }
        if (k > 1 && row <= p.last) {
            copy(a.x, row - 1, ring_x + k % kBackwardSlots * slot);
            if constexpr (kCarried) copy(a.carried, row - 1, ring_carried + k % kBackwardSlots * slot);
        }
        end_copies();
    };
    copy_rows(0);

    attend(a.vectors, s.C, p.b, p.c, min(int64_t(channels), s.C - p.c), attention);
    fill_filters(a, p.b, p.c, channels, attention, filters);
    for (int i = threadIdx.x; i < channels; i += blockDim.x) {
        const OutputGradient<A> line(a, p.b, min(p.c + i, s.C - 1));
        lines[i] = line.of_grad;
        lines[channels + i] = line.of_o;
        lines[2 * channels + i] = line.mean;
        lines[3 * channels + i] = line.offset;
    }
    __syncthreads();

    // Each thread turns what it has copied itself into o's gradient, so only the gradient needs a barrier.
    const auto take_row = [&](int k) {
        const int64_t row = p.first - 1 + k;
        A* const to = ring + k % kGradientSlots * slot;
        const bool in_map = row >= 0 && row < s.H;
        for (int j = copy.from; j < copy.columns; j += copy.step) {
            const int64_t at = p.column + j - 1;
            const bool inside = in_map && at >= 0 && at < s.W;
            const int from = j * channels + copy.vector;
#pragma unroll
            for (int half = 0; half < kVector<T>; half += kVector<A>) {
                A grad[kVector<A>] = {};
                if (inside) {
                    const A* line = lines + copy.vector + half;
                    A o[kVector<A>], factor[kVector<A>], more[kVector<A>];
                    load<kVector<A>>(ring_o + k % kBackwardSlots * slot + from + half, o);
                    load<kVector<A>>(line + 2 * channels, factor);
#pragma unroll
                    for (int e = 0; e < kVector<A>; ++e) o[e] -= factor[e];
                    load<kVector<A>>(line + channels, factor);
                    load<kVector<A>>(line + 3 * channels, more);
#pragma unroll
                    for (int e = 0; e < kVector<A>; ++e) o[e] = factor[e] * o[e] + more[e];
                    load<kVector<A>>(ring_out + k % kGradOutSlots * slot + from + half, grad);
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

    const int64_t c = p.c + p.lane * kLane;
    const int valid = p.active && c < s.C ? min(kColumns, p.columns - p.strip * kColumns) : 0;
    const int at = p.strip * kColumns * channels + p.lane * kLane, room = static_cast<int>(min(s.C - c, int64_t(kLane)));
    A offset[kLane] = {};  // what GAP of out brings to the gradient of x
#pragma unroll
    for (int e = 0; e < kLane; ++e) {
        if (a.grad_out_mean && c + e < s.C) offset[e] = a.grad_out_mean[p.b * s.C + c + e] / A(s.HW());
    }
    Products<A, kLane, false> of_x;
    Products<A, kLane, kCentre> of_carried;
    const int steps = static_cast<int>(p.last - p.first) + 2;
    for (int k = 0; k < steps; ++k) {
        await_copies<0>();
        take_row(k);
        __syncthreads();
        copy_rows(k + 1);
        if (k < 2) continue;
        A x[kColumns][kLane], grad_x[kColumns][kLane], carried[kColumns][kLane], grad_carried[kColumns][kLane] = {};
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const int from = at + (j + 1) * channels;
            load<kLane>(ring_x + k % kBackwardSlots * slot + from, x[j]);
            if constexpr (kCarried) load<kLane>(ring_carried + k % kBackwardSlots * slot + from, carried[j]);
            load<kLane>(ring_out + (k - 1) % kGradOutSlots * slot + from, grad_x[j]);
#pragma unroll
            for (int e = 0; e < kLane; ++e) grad_x[j][e] += offset[e];
        }
#pragma unroll
        for (int dy = 0; dy < 3; ++dy) {
            A grad[kColumns + 2][kLane];
            load_row(ring + (k - dy) % kGradientSlots * slot + at, channels, grad);
            of_x.add(dy, grad, x, filters + p.lane * kLane, channels, grad_x);
            if constexpr (kCarried) {
                of_carried.add(dy, grad, carried, filters + 9 * channels + p.lane * kLane, channels, grad_carried);
            }
        }
        const int64_t pixel = (p.first + k - 2) * s.W + p.column + p.strip * kColumns;
        if (a.grad_x) store_row<kLane>(a.grad_x.at(p.b, c, pixel), a.grad_x.pixel, grad_x, valid, room, aligned);
        if (kCarried && a.grad_carried) {
            store_row<kLane>(a.grad_carried.at(p.b, c, pixel), a.grad_carried.pixel, grad_carried, valid, room, aligned);
        }
    }
    finish_products<kLane, kCarried, kCentre>(a, t, p, of_x, of_carried, shared_memory<A>());
}

}  // namespace dla::light_update
