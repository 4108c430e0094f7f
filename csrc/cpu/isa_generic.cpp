// The kernels for any processor.
#include "kernels/all.inl"

const pelton::Kernels pelton::generic_kernels = PELTON_KERNELS("generic");
