// Products of four warps together, by wgmma.m64nNk16, as Hopper alone has them: of rows of w in their registers, as
// mma.m16n8k16 wants them, and of x in shared memory, where it lies in matrices of 8 rows and 8 columns, 128 bytes each:
// [two of each mma][NT].

// Where mma 0 finds x: an address (of which the highest bits say which block of a cluster it is), the distance of matrices
// beside each other, and of those one below the other.
__device__ __forceinline__ u64 describe_x(const u16* x) {
    return u64((shared_address(x) & 0x3FFFF) >> 4) | u64(NT * 128 >> 4) << 16 | u64(128 >> 4) << 32;
}
#define NEXT_X (2 * NT * 128 >> 4)  // from one mma's to the next one's

#define SUMS_8(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define SUMS_32(c, i) SUMS_8(c, i), SUMS_8(c, i + 8), SUMS_8(c, i + 16), SUMS_8(c, i + 24)
#define NAMES_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64 NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define BEGIN_WGMMA(n, adds, sums, inputs)                                                                              \
    "{.reg .pred p; setp.ne.b32 p," adds ",0;wgmma.mma_async.sync.aligned.m64n" n "k16.f32." MMA_TYPE "." MMA_TYPE \
    "{" sums "}," inputs ",p,1,1,0;}"
#define WGMMA_INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(int(adds))

// c (+)= rows of w times 2 SIZE rows of x, begun; c is as in four products of mma.m16n8k16 for each 32 rows of x.
template <int SIZE>
__device__ __forceinline__ void begin_wgmma(float (&c)[SIZE], const u32 (&a)[4], u64 x, bool adds) {
    static_assert(SIZE == 4 || SIZE == 8 || SIZE == 16 || SIZE == 32 || SIZE == 64);
    if constexpr (SIZE == 4)
        asm volatile(BEGIN_WGMMA("8", "%9", "%0,%1,%2,%3", "{%4,%5,%6,%7},%8")
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : WGMMA_INPUTS);
    else if constexpr (SIZE == 8)
        asm volatile(BEGIN_WGMMA("16", "%13", "%0,%1,%2,%3,%4,%5,%6,%7", "{%8,%9,%10,%11},%12") : SUMS_8(c, 0) : WGMMA_INPUTS);
    else if constexpr (SIZE == 16)
        asm volatile(BEGIN_WGMMA("32", "%21", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "{%16,%17,%18,%19},%20")
                     : SUMS_8(c, 0), SUMS_8(c, 8) : WGMMA_INPUTS);
    else if constexpr (SIZE == 32)
        asm volatile(BEGIN_WGMMA("64", "%37", NAMES_32, "{%32,%33,%34,%35},%36") : SUMS_32(c, 0) : WGMMA_INPUTS);
    else
        asm volatile(BEGIN_WGMMA("128", "%69", NAMES_64, "{%64,%65,%66,%67},%68") : SUMS_32(c, 0), SUMS_32(c, 32) : WGMMA_INPUTS);
}
__device__ __forceinline__ void close_wgmma() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wait_for_wgmma() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// What was written to registers is there for products that follow.
__device__ __forceinline__ void show_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Nothing that the compiler knows of c is true any more.
template <int SIZE>
__device__ __forceinline__ void changed(float (&c)[SIZE]) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
