// Sixteen lanes with AVX2, FMA and F16C, as two registers of eight. See simd.inl for what each function means.
#include <immintrin.h>

struct F32 { __m256 a, b; };
struct I32 { __m256i a, b; };
struct U8 { __m256i a, b; };

inline F32 f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void f_store(float* p, F32 x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline F32 f_load_n(const float* p, size_t n) {
    float lanes[16] = {};
    std::memcpy(lanes, p, n * sizeof(float));
    return f_load(lanes);
}
inline void f_store_n(float* p, F32 x, size_t n) {
    float lanes[16];
    f_store(lanes, x);
    std::memcpy(p, lanes, n * sizeof(float));
}
inline F32 f_set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32 f_add(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F32 f_sub(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F32 f_mul(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F32 f_div(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F32 f_fma(F32 x, F32 y, F32 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F32 f_max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F32 f_min(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F32 f_abs(F32 x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F32 f_round(F32 x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline __m256 scale2(__m256 x, __m256 n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline F32 f_scale2(F32 x, F32 n) { return {scale2(x.a, n.a), scale2(x.b, n.b)}; }
inline F32 f_less(F32 x, F32 y, F32 yes, F32 no) {
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}

inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i load64(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
inline F32 f_load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))}; }
inline __m256 from_bf16(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline F32 f_load_bf16(const uint16_t* p) { return {from_bf16(load128(p)), from_bf16(load128(p + 8))}; }
inline F32 f_load_i8(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load64(p))), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load64(p + 8)))};
}
inline F32 f_load_u8(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load64(p))), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load64(p + 8)))};
}
inline void f_store_f16(uint16_t* p, F32 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
inline void f_store_i8(int8_t* p, F32 x) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));  // lanes mixed
    const __m256i sorted = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi16(_mm256_castsi256_si128(sorted), _mm256_extracti128_si256(sorted, 1)));
}
inline void f_store_bf16(uint16_t* p, F32 x) {
    float lanes[16];
    f_store(lanes, x);
    for (int i = 0; i < 16; ++i) p[i] = to_bf16(lanes[i]);
}

inline float f_sum(F32 x) {
    const __m256 b = _mm256_add_ps(x.a, x.b);
    const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline float f_most(F32 x, F32 y) {  // compared as integers, a NaN is larger than infinity
    const F32 p = f_abs(x), q = f_abs(y);
    const __m256i bits = _mm256_max_epu32(_mm256_max_epu32(_mm256_castps_si256(p.a), _mm256_castps_si256(p.b)),
                                          _mm256_max_epu32(_mm256_castps_si256(q.a), _mm256_castps_si256(q.b)));
    const __m128i c = _mm_max_epu32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    const __m128i d = _mm_max_epu32(c, _mm_shuffle_epi32(c, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epu32(d, _mm_shuffle_epi32(d, 0xb1))));
}
inline float f_hmax(F32 x) {
    const __m256 b = _mm256_max_ps(x.a, x.b);
    const __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    const __m128 d = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}

inline I32 i_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I32 i_set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline F32 f_from_i32(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline int32_t i_sum_i8(const int8_t* p) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += p[i];
    return sum;
}

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline U8 b_load(const uint8_t* p) { return {load256(p), load256(p + 32)}; }
inline void b_store(uint8_t* p, U8 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), x.b);
}
template <int mask>
inline U8 b_and(U8 x) {
    const __m256i m = _mm256_set1_epi8(char(mask));
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
template <int n>
inline U8 b_shr(U8 x) { return {_mm256_srli_epi16(x.a, n), _mm256_srli_epi16(x.b, n)}; }
template <int n>
inline U8 b_shl(U8 x) { return {_mm256_slli_epi16(x.a, n), _mm256_slli_epi16(x.b, n)}; }
inline U8 b_or(U8 x, U8 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline U8 b_table(const uint8_t* sixteen) {
    const __m256i table = _mm256_broadcastsi128_si256(load128(sixteen));
    return {table, table};
}
inline U8 b_lookup(U8 table, U8 index) {
    return {_mm256_shuffle_epi8(table.a, index.a), _mm256_shuffle_epi8(table.b, index.b)};
}

// Products of up to 7 bits fit the instruction's 16-bit sums; those of 8 bits are widened first.
template <int bits>
inline __m256i dot(__m256i sum, __m256i w, __m256i x) {
    if constexpr (bits < 8) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
    } else {
        const __m256i w_even = _mm256_and_si256(w, _mm256_set1_epi16(255)), w_odd = _mm256_srli_epi16(w, 8);
        const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w_even, x_even));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(w_odd, x_odd));
    }
}
template <int bits>
inline I32 i_dot(I32 sum, U8 w, int32_t x) {
    const __m256i all = _mm256_set1_epi32(x);
    return {dot<bits>(sum.a, w.a, all), dot<bits>(sum.b, w.b, all)};
}

template <int j>
inline __m256 byte(__m256i w) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(w, 8 * j), _mm256_set1_epi32(255)));
}
template <int j>
inline F32 f_byte(U8 w) { return {byte<j>(w.a), byte<j>(w.b)}; }

inline F32 f_even_bf16(const uint16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(load256(p), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(load256(p + 16), 16))};
}
inline F32 f_odd_bf16(const uint16_t* p) {
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(load256(p), upper)),
            _mm256_castsi256_ps(_mm256_and_si256(load256(p + 16), upper))};
}
