// The kernels for 64-bit ARM with the dot product extension (most cores from 2018 on; every Apple silicon).
#define PELTON_NEON
#include "kernels/all.inl"

const pelton::Kernels pelton::neon_kernels = PELTON_KERNELS("neon");
