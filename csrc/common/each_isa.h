// Compiles the file DLA_KERNELS once for every instruction set, each time in a namespace of its own.
//
// Everything from the standard library and from torch is included before, hence compiled for the baseline: a template
// of theirs that were compiled here could be the copy that the linker keeps for all.
#include <cmath>
#include <cstring>
#include <utility>

#include "common/caches.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/types.h"

#if DLA_MULTI_ISA

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define DLA_VECTOR_BYTES 64
#define DLA_F16C 1
namespace dla::avx512 {
#include "common/vec.h"
#include DLA_KERNELS
}  // namespace dla::avx512
#undef DLA_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define DLA_VECTOR_BYTES 32
namespace dla::avx2 {
#include "common/vec.h"
#include DLA_KERNELS
}  // namespace dla::avx2
#undef DLA_VECTOR_BYTES
#undef DLA_F16C
#pragma GCC pop_options

#endif

#define DLA_VECTOR_BYTES 16
#define DLA_F16C 0
namespace dla::baseline {
#include "common/vec.h"
#include DLA_KERNELS
}  // namespace dla::baseline
#undef DLA_VECTOR_BYTES
#undef DLA_F16C
