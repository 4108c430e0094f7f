// Sixteen lanes with NEON and its dot product extension, as four registers of four; with the extension of matrix
// products (I8MM) where the compiler is told so. See simd.inl for what each function means.

struct F32 { float32x4_t v[4]; };
struct I32 { int32x4_t v[4]; };
struct U8 { uint8x16_t v[4]; };

// The register f(i) for each i.
template <typename T, typename Function>
inline T each(Function&& f) { return {{f(0), f(1), f(2), f(3)}}; }

inline F32 f_load(const float* p) {
    return each<F32>([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void f_store(float* p, F32 x) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
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
inline F32 f_set1(float x) { return each<F32>([&](int) { return vdupq_n_f32(x); }); }
inline F32 f_add(F32 x, F32 y) { return each<F32>([&](int i) { return vaddq_f32(x.v[i], y.v[i]); }); }
inline F32 f_sub(F32 x, F32 y) { return each<F32>([&](int i) { return vsubq_f32(x.v[i], y.v[i]); }); }
inline F32 f_mul(F32 x, F32 y) { return each<F32>([&](int i) { return vmulq_f32(x.v[i], y.v[i]); }); }
inline F32 f_div(F32 x, F32 y) { return each<F32>([&](int i) { return vdivq_f32(x.v[i], y.v[i]); }); }
inline F32 f_fma(F32 x, F32 y, F32 z) {
    return each<F32>([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); });
}
inline F32 f_less(F32 x, F32 y, F32 yes, F32 no) {
    return each<F32>([&](int i) { return vbslq_f32(vcltq_f32(x.v[i], y.v[i]), yes.v[i], no.v[i]); });
}
// Not NEON's own: these give y where a lane is a NaN.
inline F32 f_max(F32 x, F32 y) { return f_less(y, x, x, y); }
inline F32 f_min(F32 x, F32 y) { return f_less(x, y, x, y); }
inline F32 f_abs(F32 x) { return each<F32>([&](int i) { return vabsq_f32(x.v[i]); }); }
inline F32 f_round(F32 x) { return each<F32>([&](int i) { return vrndnq_f32(x.v[i]); }); }
inline F32 f_scale2(F32 x, F32 n) {
    return each<F32>([&](int i) {
        const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127));
        return vmulq_f32(x.v[i], vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
    });
}

inline F32 f_load_f16(const uint16_t* p) {
    return each<F32>([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline F32 f_load_bf16(const uint16_t* p) {
    return each<F32>([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
inline F32 f_load_i8(const int8_t* p) {
    const int8x16_t bytes = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
}
inline F32 f_load_u8(const uint8_t* p) {
    const uint8x16_t bytes = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
    return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_high_u16(low)),
             vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_high_u16(high))}};
}
inline void f_store_f16(uint16_t* p, F32 x) {
    for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
}
inline void f_store_i8(int8_t* p, F32 x) {
    int16x4_t words[4];
    for (int i = 0; i < 4; ++i) words[i] = vqmovn_s32(vcvtnq_s32_f32(x.v[i]));
    const int16x8_t low = vcombine_s16(words[0], words[1]), high = vcombine_s16(words[2], words[3]);
    vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}
inline void f_store_bf16(uint16_t* p, F32 x) {
    float lanes[16];
    f_store(lanes, x);
    for (int i = 0; i < 16; ++i) p[i] = to_bf16(lanes[i]);
}

inline float f_sum(F32 x) {  // the same tree of sums on every instruction set
    const float32x4_t a = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
    const float32x2_t b = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(b, 0) + vget_lane_f32(b, 1);
}
inline float f_most(F32 x, F32 y) {  // compared as integers, a NaN is larger than infinity
    const auto bits = [](F32 z, int i) { return vreinterpretq_u32_f32(vabsq_f32(z.v[i])); };
    uint32x4_t most = vmaxq_u32(bits(x, 0), bits(y, 0));
    for (int i = 1; i < 4; ++i) most = vmaxq_u32(most, vmaxq_u32(bits(x, i), bits(y, i)));
    return as_float(vmaxvq_u32(most));
}
inline float f_hmax(F32 x) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
}

inline I32 i_set1(int32_t x) { return each<I32>([&](int) { return vdupq_n_s32(x); }); }
inline I32 i_zero() { return i_set1(0); }
inline F32 f_from_i32(I32 x) { return each<F32>([&](int i) { return vcvtq_f32_s32(x.v[i]); }); }
inline int32_t i_sum_i8(const int8_t* p) { return vaddlvq_s8(vld1q_s8(p)); }

inline U8 b_load(const uint8_t* p) { return each<U8>([&](int i) { return vld1q_u8(p + 16 * i); }); }
inline void b_store(uint8_t* p, U8 x) {
    for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, x.v[i]);
}
template <int mask>
inline U8 b_and(U8 x) { return each<U8>([&](int i) { return vandq_u8(x.v[i], vdupq_n_u8(mask)); }); }
template <int n>
inline U8 b_shr(U8 x) { return each<U8>([&](int i) { return vshrq_n_u8(x.v[i], n); }); }
template <int n>
inline U8 b_shl(U8 x) { return each<U8>([&](int i) { return vshlq_n_u8(x.v[i], n); }); }
inline U8 b_or(U8 x, U8 y) { return each<U8>([&](int i) { return vorrq_u8(x.v[i], y.v[i]); }); }
inline U8 b_table(const uint8_t* sixteen) { return each<U8>([&](int) { return vld1q_u8(sixteen); }); }
inline U8 b_lookup(U8 table, U8 index) {
    return each<U8>([&](int i) { return vqtbl1q_u8(table.v[i], index.v[i]); });
}

#ifdef __ARM_FEATURE_MATMUL_INT8
template <int bits>
inline I32 i_dot(I32 sum, U8 w, int32_t x) {
    const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(x));
    return each<I32>([&](int i) { return vusdotq_s32(sum.v[i], w.v[i], all); });
}
#else
// Both factors are signed: a code u of 8 bits is (u - 128) + 128, and 128 is 64 + 64.
template <int bits>
inline I32 i_dot(I32 sum, U8 w, int32_t x) {
    const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(x)), half = vdupq_n_s8(64);
    if constexpr (bits < 8) {
        return each<I32>([&](int i) { return vdotq_s32(sum.v[i], vreinterpretq_s8_u8(w.v[i]), all); });
    } else {
        const int32x4_t offset = vdotq_s32(vdotq_s32(vdupq_n_s32(0), half, all), half, all);
        return each<I32>([&](int i) {
            const int8x16_t less = vreinterpretq_s8_u8(veorq_u8(w.v[i], vdupq_n_u8(128)));
            return vdotq_s32(vaddq_s32(sum.v[i], offset), less, all);
        });
    }
}
#endif

template <int j>
inline F32 f_byte(U8 w) {
    return each<F32>([&](int i) {
        return vcvtq_f32_u32(vshrq_n_u32(vshlq_n_u32(vreinterpretq_u32_u8(w.v[i]), 24 - 8 * j), 24));
    });
}

inline uint32x4_t load_pairs(const uint16_t* p) { return vreinterpretq_u32_u16(vld1q_u16(p)); }
inline F32 f_even_bf16(const uint16_t* p) {
    return each<F32>([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(load_pairs(p + 8 * i), 16)); });
}
inline F32 f_odd_bf16(const uint16_t* p) {
    const uint32x4_t upper = vdupq_n_u32(0xffff0000u);
    return each<F32>([&](int i) { return vreinterpretq_f32_u32(vandq_u32(load_pairs(p + 8 * i), upper)); });
}
