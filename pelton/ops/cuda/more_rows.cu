// out[m, n] = sum over k of x[m, k] w[n, k], for M <= 8 NT rows of x, of which there are so many that reading them costs
// more than reading w.
//
// As few_rows.cu, but the warps of a block have rows of w of their own, 16 MT each, and share x. 128 columns of x and w
// at a time lie in shared memory, and more are on their way. SPLIT blocks share the columns; their sums are added up in
// a fixed order. Defined when compiled, beside what tiles.cuh names: NT, MT, WARPS, SPLIT, STAGES, BLOCKS (of a
// multiprocessor).
#define COPIES 8
#include "tiles.cuh"

#define CHUNK 128            // columns
#define STRIDE (CHUNK + 32)  // numbers: what eight lanes read together lies in different banks
#define STEPS (CHUNK / 16)   // mma of a chunk
#define GROUPS_OF_CHUNK (GROUP % CHUNK == 0 ? 1 : 2 * GROUPS)
#define ROWS (8 * NT)

// A chunk: what the warps of a block share, and what each has of its own.
struct Stage {
    u16 x[ROWS * STRIDE];
    u8 w[WARPS][2][MT][32 * PIECE_BYTES];  // two halves; each part of a piece for all lanes lies together
};

__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// Bring bytes to shared memory without waiting; zeros if they are not there.
template <int bytes>
__device__ __forceinline__ void fetch(u32 to, const u8* from, bool is_there = true) {
    if constexpr (bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16 : 0));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(bytes));
}
__device__ __forceinline__ void close_fetch() { asm volatile("cp.async.commit_group;"); }
template <int pending>
__device__ __forceinline__ void wait_for_fetch() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
constexpr int unit_of(int bytes) { return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : 4; }

// What a thread brings of each chunk of x: 16 bytes of some rows.
struct Courier {
    const u16* from;  // of the first row
    u32 to;           // within a stage
    int row, column;
};
__device__ __forceinline__ Courier courier(const Args& a) {
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

__device__ __forceinline__ void fetch_w(const u8* to, const Place& place, int block, int lane) {
    Piece p;
    u32 at = shared_address(to);
    each_part(p, place, block, [&](auto& part, const u8* from) {
        constexpr int unit = unit_of(sizeof(part));
#pragma unroll
        for (int i = 0; i < sizeof(part) / unit; ++i, at += 32 * unit) fetch<unit>(at + unit * lane, from + unit * i);
    });
}

__device__ __forceinline__ void read_w(Piece& p, const u8* from, int lane) {
    each_part(p, Place(), 0, [&](auto& part, const u8*) {
        constexpr int unit = unit_of(sizeof(part));
#pragma unroll
        for (int i = 0; i < sizeof(part) / unit; ++i, from += 32 * unit) {
            if constexpr (unit == 16)
                ((uint4*)&part)[i] = ((const uint4*)from)[lane];
            else if constexpr (unit == 8)
                ((uint2*)&part)[i] = ((const uint2*)from)[lane];
            else
                ((u32*)&part)[i] = ((const u32*)from)[lane];
        }
    });
}

// The numbers u - ZERO, exact, for BASE + u.
__device__ __forceinline__ u32 without_offset(u32 pair) {
#if NUMBERS
    return pair;
#else
    if (!OFFSET) return pair;
    const u32 offset = to_pair(-float(OFFSET), -float(OFFSET)), one = to_pair(1.0f, 1.0f);
    u32 r;
    asm("fma.rn." MMA_TYPE "x2 %0, %1, %2, %3;" : "=r"(r) : "r"(pair), "r"(one), "r"(offset));
    return r;
#endif
}

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

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) more_rows(const __grid_constant__ Args a) {
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
    Stage* stages = (Stage*)memory;
    alignas(16) __shared__ u32 table[TABLE_SIZE];
#if LOOKUP
    fill_table<32 * WARPS>(table, a.values);
#endif
    Place places[MT];
#pragma unroll
    for (int i = 0; i < MT; ++i) places[i] = place_of(a, tile_of(i), lane);
    const Courier own_x = courier(a);
    const auto fetch_own = [&](const Stage& stage, int chunk) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < MT; ++i)  // where there is no second half x is zero
                fetch_w(stage.w[warp][half][i], places[i], min(2 * chunk + half, num_blocks - 1), lane);
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i)
        if (begin + i < end) fetch_own(stages[i], begin + i);
    wait_for_inputs();  // weights never change; x is there from here on
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (begin + i < end) fetch_x(stages[i], a, own_x, begin + i);
        close_fetch();
    }

    float sums[MT][NT][4] = {};
    int at = 0, next = STAGES - 1;
    for (int chunk = begin; chunk < end; ++chunk) {
        wait_for_fetch<STAGES - 2>();  // this chunk is there,
        __syncthreads();               // and nobody needs the one before any more
        if (chunk + STAGES - 1 < end) {
            fetch_own(stages[next], chunk + STAGES - 1);
            fetch_x(stages[next], a, own_x, chunk + STAGES - 1);
        }
        close_fetch();
        multiply(sums, stages[at], stages[at].w[warp], table, lane);
        at = at + 1 == STAGES ? 0 : at + 1, next = next + 1 == STAGES ? 0 : next + 1;
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
