// The kernels for x86 with AVX-512 F, BW, DQ and VL (servers from 2017 on).
#include "kernels/all.inl"

const pelton::Kernels pelton::avx512_kernels = PELTON_KERNELS("avx512");
