// x [M, K] as many_rows.cu copies it: [rows / (8 NT)][columns / 128][mma][two of each][NT][8 rows][8 columns]; zeros where
// there are no rows or columns. Which columns an mma takes from a lane is as in tiles.cuh. Defined when compiled: GROUP_16.
#define HALF 0
#include "common.cuh"

struct Args {
    uint4* out;
    const u16* x;  // rows x_stride apart
    int M, K, x_stride, NT;
};

// A thread has 32 columns of a row: what two mma take of it.
extern "C" __global__ void __launch_bounds__(256) lay_out(const __grid_constant__ Args a) {
    wait_for_inputs();
    let_next_begin();
    const int num_chunks = (a.K + 127) / 128, lane = threadIdx.x % 32, warp = blockIdx.x * 8 + threadIdx.x / 32;
    const int chunk = warp % num_chunks, band = warp / num_chunks;  // of eight rows
    const int m = 8 * band + lane % 8, q = lane / 8, k = 128 * chunk + 32 * q;
    u32 words[16] = {};
    if (m < a.M && k < a.K)
#pragma unroll
        for (int i = 0; i < 4; ++i) *(uint4*)(words + 4 * i) = ((const uint4*)(a.x + u64(m) * a.x_stride + k))[i];
    uint4* to = a.out + (u64(band / a.NT * num_chunks + chunk) * 16 * a.NT + band % a.NT) * 8 + lane % 8;
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int first = GROUP_16 ? 8 * s + half : 2 * s + half, step = GROUP_16 ? 2 : 4;
            to[(2 * (2 * q + s) + half) * a.NT * 8] =
                make_uint4(words[first], words[first + step], words[first + 2 * step], words[first + 3 * step]);
        }
}
