// Quick checks that what was read of Python objects is still so. Of the extension's files only bind.cpp includes it.
//
// Between two calls of a model the network's weights have emptied L1 and L2, and reading a few thousand lines one after
// another from L3 or memory took 460 us of a 3 ms call. Prefetched some way ahead of their use they take 80.
#pragma once

#include <pybind11/pybind11.h>

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <vector>

namespace mnv2 {

constexpr int kLineBytes = 64;

inline void prefetch_bytes(const void *address, int bytes) {
    for (int at = 0; at < bytes; at += kLineBytes)
        __builtin_prefetch(static_cast<const char *>(address) + at);
}

// Which objects lie in some dicts, how many entries others have, and the classes of objects. All references are
// borrowed: the owner of the Watch keeps the objects.
class Watch {
  public:
    struct Entry {
        PyObject *dict, *key, *value;
    };
    struct Size {
        PyObject *dict;
        Py_ssize_t size;
    };
    struct Class {
        PyObject *object;
        PyTypeObject *type;
    };

    // `entries`: (dict, key, value), `sizes`: (dict, length), `classes`: (object, class).
    Watch(const pybind11::list &entries, const pybind11::list &sizes, const pybind11::list &classes) {
        namespace py = pybind11;
        for (const py::handle row : entries) {
            const auto t = py::reinterpret_borrow<py::tuple>(row);
            entries_.push_back({dict(t[0]), py::object(t[1]).ptr(), py::object(t[2]).ptr()});
        }
        for (const py::handle row : sizes) {
            const auto t = py::reinterpret_borrow<py::tuple>(row);
            sizes_.push_back({dict(t[0]), py::cast<Py_ssize_t>(t[1])});
        }
        for (const py::handle row : classes) {
            const auto t = py::reinterpret_borrow<py::tuple>(row);
            classes_.push_back({py::object(t[0]).ptr(), reinterpret_cast<PyTypeObject *>(py::object(t[1]).ptr())});
        }
    }

    bool unchanged() const {
        const std::size_t sizes = sizes_.size(), entries = entries_.size(), classes = classes_.size();
        for (std::size_t i = 0; i < sizes; ++i) {
            if (i + kAhead < sizes)
                prefetch_bytes(sizes_[i + kAhead].dict, kDictBytes);
            if (PyDict_Size(sizes_[i].dict) != sizes_[i].size)
                return false;
        }
        for (std::size_t i = 0; i < entries; ++i) {
            // A dict's entries follow one another, and its header came with its size.
            if (i + kEntriesAhead < entries && entries_[i + kEntriesAhead].dict != entries_[i + kEntriesAhead - 1].dict)
                prefetch_table(entries_[i + kEntriesAhead].dict);
            const Entry &e = entries_[i];
            if (PyDict_GetItemWithError(e.dict, e.key) != e.value) {
                PyErr_Clear();
                return false;
            }
        }
        for (std::size_t i = 0; i < classes; ++i) {
            if (i + kAhead < classes)
                __builtin_prefetch(classes_[i + kAhead].object);
            if (Py_TYPE(classes_[i].object) != classes_[i].type)
                return false;
        }
        return true;
    }

  private:
    static constexpr std::size_t kAhead = 24, kEntriesAhead = 64;
    static constexpr int kDictBytes = sizeof(PyDictObject);
    static constexpr int kTableBytes = 5 * kLineBytes;

    static PyObject *dict(const pybind11::object &object) {
        if (!PyDict_Check(object.ptr()))
            throw pybind11::type_error("a Watch looks into dicts");
        return object.ptr();
    }

    static void prefetch_table(PyObject *object) {
        const auto *d = reinterpret_cast<const PyDictObject *>(object);
        prefetch_bytes(d->ma_keys, kTableBytes);
        if (d->ma_values)
            prefetch_bytes(d->ma_values, kTableBytes);
    }

    std::vector<Entry> entries_;
    std::vector<Size> sizes_;
    std::vector<Class> classes_;
};

// What torch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h) tells of a tensor, found at run time in the
// libtorch that is loaded: no header of torch's is needed.
class TorchShim {
  public:
    static constexpr int kMaxDims = 4;

    struct Tensor {
        void *data;
        std::int32_t dtype, layout;
        std::int64_t dim, sizes[kMaxDims], strides[kMaxDims];
    };

    static const TorchShim &get() {
        static const TorchShim shim;
        return shim;
    }
    bool found() const { return data_ptr_ && dim_ && sizes_ && strides_ && dtype_ && layout_; }

    // `impl` is what Tensor._cdata says; the interface takes the address of a variable that holds it. False for more
    // than kMaxDims dimensions and for what torch refuses.
    bool read(void *impl, Tensor &out) const {
        std::memset(&out, 0, sizeof out); // the padding too: tensors are compared as bytes
        std::int64_t *sizes = nullptr, *strides = nullptr;
        if (data_ptr_(&impl, &out.data) || dtype_(&impl, &out.dtype) || layout_(&impl, &out.layout) ||
            dim_(&impl, &out.dim) || out.dim > kMaxDims || sizes_(&impl, &sizes) || strides_(&impl, &strides))
            return false;
        for (std::int64_t d = 0; d < out.dim; ++d) {
            out.sizes[d] = sizes[d];
            out.strides[d] = strides[d];
        }
        return true;
    }

  private:
    template <class T> using Getter = std::int32_t (*)(void *, T *);

    TorchShim() {
        void *const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        const auto find = [torch](const char *name, auto &function) {
            function = reinterpret_cast<std::decay_t<decltype(function)>>(torch ? dlsym(torch, name) : nullptr);
        };
        find("aoti_torch_get_data_ptr", data_ptr_);
        find("aoti_torch_get_dim", dim_);
        find("aoti_torch_get_sizes", sizes_);
        find("aoti_torch_get_strides", strides_);
        find("aoti_torch_get_dtype", dtype_);
        find("aoti_torch_get_layout", layout_);
    }

    Getter<void *> data_ptr_;
    Getter<std::int64_t> dim_;
    Getter<std::int64_t *> sizes_, strides_;
    Getter<std::int32_t> dtype_, layout_;
};

// Tensors as they were: address, dtype, layout, shape, strides, version, and the values at a few addresses.
class TensorTable {
  public:
    // `sampled`: addresses of floats in the tensors, which the owner keeps alive.
    TensorTable(const pybind11::list &tensors, const std::vector<std::uintptr_t> &sampled) : sampled_(sampled) {
        if (!TorchShim::get().found())
            throw std::runtime_error("this torch has no stable C interface");
        for (const pybind11::handle t : tensors) {
            Row row;
            if (!attribute(t.ptr(), kImpl, row.impl) || !TorchShim::get().read(at(row.impl), row.tensor))
                throw std::invalid_argument("a tensor is out of the ordinary");
            row.object = t.ptr();
            row.versioned = attribute(t.ptr(), kVersion, row.version); // inference tensors have none
            rows_.push_back(row);
        }
        values_ = values();
    }

    bool unchanged(const pybind11::list &tensors) const {
        if (tensors.size() != rows_.size())
            return false;
        TorchShim::Tensor now;
        for (std::size_t i = 0; i < rows_.size(); ++i) {
            if (i + kAhead < rows_.size())
                rows_[i + kAhead].prefetch();
            if (i + kAhead / 2 < rows_.size())
                rows_[i + kAhead / 2].prefetch_words();
            const Row &row = rows_[i];
            PyObject *const object = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
            std::uintptr_t impl, version = 0;
            if (!attribute(object, kImpl, impl) || impl != row.impl || !TorchShim::get().read(at(impl), now) ||
                std::memcmp(&now, &row.tensor, sizeof now) != 0)
                return false;
            if (row.versioned && (!attribute(object, kVersion, version) || version != row.version))
                return false;
        }
        return values() == values_;
    }

  private:
    static constexpr const char *kImpl = "_cdata", *kVersion = "_version";
    static constexpr std::size_t kAhead = 24;
    static constexpr int kImplBytes = 4 * kLineBytes;

    struct Row {
        PyObject *object; // for prefetching only
        std::uintptr_t impl, version;
        TorchShim::Tensor tensor;
        bool versioned;

        void prefetch() const {
            __builtin_prefetch(object);
            prefetch_bytes(at(impl), kImplBytes);
        }
        // The first line of a tensor points to its storage, version and gradient: lines that a look reads too.
        void prefetch_words() const {
            void *words[kLineBytes / sizeof(void *)];
            std::memcpy(words, at(impl), sizeof words);
            for (const void *word : words)
                __builtin_prefetch(word);
        }
    };

    static void *at(std::uintptr_t address) { return reinterpret_cast<void *>(address); }

    // An attribute that is a number; false where there is none.
    static bool attribute(PyObject *object, const char *name, std::uintptr_t &value) {
        static PyObject *const impl = PyUnicode_InternFromString(kImpl);
        static PyObject *const version = PyUnicode_InternFromString(kVersion);
        PyObject *const number = PyObject_GetAttr(object, name == kImpl ? impl : version);
        value = number ? PyLong_AsUnsignedLongLong(number) : 0;
        Py_XDECREF(number);
        if (!PyErr_Occurred())
            return true;
        PyErr_Clear();
        return false;
    }

    std::vector<std::uint32_t> values() const {
        std::vector<std::uint32_t> bits(sampled_.size()); // bits, so that a NaN equals itself
        for (std::size_t i = 0; i < sampled_.size(); ++i) {
            if (i + kAhead < sampled_.size())
                __builtin_prefetch(at(sampled_[i + kAhead]));
            std::memcpy(&bits[i], at(sampled_[i]), sizeof bits[i]);
        }
        return bits;
    }

    std::vector<std::uintptr_t> sampled_;
    std::vector<Row> rows_;
    std::vector<std::uint32_t> values_;
};

} // namespace mnv2
