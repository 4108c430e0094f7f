// The kernels for x86 with AVX-512 VNNI and BF16 (Cooper Lake, Sapphire Rapids, Zen 4 and later).
#include "kernels/all.inl"

const pelton::Kernels pelton::avx512_bf16_kernels = PELTON_KERNELS("avx512_bf16");
