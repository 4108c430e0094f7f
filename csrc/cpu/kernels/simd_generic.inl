// Sixteen lanes in plain C++ with the compilers' vector types (GCC, Clang), for any processor. See simd.inl for what
// each function means.

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

struct F32 { Floats v; };
struct I32 { Ints v; };
struct U8 { Words v; };

template <typename Vector>
inline Vector load_vector(const void* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <typename Function>
inline F32 f_each(Function value) {
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = value(i);
    return {load_vector<Floats>(lanes)};
}

inline F32 f_load(const float* p) { return {load_vector<Floats>(p)}; }
inline F32 f_load_n(const float* p, size_t n) {
    float lanes[16] = {};
    std::memcpy(lanes, p, n * sizeof(float));
    return f_load(lanes);
}
inline void f_store(float* p, const F32& x) { std::memcpy(p, &x.v, sizeof x.v); }
inline void f_store_n(float* p, const F32& x, size_t n) { std::memcpy(p, &x.v, n * sizeof(float)); }
inline F32 f_set1(float x) { return {x - Floats{}}; }
inline F32 f_add(const F32& x, const F32& y) { return {x.v + y.v}; }
inline F32 f_sub(const F32& x, const F32& y) { return {x.v - y.v}; }
inline F32 f_mul(const F32& x, const F32& y) { return {x.v * y.v}; }
inline F32 f_div(const F32& x, const F32& y) { return {x.v / y.v}; }
// Rounded twice: a fused one is a slow call where the processor has none. All other sets fuse; with PELTON_FUSED this
// one gives their bits (tests/csrc/fused.cpp).
#ifdef PELTON_FUSED
inline F32 f_fma(const F32& x, const F32& y, const F32& z) {
    return f_each([&](int i) { return std::fma(x.v[i], y.v[i], z.v[i]); });
}
#else
inline F32 f_fma(const F32& x, const F32& y, const F32& z) { return {x.v * y.v + z.v}; }
#endif
inline F32 f_max(const F32& x, const F32& y) { return {x.v > y.v ? x.v : y.v}; }
inline F32 f_min(const F32& x, const F32& y) { return {x.v < y.v ? x.v : y.v}; }
inline F32 f_abs(const F32& x) { return {Floats(Words(x.v) & 0x7fffffffu)}; }
inline F32 f_round(const F32& x) { return {(x.v + 12582912.0f) - 12582912.0f}; }  // to even, for |x| < 2^22
inline F32 f_scale2(const F32& x, const F32& n) {
    return {x.v * Floats((__builtin_convertvector(n.v, Ints) + 127) << 23)};
}
inline F32 f_less(const F32& x, const F32& y, const F32& yes, const F32& no) { return {x.v < y.v ? yes.v : no.v}; }

inline F32 f_load_f16(const uint16_t* p) { return f_each([&](int i) { return from_f16(p[i]); }); }
inline F32 f_load_bf16(const uint16_t* p) { return f_each([&](int i) { return from_bf16(p[i]); }); }
inline F32 f_load_i8(const int8_t* p) { return f_each([&](int i) { return float(p[i]); }); }
inline F32 f_load_u8(const uint8_t* p) { return f_each([&](int i) { return float(p[i]); }); }
inline void f_store_f16(uint16_t* p, const F32& x) { for (int i = 0; i < 16; ++i) p[i] = to_f16(x.v[i]); }
inline void f_store_bf16(uint16_t* p, const F32& x) { for (int i = 0; i < 16; ++i) p[i] = to_bf16(x.v[i]); }
inline void f_store_i8(int8_t* p, const F32& x) {
    const Floats bounded = f_round(f_max(f_min(x, f_set1(127.0f)), f_set1(-128.0f))).v;
    for (int i = 0; i < 16; ++i) p[i] = int8_t(bounded[i] == bounded[i] ? bounded[i] : 0.0f);
}

inline float f_sum(const F32& x) {
    float lanes[16];
    f_store(lanes, x);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
inline float f_most(const F32& x, const F32& y) {  // compared as integers, a NaN is larger than infinity
    const Ints a = Ints(f_abs(x).v), b = Ints(f_abs(y).v), bits = a > b ? a : b;
    int32_t most = 0;
    for (int i = 0; i < 16; ++i) most = bits[i] > most ? bits[i] : most;
    return as_float(uint32_t(most));
}
inline float f_hmax(const F32& x) {
    float most = x.v[0];
    for (int i = 1; i < 16; ++i) most = x.v[i] > most ? x.v[i] : most;
    return most;
}

inline I32 i_set1(int32_t x) { return {x - Ints{}}; }
inline I32 i_zero() { return {Ints{}}; }
inline F32 f_from_i32(const I32& x) { return {__builtin_convertvector(x.v, Floats)}; }
inline int32_t i_sum_i8(const int8_t* p) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += p[i];
    return sum;
}

inline U8 b_load(const uint8_t* p) { return {load_vector<Words>(p)}; }
inline void b_store(uint8_t* p, const U8& x) { std::memcpy(p, &x.v, sizeof x.v); }
template <int mask>
inline U8 b_and(const U8& x) { return {x.v & uint32_t(mask) * 0x01010101u}; }
template <int n>
inline U8 b_shr(const U8& x) { return {x.v >> n}; }
template <int n>
inline U8 b_shl(const U8& x) { return {x.v << n}; }
inline U8 b_or(const U8& x, const U8& y) { return {x.v | y.v}; }
inline U8 b_table(const uint8_t* sixteen) {
    uint8_t bytes[64];
    for (int i = 0; i < 64; ++i) bytes[i] = sixteen[i % 16];
    return b_load(bytes);
}
inline U8 b_lookup(const U8& table, const U8& index) {
    uint8_t entries[64], bytes[64];
    b_store(entries, table), b_store(bytes, index);
    for (int i = 0; i < 64; ++i) bytes[i] = entries[bytes[i] & 15];
    return b_load(bytes);
}

template <int j>
inline Ints byte(const U8& w) { return Ints(w.v >> 8 * j & 255u); }
template <int bits>
inline I32 i_dot(const I32& sum, const U8& w, int32_t x) {
    int8_t b[4];
    std::memcpy(b, &x, 4);
    return {sum.v + byte<0>(w) * int32_t(b[0]) + byte<1>(w) * int32_t(b[1]) + byte<2>(w) * int32_t(b[2]) +
            byte<3>(w) * int32_t(b[3])};
}
template <int j>
inline F32 f_byte(const U8& w) { return {__builtin_convertvector(byte<j>(w), Floats)}; }

inline F32 f_even_bf16(const uint16_t* p) { return {Floats(load_vector<Words>(p) << 16)}; }
inline F32 f_odd_bf16(const uint16_t* p) { return {Floats(load_vector<Words>(p) & 0xffff0000u)}; }
