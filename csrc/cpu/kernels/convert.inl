// float32 <-> 16-bit numbers, one at a time. Included once per instruction set.

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float from_bf16(uint16_t x) { return as_float(uint32_t(x) << 16); }

// Rounds to nearest, ties to even; a NaN stays a NaN.
inline uint16_t to_bf16(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float from_f16(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000u) << 16, rest = x & 0x7fffu;
    if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinite, or not a number
    if (rest < 0x400u) return as_float(sign | as_bits(float(rest) * 5.9604644775390625e-8f));  // subnormal: 2^-24 steps
    return as_float(sign | ((rest << 13) + (112u << 23)));
}

inline uint16_t to_f16(float value) {
    const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (rest >= 0x47800000u) return uint16_t(sign | 0x7c00u);
    if (rest < 0x38800000u) {  // subnormal: adding 0.5 puts steps of 2^-24 into the last bits
        const float shifted = as_float(rest) + 0.5f;
        return uint16_t(sign | (as_bits(shifted) - 0x3f000000u));
    }
    return uint16_t(sign | ((rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13));
}
