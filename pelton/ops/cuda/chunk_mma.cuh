// more_rows.cu where each warp multiplies for itself, by mma.m16n8k16: how x lies in shared memory, and a chunk's product.
// Rows are STRIDE numbers apart, so that what eight lanes read together lies in different banks.

// What a thread brings of each chunk of x: 16 bytes of some rows.
struct Courier {
    const u16* from;  // of the first row
    u32 to;           // within a stage
    int row, column;
};
__device__ __forceinline__ Courier courier(const Args& a, int warp, int lane) {
    const int row = threadIdx.x / (CHUNK / 8), column = 8 * (threadIdx.x % (CHUNK / 8));
    return {a.x + u64(row) * a.x_stride + column, u32(2 * (row * STRIDE + column)), row, column};
}
__device__ __forceinline__ void fetch_x(const Stage& stage, const Args& a, const Courier& own, int chunk) {
    constexpr int step = 32 * WARPS / (CHUNK / 8);  // rows
    const u32 to = shared_address(stage.x) + own.to;
    const bool inside = CHUNK * chunk + own.column < a.K;
#pragma unroll
    for (int i = 0; i < (ROWS + step - 1) / step; ++i)
        if (own.row + i * step < ROWS) {
            const bool is_there = inside && own.row + i * step < a.M;
            const u16* from = own.from + (is_there ? i * step * a.x_stride + CHUNK * chunk : 0);
            fetch<16>(to + i * step * STRIDE * 2, (const u8*)from, is_there);
        }
}

__device__ __forceinline__ void show_fetched() {}  // to what reads x: the threads themselves

// Where a lane's columns of a chunk's first row begin.
__device__ __forceinline__ const u16* own_columns(const Stage& stage, int lane) {
    return stage.x + lane / 4 * STRIDE + FOUR_COLUMNS(0, lane % 4);
}
// Those of mma s and s + 1, of rows 8 n ..
__device__ __forceinline__ void load_x(u32 (&x)[2][2], const u16* own, int n, int s) {
    const u16* from = own + 8 * n * STRIDE + 64 * (s / 4) + FOUR_COLUMNS(s % 4, 0);
#if GROUP == 16
    for (int e = 0; e < 2; ++e) {
        const uint2 v = *(const uint2*)(from + FOUR_COLUMNS(e, 0));
        x[e][0] = v.x, x[e][1] = v.y;
    }
#else
    const uint4 v = *(const uint4*)from;
    x[0][0] = v.x, x[0][1] = v.y, x[1][0] = v.z, x[1][1] = v.w;
#endif
}

// Multiply a chunk with the tiles of a warp.
__device__ __forceinline__ void multiply(float (&sums)[MT][NT][4], const Stage& stage, const u8 (&own_w)[2][MT][32 * PIECE_BYTES],
                                         const u32* table, int lane) {
    constexpr int per_group = STEPS / GROUPS_OF_CHUNK;
    const u16* own_x = own_columns(stage, lane);
    Piece w[MT];
    float own[MT][NT][4], x_sums[NT][4];
    (void)own, (void)x_sums, (void)per_group;
#pragma unroll
    for (int s = 0; s < STEPS; s += 2) {
        u32 x[NT][2][2];
#pragma unroll
        for (int n = 0; n < NT; ++n) load_x(x[n], own_x, n, s);
        if (s % 4 == 0)
#pragma unroll
            for (int i = 0; i < MT; ++i) read_w(w[i], own_w[s / 4][i], lane);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int group = (s + e) / per_group;
            const bool begins = (s + e) % per_group == 0, ends = (s + e) % per_group == per_group - 1;
            (void)group, (void)begins, (void)ends;
#if MIN
            const u32 one = to_pair(-1.0f, -1.0f), ones[4] = {one, one, one, one};
#pragma unroll
            for (int n = 0; n < NT; ++n)
                if (begins)
                    mma(x_sums[n], ones, x[n][e], make_float2(0.0f, 0.0f));
                else
                    mma(x_sums[n], ones, x[n][e]);
#endif
#pragma unroll
            for (int i = 0; i < MT; ++i) {
                u32 pairs[4];
                operand(pairs, w[i], (s + e) % 4, table);
#pragma unroll
                for (int j = 0; j < 4; ++j) pairs[j] = without_offset(pairs[j]);
#pragma unroll
                for (int n = 0; n < NT; ++n)
                    if (NUMBERS)
                        mma(sums[i][n], pairs, x[n][e]);
                    else if (begins)
                        mma(own[i][n], pairs, x[n][e], make_float2(0.0f, 0.0f));
                    else
                        mma(own[i][n], pairs, x[n][e]);
#if !NUMBERS
                if (ends)
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const float d = scale_of(w[i], r, group % GROUPS, 0);
                        const float m = MIN ? scale_of(w[i], r, group % GROUPS, MIN) : 0.0f;
#pragma unroll
                        for (int n = 0; n < NT; ++n)
#pragma unroll
                            for (int c = 2 * r; c < 2 * r + 2; ++c) {
                                sums[i][n][c] += d * own[i][n][c];
                                if (MIN) sums[i][n][c] += m * x_sums[n][c];
                            }
                    }
#endif
            }
        }
    }
}
