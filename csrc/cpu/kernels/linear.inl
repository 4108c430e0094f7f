// Matrix products with packed weights: y = x W^T for rows x. Included once per instruction set.
//
// The rows are put into groups of at most `max_group`; a group's activations lie as [columns][rows], so that one
// pointer serves all. A tile of 16 outputs is multiplied with one group after the other. Whatever the number of rows,
// each output is the same sum in the same order: blocks of 32 columns from left to right.

constexpr size_t block_columns = 32;
#if defined(__AVX512F__)
constexpr int max_group = 12;  // sums, and for codes integer sums, fill the 32 registers
#elif defined(__AVX2__)
constexpr int max_group = 3;
#else
constexpr int max_group = 2;
#endif
constexpr size_t rows_in_cache = 512 << 10;  // bytes of activations that stay in the second-level cache

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

// One block of 32 columns of a row: [8 words of int8][scale][scale * sum, or -zero * sum, for each group] x rows.
inline void put_int8(const float* x, const Weight& w, uint32_t* out, size_t stride) {
    const F32 a = f_load(x), b = f_load(x + 16);
    const float most = f_most(a, b);
    const F32 inverse = f_set1(most > 0.0f ? 127.0f / most : 0.0f);
    const float scale = most * (1.0f / 127.0f) + (most - most);  // not a number if any x is none, or infinite
    alignas(32) int8_t q[32];
    f_store_i8(q, f_mul(a, inverse));
    f_store_i8(q + 16, f_mul(b, inverse));
    for (int k = 0; k < 8; ++k) std::memcpy(out + k * stride, q + 4 * k, 4);
    std::memcpy(out + 8 * stride, &scale, 4);
    const int32_t sums[2] = {i_sum_i8(q), i_sum_i8(q + 16)};
    const auto put = [&](size_t at, int32_t sum) {
        const float offset = scale * float(sum);
        const int32_t correction = -w.layout.zero * sum;
        if (w.layout.has_min)
            std::memcpy(out + at * stride, &offset, 4);
        else
            std::memcpy(out + at * stride, &correction, 4);
    };
    if (w.layout.group == 16)
        put(9, sums[0]), put(10, sums[1]);
    else
        put(9, sums[0] + sums[1]);
}

inline void put_row(const float* x, const Weight& w, Activations kind, uint32_t* out, size_t stride) {
    const size_t num_in = w.num_in;
    const size_t block_words = row_words(w, kind) / w.num_blocks;
    alignas(64) float part[block_columns];
    for (size_t b = 0; b < w.num_blocks; ++b, out += block_words * stride) {
        const size_t first = b * block_columns;
        const float* values = x + first;
        if (w.order || first + block_columns > num_in) {
            for (size_t k = 0; k < block_columns; ++k) {
                const size_t at = first + k;
                part[k] = at >= num_in ? 0.0f : x[w.order ? size_t(w.order[at]) : at];
            }
            values = part;
        }
        if (kind == Activations::i8) {
            put_int8(values, w, out, stride);
        } else if (kind == Activations::bf16) {
            alignas(64) uint16_t half[block_columns];
            f_store_bf16(half, f_load(values));
            f_store_bf16(half + 16, f_load(values + 16));
            for (int k = 0; k < 16; ++k) std::memcpy(out + k * stride, half + 2 * k, 4);
        } else {
            for (int k = 0; k < 32; ++k) std::memcpy(out + k * stride, values + k, 4);
        }
    }
}

// --- one tile times one group of rows ----------------------------------------------------------------------------------

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

// sums[r] = the products of a tile with row r, over all columns; words: the group's activations.
template <int rows, int group, bool has_min, typename Source>
inline void dot_codes(F32 (&sums)[rows], Source source, size_t num_blocks, const uint32_t* words) {
    constexpr int groups = 32 / group, pairs = 4 / groups;
    const auto word = [&](int at) {
        int32_t value;
        std::memcpy(&value, words + at, 4);
        return value;
    };
    const auto number = [&](int at) {
        float value;
        std::memcpy(&value, words + at, 4);
        return f_set1(value);
    };
    for (int r = 0; r < rows; ++r) sums[r] = f_set1(0.0f);
    for (size_t b = 0; b < num_blocks; ++b) {
#pragma GCC unroll 2
        for (int g = 0; g < groups; ++g) {
            I32 part[rows];
#pragma GCC unroll 12
            for (int r = 0; r < rows; ++r) part[r] = has_min ? i_zero() : i_set1(word((9 + g) * rows + r));
#pragma GCC unroll 4
            for (int i = g * pairs; i < (g + 1) * pairs; ++i) {
                U8 low, high;
                source.load(i, low, high);
#pragma GCC unroll 12
                for (int r = 0; r < rows; ++r) part[r] = i_dot<Source::width>(part[r], low, word(2 * i * rows + r));
#pragma GCC unroll 12
                for (int r = 0; r < rows; ++r)
                    part[r] = i_dot<Source::width>(part[r], high, word((2 * i + 1) * rows + r));
            }
            F32 scale, min;
            source.next_scale(scale, min);
#pragma GCC unroll 12
            for (int r = 0; r < rows; ++r) {
                sums[r] = f_fma(f_from_i32(part[r]), f_mul(scale, number(8 * rows + r)), sums[r]);
                if constexpr (has_min) sums[r] = f_fma(min, number((9 + g) * rows + r), sums[r]);
            }
        }
        source.next_block();
        words += (9 + groups) * rows;
    }
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

template <int rows, typename T>
inline void dot_numbers(F32 (&sums)[rows], const uint8_t* tile, size_t columns, const uint32_t* words) {
    const float* x = reinterpret_cast<const float*>(words);
    for (int r = 0; r < rows; ++r) sums[r] = f_set1(0.0f);
    for (size_t k = 0; k < columns; k += 2) {
#pragma GCC unroll 2
        for (size_t odd = 0; odd < 2; ++odd) {
            const F32 w = Numbers<T>::load(tile, k + odd);
#pragma GCC unroll 12
            for (int r = 0; r < rows; ++r) sums[r] = f_fma(w, f_set1(x[(k + odd) * rows + r]), sums[r]);
        }
    }
}

#ifdef PELTON_BF16_DOT
template <int rows>
inline void dot_pairs(F32 (&sums)[rows], const uint8_t* tile, size_t columns, const uint32_t* words) {
    const auto w = reinterpret_cast<const uint16_t*>(tile);
    for (int r = 0; r < rows; ++r) sums[r] = f_set1(0.0f);
    for (size_t k = 0; k < columns / 2; ++k) {
        const Pairs pair = p_load(w + 32 * k);
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r)
            sums[r] = p_dot(sums[r], pair, p_set1(reinterpret_cast<const uint16_t*>(words + k * rows + r)));
    }
}
#endif

// --- from a tile's sums to the output --------------------------------------------------------------------------------

template <int rows>
inline void put_sums(const LinearArgs& a, size_t row, size_t tile, const F32 (&sums)[rows]) {
    const size_t column = tile * 16, left = a.weight->num_out - column;
    for (int r = 0; r < rows; ++r) {
        float* out = a.out + (row + r) * a.out_stride + column;
        F32 y = sums[r];
        if (left >= 16) {
            if (a.bias) y = f_add(y, f_load(a.bias + column));
            f_store(out, a.accumulate ? f_add(f_load(out), y) : y);
        } else {
            if (a.bias) y = f_add(y, f_load_n(a.bias + column, left));
            f_store_n(out, a.accumulate ? f_add(f_load_n(out, left), y) : y, left);
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

// A piece of the work: groups first..last of the rows, with the tiles begin..end.
struct Job {
    const LinearArgs& args;
    const Weight& weight;
    const Groups& groups;
    const uint32_t* words;  // all groups' activations
    size_t words_per_row;
    uint8_t* local;

    const uint32_t* group_words(size_t g) const { return words + groups.begin(g) * words_per_row; }

    // For each group of the piece: dot(Int<rows>, sums, group's words), then the sums to the output.
    template <typename Dot>
    void each_group(size_t tile, Range range, Dot&& dot) const {
        for (size_t g = range.begin; g < range.end; ++g)
            with_rows(groups.size(g), [&](auto rows) {
                F32 sums[rows];
                dot(rows, sums, group_words(g));
                put_sums<rows>(args, groups.begin(g), tile, sums);
            });
    }
};

// Few rows are multiplied with the codes as they are stored; for more, a tile is unpacked once.
constexpr int most_packed_rows = max_group < 4 ? max_group : 4;

inline void dot_packed(const Job& job, size_t tile, size_t g) {
    const Weight& w = job.weight;
    with_codes(w.layout, [&](auto bits, auto table, auto group, auto kind, auto has_min) {
        using Source = PackedCodes<bits, table, kind, has_min>;
        with_rows<most_packed_rows>(job.groups.size(g), [&](auto rows) {
            F32 sums[rows];
            dot_codes<rows, group, has_min>(sums, Source(w, w.tile(tile)), w.num_blocks, job.group_words(g));
            put_sums<rows>(job.args, job.groups.begin(g), tile, sums);
        });
    });
}

template <int group, bool wide, bool has_min>
inline void dot_open(const Job& job, size_t tile, Range groups) {
    job.each_group(tile, groups, [&](auto rows, auto& sums, const uint32_t* words) {
        dot_codes<rows, group, has_min>(sums, OpenCodes<wide, has_min>(job.weight, job.local), job.weight.num_blocks,
                                        words);
    });
}

inline void tile_codes(const Job& job, size_t tile, Range groups) {
    const Weight& w = job.weight;
    const Layout& layout = w.layout;
    if (groups.end - groups.begin == 1 && job.groups.size(groups.begin) <= most_packed_rows)
        return dot_packed(job, tile, groups.begin);
    with_codes(layout, [&](auto bits, auto table, auto, auto kind, auto has_min) {
        open_codes(w, PackedCodes<bits, table, kind, has_min>(w, w.tile(tile)), has_min, job.local);
    });
    const bool wide = layout.bits == 8 || layout.has_table;
    if (layout.group == 16)
        layout.has_min ? dot_open<16, false, true>(job, tile, groups) : dot_open<16, false, false>(job, tile, groups);
    else if (wide)
        layout.has_min ? dot_open<32, true, true>(job, tile, groups) : dot_open<32, true, false>(job, tile, groups);
    else
        layout.has_min ? dot_open<32, false, true>(job, tile, groups) : dot_open<32, false, false>(job, tile, groups);
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

inline void tile_numbers(const Job& job, size_t tile, Range groups) {
    const Weight& w = job.weight;
    const size_t columns = w.num_blocks * block_columns;
    const auto multiply = [&](auto type, const uint8_t* data) {
        job.each_group(tile, groups, [&](auto rows, auto& sums, const uint32_t* words) {
            dot_numbers<rows, decltype(type)>(sums, data, columns, words);
        });
    };
    if (w.layout.storage != Storage::numbers) {
        open_numbers(w, tile, reinterpret_cast<float*>(job.local));
        return multiply(float{}, job.local);
    }
    if (w.layout.type == Type::f32) return multiply(float{}, w.tile(tile));
    if (w.layout.type == Type::f16) return multiply(Half{}, w.tile(tile));
    multiply(Brain{}, w.tile(tile));
}

#ifdef PELTON_BF16_DOT
inline void tile_pairs(const Job& job, size_t tile, Range groups) {
    const Weight& w = job.weight;
    const size_t columns = w.num_blocks * block_columns;
    const uint8_t* data = w.tile(tile);
    if (w.layout.storage != Storage::numbers) {
        float* open = reinterpret_cast<float*>(job.local);
        auto pairs = reinterpret_cast<uint16_t*>(job.local + columns * 64);
        data = job.local + columns * 64;
        open_numbers(w, tile, open);
        for (size_t k = 0; k < columns; k += 2, pairs += 32) {
            alignas(64) uint16_t even[16], odd[16];
            f_store_bf16(even, f_load(open + 16 * k));
            f_store_bf16(odd, f_load(open + 16 * k + 16));
            for (int r = 0; r < 16; ++r) pairs[2 * r] = even[r], pairs[2 * r + 1] = odd[r];
        }
    }
    job.each_group(tile, groups, [&](auto rows, auto& sums, const uint32_t* words) {
        dot_pairs<rows>(sums, data, columns, words);
    });
}
#endif

inline Scratch linear_scratch(const LinearArgs& a, size_t num_rows) {
    const Weight& w = *a.weight;
    const Activations kind = effective(w, a.activations);
    const size_t columns = w.num_blocks * block_columns;
    const size_t open = kind == Activations::i8 ? columns * 16 + w.num_blocks * 4 * 64 : columns * (64 + 32);
    return {num_rows * row_words(w, kind) * 4 + 64, open + 64};
}

inline void linear(const LinearArgs& a, size_t num_rows, const Team& team) {
    if (num_rows == 0) return;
    const Weight& w = *a.weight;
    const Activations kind = effective(w, a.activations);
    const Groups groups(num_rows);
    const size_t words_per_row = row_words(w, kind);
    const auto words = reinterpret_cast<uint32_t*>(team.shared);

    const Range mine = team.share(num_rows);
    for (size_t row = mine.begin; row < mine.end; ++row) {
        size_t g = row * groups.count / num_rows;  // at most one off: the sizes differ by one
        while (groups.begin(g + 1) <= row) ++g;
        while (groups.begin(g) > row) --g;
        uint32_t* out = words + groups.begin(g) * words_per_row + (row - groups.begin(g));
        put_row(a.x + row * a.x_stride, w, kind, out, size_t(groups.size(g)));
    }
    team.barrier();

    const Job job{a, w, groups, words, words_per_row, team.local};
    const size_t groups_per_piece = std::max<size_t>(1, rows_in_cache / (words_per_row * 4 * max_group));
    const size_t pieces = (groups.count + groups_per_piece - 1) / groups_per_piece, tiles = w.num_tiles();
    const Range work = team.share(pieces * tiles);
    for (size_t i = work.begin; i < work.end; ++i) {
        const size_t piece = i / tiles, tile = i % tiles;
        const Range range{piece * groups.count / pieces, (piece + 1) * groups.count / pieces};
        if (kind == Activations::i8)
            tile_codes(job, tile, range);
#ifdef PELTON_BF16_DOT
        else if (kind == Activations::bf16)
            tile_pairs(job, tile, range);
#endif
        else
            tile_numbers(job, tile, range);
    }
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
