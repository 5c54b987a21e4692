// light_update's backward on NCHW maps: the bands of the forward kernel, with o's gradient in accumulators beside them.
#pragma once

#include "light_update/backward.cuh"
#include "light_update/planes.cuh"

namespace dla::light_update {

// Bytes of shared memory of a block with `maps` maps.
template <class T>
DLA_HOST_DEVICE inline int64_t backward_planes_shared(const Tiling& t, const Shape& s, int maps) {
    return Slab<T>::size_of(t, s) * (maps * sizeof(T) + sizeof(Acc<T>)) + (kProducts + 1) * t.lanes * sizeof(Acc<T>);
}

template <class T, Carry kCarry>
__global__ void __launch_bounds__(kMaxThreads, 2)
    backward_planes(const __grid_constant__ Backward<T> a, const __grid_constant__ Tiling t, bool aligned) {
    using A = Acc<T>;
    constexpr bool kCarried = kCarry != Carry::none, kCentre = kCarry == Carry::scaled;
    const Shape& s = a.shape;
    const Place p(t, s, t.lanes, false);
    const int size = Slab<T>::size_of(t, s);
    T* const maps = shared_memory<T>();
    A* const grads = reinterpret_cast<A*>(maps + (3 + kCarried + bool(a.grad_o)) * size);
    A* const filters = grads + size;
    A* const attention = filters + kProducts * t.lanes;
    const Slab<T> grad_out(t, s, p, a.grad_out, maps), o(t, s, p, a.o, maps + size), x(t, s, p, a.x, maps + 2 * size);
    const Slab<T> carried(t, s, p, kCarried ? a.carried : a.x, maps + 3 * size);
    const Slab<T> grad_o(t, s, p, a.grad_o ? a.grad_o : a.x, maps + (kCarried ? 4 : 3) * size);
    grad_out.copy();
    o.copy();
    x.copy();
    if constexpr (kCarried) carried.copy();
    if (a.grad_o) grad_o.copy();
    attend(a.vectors, s.C, p.b, p.c, min(int64_t(t.lanes), s.C - p.c), attention);
    fill_filters(a, p.b, p.c, t.lanes, attention, filters);
    await_copies<0>();
    __syncthreads();

    // o's gradient, run by run: each where the run of the map lies, but from the pitch's beginning on.
    for (int run = threadIdx.x / kWarp; run < o.runs; run += blockDim.x / kWarp) {
        const OutputGradient<A> line(a, p.b, p.c + (o.whole ? run : 0));
        const auto of = [&](const Slab<T>& map) { return map.shared + run * map.pitch + map.offset(map.source(run)); };
        const T *from_out = of(grad_out), *from_o = of(o), *from_grad_o = of(grad_o);
        for (int i = threadIdx.x % kWarp; i < o.length; i += kWarp) {
            A grad = line.at(widen(from_out[i]), widen(from_o[i]));
            if (a.grad_o) grad += widen(from_grad_o[i]);
            grads[run * o.pitch + i] = grad;
        }
    }
    __syncthreads();

    const bool there = p.active && p.c + p.lane < s.C;
    const int64_t c = min(p.c + p.lane, s.C - 1);
    const int valid = there ? min(kColumns, p.columns - p.strip * kColumns) : 0;
    const int64_t column = p.column + p.strip * kColumns;
    const int64_t band = ceil_div(p.last - p.first, t.groups), first = p.first + p.group * band;
    const int64_t last = min(p.last, first + band);
    const A offset = a.grad_out_mean ? a.grad_out_mean[p.b * s.C + c] / A(s.HW()) : A(0);
    Products<A, 1, false> of_x;
    Products<A, 1, kCentre> of_carried;
    for (int64_t row = first; valid > 0 && row < last; ++row) {
        const T *from_x = x.at(p.lane, row) + column, *from_out = grad_out.at(p.lane, row) + column;
        const T* from_carried = carried.at(p.lane, row) + column;
        A at_x[kColumns][1] = {}, grad_x[kColumns][1] = {}, at_carried[kColumns][1] = {}, grad_carried[kColumns][1] = {};
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            if (j >= valid) break;
            at_x[j][0] = widen(from_x[j]);
            if constexpr (kCarried) at_carried[j][0] = widen(from_carried[j]);
            grad_x[j][0] = widen(from_out[j]) + offset;
        }
#pragma unroll
        for (int dy = 0; dy < 3; ++dy) {
            const int64_t of = row + 1 - dy;
            if (of < 0 || of >= s.H) continue;
            const int run = o.whole ? p.lane : static_cast<int>(of - o.top);
            const A* from = grads + run * o.pitch + (o.whole ? (of - o.top) * s.W : -o.left);
            A grad[kColumns + 2][1];
            load_row(from, column, s.W, grad);
            of_x.add(dy, grad, at_x, filters + p.lane, t.lanes, grad_x);
            if constexpr (kCarried) {
                of_carried.add(dy, grad, at_carried, filters + 9 * t.lanes + p.lane, t.lanes, grad_carried);
            }
        }
        const int64_t pixel = row * s.W + column;
        if (a.grad_x) store_strip(a.grad_x.at(p.b, c, pixel), grad_x, valid, aligned);
        if (kCarried && a.grad_carried) store_strip(a.grad_carried.at(p.b, c, pixel), grad_carried, valid, aligned);
    }
    finish_products<1, kCarried, kCentre>(a, t, p, of_x, of_carried, shared_memory<A>());
}

}  // namespace dla::light_update
