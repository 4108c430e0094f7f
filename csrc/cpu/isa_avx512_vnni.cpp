// The kernels for x86 with AVX-512 F, BW, DQ, VL and VNNI (servers from 2019 on).
#include "kernels/all.inl"

const pelton::Kernels pelton::avx512_vnni_kernels = PELTON_KERNELS("avx512_vnni");
