// The vocabulary all kernels are written in: registers of sixteen lanes, whatever the processor calls them. Each
// isa_*.cpp chooses one of the files simd_*.inl before it includes the kernels.
//
//   F32    16 float32                 f_load, f_store, f_add ...; f_fma(a, b, c) = a b + c
//   I32    16 int32                   i_set1, i_dot
//   U8     16 lanes of 4 bytes        b_load, b_and, b_shr ... (shifts may move bits between bytes: mask them)
//   Pairs  16 pairs of bfloat16       only with PELTON_BF16_DOT
//
//   f_load_n, f_store_n     the first n lanes; the rest read as 0, or stay
//   f_scale2(a, n)          a * 2^n for whole n within float's exponents
//   f_less(a, b, yes, no)   in each lane yes where a < b, else no
//   f_most(a, b)            the largest magnitude; not finite if any lane is not
//   f_sum                   the sum of all lanes, always by the same tree
//   i_dot<bits>(s, w, x)    s + the sum of 4 products of a lane's unsigned bytes (< 2^bits) and the signed bytes of x
//   b_lookup(table, index)  for each byte its entry in a table of 16; index bytes < 16

// e^x for x <= 88 to a few units in the last place: x = n ln 2 + r, a polynomial in r (its Taylor coefficients,
// adjusted at the end), then the exponent. Below -87, and for minus infinity, the result is 0.
inline F32 f_exp(F32 x) {
    const F32 low = f_set1(-87.0f);
    const F32 bounded = f_max(low, x);  // this way round a NaN stays
    const F32 n = f_round(f_mul(bounded, f_set1(1.44269504f)));
    F32 r = f_fma(n, f_set1(-0.693359375f), bounded);
    r = f_fma(n, f_set1(2.12194440e-4f), r);
    F32 y = f_set1(1.9875691500e-4f);
    y = f_fma(y, r, f_set1(1.3981999507e-3f));
    y = f_fma(y, r, f_set1(8.3334519073e-3f));
    y = f_fma(y, r, f_set1(4.1665795894e-2f));
    y = f_fma(y, r, f_set1(1.6666665459e-1f));
    y = f_fma(y, r, f_set1(5.0000001201e-1f));
    y = f_fma(y, f_mul(r, r), f_add(r, f_set1(1.0f)));
    return f_less(x, low, f_set1(0.0f), f_scale2(y, n));
}


inline float exp_one(float x) {
    alignas(64) float lanes[16];
    f_store(lanes, f_exp(f_set1(x)));
    return lanes[0];
}

// Calls f(i, n) for pieces of at most 16 numbers that cover dim.
template <typename Function>
inline void each_piece(size_t dim, Function&& f) {
    size_t i = 0;
    for (; i + 16 <= dim; i += 16) f(i, size_t(16));
    if (i < dim) f(i, dim - i);
}
inline F32 load_piece(const float* p, size_t n) { return n == 16 ? f_load(p) : f_load_n(p, n); }
inline void store_piece(float* p, F32 x, size_t n) { n == 16 ? f_store(p, x) : f_store_n(p, x, n); }
