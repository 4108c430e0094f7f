// Rotary positions with the write to the cache, and attention over the paged cache. Included once per instruction set.

// --- one number of the cache ------------------------------------------------------------------------------------------

// Where head g of a block begins, in elements.
inline size_t head_start(const Cache& c, size_t block, size_t g, size_t per_head) {
    return (block * c.num_kv_heads + g) * per_head;
}
inline size_t keys_per_head(const Cache& c) { return c.head_size * c.block_size; }
inline size_t value_row(const Cache& c) { return round_up(c.head_size, 16); }
inline size_t values_per_head(const Cache& c) { return value_row(c) * c.block_size; }

// Writes `dim` numbers, `step` elements apart. Returns the scale of int8 numbers.
inline float store_numbers(void* base, size_t at, size_t step, const float* x, size_t dim, Type type) {
    if (type == Type::f32) {
        for (size_t i = 0; i < dim; ++i) static_cast<float*>(base)[at + i * step] = x[i];
        return 1.0f;
    }
    if (type == Type::i8) {
        float most = 0.0f;
        for (size_t i = 0; i < dim; ++i) {
            const float v = std::fabs(x[i]);
            most = v > most || v != v ? v : most;  // a NaN stays: nothing exceeds it
        }
        const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
        for (size_t i = 0; i < dim; ++i) {
            const float q = x[i] * inverse;
            static_cast<int8_t*>(base)[at + i * step] = q == q ? int8_t(std::lrint(q)) : int8_t(0);
        }
        return most * (1.0f / 127.0f) + (most - most);
    }
    for (size_t i = 0; i < dim; ++i)
        static_cast<uint16_t*>(base)[at + i * step] = type == Type::bf16 ? to_bf16(x[i]) : to_f16(x[i]);
    return 1.0f;
}

// Su et al., 2021, arXiv:2104.09864: turns pairs (i, i + dim / 2) by the angle of i.
inline void rotate(float* x, const float* cos, const float* sin, size_t half) {
    each_piece(half, [&](size_t i, size_t n) {
        const F32 a = load_piece(x + i, n), b = load_piece(x + half + i, n);
        const F32 c = load_piece(cos + i, n), s = load_piece(sin + i, n);
        store_piece(x + i, f_sub(f_mul(a, c), f_mul(b, s)), n);
        store_piece(x + half + i, f_add(f_mul(b, c), f_mul(a, s)), n);
    });
}

inline void rope_store(const RopeStoreArgs& a, size_t num_rows, const Team& team) {
    const Cache& c = a.cache;
    const size_t dim = c.head_size, half = dim / 2, num_kv = c.num_kv_heads;
    const Range mine = team.share(num_rows);
    for (size_t r = mine.begin; r < mine.end; ++r) {
        float* row = a.qkv + r * a.qkv_stride;
        for (size_t h = 0; h < a.num_heads + num_kv; ++h) {
            const float* weight = h < a.num_heads ? a.q_weight : a.k_weight;
            if (weight) rms_norm_row(row + h * dim, row + h * dim, weight, dim, a.eps, false);
            rotate(row + h * dim, a.cos + r * half, a.sin + r * half, half);
        }
        const size_t block = size_t(a.slots[r]) / c.block_size, slot = size_t(a.slots[r]) % c.block_size;
        for (size_t g = 0; g < num_kv; ++g) {
            const float* key = row + (a.num_heads + g) * dim;
            const size_t key_at = head_start(c, block, g, keys_per_head(c)) + slot;
            const size_t value_at = head_start(c, block, g, values_per_head(c)) + slot * value_row(c);
            const float key_scale = store_numbers(c.keys, key_at, c.block_size, key, dim, c.type);
            const float value_scale = store_numbers(c.values, value_at, 1, key + num_kv * dim, dim, c.type);
            if (c.type == Type::i8) {
                const size_t at = head_start(c, block, g, c.block_size) + slot;
                c.key_scales[at] = key_scale;
                c.value_scales[at] = value_scale;
            }
        }
    }
}

// --- attention ----------------------------------------------------------------------------------------------------------
//
// The work is cut into tiles: some tokens of one request with the query heads that share a key head, one row for each
// token and head. A tile walks over spans of 64 keys that begin at multiples of 64, with a running maximum and sum
// (Milakov and Gimelshein, 2018, arXiv:1805.02867). Parts of 512 keys are summed alone and added up in order. What a row
// computes does not depend on the other rows: keys it does not see count exactly nothing.

constexpr size_t span_keys = 64, part_keys = 512, tile_rows = 48;

#ifdef PELTON_BF16_DOT
inline bool in_pairs(const Cache& c) { return c.type == Type::bf16; }
#else
inline bool in_pairs(const Cache&) { return false; }
#endif

// What is summed over keys, for each row of a tile.
struct KeySums {
    float* values;   // [rows][D]: sums of values, not yet divided
    float* maximum;  // [rows]: greatest score
    float* sum;      // [rows]: of exponentials

    KeySums(float* memory, size_t rows, size_t dim)
        : values(memory), maximum(values + rows * dim), sum(maximum + rows) {}
    static size_t count(size_t rows, size_t dim) { return rows * (dim + 2); }

    void clear(size_t rows, size_t dim) const {
        std::memset(values, 0, rows * dim * sizeof(float));
        for (size_t row = 0; row < rows; ++row) {
            maximum[row] = -std::numeric_limits<float>::infinity();
            sum[row] = 0.0f;
        }
    }
};

// The memory of one thread.
struct AttentionSpace {
    uint8_t* tiles;   // keys or values of a span, in tiles of 16
    uint32_t* query;  // [rows][D]: as bfloat16, or float32
    uint32_t* probs;  // [rows][span_keys], likewise
    float* scores;    // [rows][span_keys]
    KeySums part, total;

    static size_t bytes(size_t dim) {
        return 4 * (span_keys * dim + tile_rows * dim + 2 * tile_rows * span_keys + 2 * KeySums::count(tile_rows, dim));
    }
    AttentionSpace(uint8_t* memory, size_t dim)
        : tiles(memory), query(reinterpret_cast<uint32_t*>(memory) + span_keys * dim), probs(query + tile_rows * dim),
          scores(reinterpret_cast<float*>(probs + tile_rows * span_keys)),
          part(scores + tile_rows * span_keys, tile_rows, dim),
          total(part.values + KeySums::count(tile_rows, dim), tile_rows, dim) {}
};

// One tile and what it sees.
struct AttentionTile {
    const AttentionArgs& a;
    const int64_t* blocks;        // of the request
    size_t g;                     // key head
    size_t first_head;            // query heads of the tile, which share the key head
    size_t num_heads;
    size_t first_row;             // of the query, of the tile's first token
    size_t first_position;        // of that token
    size_t num_tokens;
    size_t dim;                   // D, rounded up to 16

    size_t num_rows() const { return num_tokens * num_heads; }
    size_t position(size_t row) const { return first_position + row / num_heads; }
    size_t sees_from(size_t position) const { return a.window && position >= a.window ? position - a.window + 1 : 0; }
    size_t begin() const { return sees_from(first_position); }      // first key that any row sees
    size_t end() const { return first_position + num_tokens; }      // one past the last
    size_t first_part() const { return begin() / part_keys; }
    size_t num_parts() const { return (end() + part_keys - 1) / part_keys - first_part(); }
    float* out(size_t row) const {
        return a.out + (first_row + row / num_heads) * a.out_stride + (first_head + row % num_heads) * a.cache.head_size;
    }
    const float* query(size_t row) const {
        return a.query + (first_row + row / num_heads) * a.query_stride +
               (first_head + row % num_heads) * a.cache.head_size;
    }
};

// Numbers [n] of a row as words: as bfloat16 in pairs, or as float32.
inline void put_words(uint32_t* out, const float* x, size_t n, bool pairs) {
    if (!pairs) {
        std::memcpy(out, x, n * 4);
        return;
    }
    for (size_t i = 0; i < n; i += 16) f_store_bf16(reinterpret_cast<uint16_t*>(out) + i, f_load(x + i));
}

inline void put_queries(const AttentionTile& t, bool pairs, uint32_t* words) {
    const size_t stride = pairs ? t.dim / 2 : t.dim, size = t.a.cache.head_size;
    alignas(64) float padded[1024 + 16] = {};
    for (size_t row = 0; row < t.num_rows(); ++row) {
        const float* x = t.query(row);
        if (t.dim != size) std::memcpy(padded, x, size * sizeof(float)), x = padded;
        put_words(words + row * stride, x, t.dim, pairs);
    }
}

// Asks for the memory of the keys or values of [begin, end), so that it comes while something else is computed.
inline void prefetch_blocks(const AttentionTile& t, size_t begin, size_t end, const void* base, size_t per_head) {
    const Cache& c = t.a.cache;
    const size_t size = c.type == Type::f32 ? 4 : c.type == Type::i8 ? 1 : 2;
    for (size_t key = begin / c.block_size * c.block_size; key < end; key += c.block_size) {
        const size_t at = head_start(c, size_t(t.blocks[key / c.block_size]), t.g, per_head) * size;
        for (size_t i = 0; i < per_head * size; i += 64) __builtin_prefetch(static_cast<const char*>(base) + at + i);
    }
}
inline void prefetch_keys(const AttentionTile& t, size_t begin, size_t end) {
    prefetch_blocks(t, begin, end, t.a.cache.keys, keys_per_head(t.a.cache));
}
inline void prefetch_values(const AttentionTile& t, size_t begin, size_t end) {
    prefetch_blocks(t, begin, end, t.a.cache.values, values_per_head(t.a.cache));
}

// The keys of a span as tiles of 16 keys x D columns. Keys outside [begin, end) become zeros: their memory may hold
// anything.
inline void open_keys(const AttentionTile& t, size_t span, size_t begin, size_t end, uint8_t* tiles) {
    const Cache& c = t.a.cache;
    const F32 zero = f_set1(0.0f);
    for (size_t i = 0; i < span_keys / 16; ++i) {
        const size_t key = span + 16 * i;
        if (key + 16 <= begin || key >= end) continue;
        const size_t from = key < begin ? begin - key : 0, to = key + 16 > end ? end - key : 16;
        const bool whole = from == 0 && to == 16;
        const size_t block = size_t(t.blocks[key / c.block_size]), slot = key % c.block_size;
        const size_t at = head_start(c, block, t.g, keys_per_head(c)) + slot;
        alignas(64) float keep[16];
        for (size_t j = 0; j < 16; ++j) keep[j] = j >= from && j < to ? 1.0f : -1.0f;
        const F32 mask = f_load(keep);
#ifdef PELTON_BF16_DOT
        if (in_pairs(c)) {
            auto out = reinterpret_cast<uint16_t*>(tiles) + 16 * t.dim * i;
            const auto keys = static_cast<const uint16_t*>(c.keys) + at;
            for (size_t d = 0; d < t.dim; d += 2, out += 32) {
                if (d >= c.head_size) {
                    std::memset(out, 0, 64);
                    continue;
                }
                p_store(out, p_zip(keys + d * c.block_size, keys + (d + 1) * c.block_size));
                if (!whole)
                    for (size_t j = 0; j < 16; ++j)
                        if (j < from || j >= to) out[2 * j] = out[2 * j + 1] = 0;
            }
            continue;
        }
#endif
        float* out = reinterpret_cast<float*>(tiles) + 16 * t.dim * i;
        for (size_t d = 0; d < t.dim; ++d, out += 16) {
            const F32 k = d < c.head_size ? load_numbers(c.keys, at + d * c.block_size, c.type) : zero;
            f_store(out, whole ? k : f_less(zero, mask, k, zero));
        }
    }
}

// The first `keys` values of a span as tiles of 16 columns x keys; keys outside [begin, end) become zeros.
inline void open_values(const AttentionTile& t, size_t span, size_t begin, size_t end, size_t keys, uint8_t* tiles) {
    const Cache& c = t.a.cache;
    static const uint16_t zeros[16] = {};
    const auto at = [&](size_t key) {
        const size_t block = size_t(t.blocks[key / c.block_size]), slot = key % c.block_size;
        return head_start(c, block, t.g, values_per_head(c)) + slot * t.dim;
    };
    const auto is_seen = [&](size_t key) { return key >= begin && key < end; };
    (void)zeros;
#ifdef PELTON_BF16_DOT
    if (in_pairs(c)) {
        const auto values = static_cast<const uint16_t*>(c.values);
        for (size_t k = 0; k < keys; k += 2) {
            const uint16_t* first = is_seen(span + k) ? values + at(span + k) : nullptr;
            const uint16_t* second = is_seen(span + k + 1) ? values + at(span + k + 1) : nullptr;
            for (size_t d = 0; d < t.dim; d += 16)
                p_store(reinterpret_cast<uint16_t*>(tiles) + (d * keys + k * 16),
                        p_zip(first ? first + d : zeros, second ? second + d : zeros));
        }
        return;
    }
#endif
    for (size_t k = 0; k < keys; ++k) {
        const size_t key = span + k;
        const bool seen = is_seen(key);
        float scale = 1.0f;
        if (seen && c.type == Type::i8)
            scale = c.value_scales[head_start(c, size_t(t.blocks[key / c.block_size]), t.g, c.block_size) +
                                   key % c.block_size];
        for (size_t d = 0; d < t.dim; d += 16)
            f_store(reinterpret_cast<float*>(tiles) + (d * keys + k * 16),
                    seen ? f_mul(load_numbers(c.values, at(key) + d, c.type), f_set1(scale)) : f_set1(0.0f));
    }
}

// The products of some tiles of `columns` with a group of rows: sums [tiles][rows][16].
template <int tiles>
inline void dot_group(int num_rows, Rows x, const uint8_t* tile, size_t columns, bool pairs, float* out) {
    with_rows(num_rows, [&](auto rows) {
        F32 sums[tiles][rows];
#ifdef PELTON_BF16_DOT
        if (pairs)
            dot_pairs<rows, tiles>(sums, tile, columns * 32, columns, x);
        else
#endif
            dot_numbers<rows, tiles, float>(sums, tile, columns * 64, columns, x);
        for (int t = 0; t < tiles; ++t)
            for (int r = 0; r < rows; ++r) f_store(out + 16 * (t * rows + r), sums[t][r]);
    });
    (void)pairs;
}

// Calls put(row, tile, sums) with the products of each of `num_tiles` tiles of `columns` and each row.
template <typename Put>
inline void dot_rows(const Groups& groups, const uint32_t* words, size_t stride, const uint8_t* tile, size_t num_tiles,
                     size_t columns, bool pairs, Put&& put) {
    const size_t tile_bytes = columns * (pairs ? 32 : 64);
    alignas(64) float sums[16 * max_group * number_tiles];
    const auto some = [&](auto tiles, size_t first) {
        for (size_t g = 0; g < groups.count; ++g) {
            const int rows = groups.size(g);
            const Rows x{words + groups.begin(g) * stride, stride};
            dot_group<tiles>(rows, x, tile + first * tile_bytes, columns, pairs, sums);
            for (int t = 0; t < tiles; ++t)
                for (int r = 0; r < rows; ++r) put(groups.begin(g) + r, first + t, f_load(sums + 16 * (t * rows + r)));
        }
    };
    size_t i = 0;
    if constexpr (number_tiles > 1)
        for (; i + number_tiles <= num_tiles; i += number_tiles) some(Int<number_tiles>{}, i);
    for (; i < num_tiles; ++i) some(Int<1>{}, i);
}

#ifdef PELTON_BF16_DOT
// For a group of rows alone, keys and values are read where they are: opening them would cost more than it saves.

// The products of some tiles of 16 keys [columns][16], whose columns are `step` numbers apart, with a group of rows.
template <int rows, int tiles>
inline void dot_cached_keys(F32 (&sums)[tiles][rows], const uint16_t* const (&keys)[tiles], size_t step, size_t columns,
                            Rows x) {
    F32 own[tiles][rows];
    clear(own);
    for (size_t d = 0; d < columns; d += 2) {
        Pairs w[tiles];
#pragma GCC unroll 4
        for (int t = 0; t < tiles; ++t) w[t] = p_zip(keys[t] + d * step, keys[t] + (d + 1) * step);
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
            const Pairs value = p_set1(reinterpret_cast<const uint16_t*>(x.at(r) + d / 2));
#pragma GCC unroll 4
            for (int t = 0; t < tiles; ++t) own[t][r] = p_dot(own[t][r], w[t], value);
        }
    }
    copy(own, sums);
}

// The products of some tiles of 16 columns of `keys` values with a group of rows.
template <int rows, int tiles>
inline void dot_cached_values(F32 (&sums)[tiles][rows], const uint16_t* const* values, size_t column, size_t keys, Rows x) {
    F32 own[tiles][rows];
    clear(own);
    for (size_t k = 0; k < keys; k += 2) {
        Pairs w[tiles];
#pragma GCC unroll 4
        for (int t = 0; t < tiles; ++t)
            w[t] = p_zip(values[k] + column + 16 * t, values[k + 1] + column + 16 * t);
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
            const Pairs value = p_set1(reinterpret_cast<const uint16_t*>(x.at(r) + k / 2));
#pragma GCC unroll 4
            for (int t = 0; t < tiles; ++t) own[t][r] = p_dot(own[t][r], w[t], value);
        }
    }
    copy(own, sums);
}

// Calls put(row, tile, sums) for the keys of a span; what is beyond the tiles repeats the last.
template <typename Put>
inline void dot_keys_in_place(const AttentionTile& t, size_t span, size_t num_tiles, const uint32_t* query, Put&& put) {
    const Cache& c = t.a.cache;
    const uint16_t* keys[4];
    for (size_t i = 0; i < 4; ++i) {
        const size_t key = span + 16 * std::min(i, num_tiles - 1);
        keys[i] = static_cast<const uint16_t*>(c.keys) +
                  head_start(c, size_t(t.blocks[key / c.block_size]), t.g, keys_per_head(c)) + key % c.block_size;
    }
    with_rows(int(t.num_rows()), [&](auto rows) {
        F32 sums[4][rows];
        dot_cached_keys<rows, 4>(sums, keys, c.block_size, c.head_size, Rows{query, t.dim / 2});
        for (size_t i = 0; i < num_tiles; ++i)
            for (int r = 0; r < rows; ++r) put(size_t(r), i, sums[i][r]);
    });
}

// Calls put(row, tile, sums) for the values of a span; those outside [begin, end) count as zeros.
template <typename Put>
inline void dot_values_in_place(const AttentionTile& t, size_t span, size_t begin, size_t end, size_t keys,
                                const uint32_t* probs, Put&& put) {
    static const uint16_t zeros[1024 + 16] = {};
    const Cache& c = t.a.cache;
    const uint16_t* values[span_keys];
    for (size_t k = 0; k < keys; ++k) {
        const size_t key = span + k;
        values[k] = key < begin || key >= end
                        ? zeros
                        : static_cast<const uint16_t*>(c.values) + key % c.block_size * t.dim +
                              head_start(c, size_t(t.blocks[key / c.block_size]), t.g, values_per_head(c));
    }
    const Rows x{probs, span_keys / 2};
    with_rows(int(t.num_rows()), [&](auto num_rows) {
        constexpr int rows = decltype(num_rows)::value;
        const auto some = [&](auto num_tiles, size_t first) {
            constexpr int tiles = decltype(num_tiles)::value;
            F32 sums[tiles][rows];
            dot_cached_values<rows, tiles>(sums, values, 16 * first, keys, x);
            for (int i = 0; i < tiles; ++i)
                for (int r = 0; r < rows; ++r) put(size_t(r), first + i, sums[i][r]);
        };
        size_t i = 0;
        for (; i + 4 <= t.dim / 16; i += 4) some(Int<4>{}, i);
        for (; i < t.dim / 16; ++i) some(Int<1>{}, i);
    });
}
#endif

// Scores of a span, scaled, and minus infinity where a row does not see the key: scores [rows][64], up to the last
// sixteen keys that some row sees.
inline void score_span(const AttentionTile& t, const Groups& groups, size_t span, bool pairs, const AttentionSpace& s) {
    const AttentionArgs& a = t.a;
    const Cache& c = a.cache;
    const size_t begin = std::max(span, t.begin()), end = std::min(span + span_keys, t.end());
    static const float counts[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const F32 lanes = f_load(counts), nothing = f_set1(-std::numeric_limits<float>::infinity());
    const size_t num_tiles = (end - span + 15) / 16;
    F32 factors[span_keys / 16];
    for (size_t i = 0; i < num_tiles; ++i) {
        const size_t key = span + 16 * i;
        factors[i] = f_set1(a.scale);
        if (c.type == Type::i8)
            factors[i] = f_mul(factors[i], f_load(c.key_scales + head_start(c, size_t(t.blocks[key / c.block_size]), t.g,
                                                                            c.block_size) + key % c.block_size));
    }
    const auto put = [&](size_t row, size_t i, F32 y) {
        const size_t key = span + 16 * i, position = t.position(row);
        y = f_mul(y, factors[i]);
        if (a.softcap > 0.0f) y = f_mul(f_set1(a.softcap), f_tanh(f_mul(y, f_set1(1.0f / a.softcap))));
        if (key + 15 > position || key < t.sees_from(position)) {
            const float from = float(ptrdiff_t(t.sees_from(position)) - ptrdiff_t(key));
            const float to = float(ptrdiff_t(position) - ptrdiff_t(key));
            y = f_less(lanes, f_set1(from), nothing, f_less(f_set1(to), lanes, nothing, y));
        }
        f_store(s.scores + row * span_keys + 16 * i, y);
    };
#ifdef PELTON_BF16_DOT
    if (pairs && groups.count == 1) return dot_keys_in_place(t, span, num_tiles, s.query, put);
#endif
    open_keys(t, span, begin, end, s.tiles);
    dot_rows(groups, s.query, pairs ? t.dim / 2 : t.dim, s.tiles, num_tiles, t.dim, pairs, put);
}

// Scores of `keys` keys become exponentials, as words; maxima, sums and what was summed before are brought up to date.
inline void soften_span(const AttentionTile& t, size_t keys, bool pairs, const AttentionSpace& s, KeySums sums) {
    const size_t num_rows = std::min(t.num_rows(), tile_rows), stride = pairs ? span_keys / 2 : span_keys;
    alignas(64) float base[tile_rows] = {}, kept[tile_rows] = {};
    for (size_t row = 0; row < num_rows; ++row) {
        const float* x = s.scores + row * span_keys;
        F32 most = f_load(x);
        for (size_t i = 16; i < keys; i += 16) most = f_max(most, f_load(x + i));
        const float before = sums.maximum[row], now = std::max(before, f_hmax(most));
        base[row] = now == -std::numeric_limits<float>::infinity() ? 0.0f : now;
        kept[row] = before - base[row];
        sums.maximum[row] = now;
    }
    for (size_t row = 0; row < num_rows; row += 16) f_store(kept + row, f_exp(f_load(kept + row)));
    for (size_t row = 0; row < num_rows; ++row) {
        float* x = s.scores + row * span_keys;
        F32 sum = f_set1(0.0f);
        for (size_t i = 0; i < keys; i += 16) {
            const F32 p = f_exp(f_sub(f_load(x + i), f_set1(base[row])));
            sum = f_add(sum, p);
            f_store(x + i, p);
        }
        put_words(s.probs + row * stride, x, keys, pairs);
        sums.sum[row] = sums.sum[row] * kept[row] + f_sum(sum);
        if (kept[row] == 1.0f) continue;
        float* out = sums.values + row * t.dim;
        for (size_t d = 0; d < t.dim; d += 16) f_store(out + d, f_mul(f_load(out + d), f_set1(kept[row])));
    }
}

// Sums over part i of a tile, whose queries are in the thread's memory.
inline void attend_part(const AttentionTile& t, const Groups& groups, size_t i, bool pairs, const AttentionSpace& s,
                        KeySums sums) {
    const size_t begin = std::max((t.first_part() + i) * part_keys, t.begin());
    const size_t end = std::min((t.first_part() + i + 1) * part_keys, t.end());
    sums.clear(t.num_rows(), t.dim);
    for (size_t span = begin / span_keys * span_keys; span < end; span += span_keys) {
        const size_t from = std::max(span, t.begin()), to = std::min(span + span_keys, t.end());
        const size_t keys = round_up(to - span, 16);
        prefetch_values(t, from, to);
        if (to < t.end()) prefetch_keys(t, to, std::min(to + span_keys, t.end()));
        score_span(t, groups, span, pairs, s);
        soften_span(t, keys, pairs, s, sums);
        const auto put = [&](size_t row, size_t i, F32 y) {
            float* out = sums.values + row * t.dim + 16 * i;
            f_store(out, f_add(f_load(out), y));
        };
#ifdef PELTON_BF16_DOT
        if (pairs && groups.count == 1) {
            dot_values_in_place(t, span, from, to, keys, s.probs, put);
            continue;
        }
#endif
        open_values(t, span, from, to, keys, s.tiles);
        dot_rows(groups, s.probs, pairs ? span_keys / 2 : span_keys, s.tiles, t.dim / 16, keys, pairs, put);
    }
}

// Adds the sums of a part to the total of one row.
inline void add_part(KeySums total, KeySums part, size_t row, size_t dim) {
    const float before = total.maximum[row], now = std::max(before, part.maximum[row]);
    if (now == -std::numeric_limits<float>::infinity()) return;
    const float old_weight = exp_one(before - now), new_weight = exp_one(part.maximum[row] - now);
    float* to = total.values + row * dim;
    const float* from = part.values + row * dim;
    for (size_t d = 0; d < dim; d += 16)
        f_store(to + d, f_fma(f_load(from + d), f_set1(new_weight), f_mul(f_load(to + d), f_set1(old_weight))));
    total.sum[row] = total.sum[row] * old_weight + part.sum[row] * new_weight;
    total.maximum[row] = now;
}

inline void write_row(const AttentionTile& t, size_t row, const float* total, float sum) {
    float* out = t.out(row);
    each_piece(t.a.cache.head_size, [&](size_t d, size_t n) {
        store_piece(out + d, f_div(f_load(total + d), f_set1(sum)), n);
    });
}

inline void begin_tile(const AttentionTile& t, const AttentionSpace& s) {
    prefetch_keys(t, t.begin(), std::min(t.begin() + span_keys, t.end()));
    put_queries(t, in_pairs(t.a.cache), s.query);
}

// Adds up the parts of a tile in order, as sums_of(i) gives them, and writes the rows.
template <typename SumsOf>
inline void add_parts(const AttentionTile& t, KeySums total, SumsOf&& sums_of) {
    total.clear(t.num_rows(), t.dim);
    for (size_t i = 0; i < t.num_parts(); ++i) {
        const KeySums part = sums_of(i);
        for (size_t row = 0; row < t.num_rows(); ++row) add_part(total, part, row, t.dim);
    }
    for (size_t row = 0; row < t.num_rows(); ++row) write_row(t, row, total.values + row * t.dim, total.sum[row]);
}

// How the rows of requests are cut into tiles: `heads` query heads with `tokens` tokens at most.
struct Tiling {
    size_t per_group, heads, tokens, per_row;  // per_row: tiles side by side over the heads

    explicit Tiling(const AttentionArgs& a)
        : per_group(a.num_heads / a.cache.num_kv_heads), heads(std::min(per_group, tile_rows)),
          tokens(tile_rows / heads), per_row(a.cache.num_kv_heads * ((per_group + heads - 1) / heads)) {}
    size_t of_request(const AttentionArgs& a, size_t r) const {
        const size_t rows = size_t(a.query_starts[r + 1] - a.query_starts[r]);
        return (rows + tokens - 1) / tokens * per_row;
    }
};

// Tile i of a request, the last tokens first: they see the most keys, and are best begun early.
inline AttentionTile make_tile(const AttentionArgs& a, const Tiling& tiling, size_t r, size_t i) {
    const size_t begin = size_t(a.query_starts[r]), end = size_t(a.query_starts[r + 1]);
    const size_t side = i % tiling.per_row, chunks = tiling.per_row / a.cache.num_kv_heads;
    const size_t rows_of_tiles = (end - begin + tiling.tokens - 1) / tiling.tokens;
    const size_t row = begin + (rows_of_tiles - 1 - i / tiling.per_row) * tiling.tokens;
    const size_t g = side / chunks, head = g * tiling.per_group + side % chunks * tiling.heads;
    const size_t num_heads = std::min(tiling.heads, (g + 1) * tiling.per_group - head);
    const size_t position = size_t(a.context_lens[r]) - (end - row);
    return {a, a.block_table + r * a.table_stride, g, head, num_heads, row, position, std::min(tiling.tokens, end - row),
            round_up(a.cache.head_size, 16)};
}

// The tiles of all requests, one request after the other.
struct Tiles {
    const AttentionArgs& a;
    const Tiling tiling;
    size_t count = 0;

    explicit Tiles(const AttentionArgs& args) : a(args), tiling(args) {
        for (size_t r = 0; r < a.num_requests; ++r) count += tiling.of_request(a, r);
    }
    AttentionTile operator[](size_t i) const {
        size_t r = 0;
        for (size_t n; i >= (n = tiling.of_request(a, r)); ++r) i -= n;
        return make_tile(a, tiling, r, i);
    }
};

// Where there are few tiles with many keys, threads share the parts of a tile. Sums of parts lie in the team's memory,
// one after the other, until they are added up.
struct SharedParts {
    static constexpr size_t memory = size_t(8) << 20;  // 1,000 parts of 8 rows and 256 columns
    const Tiles& tiles;
    size_t count = 0, rows = 0;

    explicit SharedParts(const Tiles& all) : tiles(all) {
        for (size_t i = 0; i < tiles.count; ++i) {
            const AttentionTile t = tiles[i];
            count += t.num_parts();
            rows = std::max(rows, t.num_rows());
        }
    }
    bool fit(size_t dim) const { return count * KeySums::count(rows, dim) * sizeof(float) <= memory; }
    KeySums sums(const Team& team, size_t i, size_t dim) const {
        return KeySums(reinterpret_cast<float*>(team.shared) + i * KeySums::count(rows, dim), rows, dim);
    }

    void attend(const AttentionSpace& s, const Team& team, size_t dim) const {
        team.each_piece(count, 1, [&](Range one) {
            size_t tile = 0, part = one.begin;
            for (size_t n; part >= (n = tiles[tile].num_parts()); ++tile) part -= n;
            const AttentionTile t = tiles[tile];
            begin_tile(t, s);
            attend_part(t, Groups(t.num_rows()), part, in_pairs(t.a.cache), s, sums(team, one.begin, dim));
        });
        team.barrier();
        size_t first = 0;
        for (size_t i = 0; i < tiles.count; ++i) {
            const AttentionTile t = tiles[i];
            if (i % team.num_threads == team.thread)
                add_parts(t, s.total, [&](size_t part) { return sums(team, first + part, dim); });
            first += t.num_parts();
        }
    }
};

inline Scratch attention_scratch(const AttentionArgs& a, size_t) {
    return {SharedParts::memory, AttentionSpace::bytes(round_up(a.cache.head_size, 16)) + 64};
}

inline void attention(const AttentionArgs& a, size_t, const Team& team) {
    const size_t dim = round_up(a.cache.head_size, 16);
    const AttentionSpace space(team.local, dim);
    const Tiles tiles(a);
    if (team.num_threads > 1 && tiles.count < 4 * team.num_threads) {
        const SharedParts parts(tiles);
        if (parts.count > tiles.count && parts.fit(dim)) return parts.attend(space, team, dim);
    }
    team.each_piece(tiles.count, 1, [&](Range one) {
        const AttentionTile t = tiles[one.begin];
        const Groups groups(t.num_rows());
        begin_tile(t, space);
        add_parts(t, space.total, [&](size_t i) {
            attend_part(t, groups, i, in_pairs(a.cache), space, space.part);
            return space.part;
        });
    });
}
