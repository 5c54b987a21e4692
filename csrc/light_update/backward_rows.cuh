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

// Bytes of shared memory while a block walks.
template <class T>
DLA_HOST_DEVICE inline int64_t backward_rows_shared(const Tiling& t, bool grad_o) {
    return int64_t(t.strips) * backward_ring<T>(t.columns / t.strips, grad_o, t.maps) * int64_t(sizeof(T)) +
           kBackwardChannels<T> * int64_t(sizeof(Acc<T>));
}

template <class T, int kMaps, bool kAligned, int kWidth>
__global__ void __launch_bounds__(kMaxThreads, sizeof(T) == 8 ? 1 : 2)
    backward_rows(const __grid_constant__ Backward<T> a, const __grid_constant__ Tiling t) {
    using A = Acc<T>;
    constexpr int kPitch = kBackwardChannels<T>, kWide = (kWidth + 2) * kPitch, kNarrow = kWidth * kPitch;
    constexpr bool kWhole = kWidth == kWholeColumns;
    const Shape& s = a.shape;
    const int H = static_cast<int>(s.H), W = static_cast<int>(s.W), C = static_cast<int>(s.C);
    const Place p(t, s, t.lanes, true);
    const int column = p.column + p.strip * kWidth, size = backward_ring<T>(kWidth, bool(a.grad_o), kMaps);
    const RowCopy<T, kPitch, 1, kWidth + 2, kAligned> copy_wide(t, s, p, column - 1);
    const RowCopy<T, kPitch, 1, kWidth, kAligned> copy_narrow(t, s, p, column);
    T* const ring_out = shared_memory<T>() + p.strip * size;
    T* const ring_o = ring_out + kBackwardSlots * kWide;
    T* const ring_x = ring_o + kBackwardSlots * kWide;
    T* const ring_carried = ring_x + kBackwardSlots * kNarrow;
    T* const ring_grad_o = ring_x + kMaps * kBackwardSlots * kNarrow;

    // Where the next row begins in each map. The first is o's gradient of row first - 1; x and carried belong to the
    // row above, whose turn it is when o's gradient of a row is there.
    const auto start = [&](const Map<const T>& map, int row, const auto& copy, int first_column) {
        if (!map) return static_cast<const T*>(nullptr);
        const int pixel = row * W + first_column + copy.of_strip;
        return map.at(p.b, p.c, 0) + (pixel * static_cast<int>(map.pixel) + copy.vector);
    };
    const T* next_out = start(a.grad_out, p.first - 1, copy_wide, column - 1);
    const T* next_o = start(a.o, p.first - 1, copy_wide, column - 1);
    const T* next_grad_o = start(a.grad_o, p.first - 1, copy_wide, column - 1);
    const T* next_x = start(a.x, p.first - 2, copy_narrow, column);
    const T* next_carried = start(a.carried, p.first - 2, copy_narrow, column);
    const auto copy_rows = [&](int k, int slot) {
        const int row = p.first - 1 + k;
        const auto one = [&](const auto& copy, const Map<const T>& map, const T* from, T* to) {
            copy(from, static_cast<int>(map.pixel), true, to);
        };
        if (row <= p.last) {
            if (row >= 0 && row < H) {
                one(copy_wide, a.grad_out, next_out, ring_out + slot * kWide);
                one(copy_wide, a.o, next_o, ring_o + slot * kWide);
                if (a.grad_o) one(copy_wide, a.grad_o, next_grad_o, ring_grad_o + slot * kWide);
            }
            if (k > 1) {
                one(copy_narrow, a.x, next_x, ring_x + slot * kNarrow);
                if constexpr (kMaps > 1) one(copy_narrow, a.carried, next_carried, ring_carried + slot * kNarrow);
            }
        }
        end_copies();
        next_out += W * static_cast<int>(a.grad_out.pixel);
        next_o += W * static_cast<int>(a.o.pixel);
        next_grad_o += W * static_cast<int>(a.grad_o.pixel);
        next_x += W * static_cast<int>(a.x.pixel);
        if constexpr (kMaps > 1) next_carried += W * static_cast<int>(a.carried.pixel);
    };
    copy_rows(0, 0);
    copy_rows(1, 1);

    A* const attention = reinterpret_cast<A*>(shared_memory<T>() + t.strips * size);
    attend(a.vectors, s.C, p.b, p.c, min(t.lanes, C - p.c), attention);
    const int c = p.c + p.lane;
    Side<A, 1> of_x(a, p, 0, c, attention), of_carried(a, p, kMaps - 1, c, attention);
    const OutputGradient<A> line(a, p.b, min(c, C - 1));

    const int valid = c < C ? min(kWidth, p.columns - p.strip * kWidth) : 0;
    const auto start_of_gradient = [&](const Map<T>& map) {
        if (!map) return static_cast<T*>(nullptr);
        return map.at(p.b, c, 0) + (p.first * W + column) * static_cast<int>(map.pixel);
    };
    T *to_x = start_of_gradient(a.grad_x), *to_carried = start_of_gradient(a.grad_carried);
    const auto put = [&](const Map<T>& map, T*& to, const A(&values)[kWidth][1]) {
        if (!map) return;
        const int distance = static_cast<int>(map.pixel);
        store_row<kAligned, kWhole>(to, distance, values, valid, C - c);
        to += W * distance;
    };
    const auto inside = [&](int j) {  // whether a column of o's gradient is in the map
        return (kWhole && j > 0 && j <= kWidth) || (column + j - 1 >= 0 && column + j - 1 < W);
    };

    A grad_o[3][kWidth + 2][1], grad_out[kWidth + 2][1] = {};
    const auto take_row = [&](int row, int slot, A(&to)[kWidth + 2][1]) {
        if (row < 0 || row >= H) {
#pragma unroll
            for (int j = 0; j < kWidth + 2; ++j) to[j][0] = 0;
            return;
        }
        load_row<kPitch>(ring_o + slot * kWide + p.lane, to);
        load_row<kPitch>(ring_out + slot * kWide + p.lane, grad_out);
#pragma unroll
        for (int j = 0; j < kWidth + 2; ++j) to[j][0] = line.of_o * (to[j][0] - line.mean) + line.offset;
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
        for (int j = 0; j < kWidth; ++j) grad_map[j][0] = grad_out[j + 1][0] + of_x.offset[0];
        take_row(p.first - 1 + k, slot, grad_o[slot]);
        if (k < 2) return;
        const auto add = [&](Side<A, 1>& side) {
            side.template add<kWidth>(0, grad_o[slot], values, grad_map);
            side.template add<kWidth>(1, grad_o[above], values, grad_map);
            side.template add<kWidth>(2, grad_o[top], values, grad_map);
        };
        load_row<kPitch>(ring_x + slot * kNarrow + p.lane, values);
        add(of_x);
        put(a.grad_x, to_x, grad_map);
        if constexpr (kMaps > 1) {
            load_row<kPitch>(ring_carried + slot * kNarrow + p.lane, values);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) grad_map[j][0] = 0;
            add(of_carried);
            put(a.grad_carried, to_carried, grad_map);
        }
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
