// Python's view of the kernels. Tensors come as addresses: no torch header is needed, and torch may change its own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <tuple>

#include "dispatch.h"
#include "int8_network.h"
#include "network.h"
#include "parallel.h"
#include "train_bind.h"
#include "watch.h"

namespace py = pybind11;
using namespace mnv2;

namespace {

using Address = std::uintptr_t;
using Desc = std::tuple<std::string, int, int, int, bool, int, Address, Address>;

template <class T> T *at(Address address) { return reinterpret_cast<T *>(address); }

Kind kind(const std::string &name) {
    if (name == "stem")
        return Kind::stem;
    if (name == "depthwise")
        return Kind::depthwise;
    if (name == "pointwise")
        return Kind::pointwise;
    if (name == "linear")
        return Kind::linear;
    throw std::invalid_argument("no layer kind '" + name + "': stem, depthwise, pointwise or linear");
}

std::unique_ptr<Network> make_network(const std::vector<Desc> &layers, bool pool, Address table, const std::string &isa,
                                      Arithmetic arithmetic) {
    std::vector<LayerDesc> descs;
    for (const auto &[name, cin, cout, stride, relu6, residual, weight, bias] : layers)
        descs.push_back({kind(name), cin, cout, stride, relu6, residual, at<float>(weight), at<float>(bias)});
    return std::make_unique<Network>(isa.empty() ? kernels() : kernels(isa), descs, pool, at<float>(table), arithmetic);
}

void run(const Network &network, Address x, Element element, const std::array<std::ptrdiff_t, 4> &strides,
         const std::array<int, 3> &size, Address residual, Address y, int threads) {
    const Call call{at<void>(x), element, strides[0], strides[1],         strides[2], strides[3],
                    size[0],     size[1], size[2],    at<void>(residual), at<void>(y)};
    const py::gil_scoped_release release;
    network.run(call, threads);
}

using Int8Desc = std::tuple<std::string, int, int, int, bool, int, Address, Address, Address, Address, Address>;

std::unique_ptr<Int8Network> make_int8_network(const std::vector<Int8Desc> &layers, Address input_scale,
                                               Address input_zero, Address table, const std::string &isa) {
    std::vector<Int8LayerDesc> descs;
    for (const auto &[name, cin, cout, stride, relu6, residual, weight, bias, scale, output_scale, zero] : layers)
        descs.push_back({kind(name), cin, cout, stride, relu6, residual, at<std::int8_t>(weight),
                         at<std::int32_t>(bias), at<float>(scale), at<float>(output_scale), at<std::uint8_t>(zero)});
    return std::make_unique<Int8Network>(isa.empty() ? kernels() : kernels(isa), descs, at<float>(input_scale),
                                         at<std::uint8_t>(input_zero), at<std::uint8_t>(table));
}

bool run_int8(const Int8Network &network, Address x, bool bytes, const std::array<std::ptrdiff_t, 4> &strides,
              const std::array<int, 3> &size, Address y, int threads) {
    const Int8Call call{at<void>(x), bytes,   strides[0], strides[1], strides[2],
                        strides[3],  size[0], size[1],    size[2],    at<float>(y)};
    const py::gil_scoped_release release;
    return network.run(call, threads);
}

// Names of block forms, in the order of BlockForm and of Int8BlockForm.
constexpr std::array<const char *, 3> kFormNames = {"fused", "part-fused", "per-layer"};
constexpr std::array<const char *, 2> kInt8FormNames = {"by-rows", "by-channels"};

// [(first layer, last layer, form or "" of a step that is no block, seconds)] for one image.
using StepRows = std::vector<std::tuple<int, int, std::string, double>>;

template <class Form, class AnyNetwork, class AnyCall, std::size_t N>
StepRows step_rows(const AnyNetwork &network, const AnyCall &call, int threads, const std::string &form,
                   const std::array<const char *, N> &names) {
    const auto found = std::find(names.begin(), names.end(), form);
    if (!form.empty() && found == names.end()) {
        std::string all;
        for (std::size_t i = 0; i < N; ++i)
            all += (i == 0 ? "" : i + 1 < N ? ", " : " or ") + std::string(names[i]);
        throw std::invalid_argument("no block form '" + form + "': " + all);
    }
    const Form forced = static_cast<Form>(found - names.begin());
    std::vector<StepTime<Form>> times;
    {
        const py::gil_scoped_release release;
        times = network.time_steps(call, threads, form.empty() ? nullptr : &forced);
    }
    StepRows rows;
    for (const StepTime<Form> &t : times)
        rows.emplace_back(t.first, t.last, t.block ? names[static_cast<std::size_t>(t.form)] : "", t.seconds);
    return rows;
}

StepRows time_steps(const Network &network, Address x, Element element, const std::array<std::ptrdiff_t, 4> &strides,
                    const std::array<int, 3> &size, Address y, int threads, const std::string &form) {
    const Call call{at<void>(x), element, strides[0], strides[1], strides[2], strides[3],
                    size[0],     size[1], size[2],    nullptr,    at<void>(y)};
    return step_rows<BlockForm>(network, call, threads, form, kFormNames);
}

StepRows time_int8_steps(const Int8Network &network, Address x, bool bytes,
                         const std::array<std::ptrdiff_t, 4> &strides, const std::array<int, 3> &size, Address y,
                         int threads, const std::string &form) {
    const Int8Call call{at<void>(x), bytes,   strides[0], strides[1], strides[2],
                        strides[3],  size[0], size[1],    size[2],    at<float>(y)};
    return step_rows<Int8BlockForm>(network, call, threads, form, kInt8FormNames);
}

double seconds_since(std::chrono::steady_clock::time_point begin) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// GMAC/s of a loop on registers, summed over the threads: the best of five runs.
double peak(double (*loop)(std::int64_t), int threads) {
    const py::gil_scoped_release release;
    constexpr std::int64_t kIterations = 2'000'000;
    double best = 0;
    for (int run = 0; run < 5; ++run) {
        std::atomic<std::int64_t> macs{0};
        const auto begin = std::chrono::steady_clock::now();
        parallel(threads, [&](Team &) { macs += static_cast<std::int64_t>(loop(kIterations)); });
        best = std::max(best, static_cast<double>(macs.load()) / seconds_since(begin) / 1e9);
    }
    return best;
}

// GB/s read and written by memcpy of `megabytes` in all, by `threads` threads: the best of five runs.
double copy_bandwidth(int megabytes, int threads) {
    const py::gil_scoped_release release;
    const std::size_t bytes = static_cast<std::size_t>(megabytes) * 1'000'000;
    const Memory from = allocate(bytes), to = allocate(bytes);
    std::memset(from.get(), 0, bytes);
    std::memset(to.get(), 0, bytes);
    double best = 0;
    for (int run = 0; run < 5; ++run) {
        const auto begin = std::chrono::steady_clock::now();
        parallel(threads, [&](Team &team) {
            long first, last;
            team.share(static_cast<long>(bytes), 4096, first, last);
            std::memcpy(to.get() + first, from.get() + first, last - first);
        });
        best = std::max(best, 2.0 * static_cast<double>(bytes) / seconds_since(begin) / 1e9);
    }
    return best;
}

} // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels of mnv2_fast. Addresses are of float32 tensors unless said otherwise.";
    m.def("isas", &runnable_isas, "Instruction sets that run here, best first.");
    m.def("isa", [] { return std::string(kernels().isa); });
    m.def(
        "dot2", [](const std::string &isa) { return (isa.empty() ? kernels() : kernels(isa)).dot2; },
        py::arg("isa") = "");
    m.def("select_isa", &select_isa, py::arg("name"));
    m.def("cpu_features", [] {
        py::dict features;
        for (const auto &[name, present] : cpu_features())
            features[py::str(name)] = present;
        return features;
    });
    m.attr("BLOCK_FORMS") = std::vector<std::string>(kFormNames.begin(), kFormNames.end());
    m.attr("INT8_BLOCK_FORMS") = std::vector<std::string>(kInt8FormNames.begin(), kInt8FormNames.end());
    m.def("default_threads", &default_threads);
    m.def("openmp_version", &openmp_version);
    m.def("compiler", [] { return std::string(__VERSION__); });
    m.def("fma_peak", [](int threads) { return peak(kernels().fma_peak, threads); }, py::arg("threads"));
    m.def("dot2_peak", [](int threads) { return peak(kernels().dot2_peak, threads); }, py::arg("threads"));
    m.def("dot4_peak", [](int threads) { return peak(kernels().dot4_peak, threads); }, py::arg("threads"));
    m.def("copy_bandwidth", &copy_bandwidth, py::arg("megabytes"), py::arg("threads"));
    py::class_<TensorTable>(m, "TensorTable")
        .def(py::init<const py::list &, const std::vector<std::uintptr_t> &>(), py::arg("tensors"), py::arg("sampled"))
        .def("unchanged", &TensorTable::unchanged, py::arg("tensors"));
    py::class_<Watch>(m, "Watch")
        .def(py::init<const py::list &, const py::list &, const py::list &>(), py::arg("entries"), py::arg("sizes"),
             py::arg("classes"))
        .def("unchanged", &Watch::unchanged);
    py::enum_<Element>(m, "Element")
        .value("float32", Element::float32)
        .value("uint8", Element::uint8)
        .value("bf16", Element::bf16);
    py::enum_<Arithmetic>(m, "Arithmetic")
        .value("float32", Arithmetic::float32)
        .value("bf16", Arithmetic::bf16)
        .value("bf16_weights", Arithmetic::bf16_weights);
    py::class_<Network>(m, "Network")
        .def(py::init(&make_network), py::arg("layers"), py::arg("pool") = true, py::arg("table") = 0,
             py::arg("isa") = "", py::arg("arithmetic") = Arithmetic::float32)
        .def("run", &run, py::arg("x"), py::arg("element"), py::arg("strides"), py::arg("size"), py::arg("residual"),
             py::arg("y"), py::arg("threads"))
        .def("time_steps", &time_steps, py::arg("x"), py::arg("element"), py::arg("strides"), py::arg("size"),
             py::arg("y"), py::arg("threads"), py::arg("form") = "")
        .def("workspace_bytes", &Network::workspace_bytes, py::arg("n"), py::arg("h"), py::arg("w"), py::arg("threads"))
        .def("kept", &Network::kept)
        .def_property_readonly("activations", &Network::activations)
        .def_property_readonly("weight_bytes", &Network::weight_bytes)
        .def_property_readonly("isa", [](const Network &n) { return std::string(n.isa()); });
    py::class_<Int8Network>(m, "Int8Network")
        .def(py::init(&make_int8_network), py::arg("layers"), py::arg("input_scale"), py::arg("input_zero"),
             py::arg("table") = 0, py::arg("isa") = "")
        .def("run", &run_int8, py::arg("x"), py::arg("bytes"), py::arg("strides"), py::arg("size"), py::arg("y"),
             py::arg("threads"))
        .def("time_steps", &time_int8_steps, py::arg("x"), py::arg("bytes"), py::arg("strides"), py::arg("size"),
             py::arg("y"), py::arg("threads"), py::arg("form") = "")
        .def("workspace_bytes", &Int8Network::workspace_bytes, py::arg("n"), py::arg("h"), py::arg("w"),
             py::arg("threads"))
        .def("kept", &Int8Network::kept)
        .def_property_readonly("weight_bytes", &Int8Network::weight_bytes)
        .def_property_readonly("isa", [](const Int8Network &n) { return std::string(n.isa()); });
    bind_train(m);
}
