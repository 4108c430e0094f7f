// What is done to rows of activations between matrix products. Included once per instruction set.

// Squares are summed in 16 lanes, whatever the instruction set.
inline float sum_of_squares(const float* x, size_t dim) {
    F32 sums = f_set1(0.0f);
    size_t i = 0;
    for (; i + 16 <= dim; i += 16) {
        const F32 v = f_load(x + i);
        sums = f_fma(v, v, sums);
    }
    if (i < dim) {
        const F32 v = f_load_n(x + i, dim - i);
        sums = f_fma(v, v, sums);
    }
    return f_sum(sums);
}

// Zhang and Sennrich, 2019, arXiv:1910.07467.
inline void rms_norm_row(float* out, const float* x, const float* weight, size_t dim, float eps, bool accumulate) {
    const F32 scale = f_set1(1.0f / std::sqrt(sum_of_squares(x, dim) / float(dim) + eps));
    each_piece(dim, [&](size_t i, size_t n) {
        const F32 y = f_mul(f_mul(load_piece(x + i, n), scale), load_piece(weight + i, n));
        store_piece(out + i, accumulate ? f_add(load_piece(out + i, n), y) : y, n);
    });
}

inline void rms_norm(const RmsNormArgs& a, size_t num_rows, const Team& team) {
    const Range mine = team.share(num_rows);
    for (size_t r = mine.begin; r < mine.end; ++r)
        rms_norm_row(a.out + r * a.out_stride, a.x + r * a.x_stride, a.weight, a.dim, a.eps, a.accumulate);
}

// 1 / (1 + e^-x)
inline F32 f_sigmoid(F32 x) {
    const F32 one = f_set1(1.0f), e = f_exp(f_min(f_set1(88.0f), f_sub(f_set1(0.0f), x)));  // 88: no overflow
    return f_div(one, f_add(one, e));
}
// tanh(x) = 2 sigmoid(2 x) - 1; near 0, where that cancels, x - x^3 / 3 + 2 x^5 / 15
inline F32 f_tanh(F32 x) {
    const F32 far = f_sub(f_mul(f_set1(2.0f), f_sigmoid(f_add(x, x))), f_set1(1.0f)), square = f_mul(x, x);
    const F32 near = f_mul(x, f_fma(square, f_fma(square, f_set1(2.0f / 15.0f), f_set1(-1.0f / 3.0f)), f_set1(1.0f)));
    return f_less(f_abs(x), f_set1(0.1f), near, far);
}

inline void gated(const GatedArgs& a, size_t num_rows, const Team& team) {
    const Range mine = team.share(num_rows);
    for (size_t r = mine.begin; r < mine.end; ++r) {
        const float* x = a.x + r * a.x_stride;
        float* out = a.out + r * a.out_stride;
        each_piece(a.dim, [&](size_t i, size_t n) {
            const F32 g = load_piece(x + i, n), up = load_piece(x + a.dim + i, n);
            F32 y;
            if (a.gate == Gate::silu) {
                y = f_mul(g, f_sigmoid(g));
            } else {  // x sigmoid(2 z) = x (1 + tanh z) / 2, z = sqrt(2 / pi) (x + 0.044715 x^3)
                const F32 z = f_mul(f_fma(f_mul(f_mul(g, g), g), f_set1(0.044715f), g), f_set1(0.7978845608f));
                y = f_mul(g, f_sigmoid(f_add(z, z)));
            }
            store_piece(out + i, f_mul(y, up), n);
        });
    }
}

inline void softcap(const SoftcapArgs& a, size_t num_rows, const Team& team) {
    const Range mine = team.share(num_rows);
    for (size_t r = mine.begin; r < mine.end; ++r) {
        float* x = a.x + r * a.stride;
        each_piece(a.dim, [&](size_t i, size_t n) {
            const F32 y = f_mul(load_piece(x + i, n), f_set1(1.0f / a.cap));
            store_piece(x + i, f_mul(f_set1(a.cap), f_tanh(y)), n);
        });
    }
}

// Sixteen numbers from `at` on.
inline F32 load_numbers(const void* base, size_t at, Type type) {
    if (type == Type::f32) return f_load(static_cast<const float*>(base) + at);
    if (type == Type::bf16) return f_load_bf16(static_cast<const uint16_t*>(base) + at);
    if (type == Type::f16) return f_load_f16(static_cast<const uint16_t*>(base) + at);
    return f_load_i8(static_cast<const int8_t*>(base) + at);
}

inline void gather(const GatherArgs& a, size_t num_rows, const Team& team) {
    const size_t size = a.type == Type::f32 ? 4 : 2;
    const Range mine = team.share(num_rows);
    for (size_t r = mine.begin; r < mine.end; ++r) {
        const auto row = static_cast<const uint8_t*>(a.x) + size_t(a.ids[r]) * a.x_stride * size;
        each_piece(a.dim, [&](size_t i, size_t n) {
            alignas(64) uint8_t piece[64] = {};  // rows may begin at an odd address
            std::memcpy(piece, row + i * size, n * size);
            store_piece(a.out + r * a.out_stride + i, f_mul(load_numbers(piece, 0, a.type), f_set1(a.scale)), n);
        });
    }
}

inline void angles(const AnglesArgs& a, size_t num_rows, const Team& team) {
    const Range mine = team.share(num_rows);
    for (size_t r = mine.begin; r < mine.end; ++r)
        for (size_t i = 0; i < a.half; ++i) {
            const float angle = float(a.positions[r]) * a.inv_freq[i];
            a.cos[r * a.half + i] = std::cos(angle) * a.magnitude;
            a.sin[r * a.half + i] = std::sin(angle) * a.magnitude;
        }
}
