// Python's view of a training step, a part of the module that bind.cpp makes.
#pragma once

#include <pybind11/pybind11.h>

namespace mnv2 {

void bind_train(pybind11::module_ &m);

} // namespace mnv2
