// Choosing the next token of each row of logits: what the kernel `sample` is given and what it gives back. What it
// means is said once, by the op in pelton/ops/sampling.py.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "team.h"

namespace pelton {

// A list of token ids, all below V.
struct Ids {
    const int32_t* data = nullptr;
    size_t size = 0;

    const int32_t* begin() const { return data; }
    const int32_t* end() const { return data + size; }
};

// A token, the logarithm of its probability by the logits as they came, and its rank (1: the most likely).
struct Score {
    int32_t id;
    float logprob;
    int32_t rank;
};

struct SampleRow {
    // What is done to the logits first, in this order; nothing where they come `adjusted`.
    const float* adjusted = nullptr;  // [V] or null
    Ids allowed;                      // empty: all are
    const uint8_t* mask = nullptr;    // or null; bit i % 8 of byte i / 8 allows token i
    Ids forbidden;
    Ids biased;
    const float* bias = nullptr;      // what is added to the logits of `biased`
    Ids history;                      // the tokens of the prompt and, from num_prompt on, of the output
    size_t num_prompt = 0;
    float repetition = 1.0f, frequency = 0.0f, presence = 0.0f;

    // The choice.
    int32_t forced = -1;              // the token itself, or -1
    float scale = 0.0f;               // 1 / temperature; 0: the most likely token
    float min_power = -INFINITY;      // the logarithm of min_p
    size_t top_k = 0;                 // 0: all
    double top_p = 1.0;
    uint64_t seed = 0, index = 0;     // of the draw

    // What is asked about the token chosen and others: the `num_top` most likely and those `wanted`.
    Score* scores = nullptr;          // [1 + num_top + wanted.size], or null
    size_t num_top = 0;               // at most V
    Ids wanted;

    bool is_adjusted() const {
        return adjusted || allowed.size || mask || forbidden.size || biased.size || repetition != 1.0f ||
               frequency != 0.0f || presence != 0.0f;
    }
};

struct Sampled {
    static constexpr int32_t not_finite = -1, no_token_left = -2;

    int32_t token;      // or one of the above
    size_t num_scores;  // the chosen token's first
};

// logits: [num_rows, vocab], rows `stride` elements apart; they stay as they are.
struct SampleArgs {
    const float* logits;
    const SampleRow* rows;  // [num_rows]
    Sampled* out;           // [num_rows]
    size_t vocab, stride;
};

// What the kernel remembers of a part of a row: its largest logit and where the first such stands.
struct Best {
    float value;
    bool is_finite;  // all of the part
    size_t index;
};

// A token that may be drawn, and how likely that is, in relation to others.
struct Candidate {
    float logit;
    int32_t id;
    float weight;
};

// A thread's memory. Counts and candidates share a place: one is done with before the other begins.
struct SampleMemory {
    static constexpr size_t block = 256;  // tokens whose weights are summed before they are added to the total

    Candidate* items;  // [V]
    uint32_t* counts;  // [V]
    double* sums;      // [blocks]
    float* logits;     // [V], adjusted

    SampleMemory(uint8_t* local, size_t vocab)
        : items(reinterpret_cast<Candidate*>(local)),
          counts(reinterpret_cast<uint32_t*>(local)),
          sums(reinterpret_cast<double*>(local + sums_at(vocab))),
          logits(reinterpret_cast<float*>(sums + vocab / block + 1)) {}

    static size_t sums_at(size_t vocab) { return (vocab * sizeof(Candidate) + 63) / 64 * 64; }
    static size_t size(size_t vocab) {
        return sums_at(vocab) + (vocab / block + 1) * sizeof(double) + vocab * sizeof(float);
    }
};

inline Scratch sample_scratch(size_t num_rows, size_t vocab, size_t num_threads) {
    return {num_rows * num_threads * sizeof(Best), SampleMemory::size(vocab)};
}

}  // namespace pelton
