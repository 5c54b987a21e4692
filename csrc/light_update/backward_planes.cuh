// light_update's backward on NCHW maps: the bands of the forward kernel, with o's gradient in accumulators beside them.
#pragma once

#include "light_update/backward.cuh"
#include "light_update/planes.cuh"

namespace dla::light_update {

// Bytes of shared memory of a block with `maps` maps.
template <class T>
DLA_HOST_DEVICE inline int64_t backward_planes_shared(const Tiling& t, const Shape& s, int maps) {
    return Slab<T>::size_of(t, s) * (maps * sizeof(T) + sizeof(Acc<T>)) + t.lanes * sizeof(Acc<T>);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    backward_planes(const __grid_constant__ Backward<T> a, const __grid_constant__ Tiling t, bool aligned) {
    using A = Acc<T>;
    const Shape& s = a.shape;
    const Place p(t, s, t.lanes, false);
    const int size = Slab<T>::size_of(t, s), H = static_cast<int>(s.H), W = static_cast<int>(s.W);
    T* const memory = shared_memory<T>();
    const Slab<T> grad_out(t, s, p, a.grad_out, memory), o(t, s, p, a.o, memory + size);
    const Slab<T> x(t, s, p, a.x, memory + 2 * size), carried(t, s, p, a.carried, memory + 3 * size);
    const Slab<T> grad_o(t, s, p, a.grad_o, memory + (2 + t.maps) * size);
    A* const grads = reinterpret_cast<A*>(memory + (2 + t.maps + (a.grad_o ? 1 : 0)) * size);
    A* const attention = grads + size;
    grad_out.copy();
    o.copy();
    x.copy();
    if (t.maps > 1) carried.copy();
    if (a.grad_o) grad_o.copy();
    attend(a.vectors, s.C, p.b, p.c, min(t.lanes, static_cast<int>(s.C) - p.c), attention);
    Side<A, 1> side(a, p, p.map, p.c + p.lane, attention);
    const Map<T> grad_of_map = p.map ? a.grad_carried : a.grad_x;
    await_copies<0>();
    __syncthreads();

    // o's gradient, run by run: each where the run of the map lies, but from the pitch's beginning on.
    for (int run = threadIdx.x / kWarp; run < o.runs; run += blockDim.x / kWarp) {
        const OutputGradient<A> line(a, p.b, p.c + (o.whole ? run : 0));
        const auto of = [&](const Slab<T>& map) { return map.shared + run * map.pitch + map.offset(map.source(run)); };
        const T *from_out = of(grad_out), *from_o = of(o), *from_grad_o = of(grad_o);
        for (int i = threadIdx.x % kWarp; i < o.length; i += kWarp) {
            A grad = line.at(a.weight ? widen(from_out[i]) : A(0), widen(from_o[i]));
            if (a.grad_o) grad += widen(from_grad_o[i]);
            grads[run * o.pitch + i] = grad;
        }
    }
    __syncthreads();

    const int valid = p.active && p.c + p.lane < s.C ? min(kColumns, p.columns - p.strip * kColumns) : 0;
    const int column = p.column + p.strip * kColumns;
    const int band = (p.last - p.first + t.groups - 1) / t.groups, first = p.first + p.group * band;
    const int last = min(p.last, first + band);
    for (int row = first; valid > 0 && row < last; ++row) {
        const T* from_map = (p.map ? carried.at(p.lane, row) : x.at(p.lane, row)) + column;
        const T* from_out = grad_out.at(p.lane, row) + column;
        A values[kColumns][1] = {}, grad_map[kColumns][1] = {};
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            if (j >= valid) break;
            values[j][0] = widen(from_map[j]);
            if (!p.map) grad_map[j][0] = widen(from_out[j]) + side.offset[0];
        }
#pragma unroll
        for (int dy = 0; dy < 3; ++dy) {
            const int of = row + 1 - dy;
            if (of < 0 || of >= H) continue;
            const int run = o.whole ? p.lane : of - static_cast<int>(o.top);
            const A* from = grads + run * o.pitch + (o.whole ? (of - o.top) * s.W : -o.left);
            A grad[kColumns + 2][1];
            load_row(from, column, W, grad);
            side.template add<kColumns>(dy, grad, values, grad_map);
        }
        if (!grad_of_map) continue;
        store_strip(grad_of_map.at(p.b, p.c + p.lane, int64_t(row) * W + column), grad_map, valid, aligned);
    }
    finish_products(a, t, p, side.products, shared_memory<A>());
}

}  // namespace dla::light_update
