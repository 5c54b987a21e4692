// Instruction sets: which were compiled in, and which one the kernels of this process use.
#pragma once

#include <string>
#include <vector>

// Only GCC lets one source be compiled for several instruction sets side by side; other compilers and other
// processors get the baseline, whose vectors they lower to what their own flags allow.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DLA_MULTI_ISA 1
#include <immintrin.h>
#else
#define DLA_MULTI_ISA 0
#endif

#define DLA_INLINE __attribute__((always_inline))

namespace dla {

enum class Isa { baseline, avx2, avx512 };

Isa active_isa();
// Names of the sets that this build has and this processor runs, the best one last.
std::vector<std::string> runnable_isas();
std::string active_isa_name();
// Makes all later calls use this set, which must be one of runnable_isas(): for tests and benchmarks.
void use_isa(const std::string& name);

}  // namespace dla

// DLA_ON_ISA(kernel<T>(args)) calls the kernel compiled for the active instruction set.
#if DLA_MULTI_ISA
#define DLA_ON_ISA(...)                   \
    switch (::dla::active_isa()) {        \
        case ::dla::Isa::avx512:          \
            ::dla::avx512::__VA_ARGS__;   \
            break;                        \
        case ::dla::Isa::avx2:            \
            ::dla::avx2::__VA_ARGS__;     \
            break;                        \
        default:                          \
            ::dla::baseline::__VA_ARGS__; \
    }
#else
#define DLA_ON_ISA(...) ::dla::baseline::__VA_ARGS__
#endif
