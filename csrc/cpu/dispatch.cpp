// Chooses the kernels by what the processor can run. Compiled without architecture flags.
#include "kernels.h"

#if defined(PELTON_ARM) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(PELTON_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace pelton {
namespace {

#ifdef PELTON_ARM
#if defined(__linux__)
bool has_dot_products() { return getauxval(AT_HWCAP) >> 20 & 1; }      // HWCAP_ASIMDDP
bool has_matrix_products() { return getauxval(AT_HWCAP2) >> 13 & 1; }  // HWCAP2_I8MM, which older headers lack
#elif defined(__APPLE__)
bool has_dot_products() { return true; }
bool has_matrix_products() {
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, nullptr, 0) == 0 && has;
}
#else
bool has_dot_products() { return false; }
bool has_matrix_products() { return false; }
#endif
#endif

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
#ifdef PELTON_ARM
        const bool neon = has_dot_products();
        if (neon && has_matrix_products()) tables[count++] = &neon_i8mm_kernels;
        if (neon) tables[count++] = &neon_kernels;
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
