// What all kernels share. Defined when compiled: HALF (1: float16, 0: bfloat16).
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ float to_float(u16 h) {
#if HALF
    return half_to_float(h);
#else
    return __uint_as_float(u32(h) << 16);
#endif
}
__device__ __forceinline__ float2 to_floats(u32 pair) { return make_float2(to_float(u16(pair)), to_float(u16(pair >> 16))); }
// Two floats as a pair of that type.
__device__ __forceinline__ u32 to_pair(float low, float high) {
    u32 r;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
    return r;
}

__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// Wait for the other threads of a team of a block.
template <int threads>
__device__ __forceinline__ void wait_for_team(int team) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(threads) : "memory");
}

// From compute capability 9.0 on a kernel may be brought up while the one before it still runs.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
