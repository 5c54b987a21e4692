// light_update on CUDA: how a map is cut, and the launches. Forward is one launch, and another where a block does not
// see all of a map; backward is three.
#include "light_update/cuda.h"

#include <algorithm>

#include "light_update/backward_planes.cuh"
#include "light_update/backward_rows.cuh"
#include "light_update/gradients.cuh"
#include "light_update/planes.cuh"
#include "light_update/rows.cuh"

namespace dla::light_update {
namespace {

// Every GPU from sm_80 on gives a block this much shared memory; one cut for all keeps their bits the same.
constexpr int64_t kMaxShared = 96 << 10;
// A block of planes stays smaller, for several on a multiprocessor: one computes while the others load.
constexpr int64_t kPlanesShared = 48 << 10;
// Blocks enough for some ten waves on the largest GPUs, so that the last one weighs little.
constexpr int64_t kBlocks = 4096;

template <class T>
Tiling cut_rows(const Shape& s, bool backward) {
    constexpr int kLane = kLaneOfRows<T>, kLine = 128 / sizeof(T) / kLane;  // lanes of 128 bytes
    constexpr int kLeast = kVector<T> / kLane;
    Tiling t = {};
    t.tiles = ceil_div(s.W, 32);
    t.strips = static_cast<int>(ceil_div(ceil_div(s.W, t.tiles), kColumns));
    t.columns = t.strips * kColumns;
    t.tiles = ceil_div(s.W, t.columns);
    t.groups = 1;
    const auto shared = [&](int64_t lanes) {
        const int64_t channels = lanes * kLane, slot = (t.columns + 2) * channels;
        return backward ? backward_rows_shared<T>(channels, t.columns, 4)
                        : 2 * kForwardSlots * slot * int64_t(sizeof(T)) + channels * int64_t(sizeof(Acc<T>));
    };
    t.lanes = kLine;
    while (t.lanes < ceil_div(s.C, kLane) && 2 * t.lanes * t.strips <= kMaxThreads && shared(2 * t.lanes) <= kMaxShared) {
        t.lanes *= 2;
    }
    while (t.lanes / 2 >= std::max<int64_t>(kLeast, ceil_div(s.C, kLane))) t.lanes /= 2;
    t.chunks = ceil_div(s.C, t.lanes * kLane);
    const int64_t blocks = std::max<int64_t>(1, s.B * t.chunks * t.tiles), most = ceil_div(s.H, 8);
    const int64_t rows = ceil_div(s.H, std::min(most, ceil_div(kBlocks, blocks)));
    t.rows = static_cast<int>(std::min<int64_t>(rows, 1 << 20));
    t.runs = ceil_div(s.H, t.rows);
    const int64_t finish = backward ? t.strips * kProducts * int64_t(sizeof(Acc<T>)) : t.strips * int64_t(sizeof(Moments<Acc<T>>));
    t.shared = static_cast<int>(std::max(shared(t.lanes), finish * t.lanes * kLane));
    return t;
}

template <class T>
Tiling cut_planes(const Shape& s, bool backward) {
    const int64_t bytes = backward ? 5 * sizeof(T) + sizeof(Acc<T>) : 2 * sizeof(T);  // of a pixel
    const int64_t budget = backward ? kMaxShared - (24 << 10) : kPlanesShared;
    Tiling t = {};
    t.lanes = 1;
    t.tiles = 1;
    t.columns = static_cast<int>(std::min<int64_t>(s.W, 1 << 20));
    int64_t rows = budget / (bytes * s.W) - 2;
    if (s.W > kColumns * kMaxThreads || (rows < 4 && rows + 2 < s.H)) {
        t.columns = 128;
        t.tiles = ceil_div(s.W, t.columns);
        rows = budget / (bytes * (t.columns + 2 + 2 * kVector<T>)) - 2;
    }
    if (t.tiles == 1 && rows + 2 >= s.H) rows = s.H;
    t.runs = ceil_div(s.H, std::min(rows, s.H));
    t.rows = static_cast<int>(ceil_div(s.H, t.runs));
    t.runs = ceil_div(s.H, t.rows);
    t.strips = static_cast<int>(std::min<int64_t>(ceil_div(t.columns, kColumns), kMaxThreads));
    t.groups = static_cast<int>(std::min<int64_t>(ceil_div(t.rows, 16), std::max(1, kMaxThreads / t.strips)));
    if (t.runs == 1 && t.tiles == 1) {
        const int64_t pitch = round_up(s.HW(), kVector<T>) + kVector<T>;
        const int64_t fit = std::min<int64_t>(budget / (bytes * pitch), kMaxThreads / t.members());
        t.lanes = static_cast<int>(std::max<int64_t>(1, std::min(fit, s.C)));
    }
    t.chunks = ceil_div(s.C, t.lanes);
    const int64_t walk = backward ? backward_planes_shared<T>(t, s, 5)
                                  : Slab<T>::size_of(t, s) * 2 * int64_t(sizeof(T)) + t.lanes * int64_t(sizeof(Acc<T>));
    const int64_t finish = backward ? kProducts * int64_t(sizeof(Acc<T>)) : int64_t(sizeof(Moments<Acc<T>>));
    t.shared = static_cast<int>(std::max(walk, finish * t.lanes * t.members()));
    return t;
}

// Calls body with the way the carry enters as a constant.
template <class Args, class Body>
void on_carry(const Args& a, const Body& body) {
    if (!a.carried) return body(std::integral_constant<Carry, Carry::none>{});
    if (!a.vectors.carry_weight) return body(std::integral_constant<Carry, Carry::scaled>{});
    body(std::integral_constant<Carry, Carry::filtered>{});
}

// Whether maps can be accessed in vectors: of channels in channels_last, of a strip's columns in NCHW, where reading
// finds its own way.
template <class... Maps>
bool fit(bool channels_last, const Shape& s, const Maps&... maps) {
    const auto one = [&](const auto& map) {
        constexpr int kVec = 16 / sizeof(*map.data);
        if (channels_last) return in_vectors<kVec>(map, s.C);
        return s.W % kColumns == 0 && in_vectors<std::min(kColumns, kVec)>(map, s.W);
    };
    return (one(maps) && ...);
}

unsigned blocks_of(int64_t blocks) {
    if (blocks > 0x7fffffff) throw std::runtime_error("light_update: the map is too large for one launch");
    return static_cast<unsigned>(blocks);
}

}  // namespace

template <class T>
Tiling tiling(const Shape& shape, bool channels_last, bool backward) {
    return channels_last ? cut_rows<T>(shape, backward) : cut_planes<T>(shape, backward);
}

template <class T>
void launch(const Forward<T>& a, const Tiling& t, bool channels_last, CUstream_st* stream) {
    const Shape& s = a.shape;
    if (s.B * s.C == 0) return;
    const dim3 grid(blocks_of(s.B * t.blocks()));
    const bool aligned = fit(channels_last, s, a.o, a.out) && (!channels_last || fit(true, s, a.x, a.carried));
    on_carry(a, [&](auto carry) {
        const auto run = [&](auto folded) {
            constexpr Carry kCarry = decltype(carry)::value;
            constexpr bool kFolded = decltype(folded)::value;
            const auto kernel = channels_last ? forward_rows<T, kCarry, kFolded> : forward_planes<T, kCarry, kFolded>;
            dla::launch(kernel, grid, t.threads(), t.shared, stream, a, t, aligned);
            if (t.parts() == 1) return;
            const dim3 joins(blocks_of(ceil_div(s.B * s.C, kMaxThreads)));
            dla::launch(join_parts<kFolded, T>, joins, kMaxThreads, 0, stream, a, t.parts());
        };
        a.out ? run(std::true_type{}) : run(std::false_type{});
    });
}

template <class T>
void launch(const Backward<T>& a, const Tiling& t, bool channels_last, CUstream_st* stream) {
    using A = Acc<T>;
    const Shape& s = a.shape;
    const bool aligned = fit(channels_last, s, a.grad_x, a.grad_carried) &&
                         (!channels_last || fit(true, s, a.x, a.carried, a.o, a.grad_out, a.grad_o));
    if (s.B * s.C > 0) {
        on_carry(a, [&](auto carry) {
            constexpr Carry kCarry = decltype(carry)::value;
            const auto kernel = channels_last ? backward_rows<T, kCarry> : backward_planes<T, kCarry>;
            dla::launch(kernel, dim3(blocks_of(s.B * t.blocks())), t.threads(), t.shared, stream, a, t, aligned);
        });
        dla::launch(sample_gradients<T>, dim3(blocks_of(s.B)), kSampleThreads, kSampleThreads / kWarp * sizeof(A), stream, a, t);
    }
    const dim3 sums(blocks_of(ceil_div(a.summed(), kSumColumns)));
    dla::launch(add_samples<T>, sums, kMaxThreads, kMaxThreads * sizeof(A), stream, a);
}

#define DLA_INSTANTIATE(T)                                                    \
    template Tiling tiling<T>(const Shape&, bool, bool);                      \
    template void launch(const Forward<T>&, const Tiling&, bool, CUstream_st*); \
    template void launch(const Backward<T>&, const Tiling&, bool, CUstream_st*);
DLA_INSTANTIATE(float)
DLA_INSTANTIATE(double)
DLA_INSTANTIATE(__half)
DLA_INSTANTIATE(__nv_bfloat16)
#undef DLA_INSTANTIATE

}  // namespace dla::light_update
