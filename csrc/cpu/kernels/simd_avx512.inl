// Sixteen lanes with AVX-512 (F, BW, DQ, VL, VNNI; BF16 where the compiler is told so). See simd.inl for what each
// function means.
#include <immintrin.h>

struct F32 { __m512 v; };
struct I32 { __m512i v; };
struct U8 { __m512i v; };

inline F32 f_load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F32 f_load_n(const float* p, size_t n) { return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)}; }
inline void f_store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
inline void f_store_n(float* p, F32 a, size_t n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a.v); }
inline F32 f_set1(float x) { return {_mm512_set1_ps(x)}; }
inline F32 f_add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 f_sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 f_mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 f_div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 f_fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 f_max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 f_min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 f_abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
inline F32 f_round(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 f_scale2(F32 a, F32 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline F32 f_less(F32 a, F32 b, F32 yes, F32 no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}

inline F32 f_load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F32 f_load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline F32 f_load_i8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline F32 f_load_u8(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void f_store_f16(uint16_t* p, F32 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void f_store_i8(int8_t* p, F32 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
#ifdef __AVX512BF16__
inline void f_store_bf16(uint16_t* p, F32 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), __m256i(_mm512_cvtneps_pbh(a.v)));
}
#else
inline void f_store_bf16(uint16_t* p, F32 a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i top = _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(rounded, 16), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(top));
}
#endif

// The same tree of sums on every instruction set.
inline float f_sum(F32 a) {
    const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline float f_most(F32 a, F32 b) {  // compared as integers, a NaN is larger than infinity
    const __m512i bits = _mm512_max_epu32(_mm512_castps_si512(f_abs(a).v), _mm512_castps_si512(f_abs(b).v));
    const __m256i half = _mm256_max_epu32(_mm512_castsi512_si256(bits), _mm512_extracti64x4_epi64(bits, 1));
    const __m128i c = _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i d = _mm_max_epu32(c, _mm_shuffle_epi32(c, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epu32(d, _mm_shuffle_epi32(d, 0xb1))));
}
inline float f_hmax(F32 a) { return _mm512_reduce_max_ps(a.v); }

inline I32 i_zero() { return {_mm512_setzero_si512()}; }
inline I32 i_set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline F32 f_from_i32(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline int32_t i_sum_i8(const int8_t* p) {  // of 16 numbers
    const __m128i wide = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1),
                                          _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m128i half = _mm_add_epi32(wide, _mm_shuffle_epi32(wide, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

inline U8 b_load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void b_store(uint8_t* p, U8 a) { _mm512_storeu_si512(p, a.v); }
template <int mask>
inline U8 b_and(U8 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(char(mask)))}; }
template <int n>
inline U8 b_shr(U8 a) { return {n == 0 ? a.v : _mm512_srli_epi16(a.v, n)}; }
template <int n>
inline U8 b_shl(U8 a) { return {n == 0 ? a.v : _mm512_slli_epi16(a.v, n)}; }
inline U8 b_or(U8 a, U8 b) { return {_mm512_or_si512(a.v, b.v)}; }
inline U8 b_table(const uint8_t* sixteen) {
    return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)))};
}
inline U8 b_lookup(U8 table, U8 index) { return {_mm512_shuffle_epi8(table.v, index.v)}; }

template <int bits>
inline I32 i_dot(I32 sum, U8 w, int32_t x) { return {_mm512_dpbusd_epi32(sum.v, w.v, _mm512_set1_epi32(x))}; }

// Byte `j` of each lane as a number.
template <int j>
inline F32 f_byte(U8 w) {
    return {_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(w.v, 8 * j), _mm512_set1_epi32(255)))};
}

#ifdef __AVX512BF16__
#define PELTON_BF16_DOT
// Sixteen pairs of bfloat16.
struct Pairs { __m512bh v; };
inline Pairs p_load(const uint16_t* p) { return {__m512bh(_mm512_loadu_si512(p))}; }
inline void p_store(uint16_t* p, Pairs a) { _mm512_storeu_si512(p, __m512i(a.v)); }
inline Pairs p_set1(const uint16_t* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return {__m512bh(_mm512_set1_epi32(x))};
}
inline F32 p_dot(F32 sum, Pairs a, Pairs b) { return {_mm512_dpbf16_ps(sum.v, a.v, b.v)}; }
// Two rows of 16 as one row of 16 pairs.
inline Pairs p_zip(const uint16_t* first, const uint16_t* second) {
    const __m512i both = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first))),
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)), 1);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return {__m512bh(_mm512_permutexvar_epi16(order, both))};
}
#endif
// The two rows of 16 numbers in a row of 16 pairs of bfloat16.
inline F32 f_even_bf16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
}
inline F32 f_odd_bf16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000))))};
}
