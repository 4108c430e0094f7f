// out[m, n] = sum over k of x[m, k] w[n, k], for M <= ROWS rows of x: bound by reading w once.
//
// A warp multiplies 16 MT rows of w with all rows of x by mma.m16n8k16 (w is its A, x its B), 64 columns at a time. The
// warps of a team take columns in turn; what they summed is added up in a fixed order. Which columns an mma multiplies is
// free, so a lane takes those whose bytes lie together. Teams share a block for its table of values alone.
//
// An mma has eight columns for rows of x. Where there are one or two, PARTS columns belong to each row: PARTS groups of
// columns of x lie side by side, and of what a group of w gives with all of them one is taken. So a lane scales the sums
// of two groups, not of all.
//
// K is a multiple of 64, and rows of x begin at multiples of 16 bytes. Defined when compiled, beside what tiles.cuh names:
// ROWS (1, 2, or a multiple of 8), MT, WARPS (of a team), TEAMS, AHEAD.
#include "tiles.cuh"

constexpr int NT = (ROWS + 7) / 8, STEPS = 4 / GROUPS;  // mma of a group
constexpr int PARTS = NUMBERS || ROWS >= 8 ? 1 : 8 / ROWS <= AHEAD * GROUPS ? 8 / ROWS : AHEAD * GROUPS;
constexpr int BATCH = PARTS > GROUPS ? PARTS / GROUPS : 1;  // pieces: the fewest that have PARTS groups,
constexpr int SETS = GROUPS > PARTS ? GROUPS / PARTS : 1;   // or SETS of these
static_assert(PARTS * SETS == BATCH * GROUPS && AHEAD % BATCH == 0 && (PARTS == 1 || SETS == 1));
// Of a multiprocessor; 0: as the compiler likes, which for few warps aims at more and keeps registers in memory for them.
constexpr int MIN_BLOCKS = TEAMS == 2 ? 2 : WARPS == 4 && PARTS > 1 && GROUPS < 4 ? 4 : 0;
// Where the sums of a lane are those of two parts these may be groups of two pieces.
constexpr int OWN = PARTS > 1 && GROUPS == 1 ? 2 : 1;

// The columns of x for one batch, as mma wants them: of each set, those of the part that the lane's column is.
struct Columns {
    u32 words[SETS][NT][STEPS][2];
};

// Where those of a lane begin, of x from column 0 on; the last row again for rows that are not there. Rows lie `stride`
// apart.
__device__ __forceinline__ void find_columns(const u16* (&rows)[NT], const u16* x, int stride, int num_rows, int lane) {
    const int part = lane / 4 % PARTS;
#pragma unroll
    for (int n = 0; n < NT; ++n)
        rows[n] = x + u64(min((8 * n + lane / 4) / PARTS, num_rows - 1)) * stride + 64 * WARPS * (part / GROUPS) +
                  FOUR_COLUMNS(part % GROUPS * STEPS, lane % 4);
}

// Those of the pieces `block`, block + WARPS .. of num_blocks; zeros for pieces that are not there.
__device__ __forceinline__ void load(Columns& columns, const u16* const (&rows)[NT], int block, int num_blocks, int lane) {
    const bool inside = BATCH == 1 || block + lane / 4 % PARTS / GROUPS * WARPS < num_blocks;
#pragma unroll
    for (int set = 0; set < SETS; ++set)
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const u16* from = rows[n] + 64 * block;
            u32(&to)[STEPS][2] = columns.words[set][n];
#if GROUP == 16
            const uint2 v = inside ? *(const uint2*)(from + FOUR_COLUMNS(set * PARTS, 0)) : make_uint2(0, 0);
            to[0][0] = v.x, to[0][1] = v.y;
#else
#pragma unroll
            for (int s = 0; s < STEPS; s += 2) {  // eight columns together, of two mma
                const u16* eight = from + FOUR_COLUMNS(set * PARTS * STEPS + s, 0);
                const uint4 v = inside ? *(const uint4*)eight : make_uint4(0, 0, 0, 0);
                to[s][0] = v.x, to[s][1] = v.y, to[s + 1][0] = v.z, to[s + 1][1] = v.w;
            }
#endif
        }
}

// The scales of the groups that are a lane's parts.
__device__ __forceinline__ void load(Scales (&scales)[OWN], const Place& place, int block, int num_blocks, int lane) {
#pragma unroll
    for (int e = 0; e < OWN; ++e) {
        const int piece = (2 * (lane % 4) + e) % PARTS / GROUPS;
        load(scales[e], place, BATCH == 1 ? block : min(block + piece * WARPS, num_blocks - 1));
    }
}

#if NUMBERS
__device__ __forceinline__ void multiply(Sum (&sums)[MT][NT][4], const Codes (&w)[MT], const u32 (&x)[NT][STEPS][2]) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            u32 a[4];
            operand(a, w[i], s, nullptr);
#pragma unroll
            for (int n = 0; n < NT; ++n) mma(sums[i][n], a, x[n][s]);
        }
}
#else
// Multiply PARTS groups of w with as many of x; done(piece) is called when a piece, but the last, is not needed any more.
// Products begin with what is too much in them, -OFFSET times the sum of x.
template <class Done>
__device__ __forceinline__ void multiply(float (&products)[MT][NT][4], float (&begin)[NT][4], const Codes (&w)[BATCH][MT],
                                         const u32 (&x)[NT][STEPS][2], int set, int num_pieces, const u32* table, int lane,
                                         Done done) {
#if NEEDS_SUM
    const u32 factor = to_pair(OFFSET ? -float(OFFSET) : 1.0f, OFFSET ? -float(OFFSET) : 1.0f);
    const u32 all[4] = {factor, factor, factor, factor};
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int s = 0; s < STEPS; ++s) mma(begin[n], all, x[n][s]);
#endif
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int piece = part / GROUPS, group = PARTS == 1 ? set : part % GROUPS;
        if (piece && piece >= num_pieces) break;
        const bool is_own = 2 * (lane % 4) % PARTS / 2 == part / 2;
#pragma unroll
        for (int i = 0; i < MT; ++i) {
            float own[NT][4] = {};
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                u32 a[4];
                operand(a, w[piece][i], group * STEPS + s, table);
#pragma unroll
                for (int n = 0; n < NT; ++n)
                    if (OFFSET && s == 0)
                        mma(own[n], a, x[n][s], begin[n]);
                    else
                        mma(own[n], a, x[n][s]);
            }
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    if (PARTS == 1 || (c % 2 == part % 2 && is_own)) products[i][n][c] = own[n][c];
        }
        if (piece < BATCH - 1 && (part + 1) % GROUPS == 0) done(piece);
    }
}

// The scales of a lane's groups, where those of the first groups are.
__device__ __forceinline__ Scales own_groups(Scales scales, int lane) {
    if (PARTS == 1 || GROUPS < 4) return scales;
    const bool second = lane % 2;  // the third and fourth group of a piece
#pragma unroll
    for (int r = 0; r < 2; ++r)
#if SCALE == 8
        scales.scales[r * PER_GROUP] = MIN ? scales.scales[2 * r + second] : scales.scales[r] >> (second ? 16 : 0);
#else
#pragma unroll
        for (int e = 0; e < 2 * PER_GROUP; ++e) {
            const int at = r * GROUPS * PER_GROUP + e;
            scales.scales[at] = scales.scales[at + (second ? 2 * PER_GROUP : 0)];
        }
#endif
    return scales;
}

// Add products times their scales.
__device__ __forceinline__ void add(Sum (&sums)[MT][NT][4], const float (&products)[MT][NT][4], const float (&begin)[NT][4],
                                    const Scales (&scales)[MT][OWN], int set, int lane) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int r = c / 2, part = c % 2, to = PARTS == 1 ? c : 2 * r, group = PARTS == 1 ? set : OWN == 1 ? part : 0;
            const Scales own = own_groups(scales[i][OWN == 1 ? 0 : part], lane);
            const float d = scale_of(own, r, group, 0);
            const float m = MIN ? scale_of(own, r, group, MIN, OFFSET ? 1.0f / OFFSET : -1.0f) : 0.0f;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                sums[i][n][to] += d * products[i][n][c];
                if (MIN) sums[i][n][to] += m * begin[n][c];
            }
        }
}
#endif

extern "C" __global__ void __launch_bounds__(32 * WARPS * TEAMS, MIN_BLOCKS)
    few_rows(const __grid_constant__ Args a) {
    const int warp_of_all = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so that it is known to be one for all lanes
    const int team = TEAMS == 1 ? 0 : warp_of_all / WARPS, warp = warp_of_all - team * WARPS;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, thread = threadIdx.x - 32 * WARPS * team;
    const int num_tiles = (a.N + 15) / 16, num_blocks = a.K / 64;
#if GATE
    const int first_tile = blockIdx.x * TEAMS + team;
    const int own_tile = TEAMS == 1 ? first_tile : min(first_tile, num_tiles / 2 - 1);
    const auto tile_of = [&](int i) { return own_tile + i * num_tiles / 2; };
#else
    const int first_tile = (blockIdx.x * TEAMS + team) * MT;
    const auto tile_of = [&](int i) { return min(first_tile + i, num_tiles - 1); };
#endif
    Place places[MT];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
        places[i] = place_of(a, tile_of(i), lane);
#if !NUMBERS
        keep(places[i].codes), keep(places[i].scales);
#endif
    }
#if LOOKUP
    const float value = __ldg(a.values + lane % 16);  // not behind all that is asked for next
#endif
    // On their way while a batch is multiplied.
    constexpr int BATCHES = AHEAD / BATCH;
    Codes codes[BATCHES][BATCH][MT];
    Scales scales[BATCHES][MT][OWN];
    Columns columns_of[BATCHES];
    const auto fetch_codes = [&](int batch, int piece, int block) {
#pragma unroll
        for (int i = 0; i < MT; ++i)
            if (block < num_blocks) load(codes[batch][piece][i], places[i], block);
    };
    const auto fetch_scales = [&](int batch, int block) {
#pragma unroll
        for (int i = 0; i < MT; ++i)
            if (block < num_blocks) load(scales[batch][i], places[i], block, num_blocks, lane);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        fetch_codes(i / BATCH, i % BATCH, warp + i * WARPS);
        if (i % BATCH == 0) fetch_scales(i / BATCH, warp + i * WARPS);
    }
    extern __shared__ uint4 memory[];
    u32* table = (u32*)memory;
#if LOOKUP
    fill_table<32 * WARPS * TEAMS>(table, [&](u32 code) { return __shfl_sync(~0u, value, code); });
#endif
    wait_for_inputs();  // weights never change; x is there from here on
    const u16* own_x[NT];
    find_columns(own_x, a.x, a.x_stride, a.M, lane);
#pragma unroll
    for (int i = 0; i < BATCHES; ++i)
        if (warp + i * BATCH * WARPS < num_blocks) load(columns_of[i], own_x, warp + i * BATCH * WARPS, num_blocks, lane);
    if (LOOKUP) __syncthreads();  // the table is there

    Sum sums[MT][NT][4] = {};
    for (int block = warp; block < num_blocks; block += AHEAD * WARPS) {
#pragma unroll
        for (int i = 0; i < BATCHES; ++i) {
            const int now = block + i * BATCH * WARPS, next = now + AHEAD * WARPS;
            if (now >= num_blocks) break;
#pragma unroll
            for (int set = 0; set < SETS; ++set) {
#if NUMBERS
                multiply(sums, codes[i][0], columns_of[i].words[0]);
#else
                float products[MT][NT][4] = {}, begin[NT][4] = {};
                const int num_pieces = (num_blocks - now + WARPS - 1) / WARPS;
                multiply(products, begin, codes[i], columns_of[i].words[set], set, num_pieces, table, lane,
                         [&](int piece) { fetch_codes(i, piece, next + piece * WARPS); });
                add(sums, products, begin, scales[i], set, lane);
#endif
            }
            fetch_codes(i, BATCH - 1, next + (BATCH - 1) * WARPS);
            fetch_scales(i, next);
            if (next < num_blocks) load(columns_of[i], own_x, next, num_blocks, lane);
        }
    }

    let_next_begin();  // not before: what waits would take the place of what reads
    prefetch_next(a);
    // Sums of a team's warps, behind the table: [warp][row][row of x].
    constexpr int rows = 16 * MT, columns = 8 * NT / PARTS, padded = columns | 1;
    Sum* shared = (Sum*)(table + (LOOKUP ? TABLE_SIZE : 0)) + team * WARPS * rows * padded;
    for (int i = 0; i < MT; ++i)
        for (int n = 0; n < NT; ++n)
            for (int c = 0; c < 4; c += PARTS == 1 ? 1 : 2) {
                Sum sum = sums[i][n][c];
                for (int by = 1; by < PARTS / 2; by *= 2) sum += __shfl_xor_sync(~0u, sum, by);
                if (2 * t % PARTS == 0 || PARTS == 1)
                    shared[(warp * rows + 16 * i + g + 8 * (c / 2)) * padded + (8 * n + 2 * t + c % 2) / PARTS] = sum;
            }
    __syncthreads();
#if GATE
    for (int e = thread; e < 16 * columns; e += 32 * WARPS) {
        const int row = e % 16, m = e / 16, n = 16 * first_tile + row;
        float gate = 0.0f, up = 0.0f;
        for (int w = 0; w < WARPS; ++w) {
            gate += shared[(w * rows + row) * padded + m];
            up += shared[(w * rows + 16 + row) * padded + m];
        }
        store_gated(a, m, n, gate, up);
    }
#else
    for (int e = thread; e < rows * columns; e += 32 * WARPS) {
        const int row = e % rows, m = e / rows;
        Sum y = 0;
        for (int w = 0; w < WARPS; ++w) y += shared[(w * rows + row) * padded + m];
        store(a, m, 16 * first_tile + row, y);
    }
#endif
}
