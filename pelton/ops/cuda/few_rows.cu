// out[m, n] = sum over k of x[m, k] w[n, k], for M <= 8 NT rows of x: bound by reading w once.
//
// A warp multiplies 16 MT rows of w with all rows of x by mma.m16n8k16 (w is its A, x its B), 64 columns at a time. The
// warps of a block, and of SPLIT blocks, take columns in turn; what they summed is added up in a fixed order. Which
// columns an mma multiplies is free, so a lane takes those whose bytes lie together.
//
// w is numbers [N, K], or packed codes (quant/tiled.py): unsigned integers u of BITS bits, for each group of columns with
// a scale d and a minimum m or a fixed zero:  w = d u - m,  w = d (u - ZERO),  or with LOOKUP  w = d value[u].
//
// Defined when compiled: HALF (1: float16, 0: bfloat16), NUMBERS or BITS, GROUP, SCALE (16, 32: floats; 8: multiples of a
// float16 for each 256 columns), MIN, ZERO, LOOKUP, NT, MT, WARPS, SPLIT, OUT32.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Args {
    void* out;            // [M, N], rows out_stride apart, of x's type or float32
    const u16* x;         // [M, K], rows x_stride apart
    const u8* codes;      // numbers, or [N / 16][K / 64][lane] codes
    const u8* more;       // further bits of the codes, likewise
    const u8* scales;     // [N / 16][K / GROUP][8 rows][row, row + 8][d (, m)]
    const u8* supers;     // [N / 16][K / 256][8 rows][row, row + 8][d (, m)] float16
    const float* values;  // [16], with LOOKUP
    const u16* bias;      // [N] of x's type, or null
    float* partial;       // [N / (16 MT)][SPLIT][16 MT][8 NT]
    u32* arrived;         // [N / (16 MT)] zeros, zeros again when done
    int M, N, K, out_stride, x_stride, accumulate;
};

#if HALF
#define MMA_TYPE "f16"
#else
#define MMA_TYPE "bf16"
#endif

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
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
// Pairs of small integers: u | MAGIC is the number BASE + u, from which z is taken.
#if HALF
#define MAGIC 0x64006400u  // 1024
#define BASE 1024
#else
#define MAGIC 0x43004300u  // 128
#define BASE 128
#endif
__device__ __forceinline__ u32 add_pair(u32 a, u32 negative) {
    u32 r;
#if HALF
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(negative));
#else
    asm("fma.rn.bf16x2 %0, %1, %3, %2;" : "=r"(r) : "r"(a), "r"(negative), "r"(0x3F803F80u));  // add needs sm_90
#endif
    return r;
}

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
    u16 scales[2 * GROUPS * PER_GROUP];
#elif SCALE == 32
    float scales[2 * GROUPS * PER_GROUP];
#else
    u8 scales[2 * GROUPS * PER_GROUP];
    u16 supers[2 * PER_GROUP];
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
#if NUMBERS
    for (int r = 0; r < 2; ++r) {
        const int n = min(16 * tile + g + 8 * r, a.N - 1);
        const u8* row = a.codes + 2 * (u64(n) * a.K + 64 * block + 8 * t);
        for (int h = 0; h < 2; ++h) {
            const bool inside = 64 * block + 32 * h + 8 * t < a.K;  // K is a multiple of 8
            p.numbers[r][h] = inside ? load_once(row + 64 * h) : make_uint4(0, 0, 0, 0);
        }
    }
#else
    const u64 at = (u64(tile) * ((a.K + 63) / 64) + block) * 32 + lane;
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
                                  : u64(tile) * ((a.K + 63) / 64) + block;
    copy<bytes>(p.scales, a.scales + (group * 8 + g) * bytes);
#if SCALE == 8
    copy<sizeof(p.supers)>(p.supers, a.supers + ((u64(tile) * (a.K / 256) + block / 4) * 8 + g) * sizeof(p.supers));
#endif
#endif
}

#if !NUMBERS
// Pair j of mma s: codes of row g (j even) or g + 8, columns 0, 1 (j < 2) or 2, 3 of the four.
__device__ __forceinline__ u32 code_pair(const Piece& p, int s, int j) {
    u32 u = 0;
#if BITS == 8
    const u32 w = word(p.codes[s / 2], 2 * (s % 2) + j / 2);  // two pairs of bytes
    const float low = __uint_as_float(__byte_perm(w, 0x4B000000u, j % 2 ? 0x7442 : 0x7440)) - 8388608.0f - ZERO;
    const float high = __uint_as_float(__byte_perm(w, 0x4B000000u, j % 2 ? 0x7443 : 0x7441)) - 8388608.0f - ZERO;
    return to_pair(low, high);
#else
#if BITS >= 4
    u = (word(p.codes[0], s) >> (4 * j)) & 0x000F000Fu;
#endif
#if BITS == 2 || BITS == 3 || BITS == 6
    const u32 two = ((s < 2 ? p.two.x : p.two.y) >> (2 * (4 * (s % 2) + j))) & 0x00030003u;
    u |= BITS == 6 ? two << 4 : two;
#endif
#if BITS == 3 || BITS == 5
    u |= ((p.one >> (4 * s + j)) & 0x00010001u) << (BITS - 1);
#endif
#if HALF
    constexpr u32 negative = 0xE400E400u + 0x00010001u * ZERO;  // -(1024 + ZERO): float16 counts ones up to 2048
#else
    constexpr u32 negative = 0xC300C300u + 0x00010001u * ZERO;  // -(128 + ZERO)
#endif
    return add_pair(u | MAGIC, negative);
#endif
}

__device__ __forceinline__ float scale_of(const Piece& p, int r, int group, int which) {
    const int i = (r * GROUPS + group) * PER_GROUP + which;
#if SCALE == 16
    return half_to_float(p.scales[i]);
#elif SCALE == 32
    return p.scales[i];
#else
    const float super = half_to_float(p.supers[r * PER_GROUP + which]);
    return super * (MIN ? float(p.scales[i]) : float((signed char)p.scales[i]));
#endif
}
#endif

__device__ __forceinline__ void multiply(float (&sums)[MT][NT][4], const Piece (&w)[MT], const u32 (&x)[NT][4][2],
                                         const u32* table) {
#if NUMBERS
    for (int i = 0; i < MT; ++i)
        for (int s = 0; s < 4; ++s) {
            const uint4 &top = w[i].numbers[0][s / 2], &low = w[i].numbers[1][s / 2];
            const int at = 2 * (s % 2);
            const u32 a[4] = {word(top, at), word(low, at), word(top, at + 1), word(low, at + 1)};
            for (int n = 0; n < NT; ++n) mma(sums[i][n], a, x[n][s]);
        }
#else
    constexpr int per_group = 4 / GROUPS;  // mma of a group
    for (int group = 0; group < GROUPS; ++group) {
        float ones[NT][4] = {};  // the sums of x, in the places of the products
#if MIN
        const u32 one = HALF ? 0x3C003C00u : 0x3F803F80u, all[4] = {one, one, one, one};
        for (int n = 0; n < NT; ++n)
            for (int q = 0; q < per_group; ++q) mma(ones[n], all, x[n][group * per_group + q]);
#endif
        for (int i = 0; i < MT; ++i) {
            float own[NT][4] = {};
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
            for (int r = 0; r < 2; ++r) {
                const float d = scale_of(w[i], r, group, 0);
                for (int n = 0; n < NT; ++n)
                    for (int c = 2 * r; c < 2 * r + 2; ++c) {
                        sums[i][n][c] += d * own[n][c];
#if MIN
                        sums[i][n][c] -= scale_of(w[i], r, group, 1) * ones[n][c];
#endif
                    }
            }
        }
    }
#endif
}

__device__ __forceinline__ void store(const Args& a, int m, int n, float y) {
    if (m >= a.M || n >= a.N) return;
    if (a.bias) y += to_float(a.bias[n]);
    const u64 at = u64(m) * a.out_stride + n;
#if OUT32
    ((float*)a.out)[at] = a.accumulate ? ((float*)a.out)[at] + y : y;
#else
    u16* out = (u16*)a.out + at;
    *out = u16(to_pair(a.accumulate ? to_float(*out) + y : y, 0.0f));
#endif
}

#define AHEAD (NUMBERS ? 2 : MT == 1 ? 4 : 2)  // pieces on their way while one is multiplied

extern "C" __global__ void __launch_bounds__(32 * WARPS) few_rows(const __grid_constant__ Args a) {
    asm volatile("griddepcontrol.launch_dependents;");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first_tile = blockIdx.x * MT, num_tiles = (a.N + 15) / 16, num_blocks = (a.K + 63) / 64;
    const int step = WARPS * SPLIT, begin = blockIdx.y * WARPS + warp;
    __shared__ u32 table[16];
#if LOOKUP
    if (threadIdx.x < 16) table[threadIdx.x] = to_pair(a.values[threadIdx.x], 0.0f);
    __syncthreads();
#endif
    Piece pieces[AHEAD][MT];
    const auto fetch = [&](int slot, int block) {
        if (block < num_blocks)
            for (int i = 0; i < MT; ++i) load(pieces[slot][i], a, min(first_tile + i, num_tiles - 1), block, lane);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) fetch(i, begin + i * step);
    asm volatile("griddepcontrol.wait;" ::: "memory");  // weights never change; x is there from here on

    float sums[MT][NT][4] = {};
    for (int block = begin; block < num_blocks; block += AHEAD * step) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int now = block + i * step;
            if (now >= num_blocks) break;
            u32 x[NT][4][2];
            for (int n = 0; n < NT; ++n)
                for (int s = 0; s < 4; ++s) {
                    const int m = 8 * n + g, k = 64 * now + FOUR_COLUMNS(s, t);
                    uint2 four = make_uint2(0, 0);
                    if (m < a.M && k < a.K) four = *(const uint2*)(a.x + u64(m) * a.x_stride + k);
                    x[n][s][0] = four.x, x[n][s][1] = four.y;
                }
            multiply(sums, pieces[i], x, table);
            fetch(i, now + AHEAD * step);
        }
    }

    // Sums of all warps: [warp][row][column of x], then of all blocks.
    constexpr int rows = 16 * MT, columns = 8 * NT, padded = columns + 1;
    extern __shared__ float shared[];
    for (int i = 0; i < MT; ++i)
        for (int n = 0; n < NT; ++n)
            for (int c = 0; c < 4; ++c)
                shared[(warp * rows + 16 * i + g + 8 * (c / 2)) * padded + 8 * n + 2 * t + c % 2] = sums[i][n][c];
    __syncthreads();
    float* partial = a.partial + u64(blockIdx.x) * SPLIT * rows * columns;
    for (int e = threadIdx.x; e < rows * columns; e += 32 * WARPS) {
        const int row = e % rows, m = e / rows;
        float y = 0.0f;
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
        float y = 0.0f;
        for (int p = 0; p < SPLIT; ++p) y += __ldcg(partial + p * rows * columns + e);
        store(a, m, 16 * first_tile + row, y);
    }
    if (threadIdx.x == 0) a.arrived[blockIdx.x] = 0;
}

#if !NUMBERS
// The weights themselves, in x's type: out[n, k]. One warp opens 16 rows x 64 columns at a time.
extern "C" __global__ void __launch_bounds__(256) open_codes(const __grid_constant__ Args a) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, num_blocks = (a.K + 63) / 64;
    const int tile = blockIdx.x, warp = blockIdx.y * 8 + threadIdx.x / 32;
    if (warp >= num_blocks) return;
    Piece p;
    load(p, a, tile, warp, lane);
    for (int s = 0; s < 4; ++s)
        for (int r = 0; r < 2; ++r) {
            const int n = 16 * tile + g + 8 * r, k = 64 * warp + FOUR_COLUMNS(s, t), group = s / (4 / GROUPS);
            if (n >= a.N || k >= a.K) continue;
            const float d = scale_of(p, r, group, 0);
            u32 pairs[2];
            for (int half = 0; half < 2; ++half) {
                const int j = r + 2 * half;
#if LOOKUP
                const u32 u = (word(p.codes[0], s) >> (4 * j)) & 0x000F000Fu;
                float low = d * a.values[u & 15], high = d * a.values[u >> 16];
#else
                const u32 q = code_pair(p, s, j);
                float low = d * to_float(u16(q)), high = d * to_float(u16(q >> 16));
#endif
#if MIN
                const float m = scale_of(p, r, group, 1);
                low -= m, high -= m;
#endif
                pairs[half] = to_pair(low, high);
            }
            *(uint2*)((u16*)a.out + u64(n) * a.out_stride + k) = make_uint2(pairs[0], pairs[1]);
        }
}
#endif
