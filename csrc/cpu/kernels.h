// What the kernels are given, and the table of them that each instruction set fills in. A kernel takes raw pointers and
// checks nothing; bindings.cpp did. Activations are float32 rows, `stride` elements apart; weights and caches have
// types of their own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sample.h"
#include "team.h"

namespace pelton {

enum class Type : uint8_t { f32, bf16, f16, i8 };

// --- weights ------------------------------------------------------------------------------------------------------

// A matrix [N, K] in the order it is multiplied in: tiles of 16 rows, each tile contiguous, columns in blocks of 32.
// `numbers`: the tile holds f32 or f16 as [K][16], or bf16 as [K / 2][16][2]. `codes`: unsigned numbers u of `bits`
// bits, of which groups of columns share a scale d and a minimum m, or a fixed zero z:  w = d u + m  or  w = d (u - z).
// `lookup`: 4-bit codes of 16 float32 values, w = d value[u].
enum class Storage : uint8_t { numbers, codes, lookup };

// How scales (and minima) are stored, for each group [16]: as f16, as f32, or as 8-bit multiples (signed without
// minima, else unsigned) of an f16 for every 256 columns.
enum class Scales : uint8_t { f16, f32, super };

struct Layout {
    Storage storage = Storage::numbers;
    Type type = Type::f32;          // of numbers
    uint8_t bits = 0;               // of codes: 2, 3, 4, 5, 6 or 8
    Scales scales = Scales::f16;    // of codes
    bool has_min = false;
    bool has_table = false;         // the code is an index into `table`, whose entries are the u
    int32_t zero = 0;
    uint32_t group = 32;            // columns that share a scale: 16, or a multiple of 32
    uint8_t table[16] = {};
    float values[16] = {};          // of lookup
};

struct Weight {
    Layout layout;
    size_t num_out = 0, num_in = 0;  // N, K
    size_t num_blocks = 0;           // of 32 columns, the last padded with zeros
    size_t tile_bytes = 0;
    // Offsets of a tile's parts: codes or numbers at 0.
    size_t scales_at = 0, mins_at = 0, super_at = 0, super_min_at = 0;
    uint8_t* data = nullptr;
    const int32_t* order = nullptr;  // column k of the tiles multiplies input order[k]; null: k

    size_t num_tiles() const { return (num_out + 15) / 16; }
    const uint8_t* tile(size_t i) const { return data + i * tile_bytes; }
};

// The precision of products: activations as int8 in blocks of 32, as bfloat16, or as they are.
enum class Activations : uint8_t { i8, bf16, f32 };

// out[r] = x[r] W^T (+ bias), or added to what is there.
struct LinearArgs {
    float* out;
    const float* x;
    const Weight* weight;
    const float* bias;  // or null
    size_t out_stride, x_stride;
    Activations activations;
    bool accumulate;
};

// out[r] = row ids[r] of W, times scale.
struct EmbedArgs {
    float* out;
    const int64_t* ids;
    const Weight* weight;
    size_t out_stride;
    float scale;
};

// --- rows ---------------------------------------------------------------------------------------------------------

// out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight, or added to what is there. `out` may be `x`.
struct RmsNormArgs {
    float* out;
    const float* x;
    const float* weight;
    size_t dim, out_stride, x_stride;
    float eps;
    bool accumulate;
};

enum class Gate : uint8_t { silu, gelu_tanh };

// out[r, i] = gate(x[r, i]) * x[r, dim + i]
struct GatedArgs {
    float* out;
    const float* x;
    size_t dim, out_stride, x_stride;
    Gate gate;
};

// x[r, i] = cap * tanh(x[r, i] / cap)
struct SoftcapArgs {
    float* x;
    size_t dim, stride;
    float cap;
};

// out[r] = x[ids[r]] * scale. x: numbers of `type` (f32, bf16 or f16), at any address.
struct GatherArgs {
    float* out;
    const void* x;
    const int64_t* ids;
    size_t dim, out_stride, x_stride;
    Type type;
    float scale;
};

// --- attention ----------------------------------------------------------------------------------------------------

// The paged cache of one layer. Within a block of S slots and for each of G heads, keys lie as [D][S] and values as
// [S][D]. int8 numbers have a float32 scale for each head and slot: scales [B, G, S].
struct Cache {
    void* keys;
    void* values;
    float* key_scales;    // only with Type::i8
    float* value_scales;
    size_t num_blocks, block_size, num_kv_heads, head_size;
    Type type;
};

// cos and sin of position * inv_freq, times magnitude: [rows, half] each.
struct AnglesArgs {
    float* cos;
    float* sin;
    const int64_t* positions;
    const float* inv_freq;
    size_t half;
    float magnitude;
};

// For each row of qkv [H + 2G heads of D]: normalise the query and key heads (where weights are given), rotate them,
// write keys and values to the row's slot of the cache. The queries stay in qkv.
struct RopeStoreArgs {
    float* qkv;
    const float* cos;
    const float* sin;
    const float* q_weight;  // or null
    const float* k_weight;
    const int64_t* slots;
    Cache cache;
    size_t qkv_stride, num_heads;
    float eps;
};

// Causal attention of each request's new rows over its context. Request r owns rows query_starts[r] to
// query_starts[r + 1]; its block ids are block_table[r * table_stride ...].
struct AttentionArgs {
    float* out;
    const float* query;
    const int64_t* query_starts;   // [num_requests + 1]
    const int64_t* context_lens;   // [num_requests]
    const int64_t* block_table;
    Cache cache;
    size_t num_requests, table_stride, num_heads, out_stride, query_stride;
    size_t window;                 // 0: none
    float scale, softcap;          // softcap 0: none
};

// --- the table ----------------------------------------------------------------------------------------------------

template <typename Args>
using Kernel = void (*)(const Args& args, size_t num_rows, const Team& team);

struct Kernels {
    const char* isa;
    Kernel<LinearArgs> linear;
    Kernel<EmbedArgs> embed;
    Kernel<RmsNormArgs> rms_norm;
    Kernel<GatedArgs> gated;
    Kernel<SoftcapArgs> softcap;
    Kernel<GatherArgs> gather;
    Kernel<AnglesArgs> angles;
    Kernel<RopeStoreArgs> rope_store;
    Kernel<AttentionArgs> attention;
    Kernel<SampleArgs> sample;
    Scratch (*linear_scratch)(const LinearArgs& args, size_t num_rows);
    Scratch (*attention_scratch)(const AttentionArgs& args, size_t num_rows);
    bool has_bf16_dot;
};

extern const Kernels generic_kernels;
#ifdef PELTON_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_vnni_kernels;
extern const Kernels avx512_bf16_kernels;
#endif
#ifdef PELTON_ARM
extern const Kernels neon_kernels;
extern const Kernels neon_i8mm_kernels;
#endif

// The tables this processor can run, best first, ended by nullptr; decided once.
const Kernels* const* supported_kernels();

}  // namespace pelton
