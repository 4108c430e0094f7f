// Every kernel, for the instruction set of the file that includes this one. That file has no other code, and all of
// this is in an anonymous namespace: the linker must never take one instruction set's code for another's.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <type_traits>
#ifdef PELTON_NEON  // asked for by name: a compiler for Apple silicon has it switched on in every file
#include <arm_neon.h>
#endif

#include "../kernels.h"

namespace pelton {
namespace {
#include "convert.inl"
#if defined(__AVX512F__)
#include "simd_avx512.inl"
#elif defined(__AVX2__)
#include "simd_avx2.inl"
#elif defined(PELTON_NEON)
#include "simd_neon.inl"
#else
#include "simd_generic.inl"
#endif
#include "simd.inl"
#include "codes.inl"
#include "linear.inl"
#include "rows.inl"
#include "attention.inl"
#include "sample.inl"

#ifdef PELTON_BF16_DOT
constexpr bool has_bf16_dot = true;
#else
constexpr bool has_bf16_dot = false;
#endif
}  // namespace
}  // namespace pelton

#define PELTON_KERNELS(isa)                                                                                  \
    {isa,                    pelton::linear,         pelton::embed,             pelton::rms_norm,            \
     pelton::gated,          pelton::softcap,        pelton::gather,            pelton::angles,              \
     pelton::rope_store,     pelton::attention,      pelton::sample,            pelton::linear_scratch,      \
     pelton::attention_scratch, pelton::has_bf16_dot}
