// light_update on NCHW maps. A block holds whole planes in shared memory, or bands of the rows of a plane that is too
// large, with a row above and below; where even rows are too long it cuts them too.
#pragma once

#include "light_update/block.cuh"

namespace dla::light_update {

// Columns of a thread's strip.
constexpr int kStrip = 4;
// Of every block. Four planes of 56x56 fill seven warps.
constexpr int kPlaneThreads = 224;

// n / d of numbers that a float counts exactly, with a quotient of few digits.
__device__ __forceinline__ int quotient(int n, int d) {
    return static_cast<int>((static_cast<float>(n) + 0.5f) * reciprocal(static_cast<float>(d)));
}

// Where a block stands in the map, and a thread in the block, in few instructions: all of them count where a thread has
// few pixels.
struct PlanePlace {
    int b, c, column, first, last, part, columns, lane, strip, group, member;
    bool active;

    __device__ PlanePlace(const Tiling& t, const Shape& s) {
        const int W = static_cast<int>(s.W), H = static_cast<int>(s.H);
        unsigned block = blockIdx.x;
        b = block / t.chunks;
        c = (block - b * t.chunks) * t.lanes;
        part = column = first = 0;
        if (t.parts() > 1) {
            part = b % static_cast<unsigned>(t.parts());
            b /= static_cast<unsigned>(t.parts());
            column = part % static_cast<unsigned>(t.tiles) * t.columns;
            first = part / static_cast<unsigned>(t.tiles) * t.rows;
        }
        columns = min(t.columns, W - column);
        last = min(H, first + t.rows);
        const int members = t.members(), thread = threadIdx.x;
        lane = quotient(thread, members);
        active = lane < t.lanes;
        if (!active) lane = 0;
        member = active ? thread - lane * members : 0;
        group = quotient(member, t.strips);
        strip = member - group * t.strips;
    }
};

// The rows [top, bottom) of a block's planes as they lie in memory. Every element keeps its place within 16 bytes, so
// that all but the ends of a run of adjacent ones moves in 16-byte copies whatever its address.
template <class T>
struct Slab {
    const T* base;            // the first run in the map
    T* shared;                // and here
    int64_t stride;           // between runs there
    int pitch, length, runs;  // between runs here, which is as much but for a multiple of 16 bytes; elements of a run
    int top, left, row;       // first row, and column where rows begin; between rows here

    // Elements that a block's slab takes.
    static __host__ __device__ int size_of(const Tiling& t, const Shape& s) {
        const int W = static_cast<int>(s.W), rows = static_cast<int>(min(int64_t(t.rows + 2), s.H));
        const int length = t.tiles == 1 ? rows * W : t.columns + 2, runs = t.tiles == 1 ? t.lanes : rows;
        return static_cast<int>(round_up(runs * (length + kVector<T> - 1), kVector<T>)) + kVector<T>;
    }

    __device__ Slab(const Tiling& t, const Shape& s, const PlanePlace& p, const Map<const T>& map, T* memory) {
        const int W = static_cast<int>(s.W), H = static_cast<int>(s.H), C = static_cast<int>(s.C);
        const bool whole = t.tiles == 1;  // a run is a band of a plane, else a part of one row
        top = max(p.first - 1, 0);
        left = max(p.column - 1, 0);
        const int rows = min(p.last + 1, H) - top, columns = min(p.column + p.columns + 1, W) - left;
        base = map.at(p.b, p.c, int64_t(top) * W + left);
        stride = whole ? map.channel : W;
        length = whole ? rows * W : columns;
        runs = whole ? min(t.lanes, C - p.c) : rows;
        pitch = length + (static_cast<int>(stride) - length & kVector<T> - 1);
        row = whole ? W : pitch;
        shared = memory + reinterpret_cast<uintptr_t>(base) % 16 / sizeof(T);
    }

    // By the whole block; the copies of 16 bytes are still under way.
    __device__ void copy() const {
        if (runs == 1 || stride == length) {
            copy_run<kPlaneThreads>(base, shared, runs * length);
        } else {
            for (int run = threadIdx.x / kWarp; run < runs; run += kPlaneThreads / kWarp) {
                copy_run<kWarp>(base + run * stride, shared + run * pitch, length);
            }
        }
        end_copies();
    }

    // By kThreads threads, at least as many as a vector has elements.
    template <int kThreads>
    static __device__ __forceinline__ void copy_run(const T* from, T* to, int length) {
        const int thread = threadIdx.x % kThreads;
        const int before = static_cast<int>(-reinterpret_cast<uintptr_t>(from) % 16 / sizeof(T));
        const int head = min(length, before), vectors = (length - head) / kVector<T>,
                  tail = head + vectors * kVector<T>;
        const T* from_vector = from + head + thread * kVector<T>;
        T* to_vector = to + head + thread * kVector<T>;
#pragma unroll 4
        for (int i = thread; i < vectors; i += kThreads) {
            copy_async(to_vector, from_vector, true);
            from_vector += kThreads * kVector<T>;
            to_vector += kThreads * kVector<T>;
        }
        if (head == 0 && tail == length) return;
        if (thread < head) to[thread] = from[thread];
        if (tail + thread < length) to[tail + thread] = from[tail + thread];
    }

    // A place in a row of the block's plane `lane`.
    __device__ __forceinline__ const T* at(int lane, int i, int column) const {
        return shared + lane * pitch + (i - top) * row + column - left;
    }
};

// A strip's elements as they lie in memory: they can be under way while others are computed with.
template <class T>
struct Packed {
    static constexpr int kPart = kVector<T> < kStrip ? kVector<T> : kStrip;  // of one access
    Word<T, kPart> words[kStrip / kPart];

    // Zeros beyond the first `valid` ones; `kAligned` where whole strips may be read at once.
    template <bool kAligned>
    __device__ __forceinline__ void fetch_from(const T* from, int valid) {
        if constexpr (kAligned) {
#pragma unroll
            for (int i = 0; i < kStrip / kPart; ++i) words[i] = fetch<kPart>(from + i * kPart);
        } else {
            T parts[kStrip];
#pragma unroll
            for (int j = 0; j < kStrip; ++j) parts[j] = j < valid ? from[j] : narrow<T>(0);
            memcpy(words, parts, sizeof words);
        }
    }

    __device__ __forceinline__ void to(Acc<T> (&values)[kStrip]) const {
#pragma unroll
        for (int i = 0; i < kStrip / kPart; ++i) {
            Acc<T> some[kPart];
            unpack<T>(words[i], some);
#pragma unroll
            for (int j = 0; j < kPart; ++j) values[i * kPart + j] = some[j];
        }
    }
};

template <bool kAligned, class T>
__device__ __forceinline__ void load_strip(const T* from, int valid, Acc<T> (&to)[kStrip]) {
    Packed<T> packed;
    packed.template fetch_from<kAligned>(from, valid);
    packed.to(to);
}

template <bool kAligned, class T>
__device__ __forceinline__ void store_strip(T* to, const Acc<T> (&values)[kStrip], int valid) {
    if constexpr (!kAligned) {
#pragma unroll
        for (int j = 0; j < kStrip; ++j) {
            if (j < valid) to[j] = narrow<T>(values[j]);
        }
    } else if constexpr (sizeof(T) == 8) {
        store<2>(to, {values[0], values[1]});
        store<2>(to + 2, {values[2], values[3]});
    } else {
        store<kStrip>(to, values);
    }
}

// Where a thread works: the rows [first, last) of a strip in one plane of the block.
struct Band {
    int c, column, valid, first, last;  // a channel in the map; `valid` columns
    bool left, right;                   // whether the map goes on beside the strip

    __device__ Band(const Tiling& t, const Shape& s, const PlanePlace& p) {
        const int C = static_cast<int>(s.C);
        c = min(p.c + p.lane, C - 1);  // beyond the last one nothing is stored
        column = p.column + p.strip * kStrip;
        const int rows = static_cast<unsigned>(p.last - p.first + t.groups - 1) / t.groups;
        first = min(p.last, p.first + p.group * rows);
        last = min(p.last, first + rows);
        valid = p.active && p.c + p.lane < C && first < last ? min(kStrip, p.columns - p.strip * kStrip) : 0;
        left = column > 0;
        right = column + kStrip < static_cast<int>(s.W);
    }

    // A strip's row with its neighbouring columns, from where the strip begins; zeros outside the map.
    template <bool kAligned, class T>
    __device__ __forceinline__ void load_row(const T* from, int W, Acc<T> (&to)[kStrip + 2]) const {
        to[0] = left ? widen(from[-1]) : Acc<T>(0);
        if constexpr (kAligned) {
            Acc<T> strip[kStrip];
            load_strip<true>(from, kStrip, strip);
#pragma unroll
            for (int j = 0; j < kStrip; ++j) to[j + 1] = strip[j];
            to[kStrip + 1] = right ? widen(from[kStrip]) : Acc<T>(0);
        } else {
#pragma unroll
            for (int j = 0; j <= kStrip; ++j) to[j + 1] = column + j < W ? widen(from[j]) : Acc<T>(0);
        }
    }
};

// A channel's filters, read before they are needed: while the block computes its attention.
template <class A, Carry kCarry>
struct Filters {
    static constexpr int kTaps = kCarry == Carry::filtered ? 9 : 1;
    A x[9], carried[kTaps];  // of the latter only the centre, where there is no more

    __device__ Filters(const Vectors<A>& v, int64_t C, int64_t b, int64_t c) {
#pragma unroll
        for (int k = 0; k < 9; ++k) x[k] = v.value_weight[c * 9 + k];
        if constexpr (kCarry != Carry::none) {
#pragma unroll
            for (int k = 0; k < kTaps; ++k) carried[k] = carried_filter(v, C, b, c, kTaps == 9 ? k : 4);
        }
    }

    __device__ void attend_by(const Vectors<A>& v, int first, int c, const A* attention) {
        const unsigned head_dim = static_cast<unsigned>(v.head_dim);
        const A factor = attention[static_cast<unsigned>(c) / head_dim - static_cast<unsigned>(first) / head_dim];
#pragma unroll
        for (int k = 0; k < 9; ++k) x[k] *= factor;
    }
};

// Three rows of output on the way down the map: each row of the input adds to all of them, so that it is read, and
// widened, once.
template <class A>
struct Falling {
    A done[kStrip], here[kStrip] = {}, next[kStrip] = {};

    // Now the row above the one that is read is finished.
    __device__ __forceinline__ void advance() {
#pragma unroll
        for (int j = 0; j < kStrip; ++j) {
            done[j] = here[j];
            here[j] = next[j];
            next[j] = 0;
        }
    }

    __device__ __forceinline__ void add(const A (&filter)[9], const A (&row)[kStrip + 2]) {
#pragma unroll
        for (int dx = 0; dx < 3; ++dx) {
#pragma unroll
            for (int j = 0; j < kStrip; ++j) {
                done[j] += filter[6 + dx] * row[j + dx];
                here[j] += filter[3 + dx] * row[j + dx];
                next[j] += filter[dx] * row[j + dx];
            }
        }
    }
};

// Mean and squared deviations of a strip by Chan's formula, a row at a time; `folded` instead sums o and the output
// that it becomes.
template <class A, bool kFolded>
struct Spread {
    A rows = 0, first = 0, second = 0;

    __device__ __forceinline__ void add(const A (&o)[kStrip], int valid) {
        const A share = reciprocal(rows + A(1)), between = A(valid) * (rows * share);
        A total = o[0];
#pragma unroll
        for (int j = 1; j < kStrip; ++j) {
            if (j < valid) total += o[j];
        }
        const A mean = valid == kStrip ? total * A(1. / kStrip) : total * reciprocal(A(valid)), apart = mean - first;
        A squares = (o[0] - mean) * (o[0] - mean);
#pragma unroll
        for (int j = 1; j < kStrip; ++j) {
            if (j < valid) squares += (o[j] - mean) * (o[j] - mean);
        }
        first += apart * share;
        second += squares + apart * apart * between;
        rows += A(1);
    }

    __device__ __forceinline__ void add_pair(A o, A out) {
        first += o;
        second += out;
    }

    __device__ __forceinline__ Moments<A> moments(int valid) const {
        return {kFolded ? A(0) : rows * A(max(valid, 0)), first, second};
    }
};

// Joins what the block's threads found, two and two, and writes it: the result where the block has seen all of the map,
// else a part.
template <bool kFolded, class T, class A = Acc<T>>
__device__ void finish_spread(const Forward<T>& a, const Tiling& t, const PlanePlace& p, Moments<A> mine,
                              Moments<A>* shared) {
    Moments<A>* const own = shared + p.lane * t.members() + p.member;
    __syncthreads();
    if (p.active) *own = mine;
    for (int width = t.members(), half; width > 1; width = half) {
        half = (width + 1) / 2;
        __syncthreads();
        if (p.active && p.member < width - half) {
            join<kFolded>(mine, own[half]);
            *own = mine;
        }
    }
    const int c = p.c + p.lane;
    if (!p.active || p.member > 0 || c >= a.shape.C) return;
    if (t.parts() == 1) {
        write_moments<kFolded>(a, p.b, c, mine);
    } else {
        reinterpret_cast<Moments<A>*>(a.parts)[(int64_t(p.b) * t.parts() + p.part) * a.shape.C + c] = mine;
    }
}

// Bytes of shared memory of a block of the forward kernel. What is carried takes a slab where a filter goes over it.
template <class T>
DLA_HOST_DEVICE inline int64_t forward_planes_shared(const Tiling& t, const Shape& s, int slabs) {
    const int64_t walk = int64_t(slabs) * Slab<T>::size_of(t, s) * sizeof(T) + t.lanes * sizeof(Acc<T>);
    const int64_t finish = int64_t(t.lanes) * t.members() * sizeof(Moments<Acc<T>>);
    return walk > finish ? walk : finish;
}

// Blocks on a multiprocessor: of four each thread has 72 registers, of three 80, of two 128. As many as spill none.
template <class T, Carry kCarry, bool kFolded, bool kAligned>
constexpr int blocks_in_forward() {
    if (sizeof(T) == 8) return 1;
    if (!kAligned) return kFolded || sizeof(T) == 4 ? 2 : 3;
    return sizeof(T) == 4 || (kFolded && kCarry == Carry::filtered) ? 3 : 4;
}

template <class T, Carry kCarry, bool kFolded, bool kAligned>
__global__ void __launch_bounds__(kPlaneThreads, (blocks_in_forward<T, kCarry, kFolded, kAligned>()))
    forward_planes(const __grid_constant__ Forward<T> a, const __grid_constant__ Tiling t) {
    using A = Acc<T>;
    constexpr bool kTwoSlabs = kCarry == Carry::filtered;
    const Shape& s = a.shape;
    const int C = static_cast<int>(s.C), H = static_cast<int>(s.H), W = static_cast<int>(s.W);
    const PlanePlace p(t, s);
    T* const memory = shared_memory<T>();
    const int size = Slab<T>::size_of(t, s);
    const Slab<T> x(t, s, p, a.x, memory), carried(t, s, p, kTwoSlabs ? a.carried : a.x, memory + size);
    A* const attention = reinterpret_cast<A*>(memory + (kTwoSlabs ? 2 : 1) * size);
    x.copy();
    if constexpr (kTwoSlabs) carried.copy();

    const Band band(t, s, p);
    const int valid = kAligned ? kStrip : band.valid;
    const bool has_rows = band.valid > 0;
    Filters<A, kCarry> filters(a.vectors, s.C, p.b, band.c);
    const Fold<A, 1> fold(a, band.c);
    const int64_t pixel = int64_t(band.first) * W + band.column;
    const T* next_carried = nullptr;
    Packed<T> of_carried;
    if constexpr (kCarry == Carry::scaled) {
        next_carried = a.carried.at(p.b, band.c, pixel);
        if (has_rows) of_carried.template fetch_from<kAligned>(next_carried, valid);
    }
    attend(a.vectors, C, p.b, p.c, min(t.lanes, C - p.c), attention);
    filters.attend_by(a.vectors, p.c, band.c, attention);
    await_copies<0>();
    __syncthreads();

    Falling<A> strip;
    Spread<A, kFolded> found;
    const int top = max(band.first - 1, 0);
    const T *from_x = x.at(p.lane, top, band.column), *from_carried = carried.at(p.lane, top, band.column);
    T* to_o = a.o.data ? a.o.at(p.b, band.c, pixel) : nullptr;
    T* to_out = kFolded ? a.out.at(p.b, band.c, pixel) : nullptr;
    const auto take = [&] {
        strip.advance();
        A values[kStrip + 2];
        band.load_row<kAligned>(from_x, W, values);
        strip.add(filters.x, values);
        from_x += x.row;
        if constexpr (kTwoSlabs) {
            band.load_row<kAligned>(from_carried, W, values);
            strip.add(filters.carried, values);
            from_carried += carried.row;
        }
    };
    // The row above the one that was taken last.
    const auto put = [&](bool more) {
        if constexpr (kCarry == Carry::scaled) {
            A values[kStrip];
            of_carried.to(values);
            next_carried += W;
            if (more) of_carried.template fetch_from<kAligned>(next_carried, valid);
#pragma unroll
            for (int j = 0; j < kStrip; ++j) strip.done[j] += filters.carried[0] * values[j];
        }
        if (!kFolded || to_o) {
            store_strip<kAligned>(to_o, strip.done, valid);
            to_o += W;
        }
        if constexpr (kFolded) {
            A values[kStrip];
            load_strip<kAligned>(from_x - 2 * x.row, valid, values);
#pragma unroll
            for (int j = 0; j < kStrip; ++j) {
                const A o = strip.done[j];
                strip.done[j] = values[j] + (o * fold.scale[0] + fold.shift[0]);
                if (j < valid) found.add_pair(o, strip.done[j]);
            }
            store_strip<kAligned>(to_out, strip.done, valid);
            to_out += W;
        } else {
            found.add(strip.done, valid);
        }
    };
    if (has_rows) {
        if (band.first > 0) take();
        take();
        const int inside = min(band.last, H - 1);
#pragma unroll kAligned ? 2 : 1
        for (int row = band.first + 1; row <= inside; ++row) {
            take();
            put(row < band.last);
        }
        if (band.last == H) {  // what is below the map adds nothing
            strip.advance();
            from_x += x.row;
            put(false);
        }
    }
    finish_spread<kFolded>(a, t, p, found.moments(band.valid), shared_memory<Moments<A>>());
}

}  // namespace dla::light_update
