#include "train_bind.h"

#include <array>
#include <optional>
#include <tuple>

#include <pybind11/stl.h>

#include "dispatch.h"
#include "train.h"
#include "train_buffer.h"

namespace py = pybind11;

namespace mnv2 {
namespace {

using Address = std::uintptr_t;

template <class T> T *at(Address address) { return reinterpret_cast<T *>(address); }

// [mean, scale, shift] as train_norm writes them, or none.
Norm norm_of(Address norm, bool relu6, int channels) {
    const float *const rows = at<float>(norm);
    if (!rows)
        return {nullptr, nullptr, nullptr, relu6};
    return {rows, rows + channels, rows + 2 * static_cast<std::ptrdiff_t>(channels), relu6};
}

TrainShape shape_of(TrainKind kind, const std::array<int, 6> &size, const std::array<std::ptrdiff_t, 4> &strides) {
    return {kind,    size[0], size[1], size[2],
            size[3], size[4], size[5], {strides[0], strides[1], strides[2], strides[3]}};
}

// (x, weight, inputs, moments) of the expansion that makes a depthwise layer's input, or nothing.
using Expansion = std::optional<std::tuple<Address, Address, int, Address>>;
// (dx, dw) of its gradients that are begun, or nothing.
using Expanded = std::optional<std::tuple<Address, Address>>;

std::optional<TrainExpandGradient> expanded_of(const Expanded &e) {
    if (!e)
        return std::nullopt;
    return TrainExpandGradient{at<float>(std::get<0>(*e)), at<float>(std::get<1>(*e))};
}

template <class T> std::optional<TrainExpand<T>> expand_of(const Expansion &e) {
    if (!e)
        return std::nullopt;
    return TrainExpand<T>{at<T>(std::get<0>(*e)), at<T>(std::get<1>(*e)), std::get<2>(*e), at<double>(std::get<3>(*e))};
}

template <class T>
void forward(TrainKind kind, const std::array<int, 6> &size, const std::array<std::ptrdiff_t, 4> &strides, Address x,
             Address norm, bool relu6, Address weight, Address z, Address sums, const Expansion &expansion,
             int threads) {
    const std::optional<TrainExpand<T>> expand = expand_of<T>(expansion);
    const TrainForward<T> f{shape_of(kind, size, strides),
                            at<void>(x),
                            norm_of(norm, relu6, size[3]),
                            at<void>(weight),
                            at<T>(z),
                            at<double>(sums),
                            expand ? &*expand : nullptr};
    const py::gil_scoped_release release;
    train_forward(kernels(), f, threads);
}

// The arguments of a backward pass, with what they point to.
template <class T> struct Backward {
    TrainBackward<T> args;
    std::optional<TrainExpand<T>> expand;
    std::optional<TrainExpandGradient> expanded;

    TrainBackward<T> get() const {
        TrainBackward<T> b = args;
        b.expand = expand ? &*expand : nullptr;
        b.expanded = expanded ? &*expanded : nullptr;
        return b;
    }
};

template <class T>
Backward<T> make_backward(TrainKind kind, const std::array<int, 6> &size, const std::array<std::ptrdiff_t, 4> &strides,
                          Address x, Address norm, bool relu6, Address weight, Address z, Address g, Address out_norm,
                          bool mask, Address coefficients, Address residual, Address dx, Address sums, Address dw,
                          const Expansion &expansion, const Expanded &expanded) {
    const int cout = size[4];
    const float *const rows = at<float>(coefficients);
    const TrainBackward<T> b{shape_of(kind, size, strides),
                             at<void>(x),
                             norm_of(norm, relu6, size[3]),
                             at<void>(weight),
                             at<T>(z),
                             at<T>(g),
                             norm_of(out_norm, mask, cout),
                             rows,
                             rows + cout,
                             rows + 2 * static_cast<std::ptrdiff_t>(cout),
                             at<T>(residual),
                             at<T>(dx),
                             at<double>(sums),
                             at<float>(dw)};
    return {b, expand_of<T>(expansion), expanded_of(expanded)};
}

template <class T>
void expand_finish(const Expansion &expansion, std::ptrdiff_t pixels, int channels, Address sums, Address norm,
                   Address coefficients, Address residual, const Expanded &begun, Address dx, int threads) {
    const TrainExpandFinish<T> f{expand_of<T>(expansion).value(),
                                 pixels,
                                 channels,
                                 at<double>(sums),
                                 norm_of(norm, true, channels).scale,
                                 at<float>(coefficients) + channels,
                                 at<T>(residual),
                                 expanded_of(begun).value(),
                                 at<T>(dx)};
    const py::gil_scoped_release release;
    train_expand_finish(kernels(), f, threads);
}

template <class T>
void activate(Address z, Address norm, bool relu6, Address residual, Address y, std::ptrdiff_t pixels, int channels,
              int threads) {
    const TrainActivate<T> a{at<T>(z), norm_of(norm, relu6, channels), at<T>(residual), at<T>(y), pixels, channels};
    const py::gil_scoped_release release;
    train_activate(kernels(), a, threads);
}

template <class T>
void sums(Address g, Address z, Address norm, bool relu6, Address out, std::ptrdiff_t pixels, int channels,
          int threads) {
    const TrainSums<T> s{at<T>(g), at<T>(z), norm_of(norm, relu6, channels), at<double>(out), pixels, channels};
    const py::gil_scoped_release release;
    train_sums(kernels(), s, threads);
}

// What there is for tensors of T, in a submodule named after their type.
template <class T> void bind_of(py::module_ m) {
    m.def("forward", &forward<T>, py::arg("kind"), py::arg("size"), py::arg("strides"), py::arg("x"), py::arg("norm"),
          py::arg("relu6"), py::arg("weight"), py::arg("z"), py::arg("sums"), py::arg("expansion"), py::arg("threads"));
    py::class_<Backward<T>>(m, "Backward")
        .def(py::init(&make_backward<T>), py::arg("kind"), py::arg("size"), py::arg("strides"), py::arg("x"),
             py::arg("norm"), py::arg("relu6"), py::arg("weight"), py::arg("z"), py::arg("g"), py::arg("out_norm"),
             py::arg("mask"), py::arg("coefficients"), py::arg("residual"), py::arg("dx"), py::arg("sums"),
             py::arg("dw"), py::arg("expansion"), py::arg("expanded"));
    m.def(
        "backward",
        [](const Backward<T> &b, int threads) {
            const py::gil_scoped_release release;
            train_backward(kernels(), b.get(), threads);
        },
        py::arg("backward"), py::arg("threads"));
    m.def(
        "moments",
        [](Address x, std::ptrdiff_t pixels, int channels, Address moments, int threads) {
            const py::gil_scoped_release release;
            train_input_moments(kernels(), at<const T>(x), pixels, channels, at<double>(moments), threads);
        },
        py::arg("x"), py::arg("pixels"), py::arg("channels"), py::arg("moments"), py::arg("threads"));
    m.def(
        "expand_sums",
        [](const Expansion &expansion, std::ptrdiff_t pixels, int channels, Address sums) {
            train_expand_sums(expand_of<T>(expansion).value(), pixels, channels, at<double>(sums));
        },
        py::arg("expansion"), py::arg("pixels"), py::arg("channels"), py::arg("sums"));
    m.def("expand_finish", &expand_finish<T>, py::arg("expansion"), py::arg("pixels"), py::arg("channels"),
          py::arg("sums"), py::arg("norm"), py::arg("coefficients"), py::arg("residual"), py::arg("begun"),
          py::arg("dx"), py::arg("threads"));
    m.def("activate", &activate<T>, py::arg("z"), py::arg("norm"), py::arg("relu6"), py::arg("residual"), py::arg("y"),
          py::arg("pixels"), py::arg("channels"), py::arg("threads"));
    m.def("sums", &sums<T>, py::arg("g"), py::arg("z"), py::arg("norm"), py::arg("relu6"), py::arg("out"),
          py::arg("pixels"), py::arg("channels"), py::arg("threads"));
}

} // namespace

void bind_train(py::module_ &m) {
    py::enum_<TrainKind>(m, "TrainKind")
        .value("pointwise", TrainKind::pointwise)
        .value("depthwise", TrainKind::depthwise)
        .value("stem", TrainKind::stem);
    bind_of<float>(m.def_submodule("train_float32"));
    bind_of<bf16>(m.def_submodule("train_bfloat16"));
    m.def(
        "train_norm",
        [](Address moments, std::ptrdiff_t pixels, Address gamma, Address beta, double eps, Address norm,
           int channels) {
            train_norm({at<double>(moments), at<float>(gamma), at<float>(beta), eps, at<float>(norm), channels},
                       pixels);
        },
        py::arg("moments"), py::arg("pixels"), py::arg("gamma"), py::arg("beta"), py::arg("eps"), py::arg("norm"),
        py::arg("channels"));
    m.def(
        "train_running",
        [](Address moments, std::ptrdiff_t pixels, double share, Address mean, Address variance, int channels) {
            train_running(at<double>(moments), pixels, share, at<float>(mean), at<float>(variance), channels);
        },
        py::arg("moments"), py::arg("pixels"), py::arg("share"), py::arg("mean"), py::arg("variance"),
        py::arg("channels"));
    m.def(
        "train_norm_gradient",
        [](Address sums, Address moments, Address gamma, double eps, std::ptrdiff_t pixels, Address norm,
           Address coefficients, Address dgamma, Address dbeta, int channels) {
            train_norm_gradient({at<double>(sums), at<double>(moments), at<float>(gamma), eps, pixels, at<float>(norm),
                                 at<float>(coefficients), at<float>(dgamma), at<float>(dbeta), channels});
        },
        py::arg("sums"), py::arg("moments"), py::arg("gamma"), py::arg("eps"), py::arg("pixels"), py::arg("norm"),
        py::arg("coefficients"), py::arg("dgamma"), py::arg("dbeta"), py::arg("channels"));
    py::class_<TrainBuffer>(m, "TrainBuffer", py::buffer_protocol())
        .def(py::init<std::size_t>(), py::arg("bytes"))
        .def_buffer([](TrainBuffer &b) {
            return py::buffer_info(b.data(), 1, py::format_descriptor<std::uint8_t>::format(),
                                   static_cast<py::ssize_t>(b.bytes()));
        })
        .def_static("used", &TrainBuffer::used)
        .def_static("kept", &TrainBuffer::kept)
        .def_static("release", &TrainBuffer::release);
}

} // namespace mnv2
