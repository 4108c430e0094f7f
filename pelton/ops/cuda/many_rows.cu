// out[m, n] = sum over k of x[m, k] w[n, k] on Hopper, for so many rows of x that multiplying takes longer than reading w.
//
// A block has 128 rows of w and ROWS of x. Eight warps open codes in their registers, from where wgmma takes them, while
// those of the 64 columns before are being multiplied. x, which lay_out.cu has put into the order in which wgmma reads it,
// is copied to shared memory by requests of one more warp. PAIR blocks, a cluster, have the same rows of x, of which each
// copies its part to both, as else the L2 cache would be too slow. SPLIT blocks share columns; the last to be done adds up
// what all have, in a fixed order.
//
// Defined when compiled, beside what tiles.cuh names: NT, SPLIT, STAGES (of x in shared memory), ENTRY.
#include "tiles.cuh"
#include "bulk.cuh"
#include "wgmma.cuh"

#define ROWS (8 * NT)
#define CHUNK 128  // columns
constexpr int PAIR = 2, WARPS = 8, OUTS = 16 * WARPS, THREADS = 32 * (WARPS + 4);
constexpr int STAGE_BYTES = 2 * ROWS * CHUNK, LINE = OUTS + 4;  // floats: what lanes store together lies in different banks
constexpr int SIZE = NT < 16 ? 4 * NT : 64;                     // sums of one wgmma
typedef float Sums[4 * NT / SIZE][SIZE];

// Numbers of a row and group are opened in pairs, in half as many instructions; but where too few share a scale, or a
// minimum would be rounded before it is taken, or a scale has more bits than float16 has room for.
#define IN_PAIRS (GROUP != 16 && (ZEROS || !MIN) && (SCALE == 16 || !HALF))
#if IN_PAIRS
struct Opener {
    u32 offset, high, low;  // each twice; a scale is high + low, so that a product is rounded once, all but exactly

    __device__ __forceinline__ Opener(const Piece& p, int r, int group) {
        const float d = scale_of(p, r, group, 0);
        float more = -OFFSET;
#if ZEROS
        more -= stored(p, r, group, 1);
#endif
        offset = to_pair(more, more), high = to_pair(d, d);
        const float rest = d - to_float(u16(high));
        low = to_pair(rest, rest);
    }
    __device__ __forceinline__ u32 open(u32 codes) const {
        if (OFFSET || ZEROS) asm("add.rn." MMA_TYPE "x2 %0, %0, %1;" : "+r"(codes) : "r"(offset));  // exact
        u32 product = 0x80008000u;  // -0
        if (!HALF) asm("mul.rn." MMA_TYPE "x2 %0, %1, %2;" : "=r"(product) : "r"(codes), "r"(low));
        asm("fma.rn." MMA_TYPE "x2 %0, %1, %2, %0;" : "+r"(product) : "r"(codes), "r"(high));
        return product;
    }
};
#endif

// The numbers of 64 columns, for four mma. (Values that are looked up are rounded before they are scaled, too.)
__device__ __forceinline__ void open(u32 (&w)[4][4], const Piece& p, const u32* table) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        operand(w[s], p, s, table);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#if IN_PAIRS
            w[s][j] = Opener(p, j % 2, s / (4 / GROUPS)).open(w[s][j]);
#else
            w[s][j] = opened(p, s, j, to_floats(w[s][j]), OFFSET);
#endif
    }
}

// One warp's work: have this block's part of x copied to the pair, as soon as there is room in both.
__device__ __forceinline__ void bring(const u8* x, int begin, int end, u32 memory, u32 x_there, u32 x_free) {
    const u32 part = blockIdx.x % PAIR * (STAGE_BYTES / PAIR);
#pragma unroll 1
    for (int chunk = begin, stage = 0, phase = 1; chunk < end; ++chunk) {
        wait_for(x_free + 8 * stage, phase);  // which it is in the beginning
        if (threadIdx.x % 32 == 0) {
            expect(x_there + 8 * stage, STAGE_BYTES);
            copy_to_all(memory + stage * STAGE_BYTES + part, x + u64(chunk) * STAGE_BYTES + part, STAGE_BYTES / PAIR,
                        x_there + 8 * stage, (1 << PAIR) - 1);
        }
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
}

// What a thread has summed, to shared memory [ROWS][LINE].
__device__ __forceinline__ void leave(Sums& sums, float* memory, int warp, int lane) {
#pragma unroll
    for (int i = 0; i < 4 * NT / SIZE; ++i) {
        changed(sums[i]);
#pragma unroll
        for (int e = 0; e < SIZE; ++e) {
            const int row = (SIZE / 4 * i + e / 4) * 8 + 2 * (lane % 4) + e % 2;
            memory[row * LINE + 16 * warp + lane / 4 + e / 2 % 2 * 8] = sums[i][e];
        }
    }
}

// Where a part of a tile's sums lies in memory, [ROWS][OUTS].
__device__ __forceinline__ float* part_of(const Args& a, int i) {
    return a.partial + u64(blockIdx.x * SPLIT + i) * (ROWS * OUTS);
}

// Eight sums of a row: of what this block has, and of others that share its columns.
__device__ __forceinline__ void add_up(float (&y)[8], const Args& a, const float* sums, int row, int column) {
#pragma unroll
    for (int i = 0; i < SPLIT; ++i)
#pragma unroll
        for (int e = 0; e < 8; e += 4) {
            float4 v = *(const float4*)(sums + row * LINE + column + e);
            if (i != blockIdx.y) v = __ldcg((const float4*)(part_of(a, i) + row * OUTS + column + e));
            y[e] += v.x, y[e + 1] += v.y, y[e + 2] += v.z, y[e + 3] += v.w;
        }
}

// Leave this block's sums where others find them.
__device__ __forceinline__ void store_part(const Args& a, const float* sums) {
    float* own = part_of(a, blockIdx.y);
#pragma unroll 8
    for (int i = 0; i < ROWS / WARPS; ++i) {
        const int row = i * WARPS + threadIdx.x / 32, column = threadIdx.x % 32 * 4;
        __stcg((float4*)(own + row * OUTS + column), *(const float4*)(sums + row * LINE + column));
    }
}

template <class Number>
__device__ __forceinline__ void store_eight(Number* to, const float (&y)[8], bool accumulate) {
    alignas(16) Number numbers[8];
#pragma unroll
    for (int i = 0; i < 8 * sizeof(Number) / 16; ++i) ((uint4*)numbers)[i] = accumulate ? ((uint4*)to)[i] : uint4{};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        if constexpr (sizeof(Number) == 4)
            numbers[e] += y[e];
        else
            numbers[e] = u16(to_pair(y[e] + (accumulate ? to_float(numbers[e]) : 0.0f), 0.0f));
    }
#pragma unroll
    for (int i = 0; i < 8 * sizeof(Number) / 16; ++i) ((uint4*)to)[i] = ((uint4*)numbers)[i];
}

// The output of a tile, or of both halves' tiles.
__device__ __forceinline__ void store_all(const Args& a, const float* sums, int down, int across) {
    constexpr int width = GATE ? OUTS / 2 : OUTS, threads = width / 8;  // of a row
    const int column = threadIdx.x % threads * 8, n = across * width + column, num_out = GATE ? a.N / 2 : a.N;
    if (n >= num_out) return;
    float bias[1 + (GATE > 0)][8];
#pragma unroll
    for (int i = 0; i < 1 + (GATE > 0); ++i)
#pragma unroll
        for (int e = 0; e < 8; ++e) bias[i][e] = a.bias ? to_float(a.bias[i * num_out + n + e]) : 0.0f;
#pragma unroll 4
    for (int row = threadIdx.x / threads; row < ROWS; row += 32 * WARPS / threads) {
        float y[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) y[e] = bias[0][e];
        add_up(y, a, sums, row, column);
#if GATE
        float up[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) up[e] = bias[1][e];
        add_up(up, a, sums, row, column + width);
#pragma unroll
        for (int e = 0; e < 8; ++e) y[e] = gated(y[e], up[e]);
#endif
        const u64 to = u64(down * ROWS + row) * a.out_stride + n;
        if (down * ROWS + row >= a.M) continue;
#if OUT32
        store_eight((float*)a.out + to, y, a.accumulate);
#else
        store_eight((u16*)a.out + to, y, a.accumulate);
#endif
    }
}

extern "C" __global__ void __cluster_dims__(PAIR, 1, 1) __launch_bounds__(THREADS, 1)
    many_rows(const __grid_constant__ Args a) {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int num_down = (a.M + ROWS - 1) / ROWS, down = blockIdx.x / PAIR % num_down;
    const int across = blockIdx.x / PAIR / num_down * PAIR + blockIdx.x % PAIR;
    const int last_block = a.K / 64 - 1, num_chunks = (a.K + 127) / 128;
    const int begin = num_chunks * int(blockIdx.y) / SPLIT, end = num_chunks * int(blockIdx.y + 1) / SPLIT;
    extern __shared__ uint4 memory[];  // [STAGES] of x; then sums [ROWS][LINE]
    __shared__ u64 barriers[2 * STAGES];
    alignas(16) __shared__ u32 table[TABLE_SIZE];
    const u32 x_there = shared_address(barriers), x_free = x_there + 8 * STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) set_up(x_there + 8 * i), set_up(x_free + 8 * i, WARPS * PAIR);
        close_set_up();
    }
#if LOOKUP
    if (warp < WARPS) fill_table<32 * WARPS>(table, [&](u32 code) { return __ldg(a.values + code); });
#endif
    __syncthreads();
    arrive_at_cluster();
    if (warp >= WARPS) {  // registers are given by four warps
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        wait_for_cluster();
        wait_for_inputs();  // weights never change; x is there from here on
        const u8* x = (const u8*)a.x + u64(down) * num_chunks * STAGE_BYTES;
        if (warp == WARPS) bring(x, begin, end, shared_address(memory), x_there, x_free);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");

    // A tile of 16 rows for each warp; with a gate, four are of either half.
    constexpr int each = GATE ? WARPS / 2 : WARPS;
    const int num_tiles = (a.N + 15) / 16 / (WARPS / each);
    const Place place = place_of(a, warp / each * num_tiles + min(each * across + warp % each, num_tiles - 1), lane);
    Piece pieces[2];
    u32 w[2][4][4];
    Sums sums = {};
    load(pieces[0], place, 2 * begin);
    load(pieces[1], place, min(2 * begin + 1, last_block));  // where there is no second half x is zero
    open(w[0], pieces[0], table);
    load(pieces[0], place, min(2 * begin + 2, last_block));
    wait_for_cluster();
    for (int chunk = begin, stage = 0, phase = 0; chunk < end; ++chunk) {
        wait_for(x_there + 8 * stage, phase);
        const u64 x = describe_x((const u16*)memory + stage * (STAGE_BYTES / 2));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            show_registers();
#pragma unroll
            for (int s = 0; s < 4; ++s)
#pragma unroll
                for (int i = 0; i < 4 * NT / SIZE; ++i)
                    begin_wgmma(sums[i], w[half][s], x + (4 * half + s) * NEXT_X + i * (16 * 128 >> 4), true);
            close_wgmma();
            wait_for_wgmma<1>();  // for those before
            if (half == 0 && chunk > begin && chunk + STAGES <= end && lane < PAIR)
                arrive_there(address_in(lane, x_free + 8 * (stage ? stage - 1 : STAGES - 1)));
            open(w[half ^ 1], pieces[half ^ 1], table);
            load(pieces[half ^ 1], place, min(2 * chunk + half + 3, last_block));
        }
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    wait_for_wgmma<0>();
    arrive_at_cluster();
    let_next_begin();
    wait_for_inputs();              // what others write is not overwritten before they are complete, nor added to
    wait_for_team<32 * WARPS>(0);  // nobody needs x any more
    leave(sums, (float*)memory, warp, lane);
    wait_for_team<32 * WARPS>(0);
    wait_for_cluster();  // the pair has all that this block had copied to both
    if (SPLIT > 1) {
        store_part(a, (const float*)memory);
        if (!is_last_block<32 * WARPS>(a, threadIdx.x, SPLIT)) return;
    }
    store_all(a, (const float*)memory, down, across);
}
