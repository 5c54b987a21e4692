// light_update on CUDA: how a map is cut, and the launches. Forward is one launch, and another where a block does not
// see all of a map; backward is three.
#include <algorithm>
#include <stdexcept>

#include "light_update/backward_planes.cuh"
#include "light_update/backward_rows.cuh"
#include "light_update/cuda.h"
#include "light_update/gradients.cuh"
#include "light_update/planes.cuh"
#include "light_update/rows.cuh"

namespace dla::light_update {
namespace {

// For the slabs of a block of planes, so that several fit on a multiprocessor with 228 KiB, four and in backward three:
// one computes while the others load. Every GPU from sm_80 on gives a block this much; one cut for all keeps their bits
// the same.
constexpr int64_t kPlanesShared = 54 << 10, kBackwardPlanesShared = 74 << 10;
// Blocks enough for some waves on the largest GPUs, so that the last one weighs little, but no more: each reads two
// rows of its neighbours.
constexpr int64_t kRowBlocks = 4096;

// What counts blocks, or places along an axis, must leave room in an int.
int count(int64_t n) {
    if (n > (1 << 30)) throw std::runtime_error("light_update: the map is too large for one launch");
    return static_cast<int>(n);
}

template <class T>
Tiling cut_rows(const Shape& s, int maps) {
    constexpr int kVec = kVector<T>;
    const int lane = maps ? 1 : kLaneOfRows<T>, other = maps ? kWideColumns : kColumns;
    const int width = s.W % kWholeColumns == 0 && s.W >= 4 * kWholeColumns ? kWholeColumns : other;
    Tiling t = {};
    t.maps = std::max(1, maps);
    t.groups = 1;
    t.lanes = (maps ? kBackwardChannels<T> : kForwardChannels<T>) / lane;
    // No fewer than make kRowStrips of them a warp.
    const int64_t least = std::max<int64_t>({kVec / lane, kWarp / kRowStrips, ceil_div(s.C, lane)});
    while (t.lanes / 2 >= least) t.lanes /= 2;
    t.chunks = count(ceil_div(s.C, t.lanes * lane));
    t.tiles = count(ceil_div(s.W, kRowStrips * width));
    const int64_t strips = ceil_div(ceil_div(s.W, t.tiles), width);
    t.strips = static_cast<int>(round_up(strips, std::max(1, kWarp / t.lanes)));
    t.columns = t.strips * width;
    t.tiles = count(ceil_div(s.W, t.columns));
    const int64_t blocks = std::max<int64_t>(1, s.B * t.chunks * t.tiles), most = ceil_div(s.H, 8);
    const int64_t rows = ceil_div(s.H, std::min(most, ceil_div(kRowBlocks, blocks)));
    t.rows = static_cast<int>(std::min<int64_t>(rows, 1 << 20));
    t.runs = count(ceil_div(s.H, t.rows));
    const int64_t finish = t.strips * int64_t(maps ? maps * 9 * sizeof(Acc<T>) : sizeof(Moments<Acc<T>>));
    t.shared = static_cast<int>(finish * t.lanes * lane);  // and what the rings take, which the launch knows
    return t;
}

template <class T>
Tiling cut_planes(const Shape& s, int maps) {
    const int64_t bytes = (maps ? 3 : 2) * sizeof(T);  // of a pixel in the slabs
    const int64_t budget = maps ? kBackwardPlanesShared : kPlanesShared;
    Tiling t = {};
    t.maps = std::max(1, maps);
    t.lanes = 1;
    t.tiles = 1;
    t.columns = static_cast<int>(std::min<int64_t>(s.W, 1 << 20));
    int64_t rows = budget / (bytes * s.W) - 2;
    if (s.W > kStrip * kPlaneThreads || (rows < 4 && rows + 2 < s.H)) {
        t.columns = 128;
        t.tiles = count(ceil_div(s.W, t.columns));
        rows = budget / (bytes * (t.columns + 2 + 2 * kVector<T>)) - 2;
    }
    if (t.tiles == 1 && rows + 2 >= s.H) rows = s.H;
    t.runs = count(ceil_div(s.H, std::min(rows, s.H)));
    t.rows = static_cast<int>(ceil_div(s.H, t.runs));
    t.runs = count(ceil_div(s.H, t.rows));
    t.strips = static_cast<int>(ceil_div(t.columns, kStrip));
    t.groups = static_cast<int>(std::min<int64_t>(ceil_div(t.rows, 16), std::max(1, kPlaneThreads / t.strips)));
    if (t.runs == 1 && t.tiles == 1) {
        const int64_t fit =
            std::min(budget / (bytes * (s.HW() + kVector<T> - 1)), int64_t(kPlaneThreads / t.members()));
        const int64_t chunks = ceil_div(s.C, std::max<int64_t>(1, fit));
        t.lanes = static_cast<int>(ceil_div(s.C, std::max<int64_t>(1, chunks)));
    }
    t.lanes = std::max(1, t.lanes);
    t.chunks = count(ceil_div(s.C, t.lanes));
    t.shared = static_cast<int>(maps ? backward_planes_shared<T>(t, s, 3) : forward_planes_shared<T>(t, s, 2));
    return t;
}

// Calls body with the way the carry enters as a constant.
template <class Args, class Body>
void on_carry(const Args& a, const Body& body) {
    if (!a.carried) return body(std::integral_constant<Carry, Carry::none>{});
    if (!a.vectors.carry_weight) return body(std::integral_constant<Carry, Carry::scaled>{});
    body(std::integral_constant<Carry, Carry::filtered>{});
}

// Channels_last kernels count elements of a sample in 32 bits; samples themselves may lie any distance apart.
template <class... Maps>
void check_samples(const Shape& s, const Maps&... maps) {
    if (((maps && (s.HW() + s.W) * maps.pixel > (int64_t(1) << 31) - 1) || ...)) {
        throw std::runtime_error("light_update: a sample's map is too large");
    }
}

// Whether maps can be accessed in vectors: of channels in channels_last, of a strip's columns in NCHW.
template <class... Maps>
bool fit(bool channels_last, const Shape& s, const Maps&... maps) {
    const auto one = [&](const auto& map) {
        constexpr int kVec = 16 / sizeof(*map.data);
        if (channels_last) return in_vectors<kVec>(map, s.C);
        return s.W % kStrip == 0 && in_vectors<std::min(kStrip, kVec)>(map, s.W);
    };
    return (one(maps) && ...);
}

}  // namespace

template <class T>
Tiling tiling(const Shape& shape, bool channels_last, int maps) {
    count(std::max({shape.C, shape.H, shape.W}));
    return channels_last ? cut_rows<T>(shape, maps) : cut_planes<T>(shape, maps);
}

template <class T>
void launch(const Forward<T>& a, const Tiling& t, bool channels_last, CUstream_st* stream) {
    const Shape& s = a.shape;
    if (s.B * s.C == 0) return;
    if (channels_last) check_samples(s, a.x, a.carried, a.o, a.out);
    const dim3 grid(count(s.B * t.blocks()));
    const bool aligned = fit(channels_last, s, a.x, a.carried, a.o, a.out);
    on_carry(a, [&](auto carry) {
        const auto run = [&](auto folded) {
            constexpr Carry kCarry = decltype(carry)::value;
            constexpr bool kFolded = decltype(folded)::value;
            if (channels_last) {
                const auto of_width = [&](auto width) {
                    constexpr int kWidth = decltype(width)::value;
                    return aligned ? forward_rows<T, kCarry, kFolded, true, kWidth>
                                   : forward_rows<T, kCarry, kFolded, false, kWidth>;
                };
                const auto kernel = t.columns == t.strips * kColumns
                                        ? of_width(std::integral_constant<int, kColumns>{})
                                        : of_width(std::integral_constant<int, kWholeColumns>{});
                const int64_t shared = std::max<int64_t>(t.shared, forward_rows_shared<T, kCarry, kFolded>(t));
                dla::launch(kernel, grid, t.lanes * t.strips, shared, stream, a, t);
            } else {
                const auto kernel =
                    aligned ? forward_planes<T, kCarry, kFolded, true> : forward_planes<T, kCarry, kFolded, false>;
                const auto shared = forward_planes_shared<T>(t, s, kCarry == Carry::filtered ? 2 : 1);
                dla::launch(kernel, grid, kPlaneThreads, shared, stream, a, t);
            }
            if (t.parts() == 1) return;
            const dim3 joins(count(ceil_div(s.B * s.C, kMaxThreads)));
            dla::launch(join_parts<kFolded, T>, joins, kMaxThreads, 0, stream, a, t.parts());
        };
        a.out ? run(std::true_type{}) : run(std::false_type{});
    });
}

template <class T>
void launch(const Backward<T>& a, const Tiling& t, bool channels_last, CUstream_st* stream) {
    using A = Acc<T>;
    const Shape& s = a.shape;
    if (channels_last) check_samples(s, a.grad_out, a.grad_o, a.o, a.x, a.carried, a.grad_x, a.grad_carried);
    const bool aligned = fit(channels_last, s, a.grad_x, a.grad_carried, a.x, a.carried, a.o, a.grad_out, a.grad_o);
    if (s.B * s.C > 0) {
        const dim3 grid(count(s.B * t.blocks()));
        if (channels_last) {
            const auto run = [&](auto maps, auto width) {
                constexpr int kMaps = decltype(maps)::value, kWidth = decltype(width)::value;
                const auto kernel =
                    aligned ? backward_rows<T, kMaps, true, kWidth> : backward_rows<T, kMaps, false, kWidth>;
                const int64_t shared = std::max<int64_t>(t.shared, backward_rows_shared<T>(t, bool(a.grad_o)));
                dla::launch(kernel, grid, t.lanes * t.strips, shared, stream, a, t);
            };
            const auto of_maps = [&](auto width) {
                t.maps > 1 ? run(std::integral_constant<int, 2>{}, width)
                           : run(std::integral_constant<int, 1>{}, width);
            };
            t.columns == t.strips* kWideColumns ? of_maps(std::integral_constant<int, kWideColumns>{})
                                                : of_maps(std::integral_constant<int, kWholeColumns>{});
        } else {
            on_carry(a, [&](auto carry) {
                constexpr Carry kCarry = decltype(carry)::value;
                const auto kernel = aligned ? backward_planes<T, kCarry, true> : backward_planes<T, kCarry, false>;
                const auto shared = backward_planes_shared<T>(t, s, a.grad_o ? 3 : 2);
                dla::launch(kernel, grid, kPlaneThreads, shared, stream, a, t);
            });
        }
        dla::launch(sample_gradients<T>, dim3(count(s.B)), kSampleThreads, kSampleThreads / kWarp * sizeof(A), stream,
                    a, t);
    }
    const dim3 sums(count(ceil_div(a.summed(), kSumColumns)));
    dla::launch(add_samples<T>, sums, kMaxThreads, kMaxThreads * sizeof(A), stream, a);
}

#define DLA_INSTANTIATE(T)                                                      \
    template Tiling tiling<T>(const Shape&, bool, int);                         \
    template void launch(const Forward<T>&, const Tiling&, bool, CUstream_st*); \
    template void launch(const Backward<T>&, const Tiling&, bool, CUstream_st*);
DLA_INSTANTIATE(float)
DLA_INSTANTIATE(double)
DLA_INSTANTIATE(__half)
DLA_INSTANTIATE(__nv_bfloat16)
#undef DLA_INSTANTIATE

}  // namespace dla::light_update
