// The table of kernels that each instruction set fills in. Kernels take raw pointers and sizes and check nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pelton {

// A bfloat16 is the upper half of a float.
struct bf16 {
    uint16_t bits;
};

// out[r, i] = x[r, i] / sqrt(mean_i(x[r, i]^2) + eps) * weight[i], computed in float32 and rounded once.
// Rows are `x_stride` and `out_stride` elements apart; the elements of a row are adjacent. `out` may be `x`.
template <typename T>
using RmsNorm = void (*)(T* out, const T* x, const float* weight, size_t num_rows, size_t dim, size_t out_stride,
                         size_t x_stride, float eps);

struct Kernels {
    const char* isa;
    RmsNorm<float> rms_norm_f32;
    RmsNorm<bf16> rms_norm_bf16;
};

extern const Kernels generic_kernels;
#ifdef PELTON_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// The tables this processor can run, best first, ended by nullptr; decided once.
const Kernels* const* supported_kernels();

}  // namespace pelton
