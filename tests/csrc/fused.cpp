// The kernels in plain C++ as those of the instruction sets round: with fused multiply-adds.
#define PELTON_FUSED
#include "kernels/all.inl"

namespace pelton {
extern const Kernels fused_kernels;
const Kernels fused_kernels = PELTON_KERNELS("fused");
}  // namespace pelton
