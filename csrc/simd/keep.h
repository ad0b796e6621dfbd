// What every vocabulary needs and no intrinsic says.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

// Holds an address in a register of its own from here on. A compiler that sees how it came about adds it up again from
// another one at each use, which costs an inner loop its cheap addressing.
inline void keep_in_register(const float *&p) { __asm__("" : "+r"(p)); }

} // namespace
} // namespace mnv2::MNV2_ISA
