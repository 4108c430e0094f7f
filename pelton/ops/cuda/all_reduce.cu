// x = the sum of every rank's x, for few numbers: each rank writes its own straight into the others' memory and adds up
// what has come, in the order of ranks. A word of 8 bytes travels with the number of the call, twice, in one store: what
// reads it needs no other sign that it is there (the protocol that NCCL calls LL).
//
// A word has the same block in every call, if not the same number of blocks run. Calls of a block take turns between two
// halves of an inbox: who is in the next call but one has had an answer from all, each of whom has read what came before.
//
// Defined when compiled, beside what common.cuh names: SIZE (ranks), FLOAT32 (1: numbers are such), THREADS, BLOCKS (most).
#include "common.cuh"

struct Args {
    uint2* x;           // [num_words]
    u32* calls;         // [blocks], so far
    const int* stop;    // of the host: not 0 when a rank is lost
    uint4* inboxes[8];  // of each rank: [2][SIZE senders][most_words]
    int rank, num_words, most_words;
};

constexpr int EACH = FLOAT32 ? 2 : 4;  // numbers of a word

__device__ __forceinline__ float number_of(const uint2& word, int i) {
#if FLOAT32
    return __uint_as_float(i ? word.y : word.x);
#else
    const u32 pair = i < 2 ? word.x : word.y;
    return to_float(u16(i % 2 ? pair >> 16 : pair));
#endif
}

__device__ __forceinline__ uint2 to_word(const float (&numbers)[EACH]) {
#if FLOAT32
    return make_uint2(__float_as_uint(numbers[0]), __float_as_uint(numbers[1]));
#else
    return make_uint2(to_pair(numbers[0], numbers[1]), to_pair(numbers[2], numbers[3]));
#endif
}

__device__ __forceinline__ void send(uint4* to, const uint2& word, u32 call) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(word.x), "r"(call), "r"(word.y), "r"(call)
                 : "memory");
}

// The word of this call; false if it will never come.
__device__ __forceinline__ bool receive(uint2& word, const uint4* from, u32 call, const int* stop) {
    for (u32 i = 1;; ++i) {
        uint4 v;
        asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
        if (v.y == call && v.w == call) {
            word = make_uint2(v.x, v.z);
            return true;
        }
        if (i % 4096 == 0 && *(volatile const int*)stop) return false;  // reading the host's memory takes long
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) all_reduce(const __grid_constant__ Args a) {
    let_next_begin();
    wait_for_inputs();
    const int first = blockIdx.x * THREADS + threadIdx.x, stride = BLOCKS * THREADS;
    const u32 call = a.calls[blockIdx.x] + 1;
    const auto place = [&](int sender, int i) { return (u64(call % 2) * SIZE + sender) * a.most_words + i; };
    for (int i = first; i < a.num_words; i += stride) {
        const uint2 own = a.x[i];
#pragma unroll
        for (int r = 0; r < SIZE; ++r)
            if (r != a.rank) send(a.inboxes[r] + place(a.rank, i), own, call);
    }
    bool is_whole = true;
    for (int i = first; i < a.num_words && is_whole; i += stride) {
        const uint2 own = a.x[i];
        float sums[EACH];
#pragma unroll
        for (int r = 0; r < SIZE; ++r) {
            uint2 word = own;
            if (r != a.rank) is_whole = is_whole && receive(word, a.inboxes[a.rank] + place(r, i), call, a.stop);
#pragma unroll
            for (int e = 0; e < EACH; ++e) sums[e] = r ? sums[e] + number_of(word, e) : number_of(word, e);
        }
        if (is_whole) a.x[i] = to_word(sums);
    }
    __syncthreads();  // all have read the number of the call
    if (threadIdx.x == 0) a.calls[blockIdx.x] = call;
}
