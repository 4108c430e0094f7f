// Root-mean-square norm of rows (Zhang and Sennrich, 2019, arXiv:1910.07467). Included once per instruction set.

// Squares are summed in 16 fixed lanes: compilers vectorise that without leave to reorder sums, and the result is
// the same bits on every instruction set.
template <typename T>
float sum_of_squares(const T* x, size_t dim) {
    constexpr size_t lanes = 16;
    float sums[lanes] = {};
    size_t i = 0;
    for (; i + lanes <= dim; i += lanes)
        for (size_t lane = 0; lane < lanes; ++lane) {
            const float value = to_float(x[i + lane]);
            sums[lane] += value * value;
        }
    for (size_t lane = 0; i < dim; ++i, ++lane) {
        const float value = to_float(x[i]);
        sums[lane] += value * value;
    }
    for (size_t half = lanes / 2; half > 0; half /= 2)
        for (size_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    return sums[0];
}

template <typename T>
void rms_norm(T* out, const T* x, const float* weight, size_t num_rows, size_t dim, size_t out_stride,
              size_t x_stride, float eps) {
    for (size_t row = 0; row < num_rows; ++row, out += out_stride, x += x_stride) {
        const float scale = 1.0f / std::sqrt(sum_of_squares(x, dim) / static_cast<float>(dim) + eps);
        for (size_t i = 0; i < dim; ++i) store(&out[i], to_float(x[i]) * scale * weight[i]);
    }
}
