// The Python module pelton._cpu: the only file that knows Python. It checks arguments and lets go of the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using pelton::bf16;
using pelton::Kernels;

namespace {

const Kernels* active = pelton::supported_kernels()[0];

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (auto table = pelton::supported_kernels(); *table; ++table) names.emplace_back((*table)->isa);
    return names;
}

void set_isa(const std::string& name) {
    for (auto table = pelton::supported_kernels(); *table; ++table)
        if (name == (*table)->isa) {
            active = *table;
            return;
        }
    throw std::invalid_argument("this processor has no instruction set '" + name + "'");
}

template <typename T>
T* pointer(uintptr_t address, const char* name) {
    if (address == 0 || address % alignof(T) != 0)
        throw std::invalid_argument(std::string(name) + " is not the address of a tensor");
    return reinterpret_cast<T*>(address);
}

template <typename T>
void run_rms_norm(pelton::RmsNorm<T> kernel, uintptr_t out, uintptr_t x, uintptr_t weight, size_t num_rows, size_t dim,
                  size_t out_stride, size_t x_stride, float eps) {
    kernel(pointer<T>(out, "out"), pointer<const T>(x, "x"), pointer<const float>(weight, "weight"), num_rows, dim,
           out_stride, x_stride, eps);
}

void rms_norm(uintptr_t out, uintptr_t x, uintptr_t weight, size_t num_rows, size_t dim, size_t out_stride,
              size_t x_stride, float eps, const std::string& dtype) {
    if (dim == 0 || out_stride < dim || x_stride < dim)
        throw std::invalid_argument("rms_norm needs dim >= 1 and strides of at least dim");
    if (!(eps >= 0)) throw std::invalid_argument("rms_norm needs eps >= 0");
    if (dtype != "float32" && dtype != "bfloat16")
        throw std::invalid_argument("rms_norm takes float32 and bfloat16, not " + dtype);
    if (num_rows == 0) return;
    nb::gil_scoped_release unlocked;
    if (dtype == "float32")
        run_rms_norm(active->rms_norm_f32, out, x, weight, num_rows, dim, out_stride, x_stride, eps);
    else
        run_rms_norm(active->rms_norm_bf16, out, x, weight, num_rows, dim, out_stride, x_stride, eps);
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.doc() = "pelton's CPU kernels. Tensors are passed as addresses (data_ptr()), sizes and strides in elements.";
    m.def("isa", [] { return std::string(active->isa); }, "The instruction set in use.");
    m.def("supported_isas", supported_isas, "What this processor can run, best first.");
    m.def("set_isa", set_isa, nb::arg("name"), "Use another of supported_isas(): for tests and measurements.");
    m.def("rms_norm", rms_norm, nb::arg("out"), nb::arg("x"), nb::arg("weight"), nb::arg("num_rows"), nb::arg("dim"),
          nb::arg("out_stride"), nb::arg("x_stride"), nb::arg("eps"), nb::arg("dtype"),
          "out[r, i] = x[r, i] / sqrt(mean(x[r]^2) + eps) * weight[i], computed in float32 and rounded once.\n"
          "out, x: [num_rows, dim] of dtype \"float32\" or \"bfloat16\", rows `stride` elements apart, out may be x;\n"
          "weight: [dim] float32. ValueError for anything else.");
}
