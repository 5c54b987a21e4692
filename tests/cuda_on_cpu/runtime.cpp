// Runs grids on the CPU: every CUDA thread is a fiber, and one host thread switches between them. Blocks run one after
// the other; those that were launched together each up to the next barrier of the grid, then in the same order on.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, size)
#define ASAN_UNPOISON_MEMORY_REGION(begin, size)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace dla {
alignas(16) unsigned char dla_shared[cuda_on_cpu::kShared];
}

namespace cuda_on_cpu {
namespace {

// Shared memory begins as NaN in every floating type, and must still do so beyond its end when the block is done.
constexpr unsigned char kPoison = 0xff;
constexpr size_t kFence = 4 << 10, kStack = 128 << 10;
constexpr unsigned kMaxThreads = 1024;

using StackPointer = void*;

#ifdef __x86_64__
// Pushes what a call must preserve, stores the stack pointer, takes the other one, and pops.
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
extern "C" void cuda_on_cpu_switch(StackPointer* from, StackPointer to);

struct Context {
    StackPointer top = nullptr;

    void start(unsigned char* stack, void (*entry)()) {
        auto** slot = reinterpret_cast<void**>(stack + kStack - 64);
        *slot = reinterpret_cast<void*>(entry);  // what `ret` takes; the stack is then aligned as after a call
        top = slot - 6;
    }
    void switch_to(Context& other) { cuda_on_cpu_switch(&top, other.top); }
};
#else
struct Context {
    ucontext_t context;

    void start(unsigned char* stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = kStack;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

struct Thread {
    Context context;
    uint3 index;
    const int64_t* waits_for = nullptr;  // until it is no longer `before`
    int64_t before = 0;
    bool done = false;

    bool runnable() const { return !done && (!waits_for || *waits_for != before); }
};

// Lanes that exchange values under one mask. Two places in turn: nobody fills a place again before all have left it.
struct Meeting {
    unsigned mask = 0, arrived = 0;
    int64_t round = 0;
    Exchange places[2];
};

struct Barrier {
    unsigned arrived = 0;
    int64_t round = 0;
};

// A block that waits for the grid, while others run.
struct Parked {
    std::vector<Thread> threads;
    unsigned alive;
    std::vector<unsigned char> shared;
};

bool reversed = false, no_cooperation = false;
std::mutex one_grid;
std::unique_ptr<unsigned char[]> stacks;
size_t stack_count = 0;
std::vector<Thread> threads;
std::vector<std::vector<std::unique_ptr<Meeting>>> meetings;  // by warp
Barrier barrier;
bool launched_together;
int64_t grid_round;
Context scheduler;
Thread* running;
unsigned alive;
const std::function<void()>* body;
const char* failure = "no error";

// Lets the next thread in order go on that can, or tells the scheduler that there is none.
void give_way() {
    Thread* const last = running;
    const int64_t n = int64_t(threads.size()), step = reversed ? n - 1 : 1;
    int64_t i = running - threads.data();
    for (int64_t k = 0; k < n; ++k) {
        i = (i + step) % n;
        if (!threads[i].runnable()) continue;
        running = &threads[i];
        running->waits_for = nullptr;
        threadIdx = running->index;
        if (running != last) last->context.switch_to(running->context);
        return;
    }
    last->context.switch_to(scheduler);
}

void pause(const int64_t& round) {
    running->waits_for = &round;
    running->before = round;
    give_way();
}

// Threads that have ended no longer hold a barrier up.
void release_if_complete() {
    if (barrier.arrived < alive || !alive) return;
    barrier.arrived = 0;
    ++barrier.round;
}

void thread_entry() {
    (*body)();
    running->done = true;
    --alive;
    if (barrier.arrived) release_if_complete();
    give_way();
}

// Puts the block's threads at their beginning; its stacks are those from `stack` on.
void start_block(unsigned n, unsigned char* stack) {
    ASAN_UNPOISON_MEMORY_REGION(stack, n * kStack);
    threads.resize(n);
    alive = n;
    for (unsigned i = 0; i < n; ++i) {
        threads[i] = {};
        threads[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        threads[i].context.start(stack + i * kStack, thread_entry);
    }
}

// Runs the block until all its threads have ended or wait for the grid; whether that is so.
bool run_block() {
    barrier = {};
    for (auto& of_warp : meetings) of_warp.clear();
    const int64_t n = int64_t(threads.size());
    for (int64_t k = 0; k < n; ++k) {
        running = &threads[reversed ? n - 1 - k : k];
        if (!running->runnable()) continue;
        running->waits_for = nullptr;
        threadIdx = running->index;
        scheduler.switch_to(running->context);
        break;
    }
    for (const Thread& thread : threads) {
        if (thread.done || (thread.waits_for == &grid_round && launched_together)) continue;
        failure = thread.waits_for == &grid_round ? "a barrier of a grid that was not launched together"
                                                  : "threads wait for a barrier that others never reach";
        return false;
    }
    return true;
}

// Whether the block kept to its shared memory.
bool fence_holds(size_t used, size_t fenced) {
    for (size_t at = used; at < fenced; ++at) {
        if (dla::dla_shared[at] == kPoison) continue;
        failure = "a thread wrote beyond the block's shared memory";
        return false;
    }
    return true;
}

}  // namespace

void wait_for_block() {
    ++barrier.arrived;
    const int64_t round = barrier.round;
    release_if_complete();
    if (barrier.round == round) pause(barrier.round);
}

void wait_for_grid() { pause(grid_round); }

const Exchange& exchange(unsigned mask, const void* value, size_t size) {
    const unsigned lane = cuda_on_cpu::lane();
    if (!(mask >> lane & 1)) {
        fprintf(stderr, "cuda_on_cpu: a thread exchanges values under a mask that leaves it out\n");
        abort();
    }
    auto& of_warp = meetings[threadIdx.x / kLanes];
    Meeting* meeting = nullptr;
    for (auto& other : of_warp) {
        if (other->mask == mask) meeting = other.get();
    }
    if (!meeting) {
        meeting = of_warp.emplace_back(std::make_unique<Meeting>()).get();
        meeting->mask = mask;
    }
    Exchange& place = meeting->places[meeting->round % 2];
    if (size) memcpy(place.values[lane], value, size);
    if (++meeting->arrived == unsigned(__builtin_popcount(mask))) {
        meeting->arrived = 0;
        ++meeting->round;
    } else {
        pause(meeting->round);
    }
    return place;
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
    const std::lock_guard<std::mutex> lock(one_grid);
    const dim3 grid = config.gridDim, block = config.blockDim;
    const uint64_t n = uint64_t(block.x) * block.y * block.z;
    const auto invalid = [](const char* why) {
        failure = why;
        return cudaErrorInvalidConfiguration;
    };
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        return invalid("a grid of an impossible size");
    }
    if (!n || n > kMaxThreads) return invalid("a block of an impossible size");
    if (block.x % kLanes || block.y != 1 || block.z != 1) return invalid("blocks here are whole warps in x");
    if (config.dynamicSmemBytes > kShared) return invalid("too much shared memory");
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    launched_together = config.numAttrs > 0 && config.attrs[0].val.cooperative;
    if (launched_together && (no_cooperation || blocks > kMultiprocessors)) {
        return invalid("more blocks than run together");
    }
    const size_t needed = n * (launched_together ? blocks : 1);
    if (stack_count < needed) {
        stacks.reset(new unsigned char[needed * kStack]);
        stack_count = needed;
    }
    meetings.resize((n + kLanes - 1) / kLanes);
    body = &thread;
    gridDim = grid;
    blockDim = block;
    const size_t used = config.dynamicSmemBytes, fenced = std::min(used + kFence, kShared);
    std::vector<Parked> parked(launched_together ? blocks : 0);
    uint64_t left = blocks;
    for (grid_round = 0; left; ++grid_round) {
        for (uint64_t k = 0; k < blocks; ++k) {
            const uint64_t i = reversed ? blocks - 1 - k : k;
            blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
            memset(dla::dla_shared, kPoison, fenced);
            if (grid_round == 0) {
                start_block(unsigned(n), stacks.get() + (launched_together ? i * n * kStack : 0));
            } else if (parked[i].alive) {
                std::swap(threads, parked[i].threads);
                alive = parked[i].alive;
                std::copy(parked[i].shared.begin(), parked[i].shared.end(), dla::dla_shared);
            } else {
                continue;
            }
            ASAN_POISON_MEMORY_REGION(dla::dla_shared + used, kShared - used);
            const bool done = run_block();
            ASAN_UNPOISON_MEMORY_REGION(dla::dla_shared, kShared);
            if (!done || !fence_holds(used, fenced)) return cudaErrorLaunchFailure;
            if (!alive) --left;
            if (!launched_together) continue;
            std::swap(threads, parked[i].threads);
            parked[i].alive = alive;
            parked[i].shared.assign(dla::dla_shared, dla::dla_shared + used);
        }
        if (left && left < blocks) {
            failure = "a block has ended for which others wait";
            return cudaErrorLaunchFailure;
        }
    }
    return cudaSuccess;
}

}  // namespace cuda_on_cpu

const char* cudaGetErrorString(cudaError_t) { return cuda_on_cpu::failure; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_cpu::kMultiprocessors : !cuda_on_cpu::no_cooperation;
    return cudaSuccess;
}

// Lets the last block and the last thread go first.
extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_reverse(bool value) {
    cuda_on_cpu::reversed = value;
}

// Offers no launch of blocks that run together.
extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_no_cooperation(bool value) {
    cuda_on_cpu::no_cooperation = value;
}
