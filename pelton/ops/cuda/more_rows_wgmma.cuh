// more_rows.cu where four warps multiply together: how x comes to shared memory, and a chunk's product.
#include "wgmma.cuh"

// Two chunks of x in shared memory. Each warp brings pieces of 8 rows and 32 columns, a lane what are its columns: a pair
// of numbers for each of four matrices. They pass through registers, a chunk ahead.
struct Inputs {
    static constexpr int bytes = 2 * ROWS * CHUNK * 2;
    static constexpr int all = CHUNK / 32 * NT, own = all < WARPS ? 1 : all / WARPS;
    u16* memory;
    int end, num_in;
    const u16* from[own];
    u32 to[own];      // bytes within a chunk
    bool is_late[own];  // in the second half
    u32 held[own][4];

    __device__ Inputs(const Args& a, u16* memory, int end, int warp, int lane) : memory(memory), end(end), num_in(a.K) {
#pragma unroll
        for (int i = 0; i < own; ++i) {
            const int piece = (warp + i * WARPS) % all, n = piece % NT, q = piece / NT;
            const int row = min(8 * n + lane / 4, a.M - 1);  // rows that are none give sums that nobody stores
            from[i] = a.x + u64(row) * a.x_stride + 64 * (q / 2) + FOUR_COLUMNS(q % 2 * 2, lane % 4);
            to[i] = 128 * (4 * q * NT + n) + 4 * lane;
            is_late[i] = q >= 2;
        }
    }
    __device__ __forceinline__ void load(int chunk) {
        if (chunk >= end) return;
        const bool has_late = CHUNK * chunk + 64 < num_in;
#pragma unroll
        for (int i = 0; i < own; ++i) {
            const bool is_there = !is_late[i] || has_late;
#if GROUP == 16
            for (int e = 0; e < 2; ++e) {
                uint2 v = make_uint2(0, 0);
                if (is_there) v = *(const uint2*)(from[i] + CHUNK * chunk + FOUR_COLUMNS(e, 0));
                held[i][2 * e] = v.x, held[i][2 * e + 1] = v.y;
            }
#else
            uint4 v = make_uint4(0, 0, 0, 0);
            if (is_there) v = *(const uint4*)(from[i] + CHUNK * chunk);
            held[i][0] = v.x, held[i][1] = v.y, held[i][2] = v.z, held[i][3] = v.w;
#endif
        }
    }
    __device__ __forceinline__ void store(int chunk) const {
#pragma unroll
        for (int i = 0; i < own; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) *(u32*)((u8*)of(chunk, 0) + to[i] + 128 * NT * j) = held[i][j];
    }
    // Before the first chunk.
    __device__ __forceinline__ void begin(int first) {
        load(first);
        store(first);
        load(first + 1);
    }
    // What was stored, to what reads it, which is not the threads.
    __device__ __forceinline__ void show() const { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
    // While a chunk is multiplied.
    __device__ __forceinline__ void advance(int chunk, int) {
        store(chunk + 1);
        load(chunk + 2);
    }
    __device__ __forceinline__ u16* of(int chunk, int) const { return memory + chunk % 2 * ROWS * CHUNK; }
};

// Multiply a chunk with the tiles of a warp: 64 columns at most for each tile, while the next are being opened.
__device__ __forceinline__ void multiply(Sums& sums, const u16* x, const u8 (&own_w)[2][MT][32 * PIECE_BYTES],
                                         const u32* table, int lane) {
    constexpr int per_group = STEPS / GROUPS_OF_CHUNK, each = per_group < 4 ? per_group : 4, parts = per_group / each;
    constexpr int units = MT * GROUPS_OF_CHUNK * parts;  // [group][tile][part of the group]
    const u64 all_x = describe_x(x);
    Piece w[MT];
    u32 a[2][each][4];
    float own[2][4 * NT], x_sums[2][4 * NT], scales[2][2], minima[2][2];
    (void)x_sums, (void)minima;
#pragma unroll
    for (int unit = 0; unit <= units; ++unit) {
        if (unit < units) {
            const int group = unit / parts / MT, i = unit / parts % MT, part = unit % parts, slot = unit / parts % 2;
            const int first = group * per_group + part * each;
#pragma unroll
            for (int q = 0; q < each; ++q) {
                const int s = first + q;
                if (s % 4 == 0) read_w(w[i], own_w[s / 4][i], lane);
                operand(a[unit % 2][q], w[i], s % 4, table);
#pragma unroll
                for (int j = 0; j < 4; ++j) a[unit % 2][q][j] = without_offset(a[unit % 2][q][j]);
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#if NUMBERS
                scales[slot][r] = 1.0f;
#else
                scales[slot][r] = scale_of(w[i], r, group % GROUPS, 0);
                if (MIN) minima[slot][r] = scale_of(w[i], r, group % GROUPS, MIN);
#endif
            }
            show_registers();
#if MIN
            const u32 one = to_pair(-1.0f, -1.0f), ones[4] = {one, one, one, one};
            if (i == 0)
#pragma unroll
                for (int q = 0; q < each; ++q)
                    begin_wgmma(x_sums[group % 2], ones, all_x + (first + q) * NEXT_X, part > 0 || q > 0);
#endif
#pragma unroll
            for (int q = 0; q < each; ++q)
                begin_wgmma(own[slot], a[unit % 2][q], all_x + (first + q) * NEXT_X, part > 0 || q > 0);
            close_wgmma();
        }
        if (unit > 0) {
            const int before = (unit - 1) / parts, group = before / MT, i = before % MT, slot = before % 2;
            if (unit < units)
                wait_for_wgmma<1>();
            else
                wait_for_wgmma<0>();
            if (unit % parts) continue;  // the group's sums are not complete
            changed(own[slot]);
#if MIN
            if (i == 0) changed(x_sums[group % 2]);
#endif
#pragma unroll
            for (int e = 0; e < 4 * NT; ++e) {
                float& sum = sums[i][e / 4][e % 4];
                sum += scales[slot][e / 2 % 2] * own[slot][e];
                if (MIN) sum += minima[slot][e / 2 % 2] * x_sums[group % 2][e];
            }
        }
    }
}
