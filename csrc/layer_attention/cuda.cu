// layer_attention on CUDA: how a map is cut, and the launches. Forward is one launch, and another where a block does
// not see all of a map; backward is two. Stages of more than kMaps layers take one more for each further kMaps of them.
#include <algorithm>
#include <stdexcept>

#include "common/cuda/parts.cuh"
#include "layer_attention/backward.cuh"
#include "layer_attention/cuda.h"
#include "layer_attention/forward.cuh"
#include "layer_attention/project.cuh"

namespace dla::layer_attention {
namespace {

// Blocks enough for some ten waves on the largest GPUs, so that the last one weighs little.
constexpr int64_t kBlocks = 4096;

constexpr int64_t kMaxSteps = 64;

unsigned blocks_of(int64_t blocks) {
    if (blocks > 0x7fffffff) throw std::runtime_error("layer_attention: the map is too large for one launch");
    return static_cast<unsigned>(blocks);
}

// Calls body with the Place of this layout and width.
template <class T, class Body>
void on_place(const Plan& p, bool channels_last, const Body& body) {
    if (channels_last) {
        p.vectors ? body(static_cast<Place<kVector<T>, true>*>(nullptr)) : body(static_cast<Place<1, true>*>(nullptr));
    } else {
        p.vectors ? body(static_cast<Place<kVector<T>, false>*>(nullptr))
                  : body(static_cast<Place<1, false>*>(nullptr));
    }
}

int64_t power_of_two_from(int64_t n) {
    int64_t power = 1;
    while (power < n) power *= 2;
    return power;
}

template <class T>
int channels_of(const Plan& p, bool channels_last) {
    return p.teams * p.lanes * (channels_last && p.vectors ? kVector<T> : 1);
}

}  // namespace

template <class T>
bool in_vectors(const Shape& s, bool channels_last, const Map<const T>& map) {
    return dla::in_vectors<kVector<T>>(map, channels_last ? s.C : s.HW());
}

template <class T>
Plan plan(const Shape& s, bool channels_last, bool vectors, int bytes) {
    const int64_t N = vectors ? kVector<T> : 1, channels = channels_last ? N : 1;     // of a thread
    const int64_t units = std::max<int64_t>(1, channels_last ? s.HW() : s.HW() / N);  // an empty batch fits any vectors
    if (std::max(units, s.C) > (1 << 30)) throw std::runtime_error("layer_attention: the map is too large");
    Plan p = {};
    p.vectors = vectors;
    // So many bytes of adjacent channels, or what is there; without vectors a warp's width.
    const int64_t widest = vectors ? bytes / 16 : kWarp;
    p.lanes = channels_last ? static_cast<int>(std::min(widest, power_of_two_from(ceil_div(s.C, N)))) : 1;
    const int64_t wanted = power_of_two_from(ceil_div(units * p.lanes, kDepth));
    p.team = static_cast<int>(std::max<int64_t>(kWarp, std::min<int64_t>(kMaxThreads, wanted)));
    const int64_t sets = std::max<int64_t>(1, ceil_div(s.C, p.lanes * channels));
    p.teams = static_cast<int>(std::min<int64_t>(kMaxThreads / p.team, sets));
    p.chunks = static_cast<unsigned>(ceil_div(sets, p.teams));
    const int64_t steps = ceil_div(units, p.team / p.lanes * kDepth);
    p.steps = static_cast<int>(std::min<int64_t>(std::max<int64_t>(1, steps * s.B * p.chunks / kBlocks), kMaxSteps));
    p.runs = static_cast<unsigned>(ceil_div(steps, p.steps));
    p.steps = static_cast<int>(ceil_div(steps, p.runs));  // evenly
    return p;
}

template <class T>
void launch(const Forward<T>& a, const Plan& p, bool channels_last, CUstream_st* stream) {
    const Shape& s = a.shape;
    if (s.B * s.C == 0) return;
    on_place<T>(p, channels_last, [&](auto* type) {
        using P = std::remove_pointer_t<decltype(type)>;
        const auto kernel = a.x ? forward<T, P, true> : forward<T, P, false>;
        dla::launch(kernel, dim3(blocks_of(s.B * p.blocks())), p.threads(),
                    forward_shared(a, channels_of<T>(p, channels_last)), stream, a, p);
    });
    if (a.after || a.x || p.runs == 1) return;
    using A = Acc<T>;
    launch_join(join_moments<A>, s.B, s.C, stream, reinterpret_cast<const Moments<A>*>(a.parts), p.runs, s.B, s.C,
                a.mean, a.var);
}

template <class T>
void launch(const Backward<T>& a, const Plan& p, bool channels_last, CUstream_st* stream) {
    const Shape& s = a.shape;
    if (s.B * s.C == 0) return;
    on_place<T>(p, channels_last, [&](auto* type) {
        using P = std::remove_pointer_t<decltype(type)>;
        dla::launch(backward<T, P>, dim3(blocks_of(s.B * p.blocks())), p.threads(),
                    backward_shared(a, p, channels_of<T>(p, channels_last)), stream, a, p);
    });
}

template <class T>
void finish(const Backward<T>& a, const Plan& p, CUstream_st* stream) {
    const Shape& s = a.shape;
    if (s.B * s.C == 0) return;
    const dim3 grid(blocks_of(s.B * (s.C / a.attention.head_dim)));
    dla::launch(head_gradients<T>, grid, kHeadThreads, 2 * a.attention.layers * sizeof(Acc<T>), stream, a, p);
}

#define DLA_INSTANTIATE(T)                                                     \
    template Plan plan<T>(const Shape&, bool, bool, int);                      \
    template bool in_vectors(const Shape&, bool, const Map<const T>&);         \
    template void launch(const Forward<T>&, const Plan&, bool, CUstream_st*);  \
    template void launch(const Backward<T>&, const Plan&, bool, CUstream_st*); \
    template void finish(const Backward<T>&, const Plan&, CUstream_st*);
DLA_INSTANTIATE(float)
DLA_INSTANTIATE(double)
DLA_INSTANTIATE(__half)
DLA_INSTANTIATE(__nv_bfloat16)
#undef DLA_INSTANTIATE

template void launch(const Filters<float>&, float*, float*, float*, CUstream_st*);
template void launch(const Filters<double>&, double*, double*, double*, CUstream_st*);
template void launch(const Filters<float>&, const FilterGradients<float>&, CUstream_st*);
template void launch(const Filters<double>&, const FilterGradients<double>&, CUstream_st*);

}  // namespace dla::layer_attention
