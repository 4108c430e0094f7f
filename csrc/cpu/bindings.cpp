// The Python module pelton._cpu: with bind_*.cpp the only files that know Python. Here every argument is checked, and
// the GIL is let go while kernels run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.h"
#include "weight.h"

namespace nb = nanobind;
using namespace pelton;

void bind_sample(nb::module_& m);  // bind_sample.cpp

namespace {

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

template <typename T>
T* pointer(uintptr_t address, const char* name) {
    if (address == 0 || address % alignof(T) != 0)
        throw std::invalid_argument(std::string(name) + " is not the address of a tensor");
    return reinterpret_cast<T*>(address);
}
template <typename T>
T* pointer_or_null(uintptr_t address, const char* name) {
    return address == 0 ? nullptr : pointer<T>(address, name);
}

void run(const Call& call, size_t num_rows) {
    nb::gil_scoped_release unlocked;
    submit(call, num_rows);
}

// --- instruction sets, threads, programs -----------------------------------------------------------------------------

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (auto table = supported_kernels(); *table; ++table) names.emplace_back((*table)->isa);
    return names;
}

void set_isa(const std::string& name) {
    for (auto table = supported_kernels(); *table; ++table)
        if (name == (*table)->isa) return set_kernels(**table);
    throw std::invalid_argument("this processor has no instruction set '" + name + "'");
}

void set_threads(size_t num_threads, const std::vector<int>& cpus) {
    require(num_threads >= 1 && num_threads <= 4096, "a pool has 1 to 4096 threads");
    require(cpus.empty() || cpus.size() == num_threads, "there must be one processor for each thread");
    nb::gil_scoped_release unlocked;
    set_pool(num_threads, cpus);
}

void replay_parts(const std::vector<std::pair<Program*, size_t>>& parts) {
    std::vector<std::pair<const Program*, size_t>> list(parts.begin(), parts.end());
    nb::gil_scoped_release unlocked;
    replay(list);
}

// Seconds each call of a program takes, its barrier included: (kernel's name, seconds).
std::vector<std::pair<std::string, double>> profile(const Program& program, size_t num_rows) {
    require(num_rows <= program.max_rows(), "more rows than the program was recorded for");
    using Clock = std::chrono::steady_clock;
    std::vector<std::pair<std::string, double>> times;
    pool().run(
        [&](const Team& team) {
            auto start = Clock::now();
            for (const Call& call : program.calls()) {
                call.run(call, num_rows, team);
                team.barrier();
                if (team.thread != 0) continue;
                const auto end = Clock::now();
                times.emplace_back(call.name, std::chrono::duration<double>(end - start).count());
                start = end;
            }
        },
        program.scratch());
    return times;
}

// --- weights and their products ---------------------------------------------------------------------------------------

void fill(PackedWeight& weight, size_t first_row, uintptr_t blocks, size_t num_bytes, const std::vector<int32_t>& rows) {
    const auto data = pointer<const uint8_t>(blocks, "blocks");
    nb::gil_scoped_release unlocked;
    weight.fill(pool(), first_row, data, num_bytes, rows);
}

void fill_codes(PackedWeight& weight, size_t first_row, size_t num_rows, uintptr_t codes, uintptr_t scales,
                uintptr_t mins) {
    const auto data = pointer<const uint8_t>(codes, "codes");
    const auto scale_data = pointer<const float>(scales, "scales");
    const auto min_data = pointer_or_null<const float>(mins, "mins");
    nb::gil_scoped_release unlocked;
    weight.fill_codes(pool(), first_row, num_rows, data, scale_data, min_data);
}

Activations parse_activations(const std::string& name) {
    if (name == "int8") return Activations::i8;
    if (name == "bf16") return Activations::bf16;
    if (name == "fp32") return Activations::f32;
    throw std::invalid_argument("activations are int8, bf16 or fp32, not " + name);
}

void linear(uintptr_t out, uintptr_t x, const PackedWeight& weight, uintptr_t bias, size_t num_rows, size_t out_stride,
            size_t x_stride, const std::string& activations, bool accumulate) {
    const Weight& w = weight.weight();
    require(out_stride >= w.num_out && x_stride >= w.num_in, "linear: rows are shorter than the weight");
    LinearArgs args{pointer<float>(out, "out"), pointer<const float>(x, "x"), &w,
                    pointer_or_null<const float>(bias, "bias"), out_stride, x_stride, parse_activations(activations),
                    accumulate};
    run(Call::make("linear", kernels().linear, args, kernels().linear_scratch(args, num_rows)), num_rows);
}

void embed(uintptr_t out, uintptr_t ids, const PackedWeight& weight, size_t num_rows, size_t out_stride, float scale) {
    const Weight& w = weight.weight();
    require(out_stride >= w.num_in, "embed: rows are shorter than the weight");
    EmbedArgs args{pointer<float>(out, "out"), pointer<const int64_t>(ids, "ids"), &w, out_stride, scale};
    run(Call::make("embed", kernels().embed, args, {0, w.num_blocks * 32 * 64 + 64}), num_rows);
}

// --- rows -------------------------------------------------------------------------------------------------------------

void rms_norm(uintptr_t out, uintptr_t x, uintptr_t weight, size_t num_rows, size_t dim, size_t out_stride,
              size_t x_stride, float eps, bool accumulate) {
    require(dim >= 1 && out_stride >= dim && x_stride >= dim, "rms_norm needs dim >= 1 and strides of at least dim");
    require(eps >= 0, "rms_norm needs eps >= 0");
    RmsNormArgs args{pointer<float>(out, "out"), pointer<const float>(x, "x"), pointer<const float>(weight, "weight"),
                     dim, out_stride, x_stride, eps, accumulate};
    run(Call::make("rms_norm", kernels().rms_norm, args), num_rows);
}

void gated(uintptr_t out, uintptr_t x, size_t num_rows, size_t dim, size_t out_stride, size_t x_stride,
           const std::string& gate) {
    require(dim >= 1 && out_stride >= dim && x_stride >= 2 * dim, "gated needs rows of 2 dim numbers");
    require(gate == "silu" || gate == "gelu_tanh", "gated knows silu and gelu_tanh");
    GatedArgs args{pointer<float>(out, "out"), pointer<const float>(x, "x"), dim, out_stride, x_stride,
                   gate == "silu" ? Gate::silu : Gate::gelu_tanh};
    run(Call::make("gated", kernels().gated, args), num_rows);
}

void softcap(uintptr_t x, size_t num_rows, size_t dim, size_t stride, float cap) {
    require(dim >= 1 && stride >= dim && cap > 0, "softcap needs dim >= 1, a stride of at least dim and cap > 0");
    run(Call::make("softcap", kernels().softcap, SoftcapArgs{pointer<float>(x, "x"), dim, stride, cap}), num_rows);
}

Type parse_type(const std::string& name) {
    if (name == "float32") return Type::f32;
    if (name == "bfloat16") return Type::bf16;
    if (name == "float16") return Type::f16;
    if (name == "int8") return Type::i8;
    throw std::invalid_argument("numbers are float32, bfloat16, float16 or int8, not " + name);
}

void gather(uintptr_t out, uintptr_t x, uintptr_t ids, size_t num_rows, size_t dim, size_t out_stride, size_t x_stride,
            const std::string& type, float scale) {
    require(dim >= 1 && out_stride >= dim && x_stride >= dim, "gather needs dim >= 1 and strides of at least dim");
    require(parse_type(type) != Type::i8, "gather has no scales for int8");
    GatherArgs args{pointer<float>(out, "out"), pointer<const char>(x, "x"), pointer<const int64_t>(ids, "ids"), dim,
                    out_stride, x_stride, parse_type(type), scale};
    run(Call::make("gather", kernels().gather, args), num_rows);
}

// --- attention ----------------------------------------------------------------------------------------------------------

constexpr size_t max_head_size = 1024;

Cache make_cache(uintptr_t keys, uintptr_t values, uintptr_t key_scales, uintptr_t value_scales, size_t num_blocks,
                 size_t block_size, size_t num_kv_heads, size_t head_size, const std::string& type) {
    require(block_size >= 16 && block_size % 16 == 0, "blocks have a multiple of 16 slots");
    require(head_size >= 2 && head_size % 2 == 0 && head_size <= max_head_size, "heads are even and at most 1024");
    require(num_kv_heads >= 1 && num_blocks >= 1, "a cache has heads and blocks");
    const bool scaled = parse_type(type) == Type::i8;
    return {pointer<char>(keys, "keys"),
            pointer<char>(values, "values"),
            scaled ? pointer<float>(key_scales, "key_scales") : nullptr,
            scaled ? pointer<float>(value_scales, "value_scales") : nullptr,
            num_blocks, block_size, num_kv_heads, head_size, parse_type(type)};
}

void angles(uintptr_t cos, uintptr_t sin, uintptr_t positions, uintptr_t inv_freq, size_t num_rows, size_t half,
            float magnitude) {
    require(half >= 1, "angles needs a head size");
    AnglesArgs args{pointer<float>(cos, "cos"), pointer<float>(sin, "sin"), pointer<const int64_t>(positions, "positions"),
                    pointer<const float>(inv_freq, "inv_freq"), half, magnitude};
    run(Call::make("angles", kernels().angles, args), num_rows);
}

void rope_store(uintptr_t qkv, uintptr_t cos, uintptr_t sin, uintptr_t q_weight, uintptr_t k_weight, uintptr_t slots,
                const Cache& cache, size_t num_rows, size_t qkv_stride, size_t num_heads, float eps) {
    require(qkv_stride >= (num_heads + 2 * cache.num_kv_heads) * cache.head_size, "rope_store: rows are too short");
    RopeStoreArgs args{pointer<float>(qkv, "qkv"), pointer<const float>(cos, "cos"), pointer<const float>(sin, "sin"),
                       pointer_or_null<const float>(q_weight, "q_weight"),
                       pointer_or_null<const float>(k_weight, "k_weight"), pointer<const int64_t>(slots, "slots"), cache,
                       qkv_stride, num_heads, eps};
    run(Call::make("rope_store", kernels().rope_store, args), num_rows);
}

void attention(uintptr_t out, uintptr_t query, uintptr_t query_starts, uintptr_t context_lens, uintptr_t block_table,
               const Cache& cache, size_t num_rows, size_t num_requests, size_t table_stride, size_t num_heads,
               size_t out_stride, size_t query_stride, size_t window, float scale, float softcap) {
    require(num_heads >= 1 && num_heads % cache.num_kv_heads == 0, "query heads are a multiple of key heads");
    require(out_stride >= num_heads * cache.head_size && query_stride >= num_heads * cache.head_size,
            "attention: rows are too short");
    AttentionArgs args{pointer<float>(out, "out"), pointer<const float>(query, "query"),
                       pointer<const int64_t>(query_starts, "query_starts"),
                       pointer<const int64_t>(context_lens, "context_lens"),
                       pointer<const int64_t>(block_table, "block_table"), cache, num_requests, table_stride, num_heads,
                       out_stride, query_stride, window, scale, softcap};
    run(Call::make("attention", kernels().attention, args, kernels().attention_scratch(args, num_rows)), num_rows);
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.doc() = "pelton's CPU kernels. Tensors are passed as addresses (data_ptr()), sizes and strides in elements.\n"
              "Activations are float32. What each kernel computes is said in csrc/cpu/kernels.h; ValueError for\n"
              "arguments that cannot be. Indices inside tensors (ids, slots, block tables) are the caller's word.";
    m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
    m.def("supported_isas", supported_isas, "What this processor can run, best first.");
    m.def("set_isa", set_isa, nb::arg("name"), "Use another of supported_isas().");
    m.def("has_bf16_dot", [] { return kernels().has_bf16_dot; }, "Whether bfloat16 is multiplied by instructions.");
    m.def("num_threads", [] { return pool().num_threads(); });
    m.def("set_threads", set_threads, nb::arg("num_threads"), nb::arg("cpus") = std::vector<int>{},
          "Compute with so many threads; all but the first are bound to their processors, if given.");

    nb::class_<Program>(m, "Program", "Kernel calls recorded for max_rows rows, to be replayed for as many or fewer.")
        .def(nb::init<size_t>(), nb::arg("max_rows"))
        .def_prop_ro("max_rows", &Program::max_rows)
        .def("__len__", &Program::num_calls);
    m.def("begin_recording", begin_recording, nb::arg("program"), "From now on, this thread's calls are not run but kept.");
    m.def("end_recording", end_recording);
    m.def("replay", replay_parts, nb::arg("parts"), "Run (program, rows) pairs one after the other.");

    m.def("profile", profile, nb::arg("program"), nb::arg("num_rows"),
          "Run a program: the name of each of its calls and the seconds it took.");

    m.def("packed_formats", packed_formats);
    nb::class_<PackedWeight>(m, "Weight", "A matrix [num_out, num_in] in the order it is multiplied in.")
        .def(nb::init<const std::string&, size_t, size_t>(), nb::arg("format"), nb::arg("num_out"), nb::arg("num_in"))
        .def_static("codes", &PackedWeight::codes, nb::arg("bits"), nb::arg("group"), nb::arg("has_min"),
                    nb::arg("zero"), nb::arg("num_out"), nb::arg("num_in"))
        .def_static("lookup", &PackedWeight::lookup, nb::arg("values"), nb::arg("group"), nb::arg("num_out"),
                    nb::arg("num_in"))
        .def("fill", fill, nb::arg("first_row"), nb::arg("blocks"), nb::arg("num_bytes"),
             nb::arg("rows") = std::vector<int32_t>{})
        .def("fill_codes", fill_codes, nb::arg("first_row"), nb::arg("num_rows"), nb::arg("codes"), nb::arg("scales"),
             nb::arg("mins") = 0)
        .def("set_order", &PackedWeight::set_order, nb::arg("order"))
        .def_prop_ro("num_bytes", &PackedWeight::num_bytes);

    m.def("linear", linear, nb::arg("out"), nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("num_rows"),
          nb::arg("out_stride"), nb::arg("x_stride"), nb::arg("activations"), nb::arg("accumulate"));
    m.def("embed", embed, nb::arg("out"), nb::arg("ids"), nb::arg("weight"), nb::arg("num_rows"), nb::arg("out_stride"),
          nb::arg("scale"));
    m.def("rms_norm", rms_norm, nb::arg("out"), nb::arg("x"), nb::arg("weight"), nb::arg("num_rows"), nb::arg("dim"),
          nb::arg("out_stride"), nb::arg("x_stride"), nb::arg("eps"), nb::arg("accumulate"));
    m.def("gated", gated, nb::arg("out"), nb::arg("x"), nb::arg("num_rows"), nb::arg("dim"), nb::arg("out_stride"),
          nb::arg("x_stride"), nb::arg("gate"));
    m.def("softcap", softcap, nb::arg("x"), nb::arg("num_rows"), nb::arg("dim"), nb::arg("stride"), nb::arg("cap"));
    m.def("gather", gather, nb::arg("out"), nb::arg("x"), nb::arg("ids"), nb::arg("num_rows"), nb::arg("dim"),
          nb::arg("out_stride"), nb::arg("x_stride"), nb::arg("type"), nb::arg("scale"));
    m.def("angles", angles, nb::arg("cos"), nb::arg("sin"), nb::arg("positions"), nb::arg("inv_freq"),
          nb::arg("num_rows"), nb::arg("half"), nb::arg("magnitude"));
    nb::class_<Cache>(m, "Cache", "The paged cache of one layer; it does not own its memory.")
        .def_static("make", make_cache, nb::arg("keys"), nb::arg("values"), nb::arg("key_scales"),
                    nb::arg("value_scales"), nb::arg("num_blocks"), nb::arg("block_size"), nb::arg("num_kv_heads"),
                    nb::arg("head_size"), nb::arg("type"));
    bind_sample(m);
    m.def("rope_store", rope_store, nb::arg("qkv"), nb::arg("cos"), nb::arg("sin"), nb::arg("q_weight"),
          nb::arg("k_weight"), nb::arg("slots"), nb::arg("cache"), nb::arg("num_rows"), nb::arg("qkv_stride"),
          nb::arg("num_heads"), nb::arg("eps"));
    m.def("attention", attention, nb::arg("out"), nb::arg("query"), nb::arg("query_starts"), nb::arg("context_lens"),
          nb::arg("block_table"), nb::arg("cache"), nb::arg("num_rows"), nb::arg("num_requests"),
          nb::arg("table_stride"), nb::arg("num_heads"), nb::arg("out_stride"), nb::arg("query_stride"),
          nb::arg("window"), nb::arg("scale"), nb::arg("softcap"));
}
