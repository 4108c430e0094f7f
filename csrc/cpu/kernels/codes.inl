// How the numbers of a packed weight are read: codes of 2 to 8 bits and their scales. kernels.h draws the tile, weight.cpp fills it.

// Bytes of one block of 32 columns x 16 rows.
constexpr size_t code_bytes(int bits) { return size_t(bits) * 64; }

// Codes 8 i + 4 h + j of each row, h = 0 for `low`, 1 for `high`. A code is cut into planes of 4, 2 and 1 bits, lowest
// first; a plane's bytes hold those bits of several columns (see weight.cpp).
template <int bits>
inline void load_codes(const uint8_t* block, int i, U8& low, U8& high) {
    if constexpr (bits == 8) {
        low = b_load(block + 128 * i);
        high = b_load(block + 128 * i + 64);
    } else if constexpr (bits >= 4) {
        const U8 both = b_load(block + 64 * i);
        low = b_and<15>(both);
        high = b_and<15>(b_shr<4>(both));
        if constexpr (bits == 5) {
            const U8 top = b_load(block + 256);
            if (i == 0) low = b_or(low, b_and<16>(b_shl<4>(top))), high = b_or(high, b_and<16>(b_shl<3>(top)));
            if (i == 1) low = b_or(low, b_and<16>(b_shl<2>(top))), high = b_or(high, b_and<16>(b_shl<1>(top)));
            if (i == 2) low = b_or(low, b_and<16>(top)), high = b_or(high, b_and<16>(b_shr<1>(top)));
            if (i == 3) low = b_or(low, b_and<16>(b_shr<2>(top))), high = b_or(high, b_and<16>(b_shr<3>(top)));
        }
        if constexpr (bits == 6) {
            const U8 top = b_load(block + 256 + 64 * (i / 2));
            if (i % 2 == 0) low = b_or(low, b_and<48>(b_shl<4>(top))), high = b_or(high, b_and<48>(b_shl<2>(top)));
            if (i % 2 == 1) low = b_or(low, b_and<48>(top)), high = b_or(high, b_and<48>(b_shr<2>(top)));
        }
    } else {
        const U8 four = b_load(block + 64 * (i / 2));
        low = i % 2 == 0 ? b_and<3>(four) : b_and<3>(b_shr<4>(four));
        high = i % 2 == 0 ? b_and<3>(b_shr<2>(four)) : b_and<3>(b_shr<6>(four));
        if constexpr (bits == 3) {
            const U8 top = b_load(block + 128);
            if (i == 0) low = b_or(low, b_and<4>(b_shl<2>(top))), high = b_or(high, b_and<4>(b_shl<1>(top)));
            if (i == 1) low = b_or(low, b_and<4>(top)), high = b_or(high, b_and<4>(b_shr<1>(top)));
            if (i == 2) low = b_or(low, b_and<4>(b_shr<2>(top))), high = b_or(high, b_and<4>(b_shr<3>(top)));
            if (i == 3) low = b_or(low, b_and<4>(b_shr<4>(top))), high = b_or(high, b_and<4>(b_shr<5>(top)));
        }
    }
}

// Reads the scales (and minima) of one group after the other. A group has 16 columns or at least one block.
template <Scales kind, bool has_min>
class ScaleReader {
   public:
    ScaleReader(const Weight& w, const uint8_t* tile)
        : scales_(tile + w.scales_at), mins_(tile + w.mins_at), super_(tile + w.super_at),
          super_min_(tile + w.super_min_at), per_super_(256 / w.layout.group),
          repeat_(w.layout.group <= 32 ? 1 : w.layout.group / 32) {}

    void next(F32& scale, F32& min) {
        if constexpr (kind == Scales::f16) {
            scale = f_load_f16(reinterpret_cast<const uint16_t*>(scales_));
            if constexpr (has_min) min = f_load_f16(reinterpret_cast<const uint16_t*>(mins_));
            advance(32);
        } else if constexpr (kind == Scales::f32) {
            scale = f_load(reinterpret_cast<const float*>(scales_));
            if constexpr (has_min) min = f_load(reinterpret_cast<const float*>(mins_));
            if (++count_ == repeat_) count_ = 0, advance(64);
        } else {
            if (count_ == 0) {
                d_ = f_load_f16(reinterpret_cast<const uint16_t*>(super_)), super_ += 32;
                if constexpr (has_min) m_ = f_load_f16(reinterpret_cast<const uint16_t*>(super_min_)), super_min_ += 32;
            }
            if (++count_ == per_super_) count_ = 0;
            if constexpr (has_min) {
                scale = f_mul(d_, f_load_u8(scales_));
                min = f_mul(m_, f_load_u8(mins_));
            } else {
                scale = f_mul(d_, f_load_i8(reinterpret_cast<const int8_t*>(scales_)));
            }
            advance(16);
        }
    }

   private:
    void advance(size_t bytes) {
        scales_ += bytes;
        mins_ += bytes;
    }

    const uint8_t *scales_, *mins_, *super_, *super_min_;
    const uint32_t per_super_, repeat_;
    uint32_t count_ = 0;
    F32 d_{}, m_{};
};

// Calls f with the compile-time form of a codes layout: f(bits, has_table, group of 16 or 32, kind of scales, has_min).
// These are the layouts there are; weight.cpp makes no others.
template <int n>
using Int = std::integral_constant<int, n>;
template <Scales kind>
using Kind = std::integral_constant<Scales, kind>;

template <typename Function>
inline void with_codes(const Layout& layout, Function&& f) {
    constexpr auto yes = std::true_type{};
    constexpr auto no = std::false_type{};
    constexpr auto f16 = Kind<Scales::f16>{};
    constexpr auto f32 = Kind<Scales::f32>{};
    constexpr auto super = Kind<Scales::super>{};
    const Scales kind = layout.scales;
    const bool has_min = layout.has_min;
    switch (layout.bits) {
        case 2: return f(Int<2>{}, no, Int<16>{}, super, yes);
        case 3: return f(Int<3>{}, no, Int<16>{}, super, no);
        case 4:
            if (layout.has_table) return kind == Scales::f16 ? f(Int<4>{}, yes, Int<32>{}, f16, no)
                                                             : f(Int<4>{}, yes, Int<32>{}, super, no);
            if (kind == Scales::super) return f(Int<4>{}, no, Int<32>{}, super, yes);
            if (kind == Scales::f16) return has_min ? f(Int<4>{}, no, Int<32>{}, f16, yes)
                                                    : f(Int<4>{}, no, Int<32>{}, f16, no);
            return has_min ? f(Int<4>{}, no, Int<32>{}, f32, yes) : f(Int<4>{}, no, Int<32>{}, f32, no);
        case 5:
            if (kind == Scales::super) return f(Int<5>{}, no, Int<32>{}, super, yes);
            return has_min ? f(Int<5>{}, no, Int<32>{}, f16, yes) : f(Int<5>{}, no, Int<32>{}, f16, no);
        case 6: return f(Int<6>{}, no, Int<16>{}, super, no);
        case 8:
            if (kind == Scales::f16) return f(Int<8>{}, no, Int<32>{}, f16, no);
            return has_min ? f(Int<8>{}, no, Int<32>{}, f32, yes) : f(Int<8>{}, no, Int<32>{}, f32, no);
    }
}
