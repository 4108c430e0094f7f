// more_rows.cu where four warps multiply together, by wgmma.m64nNk16: how x lies in shared memory, and a chunk's product.
// A warp's rows of w are in its registers, as mma.m16n8k16 wants them. x is read from shared memory, where it lies in
// matrices of 8 rows and 8 columns, 128 bytes each: [two of each mma][NT]. Their columns are the lanes' (FOUR_COLUMNS).

// What a lane brings of each chunk of x: two columns of some matrices, of one row or (with few warps) of two.
#define OWN_ROWS (NT > WARPS ? NT / WARPS : 1)
struct Courier {
    const u16* from[OWN_ROWS];
    u32 to;  // within a stage
};
// The first of the lane's two columns of a matrix.
__device__ __forceinline__ int column_of(int half, int t) {
    return 64 * (half / 8) + FOUR_COLUMNS(half / 2 % 4, t) + 2 * (half % 2);
}
__device__ __forceinline__ Courier courier(const Args& a, int warp, int lane) {
    Courier own;
    for (int i = 0; i < OWN_ROWS; ++i) {
        const int row = min(8 * (warp % NT + i * WARPS) + lane / 4, a.M - 1);  // what is none changes its own sums only
        own.from[i] = a.x + u64(row) * a.x_stride + column_of(warp / NT, lane % 4);
    }
    own.to = 128 * warp + 4 * lane;
    return own;
}
__device__ __forceinline__ void fetch_x(const Stage& stage, const Args& a, const Courier& own, int chunk) {
    const u32 to = shared_address(stage.x) + own.to;
    const bool has_both = CHUNK * chunk + 64 < a.K;
#pragma unroll
    for (int i = 0; i < 2 * STEPS * NT / WARPS; ++i) {
        const int half = i * WARPS / NT;  // beside the lane's first
        const u16* from = own.from[i % OWN_ROWS] + CHUNK * chunk;  // of what is not there nothing is read
        fetch<4>(to + 128 * i * WARPS, (const u8*)(from + column_of(half, 0)), half < 8 || has_both);
    }
}
// To what reads x past the threads.
__device__ __forceinline__ void show_fetched() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Where mma 0 finds x: an address, the distance of matrices beside each other, and of those one below the other.
__device__ __forceinline__ u64 describe_x(const Stage& stage) {
    return u64(shared_address(stage.x) >> 4) | u64(NT * 128 >> 4) << 16 | u64(128 >> 4) << 32;
}
// From one mma to the next.
#define NEXT_X (2 * NT * 128 >> 4)

#define SUMS_8(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define BEGIN_WGMMA(n, adds, sums, inputs)                                                                              \
    "{.reg .pred p; setp.ne.b32 p," adds ",0;wgmma.mma_async.sync.aligned.m64n" n "k16.f32." MMA_TYPE "." MMA_TYPE \
    "{" sums "}," inputs ",p,1,1,0;}"
#define WGMMA_INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(int(adds))

// c (+)= rows of w times x, begun; c is as in four products of mma.m16n8k16 for each 32 rows of x.
__device__ __forceinline__ void begin_wgmma(float (&c)[4 * NT], const u32 (&a)[4], u64 x, bool adds) {
#if NT == 1
    asm volatile(BEGIN_WGMMA("8", "%9", "%0,%1,%2,%3", "{%4,%5,%6,%7},%8")
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : WGMMA_INPUTS);
#elif NT == 2
    asm volatile(BEGIN_WGMMA("16", "%13", "%0,%1,%2,%3,%4,%5,%6,%7", "{%8,%9,%10,%11},%12")
                 : SUMS_8(c, 0) : WGMMA_INPUTS);
#elif NT == 4
    asm volatile(BEGIN_WGMMA("32", "%21", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "{%16,%17,%18,%19},%20")
                 : SUMS_8(c, 0), SUMS_8(c, 8) : WGMMA_INPUTS);
#else
    asm volatile(BEGIN_WGMMA("64", "%37", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,"
                       "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31", "{%32,%33,%34,%35},%36")
                 : SUMS_8(c, 0), SUMS_8(c, 8), SUMS_8(c, 16), SUMS_8(c, 24) : WGMMA_INPUTS);
#endif
}
__device__ __forceinline__ void close_wgmma() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wait_for_wgmma() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// What was written to registers is there for products that follow.
__device__ __forceinline__ void show_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Nothing that the compiler knows of c is true any more.
__device__ __forceinline__ void changed(float (&c)[4 * NT]) {
#pragma unroll
    for (int i = 0; i < 4 * NT; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// Multiply a chunk with the tiles of a warp: 64 columns at most for each tile, while the next are being opened.
__device__ __forceinline__ void multiply(float (&sums)[MT][NT][4], const Stage& stage, const u8 (&own_w)[2][MT][32 * PIECE_BYTES],
                                         const u32* table, int lane) {
    constexpr int per_group = STEPS / GROUPS_OF_CHUNK, each = per_group < 4 ? per_group : 4, parts = per_group / each;
    constexpr int units = MT * GROUPS_OF_CHUNK * parts;  // [group][tile][part of the group]
    const u64 all_x = describe_x(stage);
    Piece w[MT];
    u32 a[2][each][4];
    float own[2][4 * NT], x_sums[2][4 * NT], scales[2][2], minima[2][2];
    (void)x_sums, (void)minima;
#pragma unroll
    for (int unit = 0; unit <= units; ++unit) {
        if (unit < units) {
            const int group = unit / parts / MT, i = unit / parts % MT, part = unit % parts, slot = unit / parts % 2;
            const int first = group * per_group + part * each;
#pragma unroll
            for (int q = 0; q < each; ++q) {
                const int s = first + q;
                if (s % 4 == 0) read_w(w[i], own_w[s / 4][i], lane);
                operand(a[unit % 2][q], w[i], s % 4, table);
#pragma unroll
                for (int j = 0; j < 4; ++j) a[unit % 2][q][j] = without_offset(a[unit % 2][q][j]);
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#if NUMBERS
                scales[slot][r] = 1.0f;
#else
                scales[slot][r] = scale_of(w[i], r, group % GROUPS, 0);
                if (MIN) minima[slot][r] = scale_of(w[i], r, group % GROUPS, MIN);
#endif
            }
            show_registers();
#if MIN
            const u32 one = to_pair(-1.0f, -1.0f), ones[4] = {one, one, one, one};
            if (i == 0)
#pragma unroll
                for (int q = 0; q < each; ++q)
                    begin_wgmma(x_sums[group % 2], ones, all_x + (first + q) * NEXT_X, part > 0 || q > 0);
#endif
#pragma unroll
            for (int q = 0; q < each; ++q)
                begin_wgmma(own[slot], a[unit % 2][q], all_x + (first + q) * NEXT_X, part > 0 || q > 0);
            close_wgmma();
        }
        if (unit > 0) {
            const int before = (unit - 1) / parts, group = before / MT, i = before % MT, slot = before % 2;
            if (unit < units)
                wait_for_wgmma<1>();
            else
                wait_for_wgmma<0>();
            if (unit % parts) continue;  // the group's sums are not complete
            changed(own[slot]);
#if MIN
            if (i == 0) changed(x_sums[group % 2]);
#endif
#pragma unroll
            for (int e = 0; e < 4 * NT; ++e) {
                float& sum = sums[i][e / 4][e % 4];
                sum += scales[slot][e / 2 % 2] * own[slot][e];
                if (MIN) sum += minima[slot][e / 2 % 2] * x_sums[group % 2][e];
            }
        }
    }
}
