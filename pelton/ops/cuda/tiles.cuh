// What the kernels over weights in tiles share: their arguments, and how a lane reads codes and scales (quant/tiled.py).
//
// w is numbers [N, K], or packed codes: unsigned integers u of BITS bits, for each group of columns with a scale d and a
// minimum m, a zero point z or a fixed zero:  w = d u - m,  w = d (u - z),  w = d (u - ZERO),  or with LOOKUP
// w = d value[u]. With FLOAT8 codes of 8 bits are float8_e4m3fn. With INT8 x and w are int8 numbers, two where one of 16
// bits would lie (K counts these), each row of either has a scale, and sums are exact.
//
// Defined when compiled: HALF (1: float16, 0: bfloat16), NUMBERS or BITS, GROUP, SCALE (16, 32: floats; 8: multiples of a
// float16 for each 256 columns), MIN (m or z), ZEROS (z), ZERO, LOOKUP, FLOAT8, INT8, OUT32; GATE (1: silu, 2: gelu by
// tanh): w is [gate | up], and out[m, n] = gate(..) up.
#include "common.cuh"

struct Args {
    void* out;            // [M, N], rows out_stride apart, of x's type or float32
    const u16* x;         // [M, K], rows x_stride apart; in many_rows.cu as lay_out.cu leaves it
    const u8* codes;      // numbers, or [N / 16][K / 64][lane] codes
    const u8* more;       // further bits of the codes, likewise
    const u8* scales;     // [N / 16][K / GROUP][8 rows][row, row + 8][d (, m or z)]; with INT8 [N] floats
    const u8* supers;     // [N / 16][K / 256][8 rows][row, row + 8][d (, m)] float16
    const float* values;  // [16], with LOOKUP
    const u16* bias;      // [N] of x's type, or null
    float* partial;       // [blocks beside each other][parts of a sum][sums], of blocks that share columns
    u32* arrived;         // [blocks beside each other] zeros, zeros again when done
    const long long* ids;  // [M] rows to open; or null: all
    const u8* next;        // what is read after this, on its way when this is done
    int M, N, K, out_stride, x_stride, accumulate;
    u32 next_bytes;        // for each block: a multiple of 16
    float factor;            // of opened weights
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

// The same, of which the sums begin with `from`.
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], const float (&from)[4]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
                 "{%10,%11,%12,%13};"
                 : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(from[0]), "f"(from[1]),
                   "f"(from[2]), "f"(from[3]));
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

// What a lane needs of 16 rows x 64 columns: codes,
struct Codes {
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
#endif
};
// and scales, [row g, row g + 8][groups][d (, m)].
struct Scales {
#if !NUMBERS
#if SCALE == 16
    alignas(16) u16 scales[2 * GROUPS * PER_GROUP];
#elif SCALE == 32
    alignas(16) float scales[2 * GROUPS * PER_GROUP];
#else
    alignas(16) u32 scales[GROUPS * PER_GROUP / 2];  // four of them each
    alignas(16) u16 supers[2 * PER_GROUP];
#endif
#endif
};
struct Piece : Codes, Scales {};

// Bytes of a lane: of its codes' lower and higher bits, and of all that it needs.
constexpr int LOW_BYTES = BITS == 8 ? 32 : BITS >= 4 ? 16 : 8, HIGH_BYTES = BITS == 6 ? 8 : BITS == 3 || BITS == 5 ? 4 : 0;
constexpr int PIECE_BYTES = NUMBERS ? 64 : LOW_BYTES + HIGH_BYTES + 2 * GROUPS * PER_GROUP * (SCALE / 8) +
                                               (SCALE == 8 ? 4 * PER_GROUP : 0);

// Have a pointer kept in registers: it would be computed anew wherever it is used.
template <class T>
__device__ __forceinline__ void keep(const T*& p) {
    asm volatile("" : "+l"(p));
}

// Where what a lane needs of a tile begins.
struct Place {
#if NUMBERS
    const u8* rows[2];  // g, g + 8
#else
    const u8 *codes, *more, *scales, *supers;
#endif
};

__device__ __forceinline__ Place place_of(const Args& a, int tile, int lane) {
    Place place;
#if NUMBERS
    for (int r = 0; r < 2; ++r) {
        const int n = min(16 * tile + lane / 4 + 8 * r, a.N - 1);
        place.rows[r] = a.codes + 2 * (u64(n) * a.K + 8 * (lane % 4));
    }
#else
    const u64 first = u64(tile) * (a.K / 64) * 32 + lane;
    const u64 group = u64(tile) * (GROUP >= 64 ? (a.K + GROUP - 1) / GROUP : a.K / 64);
    place.codes = a.codes + first * LOW_BYTES;
    place.more = a.more + first * HIGH_BYTES;
    place.scales = a.scales + (group * 8 + lane / 4) * sizeof(Scales::scales);
#if SCALE == 8
    place.supers = a.supers + (u64(tile) * (a.K / 256) * 8 + lane / 4) * sizeof(Scales::supers);
#endif
#endif
    return place;
}

// Name to take(part, address) each part of codes or scales and where it lies.
template <class Take>
__device__ __forceinline__ void each_part(Codes& p, const Place& place, u64 block, Take take) {
#if NUMBERS
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) take(p.numbers[r][h], place.rows[r] + block * 128 + 64 * h);
#else
    const u8 *low = place.codes + block * (32 * LOW_BYTES), *high = place.more + block * (32 * HIGH_BYTES);
    (void)high;
#if BITS >= 4
    take(p.codes, low);
#endif
#if BITS == 2 || BITS == 3 || BITS == 6
    take(p.two, BITS == 6 ? high : low);
#endif
#if BITS == 3 || BITS == 5
    take(p.one, high);
#endif
#endif
}
template <class Take>
__device__ __forceinline__ void each_part(Scales& p, const Place& place, u64 block, Take take) {
#if !NUMBERS
    take(p.scales, place.scales + (GROUP > 64 ? 64 * u32(block) / GROUP : block) * (8 * sizeof(p.scales)));
#if SCALE == 8
    take(p.supers, place.supers + u64(u32(block) / 4) * (8 * sizeof(p.supers)));
#endif
#endif
}
template <class Take>
__device__ __forceinline__ void each_part(Piece& p, const Place& place, u64 block, Take take) {
    each_part((Codes&)p, place, block, take);
    each_part((Scales&)p, place, block, take);
}

template <int bytes>
__device__ __forceinline__ void copy(void* to, const u8* from) {
    if constexpr (bytes % 16 == 0)
        for (int i = 0; i < bytes / 16; ++i) ((uint4*)to)[i] = load_once(from + 16 * i);
    else if constexpr (bytes % 8 == 0)
        for (int i = 0; i < bytes / 8; ++i) ((uint2*)to)[i] = __ldg((const uint2*)from + i);
    else
        for (int i = 0; i < bytes / 4; ++i) ((u32*)to)[i] = __ldg((const u32*)from + i);
}

// Load codes, scales or both.
template <class Part>
__device__ __forceinline__ void load(Part& p, const Place& place, int block) {
    each_part(p, place, block, [](auto& part, const u8* from) { copy<sizeof(part)>(&part, from); });
}

#if !NUMBERS
// Pair j of mma s, of which OFFSET is to be taken: codes of row g (j even) or g + 8, columns 0, 1 (j < 2) or 2, 3 of the four.
__device__ __forceinline__ u32 code_pair(const Codes& p, int s, int j) {
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
    const float low = __uint_as_float(__byte_perm(w, 0x4B000000u, j % 2 ? 0x7442 : 0x7440)) - (8388608.0f + ZERO);
    const float high = __uint_as_float(__byte_perm(w, 0x4B000000u, j % 2 ? 0x7443 : 0x7441)) - (8388608.0f + ZERO);
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

#if SCALE != 8
// What is stored of a group: a scale (which = 0), a minimum or a zero point.
__device__ __forceinline__ float stored(const Scales& p, int r, int group, int which) {
    const auto number = p.scales[(r * GROUPS + group) * PER_GROUP + which];
    return SCALE == 16 ? half_to_float(u16(number)) : float(number);
}
#endif

// A scale (which = 0) or minimum, times a factor.
__device__ __forceinline__ float scale_of(const Scales& p, int r, int group, int which, float factor = 1.0f) {
#if SCALE != 8
    const float number = stored(p, r, group, which);
    return factor * (ZEROS && which ? stored(p, r, group, 0) * number : number);
#else
    const int i = (r * GROUPS + group) * PER_GROUP + which;
    // A byte as a float without a conversion: 2^23 + u. A super times 2^23 is exact, times 2^23 + 128 it may not be.
    const float super = factor * half_to_float(p.supers[r * PER_GROUP + which]);
    const u32 bytes = MIN ? p.scales[i / 4] : p.scales[i / 4] ^ 0x80808080u;
    const float u = __uint_as_float(__byte_perm(bytes, 0x4B000000u, 0x7440 + i % 4));
    return MIN ? fmaf(super, u, super * -8388608.0f) : super * (u - 8388736.0f);
#endif
}
#endif

#if !NUMBERS
// Pair j of mma s as numbers of w itself, times a factor, in x's type. pair: u, or values that were looked up, and offset
// more (which is exact as long as a scale and the offset have 24 bits).
__device__ __forceinline__ u32 opened(const Piece& p, int s, int j, float2 pair, float offset, float factor = 1.0f) {
    const int group = s / (4 / GROUPS), r = j % 2;
    const float d = scale_of(p, r, group, 0, factor);
    const float minimum = MIN ? scale_of(p, r, group, MIN, factor) : 0.0f, more = -offset * d - minimum;
    return to_pair(fmaf(d, pair.x, more), fmaf(d, pair.y, more));
}
#endif

#if LOOKUP
// The pairs of values for each byte, a pair of codes, ENTRY bytes from one to the next. There are COPIES of each, so
// that lanes read different banks.
constexpr int COPIES = ENTRY < 128 ? ENTRY / 4 : 32;
#define TABLE_SIZE (64 * ENTRY)
template <int threads, class ValueOf>
__device__ __forceinline__ void fill_table(u32* table, ValueOf value_of) {
    static_assert(4 * threads / COPIES % 16 == 0);  // all pairs of a thread have one lower value
    const u32 byte = 4 * threadIdx.x / COPIES;
    u8* to = (u8*)table + byte * ENTRY + 16 * threadIdx.x % (4 * COPIES);
    const float low = value_of(byte % 16);
#pragma unroll
    for (u32 more = 0; more < 256; more += 4 * threads / COPIES) {
        if (64 * COPIES % threads && byte + more >= 256) break;
        const u32 pair = to_pair(low, value_of(byte / 16 + more / 16));
        *(uint4*)(to + more * ENTRY) = make_uint4(pair, pair, pair, pair);
    }
}
// Where this lane's pair for byte j of a word lies. With entries of 256 bytes, half of which nothing uses, that is one
// instruction.
__device__ __forceinline__ u32 place_of_pair(u32 word, int j) {
    const u32 copy = threadIdx.x % COPIES * 4;
    if (ENTRY == 256) return __byte_perm(word, copy, 0x5504 | j << 4);
    constexpr int shift = ENTRY == 128 ? 7 : ENTRY == 64 ? 6 : ENTRY == 32 ? 5 : 2;
    return and_or<255 << shift>(8 * j >= shift ? word >> (8 * j - shift) : word << (shift - 8 * j), copy);
}
#else
#define TABLE_SIZE 1
#endif

// What mma s multiplies with: of codes, the numbers BASE + u.
__device__ __forceinline__ void operand(u32 (&a)[4], const Codes& w, int s, const u32* table) {
#if NUMBERS
    const uint4 &top = w.numbers[0][s / 2], &low = w.numbers[1][s / 2];
    const int at = 2 * (s % 2);
    a[0] = word(top, at), a[1] = word(low, at), a[2] = word(top, at + 1), a[3] = word(low, at + 1);
#else
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#if LOOKUP
        a[j] = *(const u32*)((const u8*)table + place_of_pair(word(w.codes[0], s), j));
#else
        a[j] = code_pair(w, s, j);
#endif
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

#if GATE
// gate(..) up, of sums with their bias.
__device__ __forceinline__ float gated(float gate, float up) {
    gate = to_float(u16(to_pair(gate, 0.0f))), up = to_float(u16(to_pair(up, 0.0f)));  // as if they had been written
    const float turn = GATE == 2 ? 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate) : gate;
    return gate / (1.0f + __expf(-turn)) * up;
}
// The same, to the output, of sums without.
__device__ __forceinline__ void store_gated(const Args& a, int m, int n, float gate, float up) {
    if (m >= a.M || n >= a.N / 2) return;
    if (a.bias) gate += to_float(a.bias[n]), up += to_float(a.bias[a.N / 2 + n]);
    ((u16*)a.out)[u64(m) * a.out_stride + n] = u16(to_pair(gated(gate, up), 0.0f));
}
#endif

// Whether this is the last of the blocks that share columns, all of which have stored their parts. For some threads.
template <int threads>
__device__ __forceinline__ bool is_last_block(const Args& a, int thread, int num_blocks) {
    __shared__ u32 is_last;
    __threadfence();
    wait_for_team<threads>(0);
    if (thread == 0) is_last = atomicAdd(a.arrived + blockIdx.x, 1) == num_blocks - 1;
    wait_for_team<threads>(0);
    if (!is_last) return false;
    __threadfence();
    if (thread == 0) a.arrived[blockIdx.x] = 0;
    return true;
}

// Ask for this block's share of what is read next: kernels between two products leave the memory idle.
__device__ __forceinline__ void prefetch_next(const Args& a) {
#if __CUDA_ARCH__ >= 900
    if (a.next_bytes && threadIdx.x == 0) {
        const u8* begin = a.next + u64(blockIdx.y * gridDim.x + blockIdx.x) * a.next_bytes;
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(begin), "r"(a.next_bytes) : "memory");
    }
#endif
}
