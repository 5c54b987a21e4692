// Kernels for the tests of the CPU build itself: a right one, and the same with one mistake each.
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vector.cuh"

namespace dla {
namespace {

constexpr int kThreads = 128;

enum Mistake {
    none,
    no_barrier,
    no_barrier_before_reuse,
    uninitialised,
    beyond_shared,
    beyond_map,
    misaligned,
    divergent,
    divergent_block  // for compute-sanitizer: the threads that are left behind go on when the others have ended
};

// Twice: out[i] = the value of the thread on the other side of the block, plus the block's sum.
template <Mistake mistake>
__global__ void mirror(const float* in, float* out) {
    float* shared = shared_memory<float>();
    const int i = threadIdx.x, at = blockIdx.x * kThreads + i;
    float value = in[at];
    for (int round = 0; round < 2; ++round) {
        if (mistake != uninitialised || i != 5) shared[i] = value;
        if (mistake == beyond_shared && i == 7) shared[kThreads + kThreads / kWarp] = 0;
        if (mistake != no_barrier) __syncthreads();
        value = shared[kThreads - 1 - i];
        if (mistake != no_barrier_before_reuse) __syncthreads();
    }
    if (mistake == divergent && i < 40) __syncwarp();
    if (mistake == divergent_block && i < 40) __syncthreads();
    float total = block_sum(value, shared + kThreads);
    if (mistake == misaligned) {
        float four[4];
        load(in + 1, four);
        total += four[0];
    }
    out[mistake == beyond_map ? at + 1 : at] = value + total;
}

enum GridMistake { right, no_grid_barrier, not_together, leaves_early };

// Twice: a block's value becomes that of the block on the other side, plus 1.
template <GridMistake mistake>
__global__ void across(float* values, float* places) {
    float* shared = shared_memory<float>();
    shared[threadIdx.x] = values[blockIdx.x];
    __syncthreads();
    for (int round = 0; round < 2; ++round) {
        if (threadIdx.x == 0) places[round * gridDim.x + blockIdx.x] = shared[31];
        if (mistake == leaves_early && blockIdx.x == 1) return;
        if (mistake == no_grid_barrier) {
            __syncthreads();
        } else {
            grid_barrier();
        }
        shared[threadIdx.x] = places[round * gridDim.x + gridDim.x - 1 - blockIdx.x] + 1;
        __syncthreads();
    }
    if (threadIdx.x == 0) values[blockIdx.x] = shared[31];
}

}  // namespace
}  // namespace dla

// Returns whether the launch succeeded.
extern "C" __attribute__((visibility("default"))) bool run_mirror(int mistake, int blocks, const float* in,
                                                                  float* out) {
    using namespace dla;
    void (*const kernels[])(const float*, float*) = {
        mirror<none>,          mirror<no_barrier>,    mirror<no_barrier_before_reuse>,
        mirror<uninitialised>, mirror<beyond_shared>, mirror<beyond_map>,
        mirror<misaligned>,    mirror<divergent>,     mirror<divergent_block>};
    try {
        launch(kernels[mistake], dim3(blocks), kThreads, (kThreads + kThreads / kWarp) * sizeof(float), nullptr, in,
               out);
    } catch (const std::runtime_error&) {
        return false;
    }
    return true;
}

// values [blocks], places [2, blocks]; returns whether the launch succeeded.
extern "C" __attribute__((visibility("default"))) bool run_across(int mistake, int blocks, float* values,
                                                                  float* places) {
    using namespace dla;
    void (*const kernels[])(float*, float*) = {across<right>, across<no_grid_barrier>, across<not_together>,
                                               across<leaves_early>};
    try {
        launch_as(mistake != not_together, kernels[mistake], dim3(blocks), kWarp, kWarp * sizeof(float), nullptr,
                  values, places);
    } catch (const std::runtime_error&) {
        return false;
    }
    return true;
}
