// Which kernels run here: CPUID and XGETBV, one table, chosen once and by name on request.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "types.h"

namespace mnv2 {

enum Feature : std::uint32_t {
    kAvx2 = 1u << 0,
    kFma = 1u << 1,
    kAvx512 = 1u << 2, // F, BW, DQ and VL: every processor since 2017 that has the first has them all
    kAvx512vnni = 1u << 4,
    kAvx512bf16 = 1u << 5,
    kAvxVnni = 1u << 6,
    kFastBf16 = 1u << 7, // kAvx512bf16, and worth using
    kAmx = 1u << 8,      // tiles of bf16 and int8, which a process has to ask for
};

// Features of this processor that its operating system lets programs use, by name.
const std::vector<std::pair<std::string, bool>> &cpu_features();

// Rows of isa.def that run here, best first.
std::vector<std::string> runnable_isas();

// The table in use: the best one until select_isa names another.
const KernelTable &kernels();

// Throws std::invalid_argument, naming the ones that run here, where `name` is none of them.
void select_isa(const std::string &name);
const KernelTable &kernels(const std::string &name);

} // namespace mnv2
