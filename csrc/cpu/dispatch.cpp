// Chooses the kernels by what the processor can run. Compiled without architecture flags.
#include "kernels.h"

namespace pelton {
namespace {

struct Supported {
    const Kernels* tables[5] = {};

    Supported() {
        size_t count = 0;
#ifdef PELTON_X86
        __builtin_cpu_init();  // also asks the operating system whether it saves the wide registers
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
        const bool vnni = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512vnni");
        if (vnni && __builtin_cpu_supports("avx512bf16")) tables[count++] = &avx512_bf16_kernels;
        if (vnni) tables[count++] = &avx512_vnni_kernels;
        if (avx2) tables[count++] = &avx2_kernels;
#endif
        tables[count] = &generic_kernels;
    }
};

}  // namespace

const Kernels* const* supported_kernels() {
    static const Supported supported;
    return supported.tables;
}

}  // namespace pelton
