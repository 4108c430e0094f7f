// Every kernel, for the instruction set of the file that includes this one. That file has no other code, and all of
// this is in an anonymous namespace: the linker must never take one instruction set's code for another's.

#include <cmath>
#include <cstring>

#include "../kernels.h"

namespace pelton {
namespace {
#include "convert.inl"
#include "rms_norm.inl"
}  // namespace
}  // namespace pelton

#define PELTON_KERNELS(isa) {isa, pelton::rms_norm<float>, pelton::rms_norm<pelton::bf16>}
