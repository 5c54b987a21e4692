#include "common/isa.h"

#include <atomic>
#include <stdexcept>

namespace dla {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Isa best_isa() {
#if DLA_MULTI_ISA
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2) return avx512 ? Isa::avx512 : Isa::avx2;
#endif
    return Isa::baseline;
}

std::atomic<Isa>& active() {
    static std::atomic<Isa> isa{best_isa()};
    return isa;
}

}  // namespace

Isa active_isa() { return active().load(std::memory_order_relaxed); }

std::string active_isa_name() { return kNames[static_cast<int>(active_isa())]; }

std::vector<std::string> runnable_isas() { return {kNames, kNames + static_cast<int>(best_isa()) + 1}; }

void use_isa(const std::string& name) {
    const auto names = runnable_isas();
    for (size_t i = 0; i < names.size(); ++i) {
        if (names[i] == name) return active().store(static_cast<Isa>(i));
    }
    throw std::invalid_argument("no instruction set `" + name + "` here");
}

}  // namespace dla
