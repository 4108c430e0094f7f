// float32 <-> element type, branch-free so that compilers vectorise loops over them. Included once per instruction set.

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void store(float* out, float value) { *out = value; }

// Rounds to nearest, ties to even; a NaN stays a NaN.
inline void store(bf16* out, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    out->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}
