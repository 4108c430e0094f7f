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
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int n = 16 * tile + g + 8 * r;
        if (n >= a.N || (a.ids && n != id)) continue;
        u16* to = (u16*)a.out + u64(a.ids ? blockIdx.x : n) * a.out_stride + 64 * warp;
#pragma unroll
        for (int s = 0; s < 4; s += 2) {  // two mma have eight columns that lie together, unless each has a group of its own
            u32 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int of = s + i / 2, j = r + 2 * (i % 2);
#if LOOKUP
                const u32 u = word(p.codes[0], of) >> (8 * j);
                pairs[i] = opened(p, of, j, make_float2(a.values[u & 15], a.values[u >> 4 & 15]), 0.0f, a.factor);
#else
                const float2 u = to_floats(code_pair(p, of, j));
                pairs[i] = opened(p, of, j, make_float2(u.x - OFFSET, u.y - OFFSET), 0.0f, a.factor);
#endif
            }
            if (GROUP != 16) {
                *(uint4*)(to + FOUR_COLUMNS(s, t)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            } else {
                *(uint2*)(to + FOUR_COLUMNS(s, t)) = make_uint2(pairs[0], pairs[1]);
                *(uint2*)(to + FOUR_COLUMNS(s + 1, t)) = make_uint2(pairs[2], pairs[3]);
            }
        }
    }
}
