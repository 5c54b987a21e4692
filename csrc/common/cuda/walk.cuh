// How a block walks a map pixel by pixel with sums for every channel: one source for both layouts.
//
// A thread takes vectors of N elements: N pixels of one channel in NCHW, one pixel of N channels in channels_last. A
// team of threads (a warp, or the block where maps are large or few) walks one sample's tile: a plane in NCHW, and in
// channels_last kLanes vectors of channels, as many threads side by side. All tiles of a block have the same channels,
// so what is computed for a channel is computed once for several samples. Where tiles are too few to keep the chip busy
// they are cut into runs of pixels, a block for each, and a launch more joins what the blocks have added up.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "common/cuda/reduce.cuh"
#include "common/cuda/vector.cuh"

namespace dla {

// What a launch chooses, from the shape alone: the order of every sum follows from it.
struct WalkPlan {
    int64_t tiles, groups, runs;  // of channels, of samples and of pixels; a block has one of each
    int64_t pixels;               // of a run
    int team;

    static constexpr int kThreads = 256;
    // Two waves of 8 blocks each on the 132 multiprocessors of an H100: more blocks would only repeat the statistics.
    static constexpr int64_t kBlocks = 2112;
    // Fewer than two on each are cut, into runs of at least so many vectors for every thread.
    static constexpr int64_t kFew = 264, kLeast = 8;

    WalkPlan(const Shape& s, int N, bool rows, int lanes) : tiles(rows ? ceil_div(s.C, int64_t(lanes) * N) : s.C) {
        if (std::max({s.B, s.C, s.HW()}) > INT32_MAX) throw std::runtime_error("a map of 2^31 or more along one axis");
        const int64_t vectors = rows ? s.HW() * lanes : ceil_div(s.HW(), N);
        // A warp per tile needs no barrier; but with too few of them most of the chip would wait.
        team = vectors > 32 * kWarp || (vectors > 2 * kWarp && s.B * tiles < 4096) ? kThreads : kWarp;
        groups = std::max<int64_t>(1, std::min(ceil_div(s.B, kThreads / team), ceil_div(kBlocks, tiles)));
        const int64_t wanted = team == kThreads ? kFew / (tiles * groups) : 1, most = vectors / (kLeast * kThreads);
        pixels = round_up(ceil_div(s.HW(), std::max<int64_t>(1, std::min(wanted, most))), N);
        runs = ceil_div(s.HW(), pixels);
    }

    // For a warp that takes tiles of its own choice.
    __device__ WalkPlan(int64_t tiles, const Shape& s)
        : tiles(tiles), groups(1), runs(1), pixels(s.HW()), team(kWarp) {}

    // Blocks that share a tile of channels.
    DLA_HOST_DEVICE int64_t parts() const { return groups * runs; }
    dim3 grid() const { return dim3(static_cast<unsigned>(tiles * parts())); }
};

template <class T, int N_, bool kRows_>
struct Walk {
    using A = Acc<T>;
    static constexpr int N = N_;
    static constexpr bool kRows = kRows_;
    // 64 bytes of adjacent channels in vectors, two whole sectors; without vectors a warp takes as many as it can.
    static constexpr int kLanes = !kRows ? 1 : N == 1 ? kWarp : 64 / (N * sizeof(T));
    // Channels of a thread, and of a tile.
    static constexpr int kChannels = kRows ? N : 1, kTile = kLanes * kChannels;
    static constexpr int kThreads = WalkPlan::kThreads;
    // Values of shared memory that a sum over the block needs.
    static constexpr int kShared = kThreads / kWarp * kTile;

    static WalkPlan plan(const Shape& s) { return WalkPlan(s, N, kRows, kLanes); }

    const Shape& s;
    const WalkPlan& plan_;
    int tile, group, run, c;  // c: the thread's first channel
    int lane, walker;         // the thread's place among the channels, and among the vectors of its channels

    __device__ Walk(const Shape& s, const WalkPlan& plan)
        : Walk(s, plan, blockIdx.x % static_cast<unsigned>(plan.tiles),
               blockIdx.x / static_cast<unsigned>(plan.tiles)) {}

    __device__ Walk(const Shape& s, const WalkPlan& plan, int tile, int part)
        : s(s),
          plan_(plan),
          tile(tile),
          group(part % static_cast<int>(plan.groups)),
          run(part / static_cast<int>(plan.groups)),
          c(kRows ? (tile * kLanes + threadIdx.x % kLanes) * N : tile),
          lane(threadIdx.x % kLanes),
          walker(threadIdx.x % plan.team / kLanes) {}

    // Without vectors the last tile may be wider than the map.
    __device__ bool inside() const { return !kRows || c < s.C; }
    __device__ int part() const { return run * int(plan_.groups) + group; }

    // The samples of this thread's team, the same number of rounds for all threads of a team.
    template <class Body>
    __device__ __forceinline__ void each_sample(const Body& body) const {
        const int teams = kThreads / plan_.team;
        for (int b = group * teams + threadIdx.x / plan_.team; b < s.B; b += int(plan_.groups) * teams) body(b);
    }

    // The thread's vectors of a run by their first pixel: get(pixel) of kAtOnce of them, then use(pixel, what it got)
    // of each, so that as many loads are under way. A plane has less than 2^31 pixels; strides are of 64 bits.
    template <int kAtOnce, class Get, class Use>
    __device__ __forceinline__ void each_vector(const Get& get, const Use& use) const {
        const auto begin = static_cast<unsigned>(run * plan_.pixels);
        const unsigned end =
            inside() ? min(begin + static_cast<unsigned>(plan_.pixels), static_cast<unsigned>(s.HW())) : 0;
        const unsigned step = plan_.team / kLanes * (kRows ? 1 : N);
        for (unsigned p = begin + walker * (kRows ? 1 : N); p < end; p += kAtOnce * step) {
            decltype(get(p)) got[kAtOnce];
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
                if (p + k * step < end) got[k] = get(p + k * step);
            }
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
                if (p + k * step < end) use(p + k * step, got[k]);
            }
        }
    }

    // Sums over all threads of the block that share channels, in each of them.
    __device__ static __forceinline__ void block_sums(A (&v)[kChannels], A* shared) {
        const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kLanes;
#pragma unroll
        for (int i = 0; i < kChannels; ++i) v[i] = warp_sum<kLanes>(v[i]);
        if (threadIdx.x % kWarp < kLanes) {
#pragma unroll
            for (int i = 0; i < kChannels; ++i) shared[(warp * kLanes + lane) * kChannels + i] = v[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
            v[i] = 0;
            for (int w = 0; w < kThreads / kWarp; ++w) v[i] += shared[(w * kLanes + lane) * kChannels + i];
        }
        __syncthreads();
    }

    // The same over the threads of a team.
    __device__ __forceinline__ void team_sums(A (&v)[kChannels], A* shared) const {
        if (plan_.team > kWarp) return block_sums(v, shared);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) v[i] = warp_sum<kLanes>(v[i]);
    }
};

// Elements of a vector. In channels_last every element has its own channel, whose constants and sums are registers:
// four leave room for two vectors in flight, which for 16-bit maps are 8 bytes each. float64, which is there for
// exactness, has no vectors.
template <class T>
constexpr int kPlaneVector = std::is_same_v<T, double> ? 1 : kVector<T>;
template <class T>
constexpr int kRowVector = std::is_same_v<T, double> ? 1 : 4;

// Calls body with the Walk for this layout that has vectors where all maps allow it.
template <class T, class Body>
void on_walk(bool channels_last, const Shape& s, std::initializer_list<Map<const T>> maps, const Body& body) {
    const auto all = [&](auto fits) { return std::all_of(maps.begin(), maps.end(), fits); };
    if (channels_last) {
        constexpr int N = kRowVector<T>;
        all([&](const auto& map) { return in_vectors<N>(map, s.C); }) ? body(static_cast<Walk<T, N, true>*>(nullptr))
                                                                      : body(static_cast<Walk<T, 1, true>*>(nullptr));
    } else {
        constexpr int N = kPlaneVector<T>;
        all([&](const auto& map) { return in_vectors<N>(map, s.HW()); })
            ? body(static_cast<Walk<T, N, false>*>(nullptr))
            : body(static_cast<Walk<T, 1, false>*>(nullptr));
    }
}

template <class T>
Map<const T> to_const(const Map<T>& m) {
    return {m.data, m.batch, m.channel, m.pixel};
}

}  // namespace dla
