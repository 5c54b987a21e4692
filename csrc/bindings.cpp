// The Python module `dla_kernels._C`. Importing it registers the library ops, which every op's own file defines;
// the module itself only tells how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "common/caches.h"
#include "common/isa.h"

namespace {

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The native library of dla_kernels.";
    m.def("build_info", [] {
        return std::map<std::string, std::string>{
            {"version", DLA_VERSION}, {"torch", DLA_TORCH}, {"compiler", compiler()}, {"flags", DLA_FLAGS}};
    });
    m.def("instruction_sets", &dla::runnable_isas, "The instruction sets that kernels can use here, best last.");
    m.def("instruction_set", &dla::active_isa_name, "The one they use.");
    m.def("use_instruction_set", &dla::use_isa, "Makes them use another: for tests and benchmarks.");
    m.def(
        "use_cache_bytes", [](int64_t bytes) { return dla::cache_bytes.exchange(bytes); },
        "Makes them take the caches for this large, and returns what they did before: for tests and benchmarks.");
}
