// The kernels for 64-bit ARM with the extension of int8 matrix products (Neoverse V1 and N2, Apple M2 and later).
#define PELTON_NEON
#include "kernels/all.inl"

const pelton::Kernels pelton::neon_i8mm_kernels = PELTON_KERNELS("neon_i8mm");
