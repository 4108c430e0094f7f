// Holds the kernels of every instruction set that this processor runs to those in plain C++, on random arguments.
// Prints a line for each set; the exit status is 1 if any result differs by more than it may.
//
// With fused multiply-adds (fused.cpp) plain C++ gives the bits of all sets, with two exceptions: "generic" rounds
// products first, and sets with products of bfloat16 round what they multiply. Those are held to a part of the largest
// number of a result.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "weight.h"

namespace pelton {
extern const Kernels fused_kernels;

namespace {
#include "kernels/convert.inl"

constexpr float generic_tolerance = 1e-5f, bf16_tolerance = 1e-2f;

// What a kernel wrote. `step`: by how much numbers that were rounded once more may differ where their sums do, as a
// part of the largest; below 0: they never differ.
struct Piece {
    const char* name;
    std::vector<float> numbers;
    float step = 0.0f;
};
using Pieces = std::vector<Piece>;

struct Case {
    std::string name;
    bool may_use_bf16;  // products of bfloat16, by the sets that have them
    std::function<Pieces(const Kernels&)> run;
};

// --- arguments -------------------------------------------------------------------------------------------------------

class Random {
   public:
    explicit Random(uint64_t seed) : bits_(seed) {}
    uint32_t below(uint32_t n) { return uint32_t(bits_() % n); }
    float number() {  // in [-1, 1), denser near 0
        const float a = float(int32_t(bits_())) * 0x1p-31f, b = float(uint32_t(bits_())) * 0x1p-32f;
        return a * b;
    }
    std::vector<float> numbers(size_t n, float scale = 1.0f) {
        std::vector<float> all(n);
        for (float& x : all) x = number() * scale;
        return all;
    }
    std::vector<uint8_t> bytes(size_t n) {
        std::vector<uint8_t> all(n);
        for (uint8_t& x : all) x = uint8_t(bits_());
        return all;
    }
    std::vector<int32_t> permutation(size_t n) {
        std::vector<int32_t> all(n);
        for (size_t i = 0; i < n; ++i) {
            const size_t at = below(uint32_t(i + 1));
            all[i] = all[at], all[at] = int32_t(i);
        }
        return all;
    }

   private:
    std::mt19937 bits_;
};

Pool& pool() {
    static Pool one(1, {});
    return one;
}

template <typename Args>
void call(Kernel<Args> kernel, const Args& args, size_t num_rows, Scratch scratch = {}) {
    pool().run([&](const Team& team) { kernel(args, num_rows, team); }, scratch);
}

constexpr size_t size_of(Type type) { return type == Type::f32 ? 4 : type == Type::i8 ? 1 : 2; }
const char* name_of(Type type) {
    return type == Type::f32 ? "f32" : type == Type::f16 ? "f16" : type == Type::bf16 ? "bf16" : "i8";
}

std::vector<uint8_t> encode(const std::vector<float>& numbers, Type type) {
    std::vector<uint8_t> bytes(numbers.size() * size_of(type));
    for (size_t i = 0; i < numbers.size(); ++i) {
        if (type == Type::f32) std::memcpy(&bytes[4 * i], &numbers[i], 4);
        const uint16_t half = type == Type::f16 ? to_f16(numbers[i]) : to_bf16(numbers[i]);
        if (size_of(type) == 2) std::memcpy(&bytes[2 * i], &half, 2);
        if (type == Type::i8) bytes[i] = uint8_t(int8_t(numbers[i] * 127.0f));
    }
    return bytes;
}
std::vector<float> decode(const std::vector<uint8_t>& bytes, Type type) {
    std::vector<float> numbers(bytes.size() / size_of(type));
    for (size_t i = 0; i < numbers.size(); ++i) {
        uint16_t half = 0;
        if (type == Type::f32) std::memcpy(&numbers[i], &bytes[4 * i], 4);
        if (size_of(type) == 2) std::memcpy(&half, &bytes[2 * i], 2);
        if (type == Type::f16) numbers[i] = from_f16(half);
        if (type == Type::bf16) numbers[i] = from_bf16(half);
        if (type == Type::i8) numbers[i] = float(int8_t(bytes[i]));
    }
    return numbers;
}

// --- products --------------------------------------------------------------------------------------------------------

constexpr size_t num_out = 71;  // five tiles, the last not whole

struct NamedWeight {
    std::string name;
    std::shared_ptr<PackedWeight> packed;
};

// Random blocks of a format, with scales that are numbers.
NamedWeight random_blocks(const std::string& format, Random& random) {
    const bool dense = format == "F32" || format == "F16" || format == "BF16";
    const size_t num_in = dense ? 101 : format.ends_with("_K") || format == "IQ4_XS" ? 512 : 160;
    auto packed = std::make_shared<PackedWeight>(format, num_out, num_in);
    const Weight& w = packed->weight();
    const auto blocks = dense ? encode(random.numbers(num_out * num_in), w.layout.type)
                              : random.bytes(num_out * packed->row_bytes());
    packed->fill(pool(), 0, blocks.data(), blocks.size(), {});
    const auto put_scales = [&](size_t at, size_t count) {
        for (size_t tile = 0; tile < w.num_tiles(); ++tile) {
            const auto halves = encode(random.numbers(16 * count, 0.01f), Type::f16);  // some of them subnormal
            std::memcpy(w.data + tile * w.tile_bytes + at, halves.data(), halves.size());
        }
    };
    const bool super = w.layout.scales == Scales::super;
    const size_t count = super ? (num_in + 255) / 256 : w.num_blocks;
    if (!dense) put_scales(super ? w.super_at : w.scales_at, count);
    if (w.layout.has_min) put_scales(super ? w.super_min_at : w.mins_at, count);
    return {format, packed};
}

NamedWeight random_codes(int bits, uint32_t group, bool has_min, bool has_order, Random& random) {
    const size_t num_in = 230, groups = (num_in + group - 1) / group;
    auto packed = std::make_shared<PackedWeight>(
        PackedWeight::codes(bits, group, has_min, has_min ? 0 : (1 << bits) / 2 - 1, num_out, num_in));
    const auto codes = random.bytes(num_out * num_in);
    const auto scales = random.numbers(num_out * groups, 0.01f), mins = random.numbers(num_out * groups);
    packed->fill_codes(pool(), 0, num_out, codes.data(), scales.data(), has_min ? mins.data() : nullptr);
    if (has_order) packed->set_order(random.permutation(num_in));
    return {"int" + std::to_string(bits) + " group " + std::to_string(group) + (has_min ? " minima" : "") +
                (has_order ? " order" : ""), packed};
}

NamedWeight random_lookup(Random& random) {
    const size_t num_in = 230, group = 64, groups = 4;
    auto packed = std::make_shared<PackedWeight>(PackedWeight::lookup(random.numbers(16), group, num_out, num_in));
    auto codes = random.bytes(num_out * num_in);
    for (uint8_t& code : codes) code &= 15;
    const auto scales = random.numbers(num_out * groups);
    packed->fill_codes(pool(), 0, num_out, codes.data(), scales.data(), nullptr);
    return {"lookup", packed};
}

Pieces multiply(const Kernels& kernels, const Weight& w, size_t num_rows, Activations activations) {
    Random random(num_rows);
    const size_t x_stride = w.num_in + 5, out_stride = num_out + 3;
    auto x = random.numbers(num_rows * x_stride), out = random.numbers(num_rows * out_stride);
    const auto bias = random.numbers(num_out);
    for (size_t row = 0; row < num_rows; ++row)
        for (size_t i = 0; i < x_stride; ++i) x[row * x_stride + i] *= row == 3 ? 0.0f : 0.1f + float(row % 4);
    const LinearArgs args{out.data(), x.data(), &w, num_rows % 2 ? bias.data() : nullptr, out_stride, x_stride,
                          activations, num_rows > 6};
    call(kernels.linear, args, num_rows, kernels.linear_scratch(args, num_rows));
    return {{"out", out}};
}

Pieces look_up(const Kernels& kernels, const Weight& w) {
    Random random(7);
    const size_t num_rows = 9, stride = w.num_in + 2;
    std::vector<float> out(num_rows * stride, 1.0f);
    std::vector<int64_t> ids;
    for (size_t row = 0; row < num_rows; ++row) ids.push_back(random.below(num_out));
    call(kernels.embed, EmbedArgs{out.data(), ids.data(), &w, stride, 2.5f}, num_rows, {0, w.num_blocks * 32 * 64});
    return {{"out", out}};
}

void add_products(std::vector<Case>& cases) {
    Random random(1);
    std::vector<NamedWeight> weights;
    for (const std::string& format : packed_formats()) weights.push_back(random_blocks(format, random));
    for (int bits : {4, 8})
        for (uint32_t group : {32, 128})
            for (bool has_min : {false, true})
                weights.push_back(random_codes(bits, group, has_min, group == 128, random));
    weights.push_back(random_lookup(random));
    for (const NamedWeight& weight : weights) {
        const auto packed = weight.packed;  // kept alive by the cases
        const std::string& name = weight.name;
        cases.push_back({"embed " + name, false, [=](const Kernels& k) { return look_up(k, packed->weight()); }});
        for (const auto& [kind, label] : {std::pair(Activations::i8, "i8"), {Activations::bf16, "bf16"},
                                          {Activations::f32, "f32"}})
            for (size_t num_rows : {1, 5, 6, 7, 24, 25, 40})
                cases.push_back({"linear " + name + " x " + label + " rows " + std::to_string(num_rows),
                                 kind != Activations::f32,
                                 [=, kind = kind](const Kernels& k) {
                                     return multiply(k, packed->weight(), num_rows, kind);
                                 }});
    }
}

// --- rows ------------------------------------------------------------------------------------------------------------

// Numbers, some of them of no ordinary size.
std::vector<float> rows_of(size_t num_rows, size_t dim, uint64_t seed) {
    Random random(seed);
    auto x = random.numbers(num_rows * dim, 8.0f);
    const float odd[] = {0.0f, -0.0f, 88.5f, -88.5f, 200.0f, -200.0f, 1e30f, -1e30f, 1e-40f, INFINITY, -INFINITY, NAN};
    for (size_t i = 0; i < std::size(odd); ++i)
        if (i < dim) x[(num_rows - 1) * dim + i * dim / std::size(odd)] = odd[i];
    return x;
}

void add_rows(std::vector<Case>& cases, size_t dim) {
    constexpr size_t rows = 4;
    const std::string with = " of " + std::to_string(dim);
    for (bool accumulate : {false, true})
        cases.push_back({"rms_norm" + with + (accumulate ? " added" : ""), false, [=](const Kernels& k) {
            auto x = rows_of(rows, dim, 1), out = rows_of(rows, dim, 2);
            const auto weight = Random(3).numbers(dim);
            call(k.rms_norm, RmsNormArgs{out.data(), x.data(), weight.data(), dim, dim, dim, 1e-5f, accumulate}, rows);
            return Pieces{{"out", out}};
        }});
    for (Gate gate : {Gate::silu, Gate::gelu_tanh})
        cases.push_back({(gate == Gate::silu ? "silu" : "gelu_tanh") + with, false, [=](const Kernels& k) {
            const auto x = rows_of(rows, 2 * dim, 4);
            std::vector<float> out(rows * dim);
            call(k.gated, GatedArgs{out.data(), x.data(), dim, dim, 2 * dim, gate}, rows);
            return Pieces{{"out", out}};
        }});
    cases.push_back({"softcap" + with, false, [=](const Kernels& k) {
        auto x = rows_of(rows, dim, 5);
        call(k.softcap, SoftcapArgs{x.data(), dim, dim, 30.0f}, rows);
        return Pieces{{"x", x}};
    }});
    for (Type type : {Type::f32, Type::f16, Type::bf16})
        cases.push_back({std::string("gather ") + name_of(type) + with, false, [=](const Kernels& k) {
            auto x = encode(rows_of(rows, dim, 6), type);
            x.insert(x.begin(), 0);  // at an odd address
            const int64_t ids[] = {3, 0, 2, 3, 1};
            std::vector<float> out(std::size(ids) * dim);
            call(k.gather, GatherArgs{out.data(), x.data() + 1, ids, dim, dim, dim, type, 1.5f}, std::size(ids));
            return Pieces{{"out", out}};
        }});
    cases.push_back({"angles" + with, false, [=](const Kernels& k) {
        const int64_t positions[] = {0, 1, 17, 4095, 131071};
        const auto inv_freq = Random(8).numbers(dim);
        std::vector<float> cos(std::size(positions) * dim), sin(cos);
        const AnglesArgs args{cos.data(), sin.data(), positions, inv_freq.data(), dim, 1.25f};
        call(k.angles, args, std::size(positions));
        return Pieces{{"cos", cos}, {"sin", sin}};
    }});
}

// --- attention -------------------------------------------------------------------------------------------------------

constexpr size_t block_size = 32, num_blocks = 64, num_heads = 6, num_kv_heads = 2;

// A cache and its memory. What no token was written to is NaN, but for the columns that pad values.
struct RandomCache {
    std::vector<uint8_t> keys, values;
    std::vector<float> key_scales, value_scales;
    Cache cache;

    RandomCache(Type type, size_t head_size)
        : key_scales(num_blocks * num_kv_heads * block_size, NAN), value_scales(key_scales) {
        const size_t slots = num_blocks * num_kv_heads * block_size, padded = (head_size + 15) / 16 * 16;
        keys.assign(slots * head_size * size_of(type), 0xff);
        values.assign(slots * padded * size_of(type), 0);
        cache = {keys.data(), values.data(), key_scales.data(), value_scales.data(), num_blocks, block_size,
                 num_kv_heads, head_size, type};
        for (size_t slot = 0; slot < slots; ++slot)
            std::memset(&values[slot * padded * size_of(type)], 0xff, head_size * size_of(type));
    }
    RandomCache(const RandomCache&) = delete;

    void put(size_t slot, Random& random) {
        const size_t dim = cache.head_size, padded = (dim + 15) / 16 * 16, size = size_of(cache.type);
        for (size_t g = 0; g < num_kv_heads; ++g) {
            const auto key = encode(random.numbers(dim, 2.0f), cache.type);
            const auto value = encode(random.numbers(dim), cache.type);
            const size_t head = slot / block_size * num_kv_heads + g, at = slot % block_size;
            for (size_t d = 0; d < dim; ++d)
                std::memcpy(&keys[((head * dim + d) * block_size + at) * size], &key[d * size], size);
            std::memcpy(&values[(head * block_size + at) * padded * size], value.data(), value.size());
            key_scales[head * block_size + at] = 0.02f + 0.01f * random.number();
            value_scales[head * block_size + at] = 0.02f + 0.01f * random.number();
        }
    }
    Pieces pieces() const {
        const Type type = cache.type;
        const float step =
            type == Type::f32 ? 0.0f : type == Type::f16 ? 0x1p-10f : type == Type::bf16 ? 0x1p-7f : 0x1p-6f;
        return {{"keys", decode(keys, type), step}, {"values", decode(values, type), step},
                {"key scales", key_scales}, {"value scales", value_scales}};
    }
};

Pieces attend(const Kernels& kernels, Type type, size_t head_size, size_t window, float softcap) {
    Random random(head_size);
    RandomCache memory(type, head_size);
    const std::vector<int64_t> contexts = {600, 90, 17, 530}, new_rows = {1, 30, 17, 3};
    const auto order = random.permutation(num_blocks);
    const size_t table_stride = 20;
    std::vector<int64_t> table(contexts.size() * table_stride, 0), starts = {0};
    for (size_t r = 0, used = 0; r < contexts.size(); ++r) {
        starts.push_back(starts.back() + new_rows[r]);
        for (size_t key = 0; key < size_t(contexts[r]); ++key) {
            int64_t& block = table[r * table_stride + key / block_size];
            if (key % block_size == 0) block = order[used++];
            memory.put(size_t(block) * block_size + key % block_size, random);
        }
    }
    const size_t stride = num_heads * head_size + 3, num_rows = size_t(starts.back());
    const auto query = random.numbers(num_rows * stride, 4.0f);
    std::vector<float> out(num_rows * stride, 1.0f);
    const AttentionArgs args{out.data(), query.data(), starts.data(), contexts.data(), table.data(), memory.cache,
                             contexts.size(), table_stride, num_heads, stride, stride, window, 0.125f, softcap};
    call(kernels.attention, args, num_rows, kernels.attention_scratch(args, num_rows));
    return {{"out", out}};
}

Pieces rotate_and_store(const Kernels& kernels, Type type, size_t head_size, bool has_norms) {
    Random random(head_size + 1);
    RandomCache memory(type, head_size);
    const size_t num_rows = 6, stride = (num_heads + 2 * num_kv_heads) * head_size + 1, half = head_size / 2;
    auto qkv = random.numbers(num_rows * stride, 3.0f);
    const auto cos = random.numbers(num_rows * half), sin = random.numbers(num_rows * half);
    const auto q_weight = random.numbers(head_size), k_weight = random.numbers(head_size);
    const int64_t slots[] = {5, 31, 32, 700, 64, 2047};
    const RopeStoreArgs args{qkv.data(), cos.data(), sin.data(), has_norms ? q_weight.data() : nullptr,
                             has_norms ? k_weight.data() : nullptr, slots, memory.cache, stride, num_heads, 1e-6f};
    call(kernels.rope_store, args, num_rows);
    Pieces pieces = memory.pieces();
    pieces.push_back({"qkv", qkv});
    return pieces;
}

void add_attention(std::vector<Case>& cases) {
    for (Type type : {Type::f32, Type::f16, Type::bf16, Type::i8})
        for (size_t head_size : {40, 64, 80}) {
            const std::string with = std::string(" ") + name_of(type) + " heads of " + std::to_string(head_size);
            for (const auto& [window, softcap] : {std::pair(0, 0.0f), {70, 0.0f}, {70, 20.0f}})
                cases.push_back({"attention" + with + (window ? " window" : "") + (softcap > 0.0f ? " softcap" : ""),
                                 type == Type::bf16, [=, window = window, softcap = softcap](const Kernels& k) {
                                     return attend(k, type, head_size, size_t(window), softcap);
                                 }});
            for (bool has_norms : {false, true})
                cases.push_back({"rope_store" + with + (has_norms ? " norms" : ""), false, [=](const Kernels& k) {
                    return rotate_and_store(k, type, head_size, has_norms);
                }});
        }
}

// --- sampling --------------------------------------------------------------------------------------------------------

// Rows of logits; `choose` says what is asked of each.
Pieces draw(const Kernels& kernels, size_t vocab, const std::function<void(SampleRow&, size_t)>& choose) {
    constexpr size_t num_rows = 12, num_top = 5;
    Random random(vocab);
    auto logits = random.numbers(num_rows * vocab, 12.0f);
    logits[1 * vocab + 77] = NAN, logits[2 * vocab + vocab - 1] = INFINITY;
    for (size_t i = 0; i < vocab; ++i) logits[3 * vocab + i] = i % 3 ? -INFINITY : logits[3 * vocab + i];
    for (size_t i = 0; i < vocab; ++i) logits[4 * vocab + i] = 2.5f;  // all alike
    const std::vector<int32_t> wanted = {3, int32_t(vocab) - 1};
    std::vector<Score> scores(num_rows * (1 + num_top + wanted.size()), {0, 0.0f, 0});
    std::vector<SampleRow> rows(num_rows);
    for (size_t r = 0; r < num_rows; ++r) {
        rows[r].seed = 1000 + r, rows[r].index = r;
        rows[r].scores = &scores[r * (1 + num_top + wanted.size())], rows[r].num_top = num_top;
        rows[r].wanted = {wanted.data(), wanted.size()};
        choose(rows[r], r);
    }
    std::vector<Sampled> out(num_rows);
    call(kernels.sample, SampleArgs{logits.data(), rows.data(), out.data(), vocab, vocab}, num_rows,
         sample_scratch(num_rows, vocab, 1));
    Pieces pieces = {{"tokens", {}, -1.0f}, {"ids and ranks", {}, -1.0f}, {"log-probabilities", {}}};
    for (size_t r = 0; r < num_rows; ++r) {
        pieces[0].numbers.push_back(float(out[r].token));
        for (size_t i = 0; i < out[r].num_scores; ++i) {
            const Score& score = rows[r].scores[i];
            pieces[1].numbers.push_back(float(score.id)), pieces[1].numbers.push_back(float(score.rank));
            pieces[2].numbers.push_back(score.logprob);
        }
    }
    return pieces;
}

void add_sampling(std::vector<Case>& cases, size_t vocab) {
    static const std::vector<int32_t> few = {4, 9, 16, 25, 36, 49, 900}, history = {1, 2, 3, 9, 9, 9, 4, 900, 5, 4};
    static const std::vector<float> bias = {3.0f, -2.0f, 1.0f, 0.5f, -0.25f, 5.0f, 9.0f};
    static const std::vector<uint8_t> mask = Random(9).bytes(1000);
    const Ids ids{few.data(), few.size()}, past{history.data(), history.size()};
    const std::vector<std::pair<const char*, std::function<void(SampleRow&, size_t)>>> choices = {
        {"greedy", [](SampleRow&, size_t) {}},
        {"temperature", [](SampleRow& row, size_t r) { row.scale = 0.5f + 0.2f * float(r); }},
        {"top_k", [](SampleRow& row, size_t r) { row.scale = 1.0f, row.top_k = 1 + 7 * r; }},
        {"top_p", [](SampleRow& row, size_t r) { row.scale = 1.1f, row.top_p = 0.99 - 0.08 * double(r); }},
        {"top_k top_p", [](SampleRow& row, size_t r) {
            row.scale = 0.7f, row.top_k = 50, row.top_p = 0.5 + 0.04 * double(r);
        }},
        {"min_p", [](SampleRow& row, size_t r) { row.scale = 1.3f, row.min_power = std::log(0.01f * float(1 + r)); }},
        {"allowed", [=](SampleRow& row, size_t) { row.scale = 1.0f, row.allowed = ids; }},
        {"mask", [](SampleRow& row, size_t) { row.scale = 1.0f, row.mask = mask.data(); }},
        {"bias", [=](SampleRow& row, size_t) {
            row.scale = 1.0f, row.forbidden = past, row.biased = ids, row.bias = bias.data();
        }},
        {"penalties", [=](SampleRow& row, size_t r) {
            row.scale = 2.0f, row.history = past, row.num_prompt = r % 5;
            row.repetition = 1.3f, row.frequency = 0.4f, row.presence = 0.7f;
        }},
    };
    for (const auto& [name, choose] : choices)
        cases.push_back({"sample of " + std::to_string(vocab) + " " + name, false,
                         [vocab, choose = choose](const Kernels& k) { return draw(k, vocab, choose); }});
}

// --- the comparison --------------------------------------------------------------------------------------------------

bool is_same(float a, float b) { return as_bits(a) == as_bits(b) || (a != a && b != b); }

struct Verdict {
    const Kernels& kernels;
    size_t compared = 0, equal = 0, failed = 0;
    float worst = 0.0f;  // difference as a part of the largest, beyond a step

    void compare(const Case& c, const Piece& expected, const Piece& got) {
        ++compared;
        const bool exact = &kernels != &generic_kernels && !(kernels.has_bf16_dot && c.may_use_bf16);
        const float tolerance = &kernels == &generic_kernels ? generic_tolerance : bf16_tolerance;
        float largest = 0.0f;
        for (float x : expected.numbers) largest = std::isfinite(x) && std::fabs(x) > largest ? std::fabs(x) : largest;
        bool all_equal = expected.numbers.size() == got.numbers.size();
        if (!all_equal) return fail(c, got, "has another length");
        for (size_t i = 0; i < got.numbers.size(); ++i) {
            const float a = expected.numbers[i], b = got.numbers[i];
            if (is_same(a, b)) continue;
            all_equal = false;
            const float part = std::fabs(a - b) / largest - expected.step;  // NaN where one of them is not finite
            if (exact || expected.step < 0.0f || !(part <= tolerance)) {
                char why[100];
                std::snprintf(why, sizeof why, "[%zu] is %.9g instead of %.9g", i, double(b), double(a));
                return fail(c, got, why);
            }
            worst = part > worst ? part : worst;
        }
        equal += all_equal;
    }
    void fail(const Case& c, const Piece& piece, const char* why) {
        if (++failed <= 10) std::printf("%s, %s: %s %s\n", kernels.isa, c.name.c_str(), piece.name, why);
    }
};

}  // namespace

int compare_isas() {
    std::vector<Case> cases;
    add_products(cases);
    for (size_t dim : {1, 15, 16, 17, 100, 576}) add_rows(cases, dim);
    add_attention(cases);
    for (size_t vocab : {1000, 5003}) add_sampling(cases, vocab);
    std::vector<Verdict> verdicts;
    for (auto table = supported_kernels(); *table; ++table) verdicts.push_back({**table});
    for (const Case& c : cases) {
        const Pieces expected = c.run(fused_kernels);
        for (Verdict& verdict : verdicts) {
            const Pieces got = c.run(verdict.kernels);
            for (size_t i = 0; i < expected.size(); ++i) verdict.compare(c, expected[i], got[i]);
        }
    }
    size_t failed = 0;
    for (const Verdict& v : verdicts) {
        failed += v.failed;
        std::printf("%s: %zu results, %zu equal to the last bit, %zu wrong; off by at most %.1e of the largest\n",
                    v.kernels.isa, v.compared, v.equal, v.failed, double(v.worst));
    }
    return failed ? 1 : 0;
}

}  // namespace pelton

int main() { return pelton::compare_isas(); }
