// light_update's backward on NCHW maps: the bands of the forward kernel. What goes into o's gradient lies in shared
// memory, where every row is read for its neighbours too; x and what is carried are read by their own thread alone.
#pragma once

#include "light_update/backward.cuh"
#include "light_update/planes.cuh"

namespace dla::light_update {

// Bytes of shared memory of a block with as many slabs.
template <class T>
DLA_HOST_DEVICE inline int64_t backward_planes_shared(const Tiling& t, const Shape& s, int slabs) {
    const int64_t walk = int64_t(slabs) * Slab<T>::size_of(t, s) * sizeof(T) + t.lanes * sizeof(Acc<T>);
    const int64_t finish = int64_t(t.maps) * 9 * t.lanes * (t.members() | 1) * sizeof(Acc<T>);
    return walk > finish ? walk : finish;
}

// A thread's share in what its map has to do with o's gradient: that of the map, and for each tap the sum of the map
// times o's gradient shifted by it.
template <class A, int kTaps>
struct Share {
    A products[kTaps] = {};

    // One row of the map and three of o's gradient, the one above first; with a single tap, that is the centre.
    __device__ __forceinline__ void add(const A (&filter)[kTaps], const A (&above)[kStrip + 2],
                                        const A (&here)[kStrip + 2], const A (&below)[kStrip + 2],
                                        const A (&values)[kStrip], A (&grad)[kStrip]) {
        if constexpr (kTaps == 1) {
            add_tap<0>(filter, 1, here, values, grad);
        } else {
            add_row<0>(filter, below, values, grad);
            add_row<3>(filter, here, values, grad);
            add_row<6>(filter, above, values, grad);
        }
    }

  private:
    template <int kFirst>
    __device__ __forceinline__ void add_row(const A (&filter)[kTaps], const A (&row)[kStrip + 2],
                                            const A (&values)[kStrip], A (&grad)[kStrip]) {
        add_tap<kFirst>(filter, 2, row, values, grad);
        add_tap<kFirst + 1>(filter, 1, row, values, grad);
        add_tap<kFirst + 2>(filter, 0, row, values, grad);
    }

    template <int kTap>
    __device__ __forceinline__ void add_tap(const A (&filter)[kTaps], int from, const A (&row)[kStrip + 2],
                                            const A (&values)[kStrip], A (&grad)[kStrip]) {
#pragma unroll
        for (int j = 0; j < kStrip; ++j) {
            products[kTap] += values[j] * row[j + from];
            grad[j] += filter[kTap] * row[j + from];
        }
    }
};

// Adds up the products of the block's threads, member by member, and writes them to the block's part.
template <Carry kCarry, class T, class A, int kTaps>
__device__ void finish_shares(const Backward<T>& a, const Tiling& t, const PlanePlace& p, const Share<A, 9>& of_x,
                              const Share<A, kTaps>& of_carried, A* shared) {
    const int pitch = t.members() | 1, tap = t.lanes * pitch;  // odd, for the banks
    A* const own = shared + p.lane * pitch + p.member;
    __syncthreads();
    if (p.active) {
#pragma unroll
        for (int k = 0; k < 9; ++k) own[k * tap] = of_x.products[k];
        if constexpr (kCarry != Carry::none) {
#pragma unroll
            for (int k = 0; k < kTaps; ++k) own[(9 + k) * tap] = of_carried.products[k];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < t.maps * 9 * t.lanes; i += blockDim.x) {
        const int c = p.c + i % t.lanes;
        int k = i / t.lanes;
        if (c >= a.shape.C) continue;
        A* const to = a.parts + ((int64_t(p.b) * t.parts() + p.part) * kProducts + k) * a.shape.C + c;
        // Where no filter goes over what is carried there is one product for the centre, and no use for others.
        if (kTaps == 1 && k >= 9) {
            if (k != 9 + 4) {
                *to = 0;
                continue;
            }
            k = 9;
        }
        const A* const from = shared + (k * t.lanes + i % t.lanes) * pitch;
        A sum = 0;
#pragma unroll 4
        for (int m = 0; m < t.members(); ++m) sum += from[m];
        *to = sum;
    }
}

// Blocks on a multiprocessor, as in forward. Two filters and their products do not fit in 80 registers.
template <class T, Carry kCarry, bool kAligned>
constexpr int kBackwardBlocks = sizeof(T) == 8                                            ? 1
                                : sizeof(T) == 2 && kAligned && kCarry != Carry::filtered ? 3
                                                                                          : 2;

template <class T, Carry kCarry, bool kAligned>
__global__ void __launch_bounds__(kPlaneThreads, kBackwardBlocks<T, kCarry, kAligned>)
    backward_planes(const __grid_constant__ Backward<T> a, const __grid_constant__ Tiling t) {
    using A = Acc<T>;
    constexpr int kTaps = Filters<A, kCarry>::kTaps;
    const Shape& s = a.shape;
    const int C = static_cast<int>(s.C), H = static_cast<int>(s.H), W = static_cast<int>(s.W);
    const PlanePlace p(t, s);
    const int size = Slab<T>::size_of(t, s);
    T* const memory = shared_memory<T>();
    const Slab<T> grad_out(t, s, p, a.grad_out, memory), o(t, s, p, a.o, memory + size);
    const Slab<T> grad_o(t, s, p, a.grad_o, memory + 2 * size);
    A* const attention = reinterpret_cast<A*>(memory + (a.grad_o ? 3 : 2) * size);
    grad_out.copy();
    o.copy();
    if (a.grad_o) grad_o.copy();

    const Band band(t, s, p);
    const int valid = kAligned ? kStrip : band.valid;
    const bool has_rows = band.valid > 0;
    const int64_t pixel = int64_t(band.first) * W + band.column;
    const T *next_x = a.x.at(p.b, band.c, pixel), *next_carried = nullptr;
    Packed<T> of_x, of_carried;
    if (has_rows) of_x.template fetch_from<kAligned>(next_x, valid);
    if constexpr (kCarry != Carry::none) {
        next_carried = a.carried.at(p.b, band.c, pixel);
        if (has_rows) of_carried.template fetch_from<kAligned>(next_carried, valid);
    }
    Filters<A, kCarry> filters(a.vectors, s.C, p.b, band.c);
    const OutputGradient<A> line(a, p.b, band.c);
    const A offset = a.grad_out_mean ? a.grad_out_mean[p.b * s.C + band.c] / A(s.HW()) : A(0);
    attend(a.vectors, C, p.b, p.c, min(t.lanes, C - p.c), attention);
    filters.attend_by(a.vectors, p.c, band.c, attention);
    await_copies<0>();
    __syncthreads();

    const bool wants_x(a.grad_x), wants_carried(a.grad_carried), has_grad_o(a.grad_o);
    T *to_x = a.grad_x.at(p.b, band.c, pixel), *to_carried = a.grad_carried.at(p.b, band.c, pixel);
    // o's gradient in a row, zeros outside the map.
    const int above_first = band.first - 1;
    const T *from_out = grad_out.at(p.lane, above_first, band.column), *from_o = o.at(p.lane, above_first, band.column);
    const T* from_grad_o = grad_o.at(p.lane, above_first, band.column);
    const auto next_row = [&](int row, A(&to)[kStrip + 2]) {
        if (row < H) {
            A values[kStrip + 2] = {};
            if (kCarry != Carry::none || a.weight) band.template load_row<kAligned>(from_out, W, values);
            band.template load_row<kAligned>(from_o, W, to);
#pragma unroll
            for (int j = 0; j < kStrip + 2; ++j) to[j] = line.at(values[j], to[j]);
            if (has_grad_o) {
                band.template load_row<kAligned>(from_grad_o, W, values);
#pragma unroll
                for (int j = 0; j < kStrip + 2; ++j) to[j] += values[j];
            }
            if (!band.left) to[0] = 0;
            if (kAligned) {
                if (!band.right) to[kStrip + 1] = 0;
            } else {
#pragma unroll
                for (int j = 0; j <= kStrip; ++j) to[j + 1] = band.column + j < W ? to[j + 1] : A(0);
            }
        } else {
#pragma unroll
            for (int j = 0; j < kStrip + 2; ++j) to[j] = 0;
        }
        from_out += o.row;
        from_o += o.row;
        from_grad_o += o.row;
    };
    Share<A, 9> share_x;
    Share<A, kTaps> share_carried;
    if (has_rows) {
        A above[kStrip + 2], here[kStrip + 2], below[kStrip + 2];
        if (band.first > 0) {
            next_row(band.first - 1, here);
        } else {
#pragma unroll
            for (int j = 0; j < kStrip + 2; ++j) here[j] = 0;
            from_out += o.row;
            from_o += o.row;
            from_grad_o += o.row;
        }
        next_row(band.first, below);
#pragma unroll kCarry == Carry::scaled || !kAligned ? 1 : 3
        for (int row = band.first; row < band.last; ++row) {
#pragma unroll
            for (int j = 0; j < kStrip + 2; ++j) {
                above[j] = here[j];
                here[j] = below[j];
            }
            next_row(row + 1, below);
            A values[kStrip], grad[kStrip];
            of_x.to(values);
            next_x += W;
            if (row + 1 < band.last) of_x.template fetch_from<kAligned>(next_x, valid);
            load_strip<kAligned>(from_out - 2 * o.row, valid, grad);
#pragma unroll
            for (int j = 0; j < kStrip; ++j) grad[j] += offset;
            share_x.add(filters.x, above, here, below, values, grad);
            if (wants_x) store_strip<kAligned>(to_x, grad, valid);
            to_x += W;
            if constexpr (kCarry != Carry::none) {
                of_carried.to(values);
                next_carried += W;
                if (row + 1 < band.last) of_carried.template fetch_from<kAligned>(next_carried, valid);
#pragma unroll
                for (int j = 0; j < kStrip; ++j) grad[j] = 0;
                share_carried.add(filters.carried, above, here, below, values, grad);
                if (wants_carried) store_strip<kAligned>(to_carried, grad, valid);
                to_carried += W;
            }
        }
    }
    finish_shares<kCarry>(a, t, p, share_x, share_carried, shared_memory<A>());
}

}  // namespace dla::light_update
