// Choosing the next token of each row. Included once per instruction set.

// --- passes over the vocabulary ---------------------------------------------------------------------------------------

// The part's largest logit and whether all are finite, in one pass. A NaN is never the largest.
inline Best best_of(const float* x, Range part) {
    constexpr size_t block = 512;
    const F32 zero = f_set1(0.0f);
    F32 faults[4] = {zero, zero, zero, zero};  // 0 * x: NaN if x is not finite
    float rest = 0.0f;
    Best best{-INFINITY, true, part.begin};
    for (size_t begin = part.begin; begin < part.end; begin += block) {
        const size_t end = std::min(begin + block, part.end);
        F32 most[4];
        for (F32& lanes : most) lanes = f_set1(-INFINITY);
        size_t i = begin;
        for (; i + 64 <= end; i += 64)
            for (size_t j = 0; j < 4; ++j) {
                const F32 v = f_load(x + i + 16 * j);
                most[j] = f_max(v, most[j]);
                faults[j] = f_fma(v, zero, faults[j]);
            }
        float value = f_hmax(f_max(f_max(most[0], most[1]), f_max(most[2], most[3])));
        for (; i < end; ++i) {
            value = x[i] > value ? x[i] : value;
            rest += 0.0f * x[i];
        }
        if (value > best.value) best.value = value, best.index = begin;
    }
    while (best.index + 1 < part.end && x[best.index] != best.value) ++best.index;
    best.is_finite = f_sum(f_add(f_add(faults[0], faults[1]), f_add(faults[2], faults[3]))) + rest == 0.0f;
    return best;
}

// Calls f(i, x) for sixteen logits from i on, the last padded with minus infinity.
template <typename Function>
inline void each_sixteen(const float* x, size_t begin, size_t end, Function&& f) {
    size_t i = begin;
    for (; i + 16 <= end; i += 16) f(i, f_load(x + i));
    if (i == end) return;
    float lanes[16];
    f_store(lanes, f_set1(-INFINITY));
    std::memcpy(lanes, x + i, (end - i) * sizeof(float));
    f(i, f_load(lanes));
}

// How many logits are larger, plus one.
inline int32_t rank_of(float logit, const float* x, size_t vocab) {
    F32 larger = f_set1(0.0f);
    each_sixteen(x, 0, vocab, [&](size_t, F32 v) {
        larger = f_add(larger, f_less(f_set1(logit), v, f_set1(1.0f), f_set1(0.0f)));
    });
    return int32_t(f_sum(larger)) + 1;
}

// From logits to weights e^((x - best) / temperature); 0 for what min_p leaves out.
struct Tempered {
    float best, scale, min_power;

    F32 power(F32 x) const { return f_mul(f_sub(x, f_set1(best)), f_set1(scale)); }
    F32 weight(F32 x) const {
        const F32 p = power(x);
        return f_less(p, f_set1(min_power), f_set1(0.0f), f_exp(p));
    }
};

// The sum of all weights; sums[b] is that of the first b + 1 blocks.
inline double weigh(double* sums, const float* x, size_t vocab, const Tempered& tempered) {
    double total = 0.0;
    for (size_t begin = 0; begin < vocab; begin += SampleMemory::block) {
        F32 sum = f_set1(0.0f);
        each_sixteen(x, begin, std::min(begin + SampleMemory::block, vocab),
                     [&](size_t, F32 v) { sum = f_add(sum, tempered.weight(v)); });
        total += double(f_sum(sum));
        *sums++ = total;
    }
    return total;
}

// --- candidates -------------------------------------------------------------------------------------------------------

// Adds those of 64 (at the end: fewer) logits that exceed `low`.
inline size_t add_larger(Candidate* items, size_t count, const float* x, size_t begin, size_t end, float low) {
    const bool full = begin + 64 <= end;
    if (full) {
        const float* p = x + begin;
        const F32 most = f_max(f_max(f_load(p), f_load(p + 16)), f_max(f_load(p + 32), f_load(p + 48)));
        if (f_hmax(most) <= low) return count;
    }
    for (size_t i = begin, last = full ? begin + 64 : end; i < last; i += 16) {
        if (full && f_hmax(f_load(x + i)) <= low) continue;
        for (size_t j = i; j < std::min(i + 16, last); ++j) {
            items[count] = {x[j], int32_t(j), 0.0f};  // there is room for as many as have been seen
            count += x[j] > low;
        }
    }
    return count;
}

// The order of candidates. Of a type that only this instruction set has: the linker would merge the functions that the
// standard library makes for a common one.
constexpr auto is_before = [](const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
};

// The k most likely tokens above minus infinity, in any order; returns how many there are.
inline size_t most_likely(Candidate* items, const float* x, size_t vocab, size_t k) {
    const auto cut = [&](size_t count) {
        std::nth_element(items, items + k - 1, items + count, is_before);
        return k;
    };
    if (k == 0) return 0;
    size_t count = 0;
    float low = -INFINITY;  // k tokens before the next ones are at least as large
    for (size_t i = 0; i < vocab; i += 64) {
        count = add_larger(items, count, x, i, vocab, low);
        if (count < 2 * k + 64) continue;
        count = cut(count);
        low = items[k - 1].logit;
    }
    return count > k ? cut(count) : count;
}

// All tokens that can be among the first to weigh `share` of the total: the others, each with less than
// (1 - share) total / V, weigh too little together to leave a place for one of them.
inline size_t likely_enough(Candidate* items, const float* x, size_t vocab, const Tempered& tempered, double total,
                            double share) {
    const double depth = std::log((1.0 - share) * total / double(vocab)) / tempered.scale;
    const double rounding = 1e-5 * (std::fabs(depth) + std::fabs(tempered.best));
    const float low = float(tempered.best + depth - rounding);
    size_t count = 0;
    for (size_t i = 0; i < vocab; i += 64) count = add_larger(items, count, x, i, vocab, low);
    return count;
}

// Weighs the candidates and drops those without weight; returns how many are left.
inline size_t weigh_candidates(Candidate* items, size_t count, const Tempered& tempered) {
    size_t kept = 0;
    for (size_t begin = 0; begin < count; begin += 16) {
        float lanes[16] = {};
        const size_t n = std::min<size_t>(16, count - begin);
        for (size_t i = 0; i < n; ++i) lanes[i] = items[begin + i].logit;
        f_store(lanes, tempered.weight(f_load(lanes)));
        for (size_t i = 0; i < n; ++i)
            if (lanes[i] > 0.0f) items[kept++] = {items[begin + i].logit, items[begin + i].id, lanes[i]};
    }
    return kept;
}

inline double weight_of(const Candidate* items, size_t count) {
    double sum = 0.0;
    for (size_t i = 0; i < count; ++i) sum += double(items[i].weight);
    return sum;
}

// Moves to the front the candidates before which less than `mass` stands in their order; returns how many. The last
// of them comes last. Halves the part where the border lies until that is small.
inline size_t first_to_weigh(Candidate* items, size_t count, double mass) {
    size_t begin = 0, end = count;
    double before = 0.0;
    while (end - begin > 32) {
        const size_t middle = begin + (end - begin) / 2;
        std::nth_element(items + begin, items + middle, items + end, is_before);
        const double weight = before + weight_of(items + begin, middle - begin);
        if (weight < mass) {
            before = weight + double(items[middle].weight);
            begin = middle + 1;
        } else {
            end = middle;
        }
    }
    std::sort(items + begin, items + end, is_before);
    for (; begin < end && before < mass; ++begin) before += double(items[begin].weight);
    return begin;
}

// --- one row ----------------------------------------------------------------------------------------------------------

inline void forbid_by_mask(float* x, const uint8_t* mask, size_t vocab) {
    for (size_t i = 0; i < vocab; i += 8) {
        const unsigned bits = mask[i / 8];
        if (bits == 0xff) continue;
        const size_t n = std::min<size_t>(8, vocab - i);
        for (size_t j = 0; j < n; ++j)
            if (!(bits >> j & 1)) x[i + j] = -INFINITY;
    }
}

// Each token once, however often it occurs: counts [V] are cleared where they are used.
inline void penalise(float* x, const SampleRow& row, uint32_t* counts) {
    if (row.repetition != 1.0f) {
        for (int32_t id : row.history) counts[id] = 1;
        for (int32_t id : row.history) {
            if (counts[id]) x[id] = x[id] > 0.0f ? x[id] / row.repetition : x[id] * row.repetition;
            counts[id] = 0;
        }
    }
    if (row.frequency != 0.0f || row.presence != 0.0f) {
        const Ids output{row.history.data + row.num_prompt, row.history.size - row.num_prompt};
        for (int32_t id : output) counts[id] = 0;
        for (int32_t id : output) ++counts[id];
        for (int32_t id : output) {
            if (counts[id]) x[id] -= row.frequency * float(counts[id]) + row.presence;
            counts[id] = 0;
        }
    }
}

inline void adjust(float* x, const float* raw, const SampleRow& row, size_t vocab, uint32_t* counts) {
    if (row.allowed.size) {
        std::fill(x, x + vocab, -INFINITY);
        for (int32_t id : row.allowed) x[id] = raw[id];
    } else {
        std::memcpy(x, raw, vocab * sizeof(float));
    }
    if (row.mask) forbid_by_mask(x, row.mask, vocab);
    for (int32_t id : row.forbidden) x[id] = -INFINITY;
    for (size_t i = 0; i < row.biased.size; ++i) x[row.biased.data[i]] += row.bias[i];
    penalise(x, row, counts);
}

// A number in [0, 1) that depends on (seed, index) alone: SplitMix64 (Steele et al., OOPSLA 2014).
inline uint64_t mix64(uint64_t z) {
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}
inline double uniform(uint64_t seed, uint64_t index) {
    return double(mix64(mix64(seed) + (index + 1) * 0x9E3779B97F4A7C15u) >> 11) * 0x1p-53;
}

// The first token, in the order of ids, up to which more than `mass` stands.
inline int32_t draw_by_id(const float* x, size_t vocab, const Tempered& tempered, const double* sums, double mass) {
    const size_t last = (vocab - 1) / SampleMemory::block, b = size_t(std::upper_bound(sums, sums + last, mass) - sums);
    double before = b ? sums[b - 1] : 0.0;
    int32_t drawn = -1;  // where rounding leaves none, the block's last with any weight
    bool found = false;
    each_sixteen(x, b * SampleMemory::block, std::min((b + 1) * SampleMemory::block, vocab), [&](size_t i, F32 v) {
        float weights[16];
        f_store(weights, tempered.weight(v));
        for (size_t j = 0; j < 16 && !found; ++j) {
            if (weights[j] > 0.0f) drawn = int32_t(i + j);
            before += double(weights[j]);
            found = before > mass;
        }
    });
    return drawn;
}

// One token by chance, of logits [V] whose largest is finite.
inline int32_t draw(const float* x, size_t vocab, float best, const SampleRow& row, const SampleMemory& memory) {
    const Tempered tempered{best, row.scale, row.min_power};
    const double chance = uniform(row.seed, row.index);
    const bool has_top_k = 0 < row.top_k && row.top_k < vocab, has_top_p = row.top_p < 1.0;
    double total = has_top_k ? 0.0 : weigh(memory.sums, x, vocab, tempered);
    if (!has_top_k && !has_top_p) return draw_by_id(x, vocab, tempered, memory.sums, chance * total);

    Candidate* items = memory.items;
    size_t count = has_top_k ? most_likely(items, x, vocab, row.top_k)
                             : likely_enough(items, x, vocab, tempered, total, row.top_p);
    count = weigh_candidates(items, count, tempered);
    if (count == 0) return Sampled::not_finite;
    if (has_top_k) total = weight_of(items, count);
    if (has_top_p) {
        count = std::max<size_t>(1, first_to_weigh(items, count, row.top_p * total));
        total = weight_of(items, count);
    }
    const size_t place = first_to_weigh(items, count, std::nextafter(chance * total, double(INFINITY)));
    return items[std::max<size_t>(1, place) - 1].id;
}

// The token, or why there is none. `best` is that of the logits as they came.
inline int32_t choose(const float* raw, Best best, const SampleRow& row, size_t vocab, const SampleMemory& memory) {
    if (row.forced >= 0) return row.forced;
    const float* x = raw;
    if (row.is_adjusted()) {
        if (!row.adjusted) adjust(memory.logits, raw, row, vocab, memory.counts);
        x = row.adjusted ? row.adjusted : memory.logits;
        best = best_of(x, {0, vocab});
    }
    if (best.value == -INFINITY) return Sampled::no_token_left;
    if (row.scale == 0.0f || best.value == INFINITY) return int32_t(best.index);
    return draw(x, vocab, best.value, row, memory);
}

// Fills row.scores; returns how many.
inline size_t score(const float* raw, float best, int32_t token, const SampleRow& row, size_t vocab,
                    const SampleMemory& memory) {
    const double norm = best + std::log(weigh(memory.sums, raw, vocab, {best, 1.0f, -INFINITY}));
    size_t num = 0;
    const auto add = [&](int32_t id, int32_t rank) {
        row.scores[num++] = {id, float(double(raw[id]) - norm), rank};
    };
    const int32_t chosen_rank = rank_of(raw[token], raw, vocab);
    add(token, chosen_rank);
    const size_t count = most_likely(memory.items, raw, vocab, row.num_top);
    std::sort(memory.items, memory.items + count, is_before);
    int32_t rank = 1;
    for (size_t i = 0; i < count; ++i) {
        if (memory.items[i].id == token) continue;
        rank += rank == chosen_rank;
        add(memory.items[i].id, rank++);
    }
    for (int32_t id : row.wanted)
        if (id != token) add(id, rank_of(raw[id], raw, vocab));
    return num;
}

// Rows are shared by the threads. Where there are fewer rows than threads, all take part in the first pass over each.
inline void sample(const SampleArgs& a, size_t num_rows, const Team& team) {
    const bool together = num_rows < team.num_threads;
    Best* parts = reinterpret_cast<Best*>(team.shared);  // [num_rows, num_threads]
    if (together) {
        for (size_t r = 0; r < num_rows; ++r)
            parts[r * team.num_threads + team.thread] = best_of(a.logits + r * a.stride, team.share(a.vocab));
        team.barrier();
    }
    const SampleMemory memory(team.local, a.vocab);
    const Range mine = team.share(num_rows);
    for (size_t r = mine.begin; r < mine.end; ++r) {
        const float* raw = a.logits + r * a.stride;
        Best best = together ? parts[r * team.num_threads] : best_of(raw, {0, a.vocab});
        for (size_t t = 1; together && t < team.num_threads; ++t) {
            const Best& part = parts[r * team.num_threads + t];
            best = {std::max(best.value, part.value), best.is_finite && part.is_finite,
                    part.value > best.value ? part.index : best.index};
        }
        Sampled& out = a.out[r];
        out.token = best.is_finite ? choose(raw, best, a.rows[r], a.vocab, memory) : Sampled::not_finite;
        out.num_scores = 0;
        if (out.token >= 0 && a.rows[r].scores)
            out.num_scores = score(raw, best.value, out.token, a.rows[r], a.vocab, memory);
    }
}
