// Sums over pixels for the global average pool.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

void pool(const PoolArgs &a) {
    for (int c = 0; c < a.channels; c += kLanes) {
        const int left = a.channels - c;
        const bool whole = left >= kLanes;
        Vec sum = zero();
        const float *x = a.x + c;
        for (std::ptrdiff_t p = 0; p < a.pixels; ++p, x += a.x_ld)
            sum = add(sum, whole ? load(x) : load_first(x, left));
        if (whole)
            store(a.sum + c, sum);
        else
            store_first(a.sum + c, sum, left);
    }
}

} // namespace
} // namespace mnv2::MNV2_ISA
