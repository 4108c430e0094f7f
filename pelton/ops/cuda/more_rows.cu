// out[m, n] = sum over k of x[m, k] w[n, k], for M <= 8 NT rows of x, of which there are so many that reading them costs
// more than reading w.
//
// As few_rows.cu, but the warps of a team have rows of w of their own, 16 MT each, and share x. 128 columns of x and w
// at a time lie in shared memory, and more are on their way. SPLIT blocks, and in each TEAMS teams that do not wait for
// each other, share the columns; their sums are added up in a fixed order. Defined when compiled, beside what tiles.cuh
// names: NT, MT, WARPS (of a team), TEAMS, SPLIT, STAGES, BLOCKS (of a multiprocessor), ENTRY; WGMMA: as Hopper does it;
// PARTS, if not 0: a sum has so many parts, no more than chunks, each summed alone; a team has some.
#include "tiles.cuh"

#define CHUNK 128           // columns
#define STEPS (CHUNK / 16)  // mma of a chunk
#define GROUPS_OF_CHUNK (GROUP % CHUNK == 0 ? 1 : 2 * GROUPS)
#define ROWS (8 * NT)
constexpr int ALL_PARTS = PARTS ? PARTS : SPLIT * TEAMS, OWN_PARTS = ALL_PARTS / (SPLIT * TEAMS);
constexpr int STORED_PARTS = SPLIT * OWN_PARTS;  // those of teams are joined before
static_assert(OWN_PARTS * SPLIT * TEAMS == ALL_PARTS && (TEAMS == 1 || OWN_PARTS == 1));

// What the warps of a block have of a chunk of w, in two halves; each part of a piece for all lanes lies together.
typedef u8 Weights[WARPS][2][MT][32 * PIECE_BYTES];
// What a thread sums, of each tile: rows g and g + 8, columns 8 n + 2 t and the next.
typedef float Sums[MT][NT][4];

// Bring bytes to shared memory without waiting; zeros if they are not there.
template <int bytes>
__device__ __forceinline__ void fetch(u32 to, const u8* from, bool is_there = true) {
    const int size = is_there ? bytes : 0;
    if constexpr (bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(bytes), "r"(size));
}
__device__ __forceinline__ void close_fetch() { asm volatile("cp.async.commit_group;"); }
template <int pending>
__device__ __forceinline__ void wait_for_fetch() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
constexpr int unit_of(int bytes) { return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : 4; }

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

#if WGMMA
#include "more_rows_wgmma.cuh"
#else
#include "more_rows_mma.cuh"
#endif

// What a warp has summed, to the output.
__device__ __forceinline__ void store_all(const Args& a, const Sums& sums, int first_tile, int lane) {
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

#define EACH (MT * NT * 4)  // sums of a thread
__device__ __forceinline__ float& sum_of(Sums& sums, int e) { return sums[e / (4 * NT)][e / 4 % NT][e % 4]; }

// Add up what all teams of a block have, for the first.
__device__ __forceinline__ void join_teams(Sums& sums, float* memory, int team, int thread) {
    __syncthreads();  // nobody needs the memory any more
    float* own = memory + (team - 1) * EACH * 32 * WARPS + thread;  // [TEAMS - 1][EACH][threads]
    if (team > 0)
#pragma unroll
        for (int e = 0; e < EACH; ++e) own[e * 32 * WARPS] = sum_of(sums, e);
    __syncthreads();
    if (team == 0)
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            sum_of(sums, e) += 0.0f;  // as in add_parts: -0 is none
            for (int i = 1; i < TEAMS; ++i) sum_of(sums, e) += own[(i * EACH + e) * 32 * WARPS];
        }
}

// Where a thread leaves sum e of a part.
__device__ __forceinline__ float* place_of_sum(const Args& a, int part, int e, int thread) {
    return a.partial + ((u64(blockIdx.x) * STORED_PARTS + part) * EACH + e) * (32 * WARPS) + thread;
}

__device__ __forceinline__ void store_part(const Args& a, Sums& sums, int part, int thread) {
#pragma unroll
    for (int e = 0; e < EACH; ++e) *place_of_sum(a, part, e, thread) = sum_of(sums, e);
}

// Add up the stored parts.
__device__ __forceinline__ void add_parts(const Args& a, Sums& sums, int thread) {
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        float y = 0.0f;
#pragma unroll
        for (int part = 0; part < STORED_PARTS; ++part) y += __ldcg(place_of_sum(a, part, e, thread));
        sum_of(sums, e) = y;
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS * TEAMS, BLOCKS) more_rows(const __grid_constant__ Args a) {
    const int warp_of_all = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int team = warp_of_all / WARPS, warp = warp_of_all % WARPS;
    const int num_tiles = (a.N + 15) / 16, num_blocks = a.K / 64, num_chunks = (num_blocks + 1) / 2;
    int part = (blockIdx.y * TEAMS + team) * OWN_PARTS;
    const auto begin_of = [&](int part) { return num_chunks * part / ALL_PARTS; };
    const int begin = begin_of(part), end = begin_of(part + OWN_PARTS);
#if GATE
    const int first_tile = blockIdx.x * WARPS + warp;
    const auto tile_of = [&](int i) { return min(first_tile, num_tiles / 2 - 1) + i * num_tiles / 2; };
#else
    const int first_tile = (blockIdx.x * WARPS + warp) * MT;
    const auto tile_of = [&](int i) { return min(first_tile + i, num_tiles - 1); };
#endif
    extern __shared__ uint4 memory[];
    u8* own_memory = (u8*)memory + team * (STAGES * sizeof(Weights) + Inputs::bytes);
    Weights* weights = (Weights*)(own_memory + Inputs::bytes);  // [STAGES]
    alignas(16) __shared__ u32 table[TABLE_SIZE];
#if LOOKUP
    fill_table<32 * WARPS * TEAMS>(table, [&](u32 code) { return __ldg(a.values + code); });
    if (TEAMS > 1) __syncthreads();
#endif
    Place places[MT];
#pragma unroll
    for (int i = 0; i < MT; ++i) places[i] = place_of(a, tile_of(i), lane);
    Inputs x(a, (u16*)own_memory, end, warp, lane);
    const auto fetch_own = [&](int stage, int chunk) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < MT; ++i)  // where there is no second half x is zero
                fetch_w(weights[stage][warp][half][i], places[i], min(2 * chunk + half, num_blocks - 1), lane);
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (begin + i < end) fetch_own(i, begin + i);
        if (WGMMA) close_fetch();  // else with x
    }
    wait_for_inputs();  // weights never change; x is there from here on
    if (NT == 1) let_next_begin();  // what reads little beside w leaves room for what waits
    x.begin(begin);

    const int thread = 32 * warp + lane;
    Sums sums = {};
    int at = 0, next = STAGES - 1, end_of_part = begin_of(part + 1);
    for (int chunk = begin; chunk < end; ++chunk) {
        wait_for_fetch<STAGES - 2>();  // this chunk is there,
        x.show();
        wait_for_team<32 * WARPS>(team);  // and nobody needs the one before any more
        if (chunk + STAGES - 1 < end) fetch_own(next, chunk + STAGES - 1);
        x.advance(chunk, next);
        close_fetch();
        multiply(sums, x.of(chunk, at), weights[at][warp], table, lane);
        at = at + 1 == STAGES ? 0 : at + 1, next = next + 1 == STAGES ? 0 : next + 1;
        if (OWN_PARTS > 1 && chunk + 1 == end_of_part) {
            store_part(a, sums, part++, thread);
            end_of_part = begin_of(part + 1);
#pragma unroll
            for (int e = 0; e < EACH; ++e) sum_of(sums, e) = 0.0f;
        }
    }

    if (NT > 1) let_next_begin();
    prefetch_next(a);
    if (TEAMS > 1) {
        // racecheck takes the join for a race unless all teams have met as often
        for (int i = end - begin; i < (num_chunks + ALL_PARTS - 1) / ALL_PARTS; ++i) wait_for_team<32 * WARPS>(team);
        join_teams(sums, (float*)memory, team, thread);
    }
    if (team > 0) return;
    if (SPLIT > 1 && OWN_PARTS == 1) store_part(a, sums, blockIdx.y, thread);
    if (SPLIT > 1 && !is_last_block<32 * WARPS>(a, thread, SPLIT)) return;
    if (SPLIT > 1 || OWN_PARTS > 1) add_parts(a, sums, thread);
    store_all(a, sums, first_tile, lane);
}
