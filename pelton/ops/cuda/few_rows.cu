// out[m, n] = sum over k of x[m, k] w[n, k], for M <= 8 NT rows of x: bound by reading w once.
//
// A warp multiplies 16 MT rows of w with all rows of x by mma.m16n8k16 (w is its A, x its B), 64 columns at a time. The
// warps of a block take columns in turn; what they summed is added up in a fixed order. Which columns an mma multiplies is
// free, so a lane takes those whose bytes lie together.
//
// K is a multiple of 64, and rows of x begin at multiples of 16 bytes. Defined when compiled, beside what tiles.cuh names:
// NT, MT, WARPS, AHEAD; NORM: rows of x are normalised, x / rms(x) * gain, by each block for itself.
#define COPIES 32
#include "tiles.cuh"

// The columns of x for one piece, as mma wants them.
struct Columns {
    u32 words[NT][4][2];
};

// Those from column 64 block on; zeros for rows that are not there. Rows of x lie `stride` apart.
__device__ __forceinline__ void load(Columns& columns, const u16* x, int stride, int num_rows, int block, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        const bool inside = 8 * n + g < num_rows;
        const u16* row = x + u64(8 * n + g) * stride + 64 * block;
#if GROUP == 16
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            const uint2 v = inside ? *(const uint2*)(row + FOUR_COLUMNS(s, t)) : make_uint2(0, 0);
            columns.words[n][s][0] = v.x, columns.words[n][s][1] = v.y;
        }
#else
#pragma unroll
        for (int h = 0; h < 2; ++h) {  // eight columns together, of two mma
            const uint4 v = inside ? *(const uint4*)(row + FOUR_COLUMNS(2 * h, t)) : make_uint4(0, 0, 0, 0);
            columns.words[n][2 * h][0] = v.x, columns.words[n][2 * h][1] = v.y;
            columns.words[n][2 * h + 1][0] = v.z, columns.words[n][2 * h + 1][1] = v.w;
        }
#endif
    }
}

#if NORM
// x times gain to shared memory [M, K], and the sums of x's squares of each warp: products are divided by rms(x) when
// they are summed, so that nothing waits for it.
__device__ __forceinline__ void bring_scaled(u16* to, float (&squares)[8 * NT][WARPS], const Args& a, int warp, int lane) {
    constexpr int step = 8 * 32 * WARPS, together = 2;  // columns; loads that are under way
    for (int m = 0; m < a.M; ++m) {
        float square = 0.0f;
        for (int begin = 8 * threadIdx.x; begin < a.K; begin += together * step) {
            uint4 v[together];
            float4 gain[together][2];
#pragma unroll
            for (int i = 0; i < together; ++i) {
                const int k = begin + i * step;
                if (k >= a.K) break;
                v[i] = *(const uint4*)(a.x + u64(m) * a.x_stride + k);
                for (int h = 0; h < 2; ++h) gain[i][h] = __ldg((const float4*)(a.gain + k) + h);
            }
#pragma unroll
            for (int i = 0; i < together; ++i) {
                const int k = begin + i * step;
                if (k >= a.K) break;
                u32 pairs[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float4 g = gain[i][j / 2];
                    const float low = to_float(u16(word(v[i], j))), high = to_float(u16(word(v[i], j) >> 16));
                    square += low * low + high * high;
                    pairs[j] = to_pair(low * (j % 2 ? g.z : g.x), high * (j % 2 ? g.w : g.y));
                }
                *(uint4*)(to + m * a.K + k) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            }
        }
        for (int by = 16; by; by /= 2) square += __shfl_xor_sync(~0u, square, by);
        if (lane == 0) squares[m][warp] = square;
    }
    __syncthreads();
}
// 1 / rms(x[m]).
__device__ __forceinline__ float factor_of(const float (&squares)[8 * NT][WARPS], const Args& a, int m) {
    float square = 0.0f;
    for (int w = 0; w < WARPS; ++w) square += squares[m][w];
    return rsqrtf(square / a.K + a.eps);
}
#endif

__device__ __forceinline__ void multiply(Sum (&sums)[MT][NT][4], const Piece (&w)[MT], const Columns& columns,
                                         const u32* table) {
    const u32(&x)[NT][4][2] = columns.words;
#if NUMBERS
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            u32 a[4];
            operand(a, w[i], s, table);
            for (int n = 0; n < NT; ++n) mma(sums[i][n], a, x[n][s]);
        }
#else
    constexpr int per_group = 4 / GROUPS;  // mma of a group
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        // Products begin with what is too much in them, -OFFSET times the sum of x.
        float begin[NT][4] = {};
#if NEEDS_SUM
        const u32 factor = to_pair(OFFSET ? -float(OFFSET) : 1.0f, OFFSET ? -float(OFFSET) : 1.0f);
        const u32 all[4] = {factor, factor, factor, factor};
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int q = 0; q < per_group; ++q) mma(begin[n], all, x[n][group * per_group + q]);
#endif
#pragma unroll
        for (int i = 0; i < MT; ++i) {
            float own[NT][4];
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c) own[n][c] = OFFSET ? begin[n][c] : 0.0f;
#pragma unroll
            for (int q = 0; q < per_group; ++q) {
                const int s = group * per_group + q;
                u32 a[4];
                operand(a, w[i], s, table);
                for (int n = 0; n < NT; ++n) mma(own[n], a, x[n][s]);
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float d = scale_of(w[i], r, group, 0);
                const float m = MIN ? scale_of(w[i], r, group, MIN, OFFSET ? 1.0f / OFFSET : -1.0f) : 0.0f;
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int c = 2 * r; c < 2 * r + 2; ++c) {
                        sums[i][n][c] += d * own[n][c];
                        if (MIN) sums[i][n][c] += m * begin[n][c];
                    }
            }
        }
    }
#endif
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) few_rows(const __grid_constant__ Args a) {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so that the compiler knows it is one for all lanes
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int num_tiles = (a.N + 15) / 16, num_blocks = a.K / 64;
#if GATE
    const int first_tile = blockIdx.x;
    const auto tile_of = [&](int i) { return first_tile + i * num_tiles / 2; };
#else
    const int first_tile = blockIdx.x * MT;
    const auto tile_of = [&](int i) { return min(first_tile + i, num_tiles - 1); };
#endif
    Place places[MT];
#pragma unroll
    for (int i = 0; i < MT; ++i) places[i] = place_of(a, tile_of(i), lane);
    Piece pieces[AHEAD][MT];  // on their way while one is multiplied
    Columns columns_of[AHEAD];
    const auto fetch = [&](int slot, int block) {
#pragma unroll
        for (int i = 0; i < MT; ++i) load(pieces[slot][i], places[i], block);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (warp + i * WARPS < num_blocks) fetch(i, warp + i * WARPS);
    alignas(16) __shared__ u32 table[TABLE_SIZE];
#if LOOKUP
    fill_table(table, a);
    __syncthreads();
#endif
    extern __shared__ uint4 memory[];  // x times gain, then sums
#if NORM
    __shared__ float squares[8 * NT][WARPS];
    u16* x = (u16*)memory;
    const int x_stride = a.K;
    Sum* shared = (Sum*)(x + a.M * a.K);
#else
    const u16* x = a.x;
    const int x_stride = a.x_stride;
    Sum* shared = (Sum*)memory;
#endif
    wait_for_inputs();  // weights never change; x is there from here on
#if NORM
    bring_scaled(x, squares, a, warp, lane);
#endif
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (warp + i * WARPS < num_blocks) load(columns_of[i], x, x_stride, a.M, warp + i * WARPS, lane);

    Sum sums[MT][NT][4] = {};
    for (int block = warp; block < num_blocks; block += AHEAD * WARPS) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int now = block + i * WARPS;
            if (now >= num_blocks) break;
            multiply(sums, pieces[i], columns_of[i], table);
            const int next = now + AHEAD * WARPS;
            if (next < num_blocks) {
                fetch(i, next);
                load(columns_of[i], x, x_stride, a.M, next, lane);
            }
        }
    }

    let_next_begin();  // not before: what waits would take the place of what reads
    prefetch_next(a);
    // Sums of all warps: [warp][row][column of x].
    constexpr int rows = 16 * MT, columns = 8 * NT, padded = columns + 1;
    for (int i = 0; i < MT; ++i)
        for (int n = 0; n < NT; ++n)
            for (int c = 0; c < 4; ++c)
                shared[(warp * rows + 16 * i + g + 8 * (c / 2)) * padded + 8 * n + 2 * t + c % 2] = sums[i][n][c];
    __syncthreads();
#if GATE
    for (int e = threadIdx.x; e < 16 * columns; e += 32 * WARPS) {
        const int row = e % 16, m = e / 16, n = 16 * first_tile + row;
        float gate = 0.0f, up = 0.0f;
        for (int w = 0; w < WARPS; ++w) {
            gate += shared[(w * rows + row) * padded + m];
            up += shared[(w * rows + 16 + row) * padded + m];
        }
#if NORM
        if (m < a.M) gate *= factor_of(squares, a, m), up *= factor_of(squares, a, m);
#endif
        store_gated(a, m, n, gate, up);
    }
#else
    for (int e = threadIdx.x; e < rows * columns; e += 32 * WARPS) {
        const int row = e % rows, m = e / rows;
        Sum y = 0;
        for (int w = 0; w < WARPS; ++w) y += shared[(w * rows + row) * padded + m];
#if NORM
        if (m < a.M) y *= factor_of(squares, a, m);
#endif
        store(a, m, 16 * first_tile + row, y);
    }
#endif
}
