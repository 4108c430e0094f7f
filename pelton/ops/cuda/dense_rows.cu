// out[m, n] = sum over k of x[m, k] w[n, k], for M <= 8 rows of x and w of numbers: bound by reading w once. From compute
// capability 9.0 on.
//
// Every multiprocessor has one block, which takes its share of w from the first byte to the last without a pause: a warp
// copies its columns of 16 rows of w into shared memory, CHUNK at a time and STAGES ahead, those of the next rows too while
// all warps of its team add up what they have of these. The first copies are on their way before x is there.
//
// Defined when compiled, beside what tiles.cuh names: WARPS, PARTS (warps of a team, which share the columns), CHUNK (a
// multiple of 64), STAGES, CHAINS (of products, so that none waits for the one before).
#include "tiles.cuh"
#include "bulk.cuh"

constexpr int MT = GATE ? 2 : 1, THREADS = 32 * WARPS, TEAMS = WARPS / PARTS;
static_assert(WARPS % PARTS == 0 && (PARTS > 1 || !GATE));
// Rows lie in shared memory with 16 bytes between them, so that eight of them are in different banks.
constexpr int LINE = 2 * CHUNK + 16, STAGE_BYTES = 16 * LINE;

__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
}

// What a warp copies: its columns of tiles of 16 rows, with a gate of two tiles each.
struct Copies {
    const Args& a;
    u32 memory, barriers;  // of STAGES
    int begin, end;        // columns
    int num_tiles, tile, last_tile, lane;
    int half = 0, column = begin, slot = 0;

    __device__ __forceinline__ void next() {
        if (tile >= last_tile || begin == end) return;
        const u32 bytes = 2 * min(CHUNK, end - column), barrier = barriers + 8 * slot;
        if (lane == 0) expect(barrier, 16 * bytes);
        if (lane < 16) {
            const int row = min(16 * (tile + half * num_tiles) + lane, a.N - 1);
            copy(memory + slot * STAGE_BYTES + lane * LINE, a.codes + 2 * (u64(row) * a.K + column), bytes, barrier);
        }
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        column += CHUNK;
        if (column >= end) {
            column = begin;
            if (++half == MT) half = 0, tile += TEAMS;
        }
    }
};

// Add the products of so many columns: w and x are where a lane's row begins, as mma wants matrices.
__device__ __forceinline__ void multiply(Sum (&sums)[CHAINS][4], u32 w, u32 x, int columns) {
#pragma unroll 1  // few registers leave room for a block of attention
    for (int column = 0; column < columns; column += 64)
#pragma unroll
        for (int s = 0; s < 4; s += 2) {
            u32 pairs[4], numbers[2][4];
            load_matrices(pairs, x + 2 * column + 32 * s);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                load_matrices(numbers[i], w + 2 * column + 32 * (s + i));
                mma(sums[(s + i) % CHAINS], numbers[i], {pairs[2 * i], pairs[2 * i + 1]});
            }
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) dense_rows(const __grid_constant__ Args a) {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int team = warp / PARTS, part = warp % PARTS;
    const int num_tiles = (a.N + 15) / 16 / MT;
    const auto tile_of = [&](int block) { return int(u64(num_tiles) * block / gridDim.x); };
    const int length = (a.K / 64 + PARTS - 1) / PARTS * 64;
    const int begin = min(length * part, a.K), end = min(begin + length, a.K), num_columns = end - begin;

    extern __shared__ uint4 memory[];  // of each warp STAGES of w; of each part rows of x; sums [2][WARPS][16 M]
    __shared__ u64 barriers[WARPS][STAGES + 1];
    const u32 all_w = shared_address(memory), all_x = all_w + WARPS * STAGES * STAGE_BYTES;
    const u32 own_w = all_w + warp * STAGES * STAGE_BYTES, own_x = all_x + a.M * (2 * begin + 16 * part);
    const u32 x_line = 2 * num_columns + 16, barrier = shared_address(barriers[warp]);
    const u32 x_barrier = shared_address(&barriers[part][STAGES]);  // of the first team, for all
    Sum* shared = (Sum*)((u8*)memory + WARPS * STAGES * STAGE_BYTES + a.M * (2 * a.K + 16 * WARPS));
    if (lane == 0) {
        for (int i = 0; i <= STAGES; ++i) set_up(barrier + 8 * i);
        close_set_up();
    }
    if (TEAMS == 1)
        __syncwarp();
    else
        __syncthreads();
    const int first_tile = tile_of(blockIdx.x) + team, last_tile = tile_of(blockIdx.x + 1);
    Copies copies{a, own_w, barrier, begin, end, num_tiles, first_tile, last_tile, lane};
    for (int i = 0; i < STAGES; ++i) copies.next();

    wait_for_inputs();  // weights never change; x is there from here on
    let_next_begin();
    if (num_columns) {
        if (lane == 0 && team == 0) expect(x_barrier, a.M * 2 * num_columns);
        if (lane < a.M && team == 0)
            copy(own_x + lane * x_line, a.x + u64(lane) * a.x_stride + begin, 2 * num_columns, x_barrier);
        wait_for(x_barrier, 0);
    }

    // The last row of x again for rows that are not there: sums that nobody stores.
    const u32 x = own_x + min(lane % 8, a.M - 1) * x_line + lane / 8 * 16, w = own_w + lane % 16 * LINE + lane / 16 * 16;
    const int thread = threadIdx.x - 32 * PARTS * team, row = thread % 16, m = thread / 16;
    int slot = 0, phase = 0, side = 0;
    for (int tile = first_tile; tile < last_tile; tile += TEAMS) {
        Sum own[MT] = {};  // of a row of w and a row of x
#pragma unroll
        for (int half = 0; half < MT; ++half, side ^= 1) {
            Sum sums[CHAINS][4] = {};
            for (int column = begin; column < end; column += CHUNK) {
                wait_for(barrier + 8 * slot, phase);
                multiply(sums, w + slot * STAGE_BYTES, x + 2 * (column - begin), min(CHUNK, end - column));
                __syncwarp();  // all lanes have read
                copies.next();
                if (++slot == STAGES) slot = 0, phase ^= 1;
            }
            Sum* all = shared + (side * TEAMS + team) * PARTS * 16 * a.M;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int to_m = 2 * (lane % 4) + c % 2, to_row = lane / 4 + 8 * (c / 2);
#pragma unroll
                for (int i = 1; i < CHAINS; ++i) sums[0][c] += sums[i][c];
                if (PARTS == 1)
                    store(a, to_m, 16 * tile + to_row, sums[0][c]);
                else if (to_m < a.M)
                    all[(part * a.M + to_m) * 16 + to_row] = sums[0][c];
            }
            if (PARTS == 1) continue;
            if (TEAMS == 1)  // what the other side holds was read before
                __syncthreads();
            else
                wait_for_team<32 * PARTS>(team);
            if (m < a.M)
                for (int i = 0; i < PARTS; ++i) own[half] += all[i * 16 * a.M + thread];
        }
#if GATE
        store_gated(a, m, 16 * tile + row, own[0], own[MT - 1]);
#else
        if (PARTS > 1) store(a, m, 16 * tile + row, own[0]);
#endif
    }
}
