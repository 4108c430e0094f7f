// Matrix products with packed weights: y = x W^T for rows x. Included once per instruction set.
//
// A micro-kernel multiplies some tiles of 16 outputs with a group of rows, so that what it loads is used several times
// and the sums stay in registers. Whatever the numbers of rows and tiles, each output is the same sum in the same
// order: blocks of 32 columns from left to right.

constexpr size_t block_columns = 32;
#if defined(__AVX512F__)
constexpr int max_group = 6, code_tiles = 2, number_tiles = 4;  // 24 of 32 registers are sums
#elif defined(__AVX2__) || defined(PELTON_NEON)
constexpr int max_group = 3, code_tiles = 1, number_tiles = 1;
#else
constexpr int max_group = 2, code_tiles = 1, number_tiles = 1;
#endif
// Bytes of activations that are multiplied with one set of open tiles after the other. The tiles stay in the
// second-level cache; a group of rows is read once for them, which the third level is fast enough for.
constexpr size_t rows_in_cache = 8 << 20;
constexpr size_t prefetch_distance = 16 << 10;  // bytes, into the second-level cache; measured on Zen 4

constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// --- the activations of a team's rows --------------------------------------------------------------------------------

struct Groups {
    size_t num_rows, count;
    explicit Groups(size_t rows) : num_rows(rows), count((rows + max_group - 1) / max_group) {}
    size_t begin(size_t group) const { return group * num_rows / count; }
    int size(size_t group) const { return int(begin(group + 1) - begin(group)); }
};

// Numbers of 4 bytes that a row of activations takes.
inline size_t row_words(const Weight& w, Activations kind) {
    const size_t columns = w.num_blocks * block_columns;
    if (kind == Activations::f32) return columns;
    if (kind == Activations::bf16) return columns / 2;
    const size_t per_block = w.layout.group == 16 ? 2 : 1;
    return w.num_blocks * (8 + 1 + per_block);
}

// What 16-bit or 8-bit products are done in: codes as asked, numbers of bfloat16 also as bfloat16, all others as float32.
inline Activations effective(const Weight& w, Activations asked) {
    if (w.layout.storage == Storage::codes && asked == Activations::i8) return Activations::i8;
#ifdef PELTON_BF16_DOT
    const bool is_bf16 = w.layout.storage != Storage::numbers || w.layout.type == Type::bf16;
    if (is_bf16 && asked != Activations::f32) return Activations::bf16;
#endif
    return Activations::f32;
}

// One block of 32 columns of a row: [8 words of int8][scale][scale * sum, or -zero * sum, for each group].
inline void put_int8(const float* x, const Weight& w, uint32_t* out) {
    const F32 a = f_load(x), b = f_load(x + 16);
    const float most = f_most(a, b);
    const F32 inverse = f_set1(most > 0.0f ? 127.0f / most : 0.0f);
    const float scale = most * (1.0f / 127.0f) + (most - most);  // not a number if any x is none, or infinite
    int8_t* q = reinterpret_cast<int8_t*>(out);
    f_store_i8(q, f_mul(a, inverse));
    f_store_i8(q + 16, f_mul(b, inverse));
    std::memcpy(out + 8, &scale, 4);
    const int32_t sums[2] = {i_sum_i8(q), i_sum_i8(q + 16)};
    const auto put = [&](size_t at, int32_t sum) {
        const float offset = scale * float(sum);
        const int32_t correction = -w.layout.zero * sum;
        if (w.layout.has_min)
            std::memcpy(out + at, &offset, 4);
        else
            std::memcpy(out + at, &correction, 4);
    };
    if (w.layout.group == 16)
        put(9, sums[0]), put(10, sums[1]);
    else
        put(9, sums[0] + sums[1]);
}

inline void put_row(const float* x, const Weight& w, Activations kind, uint32_t* out) {
    const size_t block_words = row_words(w, kind) / w.num_blocks;
    alignas(64) float part[block_columns];
    for (size_t b = 0; b < w.num_blocks; ++b, out += block_words) {
        const size_t first = b * block_columns;
        const float* values = x + first;
        if (w.order || first + block_columns > w.num_in) {
            for (size_t k = 0; k < block_columns; ++k) {
                const size_t at = first + k;
                part[k] = at >= w.num_in ? 0.0f : x[w.order ? size_t(w.order[at]) : at];
            }
            values = part;
        }
        if (kind == Activations::i8) {
            put_int8(values, w, out);
        } else if (kind == Activations::bf16) {
            auto half = reinterpret_cast<uint16_t*>(out);
            f_store_bf16(half, f_load(values));
            f_store_bf16(half + 16, f_load(values + 16));
        } else {
            std::memcpy(out, values, sizeof part);
        }
    }
}

// --- some tiles times one group of rows ----------------------------------------------------------------------------------

// Codes as they are stored.
template <int bits, bool has_table, Scales kind, bool has_min>
struct PackedCodes {
    static constexpr int width = has_table ? 8 : bits;
    const uint8_t* block;
    ScaleReader<kind, has_min> scales;
    U8 table;

    PackedCodes(const Weight& w, const uint8_t* tile)
        : block(tile), scales(w, tile), table(b_table(w.layout.table)) {}
    void load(int i, U8& low, U8& high) const {
        load_codes<bits>(block, i, low, high);
        if constexpr (has_table) low = b_lookup(table, low), high = b_lookup(table, high);
    }
    void next_scale(F32& scale, F32& min) { scales.next(scale, min); }
    void next_block() { block += code_bytes(bits); }
};

// Codes of a whole tile unpacked to bytes, then their scales as float32, then their minima: for many rows.
template <bool wide, bool has_min>
struct OpenCodes {
    static constexpr int width = wide ? 8 : 6;  // bits of a code at most
    const uint8_t* block;
    const float* scale;
    const float* min;

    OpenCodes(const Weight& w, const uint8_t* open)
        : block(open), scale(reinterpret_cast<const float*>(open + w.num_blocks * 512)),
          min(scale + (w.layout.group == 16 ? 32 : 16) * w.num_blocks) {}
    void load(int i, U8& low, U8& high) const {
        low = b_load(block + 128 * i);
        high = b_load(block + 128 * i + 64);
    }
    void next_scale(F32& s, F32& m) {
        s = f_load(scale), scale += 16;
        if constexpr (has_min) m = f_load(min), min += 16;
    }
    void next_block() { block += 512; }
};

template <typename Source>
inline void open_codes(const Weight& w, Source source, bool has_min, uint8_t* open) {
    float* scale = reinterpret_cast<float*>(open + w.num_blocks * 512);
    const int groups = w.layout.group == 16 ? 2 : 1;
    float* min = scale + 16 * groups * w.num_blocks;
    for (size_t b = 0; b < w.num_blocks; ++b, open += 512) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            U8 low, high;
            source.load(i, low, high);
            b_store(open + 128 * i, low);
            b_store(open + 128 * i + 64, high);
        }
        for (int g = 0; g < groups; ++g) {
            F32 s, m;
            source.next_scale(s, m);
            f_store(scale, s), scale += 16;
            if (has_min) f_store(min, m), min += 16;
        }
        source.next_block();
    }
}

inline int32_t int_at(const uint32_t* p) {
    int32_t value;
    std::memcpy(&value, p, 4);
    return value;
}
inline F32 float_at(const uint32_t* p) {
    float value;
    std::memcpy(&value, p, 4);
    return f_set1(value);
}

// Activations of a group: row r begins at words + r * stride.
struct Rows {
    const uint32_t* words;
    size_t stride;
    const uint32_t* at(int r) const { return words + size_t(r) * stride; }
};

template <int tiles, int rows>
inline void clear(F32 (&sums)[tiles][rows]) {
#pragma GCC unroll 4
    for (int t = 0; t < tiles; ++t)
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) sums[t][r] = f_set1(0.0f);
}
template <int tiles, int rows>
inline void copy(const F32 (&from)[tiles][rows], F32 (&to)[tiles][rows]) {
#pragma GCC unroll 4
    for (int t = 0; t < tiles; ++t)
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) to[t][r] = from[t][r];
}

// sums[t][r] = the products of tile t with row r, over all columns. `ahead`: memory to fetch while a block is computed,
// `step` bytes for each.
template <int rows, int tiles, int group, bool has_min, typename Source>
inline void dot_codes(F32 (&sums)[tiles][rows], Source (&source)[tiles], size_t num_blocks, Rows x,
                      const uint8_t* ahead = nullptr, size_t step = 0) {
    constexpr int groups = 32 / group, pairs = 4 / groups;
    const uint32_t* row[rows];
    for (int r = 0; r < rows; ++r) row[r] = x.at(r);
    F32 own[tiles][rows];  // in registers
    clear(own);
    for (size_t b = 0; b < num_blocks; ++b) {
        if (ahead) {
            for (size_t line = 0; line < step; line += 64) __builtin_prefetch(ahead + line, 0, 2);
            ahead += step;
        }
#pragma GCC unroll 2
        for (int g = 0; g < groups; ++g) {
            I32 part[tiles][rows];
#pragma GCC unroll 6
            for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
                for (int t = 0; t < tiles; ++t) part[t][r] = has_min ? i_zero() : i_set1(int_at(row[r] + 9 + g));
#pragma GCC unroll 4
            for (int i = g * pairs; i < (g + 1) * pairs; ++i) {
                U8 low[tiles], high[tiles];
#pragma GCC unroll 2
                for (int t = 0; t < tiles; ++t) source[t].load(i, low[t], high[t]);
#pragma GCC unroll 6
                for (int r = 0; r < rows; ++r) {
                    const int32_t first = int_at(row[r] + 2 * i), second = int_at(row[r] + 2 * i + 1);
#pragma GCC unroll 2
                    for (int t = 0; t < tiles; ++t) part[t][r] = i_dot<Source::width>(part[t][r], low[t], first);
#pragma GCC unroll 2
                    for (int t = 0; t < tiles; ++t) part[t][r] = i_dot<Source::width>(part[t][r], high[t], second);
                }
            }
#pragma GCC unroll 2
            for (int t = 0; t < tiles; ++t) {
                F32 scale, min;
                source[t].next_scale(scale, min);
#pragma GCC unroll 6
                for (int r = 0; r < rows; ++r) {
                    const F32 factor = f_mul(scale, float_at(row[r] + 8));
                    own[t][r] = f_fma(f_from_i32(part[t][r]), factor, own[t][r]);
                    if constexpr (has_min) own[t][r] = f_fma(min, float_at(row[r] + 9 + g), own[t][r]);
                }
            }
        }
#pragma GCC unroll 2
        for (int t = 0; t < tiles; ++t) source[t].next_block();
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) row[r] += 9 + groups;
    }
    copy(own, sums);
}

// Numbers [columns][16] of any type times float32 activations.
template <typename T>
struct Numbers;
template <>
struct Numbers<float> {
    static F32 load(const uint8_t* p, size_t k) { return f_load(reinterpret_cast<const float*>(p) + 16 * k); }
};
// float16 and bfloat16, as names of types.
struct Half {};
struct Brain {};
template <>
struct Numbers<Half> {
    static F32 load(const uint8_t* p, size_t k) { return f_load_f16(reinterpret_cast<const uint16_t*>(p) + 16 * k); }
};
template <>
struct Numbers<Brain> {
    static F32 load(const uint8_t* p, size_t k) {
        const auto pair = reinterpret_cast<const uint16_t*>(p) + 32 * (k / 2);
        return k % 2 ? f_odd_bf16(pair) : f_even_bf16(pair);
    }
};

// sums[t][r] as above; tile t lies at tile + t * tile_bytes.
template <int rows, int tiles, typename T>
inline void dot_numbers(F32 (&sums)[tiles][rows], const uint8_t* tile, size_t tile_bytes, size_t columns, Rows x,
                        size_t fetch = 0) {
    const uint8_t* ahead = tile + prefetch_distance;
    const size_t step = 2 * tile_bytes / columns;
    F32 own[tiles][rows];  // in registers
    clear(own);
    for (size_t k = 0; k < columns; k += 2, ahead += step) {
        for (size_t line = 0; line < fetch; line += 64) __builtin_prefetch(ahead + line, 0, 2);
#pragma GCC unroll 2
        for (size_t odd = 0; odd < 2; ++odd) {
            F32 w[tiles];
#pragma GCC unroll 4
            for (int t = 0; t < tiles; ++t) w[t] = Numbers<T>::load(tile + t * tile_bytes, k + odd);
#pragma GCC unroll 6
            for (int r = 0; r < rows; ++r) {
                const F32 value = float_at(x.at(r) + k + odd);
#pragma GCC unroll 4
                for (int t = 0; t < tiles; ++t) own[t][r] = f_fma(w[t], value, own[t][r]);
            }
        }
    }
    copy(own, sums);
}

#ifdef PELTON_BF16_DOT
template <int rows, int tiles>
inline void dot_pairs(F32 (&sums)[tiles][rows], const uint8_t* tile, size_t tile_bytes, size_t columns, Rows x,
                      bool fetch = false) {
    F32 own[tiles][rows];
    clear(own);
    for (size_t k = 0; k < columns / 2; ++k) {
        if (fetch) __builtin_prefetch(tile + prefetch_distance + 64 * k, 0, 2);
        Pairs w[tiles];
#pragma GCC unroll 4
        for (int t = 0; t < tiles; ++t) w[t] = p_load(reinterpret_cast<const uint16_t*>(tile + t * tile_bytes) + 32 * k);
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
            const Pairs value = p_set1(reinterpret_cast<const uint16_t*>(x.at(r) + k));
#pragma GCC unroll 4
            for (int t = 0; t < tiles; ++t) own[t][r] = p_dot(own[t][r], w[t], value);
        }
    }
    copy(own, sums);
}
#endif

// --- from a tile's sums to the output --------------------------------------------------------------------------------

template <int rows, int tiles>
inline void put_sums(const LinearArgs& a, size_t row, size_t first_tile, const F32 (&sums)[tiles][rows]) {
    for (int t = 0; t < tiles; ++t) {
        const size_t column = (first_tile + t) * 16, n = std::min<size_t>(16, a.weight->num_out - column);
        for (int r = 0; r < rows; ++r) {
            float* out = a.out + (row + r) * a.out_stride + column;
            F32 y = sums[t][r];
            if (a.bias) y = f_add(y, load_piece(a.bias + column, n));
            store_piece(out, a.accumulate ? f_add(load_piece(out, n), y) : y, n);
        }
    }
}

// Calls f(Int<rows>) for 1 <= rows <= max_group.
template <int most = max_group, typename Function>
inline void with_rows(int rows, Function&& f) {
    if constexpr (most > 1)
        if (rows < most) return with_rows<most - 1>(rows, f);
    f(Int<most>{});
}

// --- tiles and groups -------------------------------------------------------------------------------------------------

// What the threads of a product share, and the memory of one of them.
struct Job {
    const LinearArgs& args;
    const Weight& weight;
    const Groups& groups;
    const uint32_t* words;  // all rows' activations
    size_t words_per_row;
    uint8_t* local;

    Rows rows(size_t g) const { return {words + groups.begin(g) * words_per_row, words_per_row}; }
    size_t columns() const { return weight.num_blocks * block_columns; }

    // For each group of a range: dot(Int<rows>, sums, group's rows), then the sums to the output.
    template <int tiles, typename Dot>
    void each_group(size_t first_tile, Range range, Dot&& dot) const {
        for (size_t g = range.begin; g < range.end; ++g)
            with_rows(groups.size(g), [&](auto n) {
                F32 sums[tiles][n];
                dot(n, sums, rows(g));
                put_sums<n, tiles>(args, groups.begin(g), first_tile, sums);
            });
    }
};

// A few groups are multiplied with the codes as they are stored; for more, tiles are unpacked once, to memory.
constexpr size_t most_packed_groups = 4;

inline void dot_packed(const Job& job, size_t tile, size_t g) {
    const Weight& w = job.weight;
    const uint8_t* ahead = g == 0 ? w.tile(tile) + prefetch_distance : nullptr;
    const size_t step = w.tile_bytes / w.num_blocks;
    with_codes(w.layout, [&](auto bits, auto table, auto group, auto kind, auto has_min) {
        using Source = PackedCodes<bits, table, kind, has_min>;
        job.each_group<1>(tile, {g, g + 1}, [&](auto n, auto& sums, Rows rows) {
            Source source[1] = {Source(w, w.tile(tile))};
            dot_codes<n, 1, group, has_min>(sums, source, w.num_blocks, rows, ahead, step);
        });
    });
}

inline size_t open_bytes(const Weight& w) { return w.num_blocks * (512 + 4 * 64); }

template <int tiles, int group, bool wide, bool has_min>
inline void dot_open(const Job& job, size_t first_tile, Range groups) {
    using Source = OpenCodes<wide, has_min>;
    const Weight& w = job.weight;
    job.each_group<tiles>(first_tile, groups, [&](auto n, auto& sums, Rows rows) {
        if constexpr (tiles == 2) {
            Source source[2] = {Source(w, job.local), Source(w, job.local + open_bytes(w))};
            dot_codes<n, tiles, group, has_min>(sums, source, w.num_blocks, rows);
        } else {
            Source source[1] = {Source(w, job.local)};
            dot_codes<n, tiles, group, has_min>(sums, source, w.num_blocks, rows);
        }
    });
}

template <int tiles>
inline void tiles_of_codes(const Job& job, size_t first_tile, Range groups) {
    const Weight& w = job.weight;
    const Layout& layout = w.layout;
    with_codes(layout, [&](auto bits, auto table, auto, auto kind, auto has_min) {
        for (int t = 0; t < tiles; ++t)
            open_codes(w, PackedCodes<bits, table, kind, has_min>(w, w.tile(first_tile + t)), has_min,
                       job.local + t * open_bytes(w));
    });
    const auto dot = [&](auto group, auto wide) {
        layout.has_min ? dot_open<tiles, group, wide, true>(job, first_tile, groups)
                       : dot_open<tiles, group, wide, false>(job, first_tile, groups);
    };
    if (layout.group == 16)
        dot(Int<16>{}, std::false_type{});
    else if (layout.bits == 8 || layout.has_table)
        dot(Int<32>{}, std::true_type{});
    else
        dot(Int<32>{}, std::false_type{});
}

// Writes a tile's weights as float32 [columns][16].
inline void open_numbers(const Weight& w, size_t tile, float* out) {
    const uint8_t* data = w.tile(tile);
    if (w.layout.storage == Storage::codes) {
        with_codes(w.layout, [&](auto bits, auto table, auto group, auto kind, auto has_min) {
            PackedCodes<bits, table, kind, has_min> source(w, data);
            const F32 zero = f_set1(float(w.layout.zero));
            for (size_t b = 0; b < w.num_blocks; ++b, out += 512, source.next_block()) {
                F32 scale, min;
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    U8 two[2];
                    source.load(i, two[0], two[1]);
                    if (i % (group / 8) == 0) source.next_scale(scale, min);
                    for (int h = 0; h < 2; ++h) {
                        const F32 u[4] = {f_byte<0>(two[h]), f_byte<1>(two[h]), f_byte<2>(two[h]), f_byte<3>(two[h])};
                        for (int j = 0; j < 4; ++j)
                            f_store(out + 16 * (8 * i + 4 * h + j), has_min ? f_add(f_mul(scale, u[j]), min)
                                                                            : f_mul(scale, f_sub(u[j], zero)));
                    }
                }
            }
        });
    } else if (w.layout.storage == Storage::lookup) {
        ScaleReader<Scales::f32, false> scales(w, data);
        alignas(64) uint8_t codes[512];
        alignas(64) float values[16];
        for (size_t b = 0; b < w.num_blocks; ++b, data += code_bytes(4)) {
            for (int i = 0; i < 4; ++i) {
                U8 low, high;
                load_codes<4>(data, i, low, high);
                b_store(codes + 128 * i, low);
                b_store(codes + 128 * i + 64, high);
            }
            F32 scale, min;
            scales.next(scale, min);
            for (size_t k = 0; k < 32; ++k, out += 16) {
                for (int r = 0; r < 16; ++r) values[r] = w.layout.values[codes[64 * (k / 4) + 4 * r + k % 4]];
                f_store(out, f_mul(scale, f_load(values)));
            }
        }
    } else {
        const size_t columns = w.num_blocks * block_columns;
        for (size_t k = 0; k < columns; ++k, out += 16)
            f_store(out, w.layout.type == Type::f32   ? Numbers<float>::load(data, k)
                         : w.layout.type == Type::f16 ? Numbers<Half>::load(data, k)
                                                      : Numbers<Brain>::load(data, k));
    }
}

// Weights opened to float32 are followed by the same as pairs of bfloat16, where those are multiplied.
inline const uint8_t* open_pairs(const Weight& w, size_t tile, uint8_t* local) {
    const size_t columns = w.num_blocks * block_columns;
    float* open = reinterpret_cast<float*>(local);
    auto pairs = reinterpret_cast<uint16_t*>(local + columns * 64);
    open_numbers(w, tile, open);
    for (size_t k = 0; k < columns; k += 2, pairs += 32) {
        alignas(64) uint16_t even[16], odd[16];
        f_store_bf16(even, f_load(open + 16 * k));
        f_store_bf16(odd, f_load(open + 16 * k + 16));
        for (int r = 0; r < 16; ++r) pairs[2 * r] = even[r], pairs[2 * r + 1] = odd[r];
    }
    return local + columns * 64;
}

// Tiles of numbers, or (one at a time) of what is opened to numbers.
template <int tiles>
inline void tiles_of_numbers(const Job& job, size_t first_tile, Range groups, bool pairs) {
    const Weight& w = job.weight;
    const bool stored = w.layout.storage == Storage::numbers;
    const uint8_t* data = w.tile(first_tile);
#ifdef PELTON_BF16_DOT
    if (pairs) {
        if (!stored) data = open_pairs(w, first_tile, job.local);
        return job.each_group<tiles>(first_tile, groups, [&](auto n, auto& sums, Rows rows) {
            dot_pairs<n, tiles>(sums, data, w.tile_bytes, job.columns(), rows, tiles == 1 && stored);
        });
    }
#endif
    (void)pairs;
    const auto multiply = [&](auto type) {
        job.each_group<tiles>(first_tile, groups, [&](auto n, auto& sums, Rows rows) {
            const size_t fetch = tiles == 1 && stored ? 2 * w.tile_bytes / job.columns() : 0;
            dot_numbers<n, tiles, decltype(type)>(sums, data, w.tile_bytes, job.columns(), rows, fetch);
        });
    };
    if (!stored) {
        open_numbers(w, first_tile, reinterpret_cast<float*>(job.local));
        data = job.local;
        return multiply(float{});
    }
    if (w.layout.type == Type::f32) return multiply(float{});
    if (w.layout.type == Type::f16) return multiply(Half{});
    multiply(Brain{});
}

// Tiles begin..end with a range of groups.
inline void multiply_tiles(const Job& job, Range tiles, Range groups, Activations kind) {
    size_t tile = tiles.begin;
    if (kind == Activations::i8) {
        if (groups.end - groups.begin <= most_packed_groups) {
            for (; tile < tiles.end; ++tile)
                for (size_t g = groups.begin; g < groups.end; ++g) dot_packed(job, tile, g);
            return;
        }
        if constexpr (code_tiles > 1)
            for (; tile + code_tiles <= tiles.end; tile += code_tiles) tiles_of_codes<code_tiles>(job, tile, groups);
        for (; tile < tiles.end; ++tile) tiles_of_codes<1>(job, tile, groups);
        return;
    }
    const bool pairs = kind == Activations::bf16;
    if constexpr (number_tiles > 1)
        if (job.weight.layout.storage == Storage::numbers && job.groups.num_rows > 2)  // one stream is fetched best
            for (; tile + number_tiles <= tiles.end; tile += number_tiles)
                tiles_of_numbers<number_tiles>(job, tile, groups, pairs);
    for (; tile < tiles.end; ++tile) tiles_of_numbers<1>(job, tile, groups, pairs);
}

// Whether rows of float32 can be multiplied where they are.
inline bool takes_rows(const Weight& w, Activations kind) {
    return kind == Activations::f32 && !w.order && w.num_in % block_columns == 0;
}

inline Scratch linear_scratch(const LinearArgs& a, size_t num_rows) {
    const Weight& w = *a.weight;
    const Activations kind = effective(w, a.activations);
    const size_t columns = w.num_blocks * block_columns;
    const size_t open = kind == Activations::i8 ? code_tiles * open_bytes(w) : columns * (64 + 32);
    return {takes_rows(w, kind) ? 0 : num_rows * row_words(w, kind) * 4 + 64, open + 64};
}

inline void linear(const LinearArgs& a, size_t num_rows, const Team& team) {
    if (num_rows == 0) return;
    const Weight& w = *a.weight;
    const Activations kind = effective(w, a.activations);
    const Groups groups(num_rows);
    const bool in_place = takes_rows(w, kind);
    const size_t words_per_row = in_place ? a.x_stride : row_words(w, kind);
    auto words = reinterpret_cast<const uint32_t*>(a.x);
    if (!in_place) {
        const auto out = reinterpret_cast<uint32_t*>(team.shared);
        const Range mine = team.share(num_rows);
        for (size_t row = mine.begin; row < mine.end; ++row)
            put_row(a.x + row * a.x_stride, w, kind, out + row * words_per_row);
        words = out;
        team.barrier();
    }
    const Job job{a, w, groups, words, words_per_row, team.local};
    const size_t tiles = w.num_tiles();
    size_t pieces = std::min(groups.count, num_rows * words_per_row * 4 / rows_in_cache + 1);
    while (pieces < groups.count && pieces * tiles < 8 * team.num_threads) ++pieces;  // work for everybody
    const size_t tiles_per_claim = std::clamp<size_t>(pieces * tiles / (team.num_threads * 8) / 4 * 4, 4, 64);
    team.each_piece(pieces * tiles, tiles_per_claim, [&](Range work) {
        for (size_t i = work.begin; i < work.end;) {
            const size_t piece = i / tiles, first = i % tiles, count = std::min(tiles - first, work.end - i);
            const Range some{piece * groups.count / pieces, (piece + 1) * groups.count / pieces};
            multiply_tiles(job, {first, first + count}, some, kind);
            i += count;
        }
    });
}

// --- rows of a weight ---------------------------------------------------------------------------------------------------

inline void embed(const EmbedArgs& a, size_t num_rows, const Team& team) {
    const Weight& w = *a.weight;
    const Range mine = team.share(num_rows);
    for (size_t row = mine.begin; row < mine.end; ++row) {
        const size_t id = size_t(a.ids[row]), tile = id / 16;
        float* out = a.out + row * a.out_stride;
        float* open = reinterpret_cast<float*>(team.local);
        open_numbers(w, tile, open);
        for (size_t k = 0; k < w.num_in; ++k) {
            const size_t at = w.order ? size_t(w.order[k]) : k;
            out[at] = open[16 * k + id % 16] * a.scale;
        }
    }
}
