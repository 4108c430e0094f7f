// out[m, n] = sum over k of x[m, k] w[n, k], for M <= 8 NT rows of x: bound by reading w once.
//
// A warp multiplies 16 MT rows of w with all rows of x by mma.m16n8k16 (w is its A, x its B), 64 columns at a time. The
// warps of a block, and of SPLIT blocks, take columns in turn; what they summed is added up in a fixed order. Which
// columns an mma multiplies is free, so a lane takes those whose bytes lie together.
//
// K is a multiple of 64, and rows of x begin at multiples of 16 bytes. w is numbers [N, K], or packed codes (quant/tiled.py): unsigned integers u of BITS bits, for each group of columns with
// a scale d and a minimum m or a fixed zero:  w = d u - m,  w = d (u - ZERO),  or with LOOKUP  w = d value[u].
// With FLOAT8 codes of 8 bits are float8_e4m3fn. With INT8 x and w are int8 numbers, two where one of 16 bits would lie
// (K counts these), each row of either has a scale, and sums are exact.
//
// Defined when compiled: HALF (1: float16, 0: bfloat16), NUMBERS or BITS, GROUP, SCALE (16, 32: floats; 8: multiples of a
// float16 for each 256 columns), MIN, ZERO, LOOKUP, FLOAT8, INT8, NT, MT, WARPS, SPLIT, AHEAD, OUT32; GATE
// (1: silu, 2: gelu by tanh): w is [gate | up], of which a block has the same rows of both, and out[m, n] = gate(..) up.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Args {
    void* out;            // [M, N], rows out_stride apart, of x's type or float32
    const u16* x;         // [M, K], rows x_stride apart
    const u8* codes;      // numbers, or [N / 16][K / 64][lane] codes
    const u8* more;       // further bits of the codes, likewise
    const u8* scales;     // [N / 16][K / GROUP][8 rows][row, row + 8][d (, m)]; with INT8 [N] floats
    const u8* supers;     // [N / 16][K / 256][8 rows][row, row + 8][d (, m)] float16
    const float* values;  // [16], with LOOKUP
    const u16* bias;      // [N] of x's type, or null
    float* partial;       // [N / (16 MT)][SPLIT][16 MT][8 NT]
    u32* arrived;         // [N / (16 MT)] zeros, zeros again when done
    const long long* ids;  // [M] rows to open; or null: all
    int M, N, K, out_stride, x_stride, accumulate;
    float factor;          // of opened weights
    const float* x_scales;  // [M], with INT8
};

#if HALF
#define MMA_TYPE "f16"
#else
#define MMA_TYPE "bf16"
#endif

#if INT8
typedef int Sum;
#define SUM "+r"
#define MMA "m16n8k32.row.col.s32.s8.s8.s32"
#else
typedef float Sum;
#define SUM "+f"
#define MMA "m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32"
#endif

__device__ __forceinline__ void mma(Sum (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned." MMA " {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : SUM(c[0]), SUM(c[1]), SUM(c[2]), SUM(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ float to_float(u16 h) {
#if HALF
    return half_to_float(h);
#else
    return __uint_as_float(u32(h) << 16);
#endif
}
// Two floats as a pair of x's type.
__device__ __forceinline__ u32 to_pair(float low, float high) {
    u32 r;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
    return r;
}
// Pairs of small integers: u | MAGIC is the number BASE + u. What is too much is taken from the sums, as a multiple of
// the sum of x.
#if HALF
#define MAGIC 0x64006400u
#define BASE 1024
#else
#define MAGIC 0x43004300u
#define BASE 128
#endif
// (a & mask) | more in one instruction, where the compiler makes two.
template <u32 mask>
__device__ __forceinline__ u32 and_or(u32 a, u32 more) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "n"(mask), "r"(more));
    return r;
}
#define OFFSET (BITS == 8 || LOOKUP ? 0 : BASE + ZERO)
#define NEEDS_SUM (MIN || OFFSET)

__device__ __forceinline__ uint4 load_once(const u8* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
__device__ __forceinline__ u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Which column of 64 the first of four is that mma s takes from lane 4 g + t.
#define FOUR_COLUMNS(s, t) (GROUP == 16 ? 16 * (s) + 4 * (t) : 32 * ((s) / 2) + 8 * (t) + 4 * ((s) % 2))
#define GROUPS (GROUP >= 64 ? 1 : 64 / GROUP)  // in 64 columns
#define PER_GROUP (1 + MIN)                    // scale, or scale and minimum

// What a lane needs of 16 rows x 64 columns.
struct Piece {
#if NUMBERS
    uint4 numbers[2][2];  // [row g, row g + 8][columns 8 t .. , 32 + 8 t ..]
#else
#if BITS >= 4
    uint4 codes[BITS == 8 ? 2 : 1];
#endif
#if BITS == 2 || BITS == 3 || BITS == 6
    uint2 two;  // two bits of each code
#endif
#if BITS == 3 || BITS == 5
    u32 one;
#endif
#if SCALE == 16
    alignas(16) u16 scales[2 * GROUPS * PER_GROUP];
#elif SCALE == 32
    alignas(16) float scales[2 * GROUPS * PER_GROUP];
#else
    alignas(16) u8 scales[2 * GROUPS * PER_GROUP];
    alignas(16) u16 supers[2 * PER_GROUP];
#endif
#endif
};

template <int bytes>
__device__ __forceinline__ void copy(void* to, const u8* from) {
    if constexpr (bytes % 16 == 0)
        for (int i = 0; i < bytes / 16; ++i) ((uint4*)to)[i] = __ldg((const uint4*)from + i);
    else if constexpr (bytes % 8 == 0)
        for (int i = 0; i < bytes / 8; ++i) ((uint2*)to)[i] = __ldg((const uint2*)from + i);
    else if constexpr (bytes % 4 == 0)
        for (int i = 0; i < bytes / 4; ++i) ((u32*)to)[i] = __ldg((const u32*)from + i);
    else
        for (int i = 0; i < bytes / 2; ++i) ((u16*)to)[i] = __ldg((const u16*)from + i);
}

__device__ __forceinline__ void load(Piece& p, const Args& a, int tile, int block, int lane) {
    const int g = lane / 4, t = lane % 4;
    (void)t;
#if NUMBERS
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int n = min(16 * tile + g + 8 * r, a.N - 1);
        const u8* row = a.codes + 2 * (u64(n) * a.K + 64 * block + 8 * t);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            p.numbers[r][h] = load_once(row + 64 * h);
        }
    }
#else
    const u64 at = (u64(tile) * (a.K / 64) + block) * 32 + lane;
#if BITS >= 4
    for (int i = 0; i < (BITS == 8 ? 2 : 1); ++i) p.codes[i] = load_once(a.codes + (at * (BITS == 8 ? 2 : 1) + i) * 16);
#endif
    const u8* more = BITS >= 4 ? a.more : a.codes;
    (void)more;
#if BITS == 2 || BITS == 3 || BITS == 6
    p.two = __ldg((const uint2*)more + at);
#endif
#if BITS == 3 || BITS == 5
    p.one = __ldg((const u32*)a.more + at);
#endif
    constexpr int bytes = sizeof(p.scales);
    const u64 group = GROUP >= 64 ? (u64(tile) * ((a.K + GROUP - 1) / GROUP) + 64 * block / GROUP)
                                  : u64(tile) * (a.K / 64) + block;
    copy<bytes>(p.scales, a.scales + (group * 8 + g) * bytes);
#if SCALE == 8
    copy<sizeof(p.supers)>(p.supers, a.supers + ((u64(tile) * (a.K / 256) + block / 4) * 8 + g) * sizeof(p.supers));
#endif
#endif
}

#if !NUMBERS
// Pair j of mma s, of which OFFSET is to be taken: codes of row g (j even) or g + 8, columns 0, 1 (j < 2) or 2, 3 of the four.
__device__ __forceinline__ u32 code_pair(const Piece& p, int s, int j) {
    u32 u = 0;
#if BITS == 8
    const u32 w = word(p.codes[s / 2], 2 * (s % 2) + j / 2);  // two pairs of bytes
#if FLOAT8
    // The sign is spread over a half, exponent and mantissa go where x's type has their lowest bits; then the exponent,
    // which is too small by 8 or 120, is put right: exact, subnormal numbers too.
    const u32 zero = 0x80008000u, power = HALF ? 0x5C005C00u : 0x7B807B80u;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(u) : "r"(w), "r"(j % 2 ? 0xB3A2u : 0x9180u));
    u = HALF ? u << 7 & 0xBF80BF80u : u << 4 & 0x87F087F0u;
    asm("fma.rn." MMA_TYPE "x2 %0, %0, %1, %2;" : "+r"(u) : "r"(power), "r"(zero));
    return u;
#else
    const float low = __uint_as_float(__byte_perm(w, 0x4B000000u, j % 2 ? 0x7442 : 0x7440)) - 8388608.0f - ZERO;
    const float high = __uint_as_float(__byte_perm(w, 0x4B000000u, j % 2 ? 0x7443 : 0x7441)) - 8388608.0f - ZERO;
    return to_pair(low, high);
#endif
#else
    u = MAGIC;
#if BITS >= 4
    u = and_or<0x000F000Fu>(word(p.codes[0], s) >> (4 * j), u);
#endif
#if BITS == 2 || BITS == 3
    u = and_or<0x00030003u>((s < 2 ? p.two.x : p.two.y) >> (2 * (4 * (s % 2) + j)), u);
#endif
#if BITS == 6
    const u32 two = s < 2 ? p.two.x : p.two.y, at = 2 * (4 * (s % 2) + j);
    u = and_or<0x00300030u>(at >= 4 ? two >> (at - 4) : two << (4 - at), u);
#endif
#if BITS == 3 || BITS == 5
    const int at = 4 * s + j, to = BITS - 1;
    u = and_or<0x00010001u << (BITS - 1)>(at >= to ? p.one >> (at - to) : p.one << (to - at), u);
#endif
    return u;  // the number BASE + u
#endif
}

// A scale (which = 0) or minimum, times a factor.
__device__ __forceinline__ float scale_of(const Piece& p, int r, int group, int which, float factor = 1.0f) {
    const int i = (r * GROUPS + group) * PER_GROUP + which;
#if SCALE == 16
    return factor * half_to_float(p.scales[i]);
#elif SCALE == 32
    return factor * p.scales[i];
#else
    const float super = factor * half_to_float(p.supers[r * PER_GROUP + which]);
    const u32 u = MIN ? p.scales[i] : p.scales[i] ^ 128;  // as a float without a conversion: 2^23 + u
    return super * (__uint_as_float(0x4B000000u | u) - (MIN ? 8388608.0f : 8388736.0f));
#endif
}
#endif

// The columns of x for one piece, as mma wants them. `row`: x of the lane's row g, from column 64 block on.
struct Columns {
    u32 words[NT][4][2];
};

__device__ __forceinline__ void load(Columns& x, const Args& a, int block, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        const bool inside = 8 * n + g < a.M;
        const u16* row = a.x + u64(8 * n + g) * a.x_stride + 64 * block;
#if GROUP == 16
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            const uint2 v = inside ? *(const uint2*)(row + FOUR_COLUMNS(s, t)) : make_uint2(0, 0);
            x.words[n][s][0] = v.x, x.words[n][s][1] = v.y;
        }
#else
#pragma unroll
        for (int h = 0; h < 2; ++h) {  // eight columns together, of two mma
            const uint4 v = inside ? *(const uint4*)(row + FOUR_COLUMNS(2 * h, t)) : make_uint4(0, 0, 0, 0);
            x.words[n][2 * h][0] = v.x, x.words[n][2 * h][1] = v.y;
            x.words[n][2 * h + 1][0] = v.z, x.words[n][2 * h + 1][1] = v.w;
        }
#endif
    }
}

__device__ __forceinline__ void multiply(Sum (&sums)[MT][NT][4], const Piece (&w)[MT], const Columns& columns,
                                         const u32* table) {
    const u32(&x)[NT][4][2] = columns.words;
#if NUMBERS
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            const uint4 &top = w[i].numbers[0][s / 2], &low = w[i].numbers[1][s / 2];
            const int at = 2 * (s % 2);
            const u32 a[4] = {word(top, at), word(low, at), word(top, at + 1), word(low, at + 1)};
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
                for (int j = 0; j < 4; ++j) {
#if LOOKUP
                    const u32 u = (word(w[i].codes[0], s) >> (4 * j)) & 0x000F000Fu;
                    a[j] = __byte_perm(table[u & 15], table[u >> 16], 0x5410);
#else
                    a[j] = code_pair(w[i], s, j);
#endif
                }
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

__device__ __forceinline__ void store(const Args& a, int m, int n, Sum sum) {
    if (m >= a.M || n >= a.N) return;
#if INT8
    float y = __fmul_rn(__fmul_rn(float(sum), a.x_scales[m]), ((const float*)a.scales)[n]);  // the same in int8.py
#else
    float y = sum;
#endif
    if (a.bias) y += to_float(a.bias[n]);
    const u64 at = u64(m) * a.out_stride + n;
#if OUT32
    ((float*)a.out)[at] = a.accumulate ? ((float*)a.out)[at] + y : y;
#else
    u16* out = (u16*)a.out + at;
    *out = u16(to_pair(a.accumulate ? to_float(*out) + y : y, 0.0f));
#endif
}

// From compute capability 9.0 on a kernel may be brought up while the one before it still runs.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
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
    const int step = WARPS * SPLIT, begin = blockIdx.y * WARPS + warp;
    __shared__ u32 table[16];
#if LOOKUP
    if (threadIdx.x < 16) table[threadIdx.x] = to_pair(a.values[threadIdx.x], 0.0f);
    __syncthreads();
#endif
    Piece pieces[AHEAD][MT];  // on their way while one is multiplied
    Columns columns_of[AHEAD];
    const auto fetch = [&](int slot, int block) {
#pragma unroll
        for (int i = 0; i < MT; ++i) load(pieces[slot][i], a, tile_of(i), block, lane);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (begin + i * step < num_blocks) fetch(i, begin + i * step);
    wait_for_inputs();  // weights never change; x is there from here on
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (begin + i * step < num_blocks) load(columns_of[i], a, begin + i * step, lane);

    Sum sums[MT][NT][4] = {};
    for (int block = begin; block < num_blocks; block += AHEAD * step) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int now = block + i * step;
            if (now >= num_blocks) break;
            multiply(sums, pieces[i], columns_of[i], table);
            const int next = now + AHEAD * step;
            if (next < num_blocks) {
                fetch(i, next);
                load(columns_of[i], a, next, lane);
            }
        }
    }

    let_next_begin();  // not before: what waits would take the place of what reads
    // Sums of all warps: [warp][row][column of x], then of all blocks.
    constexpr int rows = 16 * MT, columns = 8 * NT, padded = columns + 1;
    extern __shared__ Sum shared[];
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
        if (m >= a.M) break;
        if (a.bias) gate += to_float(a.bias[n]), up += to_float(a.bias[a.N / 2 + n]);
        gate = to_float(u16(to_pair(gate, 0.0f))), up = to_float(u16(to_pair(up, 0.0f)));  // as if they had been written
        const float turn = GATE == 2 ? 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate) : gate;
        ((u16*)a.out)[u64(m) * a.out_stride + n] = u16(to_pair(gate / (1.0f + __expf(-turn)) * up, 0.0f));
    }
    return;
#endif
    Sum* partial = (Sum*)a.partial + u64(blockIdx.x) * SPLIT * rows * columns;
    for (int e = threadIdx.x; e < rows * columns; e += 32 * WARPS) {
        const int row = e % rows, m = e / rows;
        Sum y = 0;
        for (int w = 0; w < WARPS; ++w) y += shared[(w * rows + row) * padded + m];
        if (SPLIT == 1)
            store(a, m, 16 * first_tile + row, y);
        else if (m < a.M)
            partial[blockIdx.y * rows * columns + e] = y;
    }
    if (SPLIT == 1) return;
    __shared__ u32 is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(a.arrived + blockIdx.x, 1) == SPLIT - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    for (int e = threadIdx.x; e < rows * columns; e += 32 * WARPS) {
        const int row = e % rows, m = e / rows;
        if (m >= a.M) break;
        Sum y = 0;
        for (int p = 0; p < SPLIT; ++p) y += __ldcg(partial + p * rows * columns + e);
        store(a, m, 16 * first_tile + row, y);
    }
    if (threadIdx.x == 0) a.arrived[blockIdx.x] = 0;
}

#if !NUMBERS
// The weights themselves times a factor, in x's type: all rows, or those that are asked for, of which a warp then reads
// 15 others too. One warp opens 16 rows x 64 columns.
extern "C" __global__ void __launch_bounds__(256) open_codes(const __grid_constant__ Args a) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, num_blocks = a.K / 64;
    wait_for_inputs();
    const int warp = blockIdx.y * 8 + threadIdx.x / 32, id = a.ids ? int(a.ids[blockIdx.x]) : -1;
    const int tile = a.ids ? id / 16 : blockIdx.x;
    if (warp >= num_blocks) return;
    Piece p;
    load(p, a, tile, warp, lane);
    for (int s = 0; s < 4; ++s)
        for (int r = 0; r < 2; ++r) {
            const int n = 16 * tile + g + 8 * r, k = 64 * warp + FOUR_COLUMNS(s, t), group = s / (4 / GROUPS);
            if (n >= a.N || (a.ids && n != id)) continue;
            const float d = a.factor * scale_of(p, r, group, 0);
            u32 pairs[2];
            for (int half = 0; half < 2; ++half) {
                const int j = r + 2 * half;
#if LOOKUP
                const u32 u = (word(p.codes[0], s) >> (4 * j)) & 0x000F000Fu;
                float low = d * a.values[u & 15], high = d * a.values[u >> 16];
#else
                const u32 q = code_pair(p, s, j);
                float low = d * (to_float(u16(q)) - OFFSET), high = d * (to_float(u16(q >> 16)) - OFFSET);
#endif
#if MIN
                const float m = a.factor * scale_of(p, r, group, 1);
                low -= m, high -= m;
#endif
                pairs[half] = to_pair(low, high);
            }
            *(uint2*)((u16*)a.out + u64(a.ids ? blockIdx.x : n) * a.out_stride + k) = make_uint2(pairs[0], pairs[1]);
        }
}
#endif
