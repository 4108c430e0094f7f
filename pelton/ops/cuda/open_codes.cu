#define ENTRY 4
#include "tiles.cuh"

// The weights themselves times a factor, in x's type: all rows, or those that are asked for, of which a warp then reads
// 15 others too. One warp opens 16 rows x 64 columns.
extern "C" __global__ void __launch_bounds__(256) open_codes(const __grid_constant__ Args a) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, num_blocks = a.K / 64;
    wait_for_inputs();
    const int warp = blockIdx.y * 8 + threadIdx.x / 32, id = a.ids ? int(a.ids[blockIdx.x]) : -1;
    const int tile = a.ids ? id / 16 : blockIdx.x;
    if (warp >= num_blocks) return;
    Piece p;
    load(p, place_of(a, tile, lane), warp);
    for (int s = 0; s < 4; ++s)
        for (int r = 0; r < 2; ++r) {
            const int n = 16 * tile + g + 8 * r, k = 64 * warp + FOUR_COLUMNS(s, t), group = s / (4 / GROUPS);
            if (n >= a.N || (a.ids && n != id)) continue;
            const float d = a.factor * scale_of(p, r, group, 0);
            u32 pairs[2];
            for (int half = 0; half < 2; ++half) {
                const int j = r + 2 * half;
#if LOOKUP
                const u32 u = word(p.codes[0], s) >> (8 * j);
                float low = d * a.values[u & 15], high = d * a.values[u >> 4 & 15];
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
