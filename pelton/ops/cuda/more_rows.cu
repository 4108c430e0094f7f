// out[m, n] = sum over k of x[m, k] w[n, k], for M <= 8 NT rows of x, of which there are so many that reading them costs
// more than reading w.
//
// As few_rows.cu, but the warps of a block have rows of w of their own, 16 MT each, and share x: 128 columns of it at a
// time lie in shared memory, and some more are on their way. SPLIT blocks share the columns; their sums are added up in
// a fixed order.
#include "tiles.cuh"

#define CHUNK 128                // columns
#define STAGES 4                 // chunks of x: one that is multiplied, the next, and two on their way
#define STRIDE (CHUNK + 32)      // numbers: what eight lanes read together lies in different banks
#define STEPS (CHUNK / 16)       // mma of a chunk
#define GROUPS_OF_CHUNK (GROUP % CHUNK == 0 ? 1 : 2 * GROUPS)
#define ROWS (8 * NT)

// What the warps of a block share.
struct Shared {
    u16 x[STAGES][ROWS * STRIDE];
    float sums[2][GROUPS_OF_CHUNK][ROWS];  // of x for this chunk and the next, times what is too much in codes
};

// Chunk `chunk` of x to a stage, without waiting; zeros where there is none.
__device__ __forceinline__ void fetch_x(Shared& shared, const Args& a, int stage, int chunk) {
    for (int e = threadIdx.x; e < ROWS * (CHUNK / 8); e += 32 * WARPS) {
        const int m = e / (CHUNK / 8), column = 8 * (e % (CHUNK / 8)), k = CHUNK * chunk + column;
        const bool inside = m < a.M && k < a.K;
        const u32 to = u32(__cvta_generic_to_shared(&shared.x[stage][m * STRIDE + column]));
        const u16* from = inside ? a.x + u64(m) * a.x_stride + k : a.x;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0));
    }
}
__device__ __forceinline__ void close_fetch() { asm volatile("cp.async.commit_group;"); }
template <int pending>
__device__ __forceinline__ void wait_for_fetch() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// The columns of x that a lane has of mma s and s + 1, of rows 8 n ..
__device__ __forceinline__ void load_x(u32 (&x)[2][2], const u16* stage, int n, int s, int lane) {
    const u16* row = stage + (8 * n + lane / 4) * STRIDE + 64 * (s / 4);
#if GROUP == 16
    for (int e = 0; e < 2; ++e) {
        const uint2 v = *(const uint2*)(row + FOUR_COLUMNS(s % 4 + e, lane % 4));
        x[e][0] = v.x, x[e][1] = v.y;
    }
#else
    const uint4 v = *(const uint4*)(row + FOUR_COLUMNS(s % 4, lane % 4));
    x[0][0] = v.x, x[0][1] = v.y, x[1][0] = v.z, x[1][1] = v.w;
#endif
}

#if NEEDS_SUM
// The sums of x over each group of a chunk, by its stage: a warp has some rows.
__device__ __forceinline__ void sum_x(Shared& shared, int stage, int to, int warp, int lane) {
    const float factor = OFFSET ? -float(OFFSET) : 1.0f;
    const u32 pair = to_pair(factor, factor);
    const u32 all[4] = {pair, pair, pair, pair};
    for (int n = warp; n < NT; n += WARPS) {
        float sum[GROUPS_OF_CHUNK][4] = {};
#pragma unroll
        for (int s = 0; s < STEPS; s += 2) {
            u32 x[2][2];
            load_x(x, shared.x[stage], n, s, lane);
#pragma unroll
            for (int e = 0; e < 2; ++e) mma(sum[(s + e) * GROUPS_OF_CHUNK / STEPS], all, x[e]);
        }
        if (lane < 4)
#pragma unroll
            for (int i = 0; i < GROUPS_OF_CHUNK; ++i)
                *(float2*)&shared.sums[to][i][8 * n + 2 * lane] = make_float2(sum[i][0], sum[i][1]);
    }
}
#endif

// Multiply a chunk: w of MT tiles and its two halves.
__device__ __forceinline__ void multiply(float (&sums)[MT][NT][4], const Piece (&w)[2][MT], const u16* stage,
                                         const float (&x_sums)[GROUPS_OF_CHUNK][ROWS], const u32* table, int lane) {
    constexpr int per_group = STEPS / GROUPS_OF_CHUNK;
    float own[MT][NT][4];
    (void)own, (void)x_sums, (void)per_group;
#pragma unroll
    for (int s = 0; s < STEPS; s += 2) {
        u32 x[NT][2][2];
#pragma unroll
        for (int n = 0; n < NT; ++n) load_x(x[n], stage, n, s, lane);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int half = (s + e) / 4, group = (s + e) / per_group;
#pragma unroll
            for (int i = 0; i < MT; ++i) {
                u32 a[4];
                operand(a, w[half][i], (s + e) % 4, table);
#pragma unroll
                for (int n = 0; n < NT; ++n) {
#if NUMBERS
                    mma(sums[i][n], a, x[n][e]);
#else
                    if ((s + e) % per_group)
                        mma(own[i][n], a, x[n][e]);
                    else if (OFFSET)  // products begin with what is too much in them, -OFFSET times the sum of x
                        mma(own[i][n], a, x[n][e], *(const float2*)&x_sums[group][8 * n + 2 * (lane % 4)]);
                    else
                        mma(own[i][n], a, x[n][e], make_float2(0.0f, 0.0f));
#endif
                }
#if !NUMBERS
                if ((s + e) % per_group == per_group - 1)  // the group is complete
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const float d = scale_of(w[half][i], r, group % GROUPS, 0);
                        const float m = MIN ? scale_of(w[half][i], r, group % GROUPS, MIN, OFFSET ? 1.0f / OFFSET : -1.0f) : 0.0f;
#pragma unroll
                        for (int n = 0; n < NT; ++n)
#pragma unroll
                            for (int c = 2 * r; c < 2 * r + 2; ++c) {
                                sums[i][n][c] += d * own[i][n][c];
                                if (MIN) sums[i][n][c] += m * x_sums[group][8 * n + 2 * (lane % 4) + c % 2];
                            }
                    }
#endif
            }
        }
    }
}

// What a warp has summed, to the output.
__device__ __forceinline__ void store_all(const Args& a, const float (&sums)[MT][NT][4], int first_tile, int lane) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int m = 8 * n + 2 * (lane % 4) + c % 2, row = lane / 4 + 8 * (c / 2);
#if GATE
                if (i == 0) store_gated(a, m, 16 * first_tile + row, sums[0][n][c], sums[MT - 1][n][c]);
#else
                store(a, m, 16 * (first_tile + i) + row, sums[i][n][c]);
#endif
            }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) more_rows(const __grid_constant__ Args a) {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int num_tiles = (a.N + 15) / 16, num_blocks = a.K / 64, num_chunks = (num_blocks + 1) / 2;
    const int begin = num_chunks * blockIdx.y / SPLIT, end = num_chunks * (blockIdx.y + 1) / SPLIT;
#if GATE
    const int first_tile = blockIdx.x * WARPS + warp;
    const auto tile_of = [&](int i) { return min(first_tile, num_tiles / 2 - 1) + i * num_tiles / 2; };
#else
    const int first_tile = (blockIdx.x * WARPS + warp) * MT;
    const auto tile_of = [&](int i) { return min(first_tile + i, num_tiles - 1); };
#endif
    extern __shared__ uint4 memory[];
    Shared& shared = *(Shared*)memory;
    __shared__ u32 table[16];
#if LOOKUP
    if (threadIdx.x < 16) table[threadIdx.x] = to_pair(a.values[threadIdx.x], 0.0f);
#endif
    Piece pieces[AHEAD][2][MT];  // on their way while one is multiplied
    const auto fetch = [&](int slot, int chunk) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < MT; ++i)  // where there is no second half x is zero
                load(pieces[slot][half][i], a, tile_of(i), min(2 * chunk + half, num_blocks - 1), lane);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (begin + i < end) fetch(i, begin + i);
    wait_for_inputs();  // weights never change; x is there from here on
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (begin + i < end) fetch_x(shared, a, i, begin + i);
        close_fetch();
    }
#if NEEDS_SUM
    wait_for_fetch<STAGES - 2>();
    __syncthreads();
    sum_x(shared, 0, 0, warp, lane);
#endif

    float sums[MT][NT][4] = {};
    for (int chunk = begin; chunk < end; chunk += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int now = chunk + i, at = now - begin;
            if (now >= end) break;
            wait_for_fetch<STAGES - 3>();  // this chunk and the next are there,
            __syncthreads();               // and nobody needs the one before any more
            if (now + STAGES - 1 < end) fetch_x(shared, a, (at + STAGES - 1) % STAGES, now + STAGES - 1);
            close_fetch();
#if NEEDS_SUM
            if (now + 1 < end) sum_x(shared, (at + 1) % STAGES, (at + 1) % 2, warp, lane);
#endif
            multiply(sums, pieces[i], shared.x[at % STAGES], shared.sums[at % 2], table, lane);
            if (now + AHEAD < end) fetch(i, now + AHEAD);
        }
    }

    let_next_begin();
    prefetch_next(a);
    if (SPLIT == 1) {
        store_all(a, sums, first_tile, lane);
        return;
    }
    constexpr int each = MT * NT * 4, threads = 32 * WARPS;
    float* partial = a.partial + u64(blockIdx.x) * SPLIT * each * threads + threadIdx.x;  // [SPLIT][each][threads]
#pragma unroll
    for (int e = 0; e < each; ++e) partial[(blockIdx.y * each + e) * threads] = sums[e / (4 * NT)][e / 4 % NT][e % 4];
    __shared__ u32 is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(a.arrived + blockIdx.x, 1) == SPLIT - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
#pragma unroll
    for (int e = 0; e < each; ++e) {
        float y = 0.0f;
        for (int p = 0; p < SPLIT; ++p) y += __ldcg(partial + (p * each + e) * threads);
        sums[e / (4 * NT)][e / 4 % NT][e % 4] = y;
    }
    store_all(a, sums, first_tile, lane);
    if (threadIdx.x == 0) a.arrived[blockIdx.x] = 0;
}
