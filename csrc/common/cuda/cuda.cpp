// How the library of CUDA kernels was built, for Python to ask without a GPU.
extern "C" {
#define DLA_EXPORT __attribute__((visibility("default")))

// "80 90 120+PTX"
DLA_EXPORT const char* dla_cuda_architectures() { return DLA_CUDA_ARCHITECTURES; }
DLA_EXPORT const char* dla_cuda_toolkit() { return DLA_CUDA_TOOLKIT; }
}
