// Sampling for Python: what is known of a request is checked and kept between steps, then whole batches are sampled.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.h"

namespace nb = nanobind;

namespace {

using pelton::Sampled;
using pelton::SampleRow;
using pelton::Score;

void require(bool holds, const char* otherwise) {
    if (!holds) throw std::invalid_argument(otherwise);
}

// Token ids, and the largest of them that ever was there.
class IdList {
   public:
    IdList() = default;
    explicit IdList(const std::vector<int64_t>& ids) {
        ids_.reserve(ids.size());
        for (int64_t id : ids) add(id);
    }
    void add(int64_t id) {
        require(0 <= id && id <= std::numeric_limits<int32_t>::max(), "a token id is not in the vocabulary");
        ids_.push_back(int32_t(id));
        largest_ = std::max(largest_, ids_.back());
    }
    void resize(size_t size) { ids_.resize(size); }
    size_t size() const { return ids_.size(); }
    pelton::Ids below(size_t vocab) const {
        require(largest_ < int64_t(vocab), "a token id is not in the vocabulary");
        return {ids_.data(), ids_.size()};
    }

   private:
    std::vector<int32_t> ids_;
    int32_t largest_ = -1;
};

// What stays the same for all tokens of a request, and the list of its tokens, which Python owns and lets grow.
class RequestRow {
   public:
    RequestRow(double temperature, int64_t top_k, double top_p, double min_p, uint64_t seed, double repetition_penalty,
               double frequency_penalty, double presence_penalty, const std::vector<int64_t>& allowed_ids,
               const std::vector<int64_t>& bias_ids, std::vector<float> bias, nb::list token_ids, size_t num_prompt,
               int64_t num_top, const std::vector<int64_t>& score_ids)
        : allowed_(allowed_ids), biased_(bias_ids), wanted_(score_ids), bias_(std::move(bias)),
          tokens_(std::move(token_ids)), num_top_(num_top) {
        require(temperature == 0.0 || (temperature >= 1e-30 && temperature <= 1e30), "temperature is out of range");
        require(top_k >= 0 && top_p > 0.0 && min_p >= 0.0 && min_p <= 1.0, "top_k, top_p or min_p is out of range");
        require(repetition_penalty > 0.0, "repetition_penalty must be positive");
        require(bias_ids.size() == bias_.size(), "there must be one bias for each of bias_ids");
        row_.scale = temperature > 0.0 ? float(1.0 / temperature) : 0.0f;
        row_.top_k = size_t(top_k);
        row_.top_p = top_p;
        row_.min_power = min_p > 0.0 ? float(std::log(min_p)) : -INFINITY;
        row_.seed = seed;
        row_.repetition = float(repetition_penalty);
        row_.frequency = float(frequency_penalty);
        row_.presence = float(presence_penalty);
        row_.num_prompt = num_prompt;
    }

    bool wants_scores() const { return num_top_ >= 0; }

    // What the kernel is given. It points into this object.
    SampleRow row(size_t vocab) {
        SampleRow row = row_;
        const size_t num_tokens = nb::len(tokens_);
        require(num_tokens >= row.num_prompt, "there are fewer tokens than the prompt has");
        row.index = num_tokens - row.num_prompt;
        row.allowed = allowed_.below(vocab);
        row.biased = biased_.below(vocab);
        row.bias = bias_.data();
        row.wanted = wanted_.below(vocab);
        row.num_top = std::min(size_t(std::max<int64_t>(num_top_, 0)), vocab);
        if (row.repetition != 1.0f || row.frequency != 0.0f || row.presence != 0.0f) {
            follow(num_tokens);
            row.history = history_.below(vocab);
        }
        return row;
    }

   private:
    // The last token known is read again: a step that is repeated may have replaced it.
    void follow(size_t num_tokens) {
        const size_t known = std::min(history_.size(), num_tokens);
        history_.resize(known ? known - 1 : 0);
        for (size_t i = history_.size(); i < num_tokens; ++i) history_.add(nb::cast<int64_t>(tokens_[i]));
    }

    SampleRow row_;
    IdList allowed_, biased_, wanted_, history_;
    std::vector<float> bias_;
    nb::list tokens_;
    int64_t num_top_;  // -1: no scores at all
};

// What a row is held to in one step.
struct Hold {
    nb::object mask;  // keeps the bytes
    IdList forbidden;

    void apply(SampleRow& row, nb::handle constraint, size_t vocab) {
        const auto given = nb::cast<nb::tuple>(constraint);
        require(given.size() == 4, "a constraint is (mask, forbidden_ids, forced_id, adjusted)");
        mask = given[0];
        if (!mask.is_none()) {
            const auto bits = nb::cast<nb::bytes>(mask);
            require(bits.size() >= (vocab + 7) / 8, "a mask has fewer bits than there are tokens");
            row.mask = static_cast<const uint8_t*>(bits.data());
        }
        forbidden = IdList(nb::cast<std::vector<int64_t>>(given[1]));
        row.forbidden = forbidden.below(vocab);
        const auto forced = nb::cast<int64_t>(given[2]);
        require(-1 <= forced && forced < int64_t(vocab), "a token id is not in the vocabulary");
        row.forced = int32_t(forced);
        const auto adjusted = nb::cast<uintptr_t>(given[3]);
        require(adjusted % alignof(float) == 0, "adjusted is not the address of a tensor");
        row.adjusted = reinterpret_cast<const float*>(adjusted);
    }
};

nb::tuple as_lists(const Score* scores, size_t num) {
    nb::list ids, logprobs, ranks;
    for (size_t i = 0; i < num; ++i) {
        ids.append(scores[i].id);
        logprobs.append(scores[i].logprob);
        ranks.append(scores[i].rank);
    }
    return nb::make_tuple(ids, logprobs, ranks);
}

nb::tuple sample(uintptr_t logits, size_t num_rows, size_t vocab, size_t stride,
                 const std::vector<RequestRow*>& requests, nb::dict constraints) {
    require(logits != 0 && logits % alignof(float) == 0, "logits is not the address of a tensor");
    require(0 < vocab && vocab <= size_t(std::numeric_limits<int32_t>::max()) && stride >= vocab,
            "sample needs 1 to 2^31 - 1 tokens and a stride of at least as many");
    require(requests.size() == num_rows, "sample needs one request a row");

    std::vector<SampleRow> rows(num_rows);
    std::vector<size_t> scores_at(num_rows + 1);
    for (size_t r = 0; r < num_rows; ++r) {
        require(requests[r] != nullptr, "sample needs one request a row");
        rows[r] = requests[r]->row(vocab);
        const size_t num_scores = 1 + rows[r].num_top + rows[r].wanted.size;
        scores_at[r + 1] = scores_at[r] + (requests[r]->wants_scores() ? num_scores : 0);
    }
    std::vector<Hold> holds(constraints.size());
    auto hold = holds.begin();
    for (auto [place, constraint] : constraints) {
        const auto r = nb::cast<size_t>(place);
        require(r < num_rows, "a constraint is for a row that is not there");
        (hold++)->apply(rows[r], constraint, vocab);
    }
    std::vector<Score> scores(scores_at[num_rows]);
    for (size_t r = 0; r < num_rows; ++r)
        if (scores_at[r + 1] > scores_at[r]) rows[r].scores = scores.data() + scores_at[r];

    std::vector<Sampled> out(num_rows);
    const pelton::SampleArgs args{reinterpret_cast<const float*>(logits), rows.data(), out.data(), vocab, stride};
    if (num_rows) {
        nb::gil_scoped_release unlocked;
        pelton::Pool& pool = pelton::pool();
        pool.run([&](const pelton::Team& team) { pelton::kernels().sample(args, num_rows, team); },
                 pelton::sample_scratch(num_rows, vocab, pool.num_threads()));
    }
    nb::list tokens;
    nb::dict scored;
    for (size_t r = 0; r < num_rows; ++r) {
        tokens.append(out[r].token);
        if (out[r].num_scores) scored[nb::int_(r)] = as_lists(rows[r].scores, out[r].num_scores);
    }
    return nb::make_tuple(tokens, scored);
}

}  // namespace

void bind_sample(nb::module_& m) {
    nb::class_<RequestRow>(m, "SampleRow", "What the next token of one request is chosen by; see pelton.ops.sampling.")
        .def(nb::init<double, int64_t, double, double, uint64_t, double, double, double, const std::vector<int64_t>&,
                      const std::vector<int64_t>&, std::vector<float>, nb::list, size_t, int64_t,
                      const std::vector<int64_t>&>(),
             nb::kw_only(), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"),
             nb::arg("seed"), nb::arg("repetition_penalty"), nb::arg("frequency_penalty"), nb::arg("presence_penalty"),
             nb::arg("allowed_ids"), nb::arg("bias_ids"), nb::arg("bias"), nb::arg("token_ids"), nb::arg("num_prompt"),
             nb::arg("num_top"), nb::arg("score_ids"));
    m.def("sample", sample, nb::arg("logits"), nb::arg("num_rows"), nb::arg("vocab"), nb::arg("stride"),
          nb::arg("rows"), nb::arg("constraints"),
          "logits: [num_rows, vocab] float32, rows `stride` elements apart; rows: a list of SampleRow; constraints:\n"
          "(mask, forbidden_ids, forced_id, adjusted) for some rows, by row. Returns the token ids, -1 where logits\n"
          "are not finite and -2 where no token is left, and (ids, logprobs, ranks) by row where they are wanted.\n"
          "ValueError for anything else.");
}
