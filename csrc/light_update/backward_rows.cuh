// light_update's backward on channels_last maps: strips that go their own way as in forward. A thread has one channel,
// of which it makes o's gradient with the neighbouring columns itself, and keeps three rows of it in registers.
#pragma once

#include "light_update/backward.cuh"
#include "light_update/rows.cuh"

namespace dla::light_update {

// A strip's columns where kWholeColumns do not fit.
constexpr int kWideColumns = 8;
// Channels of a block: 64 bytes of every pixel, two whole sectors.
template <class T>
constexpr int kBackwardChannels = 64 / sizeof(T);
// Rows of a ring: two on their way and the one at hand. As many as rows of o's gradient: with three steps written out,
// all of their places are constants.
constexpr int kBackwardSlots = 3;

// Elements of a strip's rings: grad_out, o and perhaps grad_o with the neighbouring columns, x and carried without.
template <class T>
DLA_HOST_DEVICE inline int backward_ring(int width, bool grad_o, int maps) {
    return kBackwardSlots * kBackwardChannels<T> * ((width + 2) * (grad_o ? 3 : 2) + width * maps);
}

// Where a block's channels begin in each map that is read: pointers that no register has to keep.
template <class T>
struct Bases {
    const T *grad_out, *o, *grad_o, *x, *carried;
};

// Bytes of shared memory while a block walks.
template <class T>
DLA_HOST_DEVICE inline int64_t backward_rows_shared(const Tiling& t, bool grad_o) {
    return int64_t(t.strips) * backward_ring<T>(t.columns / t.strips, grad_o, t.maps) * int64_t(sizeof(T)) +
           kBackwardChannels<T> * int64_t(sizeof(Acc<T>)) + int64_t(sizeof(Bases<T>));
}

// Blocks that share a multiprocessor's registers.
template <class T, int kMaps, bool kAligned>
constexpr int kBackwardResident = sizeof(T) == 8           ? 2
                                  : kAligned && kMaps == 1 ? 4
                                                           : 3;

template <class T, int kMaps, bool kAligned, int kWidth>
__global__ void __launch_bounds__(kRowThreads, (kBackwardResident<T, kMaps, kAligned>))
    backward_rows(const __grid_constant__ Backward<T> a, const __grid_constant__ Tiling t) {
    using A = Acc<T>;
    constexpr int kPitch = kBackwardChannels<T>, kWide = (kWidth + 2) * kPitch, kNarrow = kWidth * kPitch;
    constexpr bool kWhole = kWidth == kWholeColumns;
    const Shape& s = a.shape;
    const int H = static_cast<int>(s.H), W = static_cast<int>(s.W), C = static_cast<int>(s.C);
    const Place p(t, s, t.lanes);
    const int column = p.column + p.strip * kWidth, size = backward_ring<T>(kWidth, bool(a.grad_o), kMaps);
    const RowCopy<T, kPitch, 1, kWidth + 2, kAligned> copy_wide(t, s, p, column - 1);
    const RowCopy<T, kPitch, 1, kWidth, kAligned> copy_narrow(t, s, p, column);
    T* const ring_out = shared_memory<T>() + p.strip * size;
    T* const ring_o = ring_out + kBackwardSlots * kWide;
    T* const ring_x = ring_o + kBackwardSlots * kWide;
    T* const ring_carried = ring_x + kBackwardSlots * kNarrow;
    T* const ring_grad_o = ring_x + kMaps * kBackwardSlots * kNarrow;

    A* const attention = reinterpret_cast<A*>(shared_memory<T>() + t.strips * size);
    Bases<T>& bases = *reinterpret_cast<Bases<T>*>(attention + kPitch);
    if (threadIdx.x == 0) {
        const auto base = [&](const auto& map) { return map ? map.at(p.b, p.c, 0) : nullptr; };
        bases = {base(a.grad_out), base(a.o), base(a.grad_o), base(a.x), base(a.carried)};
    }
    __syncthreads();

    // What step k needs: o's gradient of row first - 1 + k; x and carried belong to the row above, whose turn it then
    // is.
    const auto copy_rows = [&](int k, int slot) {
        const int row = p.first - 1 + k;
        const auto one = [&](const auto& copy, const Map<const T>& map, const T* base, int pixel, T* to) {
            const int distance = static_cast<int>(map.pixel);
            copy(base + ((pixel + copy.of_strip) * distance + copy.vector), distance, true, to);
        };
        if (row <= p.last) {
            if (row >= 0 && row < H) {
                const int pixel = row * W + column - 1;
                one(copy_wide, a.grad_out, bases.grad_out, pixel, ring_out + slot * kWide);
                one(copy_wide, a.o, bases.o, pixel, ring_o + slot * kWide);
                if (a.grad_o) one(copy_wide, a.grad_o, bases.grad_o, pixel, ring_grad_o + slot * kWide);
            }
            if (k > 1) {
                const int pixel = (row - 1) * W + column;
                one(copy_narrow, a.x, bases.x, pixel, ring_x + slot * kNarrow);
                if constexpr (kMaps > 1) {
                    one(copy_narrow, a.carried, bases.carried, pixel, ring_carried + slot * kNarrow);
                }
            }
        }
        end_copies();
    };
    copy_rows(0, 0);
    copy_rows(1, 1);

    attend(a.vectors, s.C, p.b, p.c, min(t.lanes, C - p.c), attention);
    const int c = p.c + p.lane;
    Side<A, 1> of_x(a, p, 0, c, attention), of_carried(a, p, kMaps - 1, c, attention);
    const OutputGradient<A> line(a, p.b, min(c, C - 1));

    const int valid = c < C ? min(kWidth, p.columns - p.strip * kWidth) : 0;
    const auto put = [&](const Map<T>& map, int row, const A(&values)[kWidth][1]) {
        if (!map) return;
        const int distance = static_cast<int>(map.pixel);
        T* const to = map.at(p.b, p.c, 0) + ((row * W + column) * distance + p.lane);
        store_row<kAligned, kWhole>(to, distance, values, valid, C - c);
    };
    const auto inside = [&](int j) {  // whether a column of o's gradient is in the map
        return (kWhole && j > 0 && j <= kWidth) || (column + j - 1 >= 0 && column + j - 1 < W);
    };

    // grad_out of the row above, which the gradient of x takes up, is kept, or read again where registers are scarce.
    constexpr bool kKeep = kWhole && kAligned && sizeof(T) == 2;
    A grad_o[3][kWidth + 2][1], residual[3][kWidth][1] = {};
    const auto take_row = [&](int row, int slot, A(&to)[kWidth + 2][1], A(&centre)[kWidth][1]) {
        if (row < 0 || row >= H) {
#pragma unroll
            for (int j = 0; j < kWidth + 2; ++j) to[j][0] = 0;
            return;
        }
        load_row<kPitch>(ring_o + slot * kWide + p.lane, to);
        A grad_out[kWidth + 2][1];
        load_row<kPitch>(ring_out + slot * kWide + p.lane, grad_out);
#pragma unroll
        for (int j = 0; j < kWidth + 2; ++j) to[j][0] = line.of_o * (to[j][0] - line.mean) + line.offset;
        if constexpr (kKeep) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) centre[j][0] = grad_out[j + 1][0];
        }
        if (a.weight) {
#pragma unroll
            for (int j = 0; j < kWidth + 2; ++j) to[j][0] = line.of_grad * grad_out[j][0] + to[j][0];
        }
        if (a.grad_o) {
            A more[kWidth + 2][1];
            load_row<kPitch>(ring_grad_o + slot * kWide + p.lane, more);
#pragma unroll
            for (int j = 0; j < kWidth + 2; ++j) to[j][0] += more[j][0];
        }
#pragma unroll
        for (int j = 0; j < kWidth + 2; ++j) {
            if (!inside(j)) to[j][0] = 0;
        }
    };
    // Step k of those with k % 3 == slot: o's gradient of a row, and with it the gradients of the row above.
    const auto step = [&](int k, auto constant) {
        constexpr int slot = decltype(constant)::value, above = (slot + 2) % 3, top = (slot + 1) % 3;
        await_copies<1>();
        __syncwarp();
        copy_rows(k + 2, above);
        A grad_map[kWidth][1], values[kWidth][1];
#pragma unroll
        for (int j = 0; j < kWidth; ++j) grad_map[j][0] = residual[above][j][0] + of_x.offset[0];
        take_row(p.first - 1 + k, slot, grad_o[slot], residual[slot]);
        const auto add = [&](Side<A, 1>& side) {
            side.template add<kWidth>(0, grad_o[slot], values, grad_map);
            side.template add<kWidth>(1, grad_o[above], values, grad_map);
            side.template add<kWidth>(2, grad_o[top], values, grad_map);
        };
        if (k > 1) {
            load_row<kPitch>(ring_x + slot * kNarrow + p.lane, values);
            add(of_x);
            put(a.grad_x, p.first - 2 + k, grad_map);
            if constexpr (kMaps > 1) {
                load_row<kPitch>(ring_carried + slot * kNarrow + p.lane, values);
#pragma unroll
                for (int j = 0; j < kWidth; ++j) grad_map[j][0] = 0;
                add(of_carried);
                put(a.grad_carried, p.first - 2 + k, grad_map);
            }
        }
        if constexpr (!kKeep) load_row<kPitch>(ring_out + slot * kWide + kPitch + p.lane, residual[slot]);
    };
    const int steps = p.last - p.first + 2;
    for (int k = 0; k < steps; k += 3) {
        step(k, std::integral_constant<int, 0>{});
        if (k + 1 < steps) step(k + 1, std::integral_constant<int, 1>{});
        if (k + 2 < steps) step(k + 2, std::integral_constant<int, 2>{});
    }

    A products[9 * kMaps][1];
#pragma unroll
    for (int k = 0; k < 9; ++k) {
        products[k][0] = of_x.products[k][0];
        if constexpr (kMaps > 1) products[9 + k][0] = of_carried.products[k][0];
    }
    finish_products(a, t, p, products, shared_memory<A>());
}

}  // namespace dla::light_update
