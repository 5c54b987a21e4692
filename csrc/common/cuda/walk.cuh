// How a block walks a map pixel by pixel with sums for every channel: one source for both layouts.
//
// A thread takes vectors of N elements: N pixels of one channel in NCHW, one pixel of N channels in channels_last. A
// team of threads (a warp, or the block where maps are large or few) walks one sample's tile: a plane in NCHW, and in
// channels_last up to 256 bytes of adjacent channels, as many threads side by side. All tiles of a block have the same
// channels, so what is computed for a channel is computed once for several samples. Where tiles are too few to keep the
// chip busy they are cut into runs of pixels, a block for each, and a launch more joins what the blocks have added up.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "common/cuda/async.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vector.cuh"

namespace dla {

constexpr int kWalkThreads = 256;  // of a block

// What a launch chooses, from the shape alone: the order of every sum follows from it.
struct WalkPlan {
    int64_t tiles, groups, runs;  // of channels, of samples and of pixels; a block has one of each
    int64_t pixels;               // of a run
    int team, lanes;              // threads of a tile, and of them those side by side

    // Two waves of 8 blocks each on the 132 multiprocessors of an H100: more blocks would only repeat the statistics.
    static constexpr int64_t kBlocks = 2112;
    // Fewer than two on each are cut, into runs of at least so many vectors for every thread.
    static constexpr int64_t kFew = 264, kLeast = 8;

    WalkPlan(const Shape& s, int N, bool rows, int lanes)
        : tiles(rows ? ceil_div(s.C, int64_t(lanes) * N) : s.C), lanes(lanes) {
        if (std::max({s.B, s.C, s.HW()}) > INT32_MAX) throw std::runtime_error("a map of 2^31 or more along one axis");
        const int64_t vectors = rows ? s.HW() * lanes : ceil_div(s.HW(), N);
        // A warp per tile needs no barrier; but with too few of them most of the chip would wait.
        team = vectors > 32 * kWarp || (vectors > 2 * kWarp && s.B * tiles < 4096) ? kWalkThreads : kWarp;
        groups = std::max<int64_t>(1, std::min(ceil_div(s.B, kWalkThreads / team), ceil_div(kBlocks, tiles)));
        const int64_t wanted = team == kWalkThreads ? kFew / (tiles * groups) : 1;
        const int64_t most = vectors / (kLeast * kWalkThreads);
        pixels = round_up(ceil_div(s.HW(), std::max<int64_t>(1, std::min(wanted, most))), N);
        runs = ceil_div(s.HW(), pixels);
    }

    // For a warp that takes tiles of its own choice.
    __device__ WalkPlan(const Shape& s, int lanes, int channels)
        : tiles(ceil_div(s.C, int64_t(lanes) * channels)),
          groups(1),
          runs(1),
          pixels(s.HW()),
          team(kWarp),
          lanes(lanes) {}

    // Blocks that share a tile of channels.
    DLA_HOST_DEVICE int64_t parts() const { return groups * runs; }
    dim3 grid() const { return dim3(static_cast<unsigned>(tiles * parts())); }
};

// A thread's vectors of a map: operator[] tells where the i-th lies.
template <class T>
struct Cursor {
    T* first;
    int step;  // bytes

    __device__ __forceinline__ T* operator[](int i) const {
        using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
        return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + int64_t(i) * step);
    }
    __device__ explicit operator bool() const { return first != nullptr; }
};

template <class T, int N_, bool kRows_>
struct Walk {
    using A = Acc<T>;
    static constexpr int N = N_;
    static constexpr bool kRows = kRows_;
    // 256 bytes of adjacent channels in vectors; without vectors a warp takes as many as it can.
    static constexpr int kMostLanes = !kRows ? 1 : N == 1 ? kWarp : 256 / (N * sizeof(T));
    static constexpr int kChannels = kRows ? N : 1;  // of a thread
    // Values of shared memory that a sum over the block needs.
    static constexpr int kShared = kWalkThreads / kWarp * kMostLanes * kChannels;

    static DLA_HOST_DEVICE int lanes(int64_t C) {
        int lanes = 1;
        while (lanes < kMostLanes && lanes * N < C) lanes *= 2;
        return lanes;
    }
    static WalkPlan plan(const Shape& s) { return WalkPlan(s, N, kRows, lanes(s.C)); }

    // An int counts the bytes of a thread's step through a map.
    static void check(const Map<const T>& map) {
        if (map.pixel <= INT32_MAX / int64_t(kWalkThreads * N * sizeof(T))) return;
        throw std::runtime_error("adjacent pixels of a map lie too far apart");
    }

    const Shape& s;
    const WalkPlan& plan_;
    int tile, group, run, c;  // c: the thread's first channel
    int lane, walker;         // the thread's place among the channels, and among the vectors of its channels
    int first, step, count;   // its vectors of a sample: the first one's pixel, pixels from one to the next, how many

    __device__ Walk(const Shape& s, const WalkPlan& plan)
        : Walk(s, plan, blockIdx.x % static_cast<unsigned>(plan.tiles),
               blockIdx.x / static_cast<unsigned>(plan.tiles)) {}

    __device__ Walk(const Shape& s, const WalkPlan& plan, int tile, int part)
        : s(s),
          plan_(plan),
          tile(tile),
          group(part % static_cast<int>(plan.groups)),
          run(part / static_cast<int>(plan.groups)),
          c(kRows ? (tile * plan.lanes + threadIdx.x % plan.lanes) * N : tile),
          lane(threadIdx.x % plan.lanes),
          walker(threadIdx.x % plan.team / plan.lanes) {
        const int begin = run * static_cast<int>(plan.pixels), apart = kRows ? 1 : N;
        const int left = static_cast<int>(min(plan.pixels, s.HW() - begin)) - walker * apart;
        first = begin + walker * apart;
        step = plan.team / plan.lanes * apart;
        count = inside() && left > 0 ? (left - 1) / step + 1 : 0;
    }

    // Without vectors the last tile may be wider than the map.
    __device__ bool inside() const { return !kRows || c < s.C; }
    __device__ int part() const { return run * int(plan_.groups) + group; }

    template <class U>
    __device__ __forceinline__ Cursor<U> cursor(const Map<U>& map, int64_t b) const {
        return {map.at(b, c, first), static_cast<int>(step * map.pixel * int64_t(sizeof(U)))};
    }

    // The samples of this thread's team, the same number of rounds for all threads of a team.
    template <class Body>
    __device__ __forceinline__ void each_sample(const Body& body) const {
        const int teams = kWalkThreads / plan_.team;
        for (int b = group * teams + threadIdx.x / plan_.team; b < s.B; b += int(plan_.groups) * teams) body(b);
    }

    // Vectors of each of several maps that a thread has under way in shared memory; each stands in a row of all
    // threads.
    static constexpr bool kAsync = sizeof(Word<T, N>) == 16;
    template <int kMaps>
    static constexpr int kStages = kMaps == 1   ? 8
                                   : kMaps == 2 ? 4
                                                : 3;
    // Bytes of shared memory that they take.
    template <int kMaps>
    static constexpr int kRing = kAsync ? kStages<kMaps> * kMaps * kWalkThreads * 16 : 0;

    // The thread's vectors of a run, of several maps: use(i, the words of each). A map that is not there holds zeros.
    // What a thread has copied it alone reads, so that no thread waits for another.
    template <int kMaps, class Use>
    __device__ __forceinline__ void each_vector(const Cursor<const T> (&maps)[kMaps], void* ring,
                                                const Use& use) const {
        if constexpr (kAsync) {
            constexpr int kDepth = kStages<kMaps>;
            uint4* const own = static_cast<uint4*>(ring) + threadIdx.x;
            const auto begin = [&](int i, int stage) {
#pragma unroll
                for (int m = 0; m < kMaps; ++m) {
                    if (i < count) copy_async(own + (stage * kMaps + m) * kWalkThreads, maps[m][i], bool(maps[m]));
                }
                end_copies();
            };
#pragma unroll
            for (int stage = 0; stage < kDepth; ++stage) begin(stage, stage);
#pragma unroll 1
            for (int i = 0; i < count; i += kDepth) {
#pragma unroll
                for (int stage = 0; stage < kDepth; ++stage) {
                    await_copies<kDepth - 1>();
                    Word<T, N> words[kMaps];
#pragma unroll
                    for (int m = 0; m < kMaps; ++m) words[m] = own[(stage * kMaps + m) * kWalkThreads];
                    begin(i + stage + kDepth, stage);
                    if (i + stage < count) use(i + stage, words);
                }
            }
        } else {
            each_vector<4>(maps, use);
        }
    }

    // The same without shared memory: kAtOnce of each map under way, in registers.
    template <int kAtOnce, int kMaps, class Use>
    __device__ __forceinline__ void each_vector(const Cursor<const T> (&maps)[kMaps], const Use& use) const {
#pragma unroll 1
        for (int i = 0; i < count; i += kAtOnce) {
            Word<T, N> words[kAtOnce][kMaps] = {};
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
                for (int m = 0; m < kMaps; ++m) {
                    if (i + k < count && maps[m]) words[k][m] = fetch<N>(maps[m][i + k]);
                }
            }
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
                if (i + k < count) use(i + k, words[k]);
            }
        }
    }

    // Sums over the lanes of a warp that share channels, in each of them.
    __device__ __forceinline__ void warp_sums(A (&v)[kChannels]) const {
        for (int offset = kWarp / 2; offset >= plan_.lanes; offset /= 2) {
#pragma unroll
            for (int i = 0; i < kChannels; ++i) v[i] += __shfl_xor_sync(kAllLanes, v[i], offset);
        }
    }

    // Sums over all threads of the block that share channels, in each of them.
    __device__ __forceinline__ void block_sums(A (&v)[kChannels], A* shared) const {
        const int warp = threadIdx.x / kWarp, lanes = plan_.lanes;
        warp_sums(v);
        if (threadIdx.x % kWarp < lanes) {
#pragma unroll
            for (int i = 0; i < kChannels; ++i) shared[(warp * lanes + lane) * kChannels + i] = v[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kChannels; ++i) v[i] = 0;
#pragma unroll 1  // else all of them wait in registers
        for (int w = 0; w < kWalkThreads / kWarp; ++w) {
#pragma unroll
            for (int i = 0; i < kChannels; ++i) v[i] += shared[(w * lanes + lane) * kChannels + i];
        }
        __syncthreads();
    }

    // The same over the threads of a team.
    __device__ __forceinline__ void team_sums(A (&v)[kChannels], A* shared) const {
        plan_.team > kWarp ? block_sums(v, shared) : warp_sums(v);
    }
};

// Elements of a vector. float64, which is there for exactness, has no vectors.
template <class T>
constexpr int kWalkVector = std::is_same_v<T, double> ? 1 : kVector<T>;

// Calls body with the Walk for this layout that has vectors where all maps allow it.
template <class T, class Body>
void on_walk(bool channels_last, const Shape& s, std::initializer_list<Map<const T>> maps, const Body& body) {
    constexpr int N = kWalkVector<T>;
    const int64_t length = channels_last ? s.C : s.HW();
    const bool vectors =
        std::all_of(maps.begin(), maps.end(), [&](const auto& map) { return in_vectors<N>(map, length); });
    const auto run = [&](auto* walk) {
        for (const auto& map : maps) std::remove_pointer_t<decltype(walk)>::check(map);
        body(walk);
    };
    if (channels_last) {
        vectors ? run(static_cast<Walk<T, N, true>*>(nullptr)) : run(static_cast<Walk<T, 1, true>*>(nullptr));
    } else {
        vectors ? run(static_cast<Walk<T, N, false>*>(nullptr)) : run(static_cast<Walk<T, 1, false>*>(nullptr));
    }
}

template <class T>
Map<const T> to_const(const Map<T>& m) {
    return {m.data, m.batch, m.channel, m.pixel};
}

}  // namespace dla
