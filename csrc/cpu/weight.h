// Weights on their way from a checkpoint's order to the order they are multiplied in.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace pelton {

// A Weight that owns its memory.
class PackedWeight {
   public:
    // `format`: a GGUF type, "F32", "F16" or "BF16"; see layout_of. Throws std::invalid_argument for what cannot be.
    PackedWeight(const std::string& format, size_t num_out, size_t num_in);
    // Codes of `bits` (4 or 8) with float32 scales, and minima or one zero, for each `group` columns.
    static PackedWeight codes(int bits, uint32_t group, bool has_min, int zero, size_t num_out, size_t num_in);
    // 4-bit codes of 16 values with a float32 scale for each `group` columns.
    static PackedWeight lookup(const std::vector<float>& values, uint32_t group, size_t num_out, size_t num_in);

    // Rows first_row... from the file's blocks. `rows`: which of them in turn; empty: all in order.
    void fill(Pool& pool, size_t first_row, const uint8_t* blocks, size_t num_bytes, const std::vector<int32_t>& rows);
    // Rows first_row... from codes [rows, K] of one byte each, scales and minima (or null) [rows, groups].
    void fill_codes(Pool& pool, size_t first_row, size_t num_rows, const uint8_t* codes, const float* scales,
                    const float* mins);
    // Column k of the weight multiplies input order[k].
    void set_order(std::vector<int32_t> order);

    const Weight& weight() const { return weight_; }
    size_t num_bytes() const { return memory_.size(); }
    const std::string& format() const { return format_; }
    size_t row_bytes() const;  // of the file's blocks

   private:
    PackedWeight(Layout layout, size_t num_out, size_t num_in, std::string format);
    void check_rows(size_t first_row, size_t num_rows) const;

    std::string format_;
    Weight weight_;
    Buffer memory_;
    std::vector<int32_t> order_;
};

// The GGUF types that can be packed, and the dense ones.
std::vector<std::string> packed_formats();

}  // namespace pelton
