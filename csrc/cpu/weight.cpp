// Packing. Sources of the formats: ggml/src/ggml-common.h and ggml-quants.c of llama.cpp define GGUF's blocks;
// pelton/quant/gguf.py says in one line each what their weights are.
#include "weight.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace pelton {
namespace {

constexpr size_t block_columns = 32, tile_rows = 16;

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

uint32_t word(const void* p) {
    uint32_t value;
    std::memcpy(&value, p, 4);
    return value;
}
uint16_t half(const uint8_t* p) { return uint16_t(p[0] | p[1] << 8); }
void put_word(uint8_t* p, uint32_t value) { std::memcpy(p, &value, 4); }
void put_half(uint8_t* p, uint16_t value) { std::memcpy(p, &value, 2); }

// --- GGUF's blocks -----------------------------------------------------------------------------------------------------

// One block of one row, taken apart: codes, d and m as f16 bits (m is added), and 8-bit scales and minima of sub-blocks.
struct Parts {
    uint8_t u[256];
    uint16_t d, m;
    uint8_t scales[16], mins[16];
};

// Weights of `run` bytes: first their low halves, then their high halves, and so on.
template <int run>
void nibbles(const uint8_t* p, int n, uint8_t* u) {
    for (int i = 0; i < n / 2; i += run, p += run, u += 2 * run)
        for (int j = 0; j < run; ++j) u[j] = p[j] & 15, u[run + j] = p[j] >> 4;
}

void q4_0(const uint8_t* p, Parts& o) {
    o.d = half(p);
    nibbles<16>(p + 2, 32, o.u);
}
void q4_1(const uint8_t* p, Parts& o) {
    o.d = half(p), o.m = half(p + 2);
    nibbles<16>(p + 4, 32, o.u);
}
void fifth_bits(const uint8_t* p, uint8_t* u) {
    const uint32_t bits = word(p);
    for (int i = 0; i < 32; ++i) u[i] = uint8_t(u[i] | (bits >> i & 1) << 4);
}
void q5_0(const uint8_t* p, Parts& o) {
    o.d = half(p);
    nibbles<16>(p + 6, 32, o.u);
    fifth_bits(p + 2, o.u);
}
void q5_1(const uint8_t* p, Parts& o) {
    o.d = half(p), o.m = half(p + 2);
    nibbles<16>(p + 8, 32, o.u);
    fifth_bits(p + 4, o.u);
}
void q8_0(const uint8_t* p, Parts& o) {
    o.d = half(p);
    for (int i = 0; i < 32; ++i) o.u[i] = p[2 + i] ^ 0x80;  // signed to unsigned with zero 128
}
void scales_and_mins(const uint8_t* p, Parts& o) {  // 12 bytes: 8 pairs of 6 bits, as quant/gguf.py draws them
    for (int i = 0; i < 4; ++i) {
        o.scales[i] = p[i] & 63, o.mins[i] = p[4 + i] & 63;
        o.scales[4 + i] = uint8_t((p[8 + i] & 15) | p[i] >> 6 << 4);
        o.mins[4 + i] = uint8_t(p[8 + i] >> 4 | p[4 + i] >> 6 << 4);
    }
}
void q4_k(const uint8_t* p, Parts& o) {
    o.d = half(p), o.m = half(p + 2) ^ 0x8000;  // the file's minimum is subtracted
    scales_and_mins(p + 4, o);
    nibbles<32>(p + 16, 256, o.u);
}
void q5_k(const uint8_t* p, Parts& o) {
    o.d = half(p), o.m = half(p + 2) ^ 0x8000;
    scales_and_mins(p + 4, o);
    nibbles<32>(p + 48, 256, o.u);
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 32; ++j) o.u[32 * i + j] = uint8_t(o.u[32 * i + j] | (p[16 + j] >> i & 1) << 4);
}
void q6_k(const uint8_t* p, Parts& o) {
    o.d = half(p + 208);
    nibbles<64>(p, 256, o.u);
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 32; ++j)
            o.u[32 * i + j] = uint8_t(o.u[32 * i + j] | (p[128 + 32 * (i / 4) + j] >> 2 * (i % 4) & 3) << 4);
    std::memcpy(o.scales, p + 192, 16);
}
void two_bits(const uint8_t* p, uint8_t* u) {
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 32; ++j) u[32 * i + j] = p[32 * (i / 4) + j] >> 2 * (i % 4) & 3;
}
void q2_k(const uint8_t* p, Parts& o) {
    o.d = half(p + 80), o.m = half(p + 82) ^ 0x8000;
    for (int i = 0; i < 16; ++i) o.scales[i] = p[i] & 15, o.mins[i] = p[i] >> 4;
    two_bits(p + 16, o.u);
}
void q3_k(const uint8_t* p, Parts& o) {
    o.d = half(p + 108);
    two_bits(p + 32, o.u);
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 32; ++j) o.u[32 * i + j] = uint8_t(o.u[32 * i + j] | (p[j] >> i & 1) << 2);
    for (int i = 0; i < 16; ++i) {  // 16 x 6 bits: 8 bytes of low nibbles, then 4 bytes of four 2-bit fields
        const int low = i < 8 ? p[96 + i] & 15 : p[96 + i - 8] >> 4;
        const int high = p[104 + i % 4] >> 2 * (i / 4) & 3;
        o.scales[i] = uint8_t((low | high << 4) - 32);
    }
}
void iq4_nl(const uint8_t* p, Parts& o) { q4_0(p, o); }
void iq4_xs(const uint8_t* p, Parts& o) {
    o.d = half(p);
    const uint16_t high = half(p + 2);
    for (int i = 0; i < 8; ++i)
        o.scales[i] = uint8_t(((p[4 + i / 2] >> 4 * (i % 2) & 15) | (high >> 2 * i & 3) << 4) - 32);
    nibbles<16>(p + 8, 256, o.u);
}

struct Format {
    const char* name;
    size_t block_size, block_bytes;  // in the file
    void (*take_apart)(const uint8_t*, Parts&);  // null: plain numbers
    Layout layout;
};

Layout numbers(Type type) {
    Layout layout;
    layout.type = type;
    return layout;
}

Layout codes_layout(int bits, Scales scales, uint32_t group, int zero) {  // zero < 0: minima
    Layout layout;
    layout.storage = Storage::codes;
    layout.bits = uint8_t(bits);
    layout.scales = scales;
    layout.group = group;
    layout.has_min = zero < 0;
    layout.zero = zero < 0 ? 0 : zero;
    return layout;
}

Layout iq4(Scales scales) {
    constexpr int values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    Layout layout = codes_layout(4, scales, 32, 128);
    layout.has_table = true;
    for (int i = 0; i < 16; ++i) layout.table[i] = uint8_t(values[i] + 128);
    return layout;
}

const std::vector<Format>& formats() {
    static const std::vector<Format> all = {
        {"F32", 1, 4, nullptr, numbers(Type::f32)},
        {"F16", 1, 2, nullptr, numbers(Type::f16)},
        {"BF16", 1, 2, nullptr, numbers(Type::bf16)},
        {"Q4_0", 32, 18, q4_0, codes_layout(4, Scales::f16, 32, 8)},
        {"Q4_1", 32, 20, q4_1, codes_layout(4, Scales::f16, 32, -1)},
        {"Q5_0", 32, 22, q5_0, codes_layout(5, Scales::f16, 32, 16)},
        {"Q5_1", 32, 24, q5_1, codes_layout(5, Scales::f16, 32, -1)},
        {"Q8_0", 32, 34, q8_0, codes_layout(8, Scales::f16, 32, 128)},
        {"Q2_K", 256, 84, q2_k, codes_layout(2, Scales::super, 16, -1)},
        {"Q3_K", 256, 110, q3_k, codes_layout(3, Scales::super, 16, 4)},
        {"Q4_K", 256, 144, q4_k, codes_layout(4, Scales::super, 32, -1)},
        {"Q5_K", 256, 176, q5_k, codes_layout(5, Scales::super, 32, -1)},
        {"Q6_K", 256, 210, q6_k, codes_layout(6, Scales::super, 16, 32)},
        {"IQ4_NL", 32, 18, iq4_nl, iq4(Scales::f16)},
        {"IQ4_XS", 256, 136, iq4_xs, iq4(Scales::super)},
    };
    return all;
}

const Format& find_format(const std::string& name) {
    for (const Format& format : formats())
        if (name == format.name) return format;
    throw std::invalid_argument("there is no packed layout for " + name);
}

// --- the tile -----------------------------------------------------------------------------------------------------------

// Codes of row r for one block of 32 columns. A code's low 4 bits (or 2) go to the first plane, what is above to the
// planes behind; word k holds the codes 4 k ... 4 k + 3. load_codes in kernels/codes.inl is the way back.
void put_codes(uint8_t* block, size_t r, int bits, const uint8_t* u) {
    uint32_t w[8];
    std::memcpy(w, u, 32);
    uint8_t* row = block + 4 * r;
    if (bits == 8) {
        for (int k = 0; k < 8; ++k) put_word(row + 64 * k, w[k]);
        return;
    }
    const auto plane = [&](int shift, uint32_t mask, int step, int first, int count) {
        uint32_t bits_of = 0;
        for (int k = 0; k < count; ++k) bits_of |= (w[first + k] >> shift & mask) << step * k;
        return bits_of;
    };
    constexpr uint32_t ones = 0x01010101u, threes = 0x03030303u, fifteens = 0x0f0f0f0fu;
    if (bits >= 4) {
        for (int i = 0; i < 4; ++i) put_word(row + 64 * i, (w[2 * i] & fifteens) | (w[2 * i + 1] & fifteens) << 4);
        if (bits == 5) put_word(row + 256, plane(4, ones, 1, 0, 8));
        if (bits == 6)
            for (int i = 0; i < 2; ++i) put_word(row + 256 + 64 * i, plane(4, threes, 2, 4 * i, 4));
    } else {
        for (int i = 0; i < 2; ++i) put_word(row + 64 * i, plane(0, threes, 2, 4 * i, 4));
        if (bits == 3) put_word(row + 128, plane(2, ones, 1, 0, 8));
    }
}

Weight make_weight(const Layout& layout, size_t num_out, size_t num_in) {
    Weight w;
    w.layout = layout;
    w.num_out = num_out, w.num_in = num_in;
    w.num_blocks = (num_in + block_columns - 1) / block_columns;
    const size_t columns = w.num_blocks * block_columns, groups = (columns + layout.group - 1) / layout.group;
    size_t at = 0;
    const auto part = [&](size_t bytes) {
        const size_t start = at;
        at = round_up(at + bytes, 64);
        return start;
    };
    if (layout.storage == Storage::numbers) {
        part(columns * tile_rows * (layout.type == Type::f32 ? 4 : 2));
    } else {
        part(w.num_blocks * size_t(layout.bits) * 64);
        const size_t bytes = layout.scales == Scales::f32 ? 64 : layout.scales == Scales::f16 ? 32 : 16;
        w.scales_at = part(groups * bytes);
        if (layout.has_min) w.mins_at = part(groups * bytes);
        if (layout.scales == Scales::super) {
            w.super_at = part((columns + 255) / 256 * 32);
            if (layout.has_min) w.super_min_at = part((columns + 255) / 256 * 32);
        }
    }
    w.tile_bytes = at;
    return w;
}

void put_numbers(const Weight& w, uint8_t* tile, size_t r, const uint8_t* row) {
    if (w.layout.type == Type::f32) {
        for (size_t k = 0; k < w.num_in; ++k) put_word(tile + 64 * k + 4 * r, word(row + 4 * k));
    } else if (w.layout.type == Type::f16) {
        for (size_t k = 0; k < w.num_in; ++k) put_half(tile + 32 * k + 2 * r, half(row + 2 * k));
    } else {
        size_t k = 0;
        for (; k + 1 < w.num_in; k += 2) put_word(tile + 32 * k + 4 * r, word(row + 2 * k));
        if (k < w.num_in) put_half(tile + 32 * k + 4 * r, half(row + 2 * k));
    }
}

// Block b of the file for row r of a tile.
void put_block(const Weight& w, const Format& format, uint8_t* tile, size_t r, size_t b, const uint8_t* block) {
    const Layout& layout = w.layout;
    const size_t block_bytes = size_t(layout.bits) * 64, groups = format.block_size / layout.group;
    const size_t per_block = format.block_size / block_columns;
    Parts parts;
    format.take_apart(block, parts);
    for (size_t i = 0; i < per_block; ++i)
        put_codes(tile + (b * per_block + i) * block_bytes, r, layout.bits, parts.u + block_columns * i);
    if (layout.scales == Scales::f16) {
        put_half(tile + w.scales_at + 32 * b + 2 * r, parts.d);
        if (layout.has_min) put_half(tile + w.mins_at + 32 * b + 2 * r, parts.m);
        return;
    }
    put_half(tile + w.super_at + 32 * b + 2 * r, parts.d);
    if (layout.has_min) put_half(tile + w.super_min_at + 32 * b + 2 * r, parts.m);
    for (size_t g = 0; g < groups; ++g) {
        tile[w.scales_at + 16 * (b * groups + g) + r] = parts.scales[g];
        if (layout.has_min) tile[w.mins_at + 16 * (b * groups + g) + r] = parts.mins[g];
    }
}

}  // namespace

std::vector<std::string> packed_formats() {
    std::vector<std::string> names;
    for (const Format& format : formats()) names.emplace_back(format.name);
    return names;
}

PackedWeight::PackedWeight(Layout layout, size_t num_out, size_t num_in, std::string format)
    : format_(std::move(format)) {
    constexpr size_t most = size_t(1) << 31;
    if (num_out == 0 || num_in == 0 || num_out > most || num_in > most)
        throw std::invalid_argument("a weight has at least one row and one column");
    weight_ = make_weight(layout, num_out, num_in);
    memory_ = Buffer(weight_.tile_bytes * weight_.num_tiles());
    weight_.data = memory_.data();
}

PackedWeight::PackedWeight(const std::string& format, size_t num_out, size_t num_in)
    : PackedWeight(find_format(format).layout, num_out, num_in, format) {
    if (num_in % find_format(format).block_size)
        throw std::invalid_argument(format + " needs a multiple of " + std::to_string(find_format(format).block_size) +
                                    " columns");
}

PackedWeight PackedWeight::codes(int bits, uint32_t group, bool has_min, int zero, size_t num_out, size_t num_in) {
    if (bits != 4 && bits != 8) throw std::invalid_argument("codes have 4 or 8 bits");
    if (group == 0 || group % block_columns) throw std::invalid_argument("a group has a multiple of 32 columns");
    if (zero < 0 || zero >= 1 << bits) throw std::invalid_argument("the zero is not a code");
    return {codes_layout(bits, Scales::f32, group, has_min ? -1 : zero), num_out, num_in, "codes"};
}

PackedWeight PackedWeight::lookup(const std::vector<float>& values, uint32_t group, size_t num_out, size_t num_in) {
    if (values.size() != 16) throw std::invalid_argument("4-bit codes stand for 16 values");
    if (group == 0 || group % block_columns) throw std::invalid_argument("a group has a multiple of 32 columns");
    Layout layout = codes_layout(4, Scales::f32, group, 0);
    layout.storage = Storage::lookup;
    std::copy(values.begin(), values.end(), layout.values);
    return {layout, num_out, num_in, "lookup"};
}

size_t PackedWeight::row_bytes() const {
    const Format& format = find_format(format_);
    return weight_.num_in / format.block_size * format.block_bytes;
}

void PackedWeight::check_rows(size_t first_row, size_t num_rows) const {
    if (first_row > weight_.num_out || num_rows > weight_.num_out - first_row)
        throw std::invalid_argument("more rows than the weight has");
}

void PackedWeight::fill(Pool& pool, size_t first_row, const uint8_t* blocks, size_t num_bytes,
                        const std::vector<int32_t>& rows) {
    const Format& format = find_format(format_);
    const size_t row_bytes = this->row_bytes(), num_rows = num_bytes / row_bytes;
    if (num_rows * row_bytes != num_bytes) throw std::invalid_argument("the blocks are not whole rows");
    check_rows(first_row, num_rows);
    if (!rows.empty() && rows.size() != num_rows) throw std::invalid_argument("the order of rows has another length");
    for (int32_t row : rows)
        if (row < 0 || size_t(row) >= num_rows) throw std::invalid_argument("the order of rows names a row there is not");
    // Rows of one tile stay with one thread, which is the one that multiplies them.
    const size_t first_tile = first_row / tile_rows, tiles = (first_row + num_rows + tile_rows - 1) / tile_rows - first_tile;
    pool.run([&](const Team& team) {
        const Range mine = team.share(tiles);
        for (size_t t = first_tile + mine.begin; t < first_tile + mine.end; ++t) {
            uint8_t* tile = weight_.data + t * weight_.tile_bytes;
            const size_t begin = std::max(first_row, t * tile_rows);
            const size_t end = std::min(first_row + num_rows, (t + 1) * tile_rows);
            const auto source = [&](size_t row) {
                return blocks + (rows.empty() ? row - first_row : size_t(rows[row - first_row])) * row_bytes;
            };
            if (!format.take_apart) {
                for (size_t row = begin; row < end; ++row) put_numbers(weight_, tile, row % tile_rows, source(row));
                continue;
            }
            for (size_t b = 0; b < weight_.num_in / format.block_size; ++b)  // all rows of a block: they share lines
                for (size_t row = begin; row < end; ++row)
                    put_block(weight_, format, tile, row % tile_rows, b, source(row) + b * format.block_bytes);
        }
    });
}

void PackedWeight::fill_codes(Pool& pool, size_t first_row, size_t num_rows, const uint8_t* codes, const float* scales,
                              const float* mins) {
    check_rows(first_row, num_rows);
    if (weight_.layout.has_min != (mins != nullptr)) throw std::invalid_argument("minima do not fit the layout");
    const Weight& w = weight_;
    const size_t groups = (w.num_in + w.layout.group - 1) / w.layout.group;
    pool.run([&](const Team& team) {
        const Range mine = team.share((num_rows + tile_rows - 1) / tile_rows);
        for (size_t i = mine.begin * tile_rows; i < std::min(num_rows, mine.end * tile_rows); ++i) {
            const size_t row = first_row + i, r = row % tile_rows;
            uint8_t* tile = w.data + row / tile_rows * w.tile_bytes;
            for (size_t b = 0; b < w.num_blocks; ++b) {
                uint8_t u[block_columns] = {};
                const size_t first = b * block_columns, n = std::min(block_columns, w.num_in - first);
                const uint8_t limit = w.layout.bits == 4 ? 15 : 255;
                for (size_t k = 0; k < n; ++k) u[k] = codes[i * w.num_in + first + k] & limit;
                put_codes(tile + b * w.layout.bits * 64, r, w.layout.bits, u);
            }
            for (size_t g = 0; g < groups; ++g) {
                std::memcpy(tile + w.scales_at + 64 * g + 4 * r, scales + i * groups + g, 4);
                if (mins) std::memcpy(tile + w.mins_at + 64 * g + 4 * r, mins + i * groups + g, 4);
            }
        }
    });
}

void PackedWeight::set_order(std::vector<int32_t> order) {
    if (order.size() != weight_.num_in) throw std::invalid_argument("the order of columns has another length");
    for (int32_t k : order)
        if (k < 0 || size_t(k) >= weight_.num_in)
            throw std::invalid_argument("the order of columns names a column there is not");
    order_ = std::move(order);
    weight_.order = order_.data();
}

}  // namespace pelton
