// The kernels for x86 with AVX2, FMA and F16C (2013 and later).
#include "kernels/all.inl"

const pelton::Kernels pelton::avx2_kernels = PELTON_KERNELS("avx2");
