// more_rows.cu where each warp multiplies for itself, by mma.m16n8k16: how x comes to shared memory, and a chunk's product.

#define STRIDE (CHUNK + 32)  // numbers of a row: what eight lanes read together lies in different banks

// Chunks of x in shared memory, [STAGES][ROWS][STRIDE]. A thread brings 16 bytes of some rows of each.
struct Inputs {
    static constexpr int bytes = STAGES * ROWS * STRIDE * 2;
    const Args& a;
    u16* memory;
    const u16* from;  // of the first row
    int end, row, column;

    __device__ Inputs(const Args& a, u16* memory, int end, int warp, int lane)
        : a(a), memory(memory), end(end), row((32 * warp + lane) / (CHUNK / 8)), column(8 * (lane % (CHUNK / 8))) {
        from = a.x + u64(row) * a.x_stride + column;
    }
    __device__ __forceinline__ void fetch_chunk(int chunk, int stage) const {
        if (chunk >= end) return;
        constexpr int step = 32 * WARPS / (CHUNK / 8);  // rows
        const u32 to = shared_address(memory) + 2 * ((stage * ROWS + row) * STRIDE + column);
        const bool inside = CHUNK * chunk + column < a.K;
#pragma unroll
        for (int i = 0; i < (ROWS + step - 1) / step; ++i)
            if (row + i * step < ROWS) {
                const bool is_there = inside && row + i * step < a.M;
                const u16* from_row = from + (is_there ? i * step * a.x_stride + CHUNK * chunk : 0);
                fetch<16>(to + i * step * STRIDE * 2, (const u8*)from_row, is_there);
            }
    }
    // Before the first chunk.
    __device__ __forceinline__ void begin(int first) {
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i) {
            fetch_chunk(first + i, i);
            close_fetch();
        }
    }
    // What has come, to what reads it: the threads themselves.
    __device__ __forceinline__ void show() const {}
    // While a chunk is multiplied; `next`: the stage that is free.
    __device__ __forceinline__ void advance(int chunk, int next) { fetch_chunk(chunk + STAGES - 1, next); }
    __device__ __forceinline__ const u16* of(int chunk, int stage) const { return memory + stage * ROWS * STRIDE; }
};

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
__device__ __forceinline__ void multiply(Sums& sums, const u16* all_x, const u8 (&own_w)[2][MT][32 * PIECE_BYTES],
                                         const u32* table, int lane) {
    constexpr int per_group = STEPS / GROUPS_OF_CHUNK;
    const u16* own_x = all_x + lane / 4 * STRIDE + FOUR_COLUMNS(0, lane % 4);
    Piece w[MT];
    float own[MT][NT][4], x_sums[NT][4];
    const float zeros[4] = {};
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
                    mma(x_sums[n], ones, x[n][e], zeros);
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
                        mma(own[i][n], pairs, x[n][e], zeros);
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
