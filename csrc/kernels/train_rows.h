// What a training step does to each element between its convolutions: normalize and activate, the gradient of that, and
// sums over pixels.
//
// Pixels outside, channels inside: a tensor from memory is read as it lies. Sums over pixels take kGroup pixels of a
// vector of channels at a time, so that a sum is fetched once for all of them, and keeps its digits: a chunk is 8 + 28
// additions deep, not 224.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

constexpr int kGroup = 8;

// Asks L2 for what is read two pages later: the hardware does not look beyond the page at hand. A gradient's rows then
// come at the speed of memory, 5.5 ns a vector on Zen 4, where asking L1, whose few misses at a time they need
// themselves, takes 8.5. A step in float32 takes 9% less so. A store to memory waits for it, too: asking for what
// moments and sums write in bf16 takes another 5% off a step there.
template <class T> inline void prefetch_later(const T *at) {
    __builtin_prefetch(reinterpret_cast<const char *>(at) + 8192, 0, 2);
}

// A vector of channels, all of which exist or the first `count`.
struct WholeVector {
    template <class T> Vec get(const T *p) const { return load(p); }
    template <class T> void put(T *p, Vec a) const { store(p, a); }
};
struct PartVector {
    int count;
    template <class T> Vec get(const T *p) const { return load_first(p, count); }
    template <class T> void put(T *p, Vec a) const { store_first(p, a, count); }
};

// f(c, vector) for every vector of channels, c its first.
template <class F> inline __attribute__((always_inline)) void each_vector(int channels, const F &f) {
    int c = 0;
    for (; c + kLanes <= channels; c += kLanes)
        f(c, WholeVector());
    if (c < channels)
        f(c, PartVector{channels - c});
}

template <class V> inline Vec normalized(const V &vector, const Norm &norm, Vec z, int c) {
    return fma(z, vector.get(norm.scale + c), vector.get(norm.shift + c));
}

template <class V, class T> inline Vec activated(const V &vector, const Norm &norm, const T *x, int c) {
    Vec v = vector.get(x + c);
    if (norm.scale)
        v = normalized(vector, norm, v, c);
    return norm.relu6 ? relu6(v) : v;
}

template <class V> inline Vec masked(const V &vector, const Norm &norm, Vec g, Vec z, int c) {
    return norm.relu6 ? relu6_gradient(normalized(vector, norm, z, c), g) : g;
}

template <class X, class Y> inline void activate(const Activate<X, Y> &a) {
    const Norm norm = a.norm;
    for (std::ptrdiff_t p = 0; p < a.pixels; ++p) {
        const X *const x = a.x + p * a.x_ld;
        const Y *const residual = a.residual ? a.residual + p * a.residual_ld : nullptr;
        Y *const y = a.y + p * a.y_ld;
        each_vector(a.channels, [&](int c, auto vector) __attribute__((always_inline)) {
            prefetch_later(x + c);
            const Vec v = activated(vector, norm, x, c);
            vector.put(y + c, residual ? add(v, vector.get(residual + c)) : v);
        });
    }
}

void train_activate(const ActivateArgs &a) { activate(a); }
void train_activate_wide(const ActivateWideArgs &a) { activate(a); }
void train_activate_bf16(const ActivateBf16Args &a) { activate(a); }

void train_panels(const PanelsArgs &a) {
    const Norm norm = a.norm;
    for (std::ptrdiff_t p = 0; p < a.pixels; ++p) {
        const float *const x = a.x + p * a.x_ld;
        each_vector(a.channels, [&](int c, auto vector) __attribute__((always_inline)) {
            prefetch_later(x + c);
            const int n = c / kPanel * kPanel, width = a.channels - n > kLanes ? kPanel : kLanes;
            store(a.y + n * a.capacity + p * width + (c - n), activated(vector, norm, x, c));
        });
    }
}

void train_pairs(const PairsArgs &a) {
    const Norm norm = a.norm;
    for (std::ptrdiff_t p = 0; p < a.pixels; p += 2) {
        const bf16 *const x = a.x + p * a.x_ld, *const next = p + 1 < a.pixels ? x + a.x_ld : nullptr;
        bf16 *const y = a.y + p * a.y_ld;
        each_vector(a.channels, [&](int c, auto vector) __attribute__((always_inline)) {
            prefetch_later(x + c);
            if (next)
                prefetch_later(next + c);
            store_pairs(y + 2 * c, activated(vector, norm, x, c), next ? activated(vector, norm, next, c) : zero());
        });
    }
}

template <class G, class Z, class Y> inline void gradient(const GradientOf<G, Z, Y> &a) {
    const Norm norm = a.norm;
    for (std::ptrdiff_t p = 0; p < a.pixels; ++p) {
        const G *const g = a.g + p * a.g_ld;
        const Z *const z = a.z + p * a.z_ld;
        Y *const dz = a.dz + p * a.dz_ld;
        each_vector(a.channels, [&](int c, auto vector) __attribute__((always_inline)) {
            prefetch_later(g + c);
            prefetch_later(z + c);
            const Vec at = vector.get(z + c), through = masked(vector, norm, vector.get(g + c), at, c);
            const Vec rest = fma(at, vector.get(a.of_z + c), vector.get(a.constant + c));
            vector.put(dz + c, fma(through, vector.get(a.of_g + c), rest));
        });
    }
}

void train_gradient(const GradientArgs &a) { gradient(a); }
void train_gradient_wide(const GradientWideArgs &a) { gradient(a); }
void train_gradient_bf16(const GradientBf16Args &a) { gradient(a); }

// Adds a group's sum to that of the groups before, or begins it.
template <class V> inline void add_group(const V &vector, float *total, Vec sum, bool begin) {
    vector.put(total, begin ? sum : add(vector.get(total), sum));
}

// each(p, c, vector, values) for every vector that is read.
template <class Each> inline void moments(const MomentsArgs &a, const Each &each) {
    for (std::ptrdiff_t p = 0; p < a.pixels; p += kGroup) {
        const int rows = min(a.pixels - p, kGroup);
        each_vector(a.channels, [&](int c, auto vector) __attribute__((always_inline)) {
            const Vec origin = vector.get(a.x + c);
            Vec sum = zero(), square = zero();
            const float *x = a.x + p * a.x_ld + c;
            for (int r = 0; r < rows; ++r, x += a.x_ld) {
                const Vec values = vector.get(x), d = sub(values, origin);
                each(p + r, c, vector, values);
                sum = add(sum, d);
                square = fma(d, d, square);
            }
            add_group(vector, a.sum + c, sum, p == 0);
            add_group(vector, a.square + c, square, p == 0);
        });
    }
}

void train_moments(const MomentsArgs &a) {
    moments(a, [](std::ptrdiff_t, int, auto, Vec) __attribute__((always_inline)) {});
}

void train_moments_narrow(const MomentsNarrowArgs &a) {
    moments(a.moments, [&](std::ptrdiff_t p, int c, auto vector, Vec values) __attribute__((always_inline)) {
        bf16 *const y = a.y + p * a.y_ld + c;
        prefetch_later(y);
        vector.put(y, values);
    });
}

// Loops that the compiler turns into vectors of this instruction set.
void train_totals(const TotalsArgs &a) {
    double *const first = a.total, *const second = a.total + a.channels;
    if (!a.origin) {
        for (int c = 0; c < a.channels; ++c) {
            first[c] += a.first[c];
            second[c] += a.second[c];
        }
        return;
    }
    const double count = static_cast<double>(a.pixels);
    for (int c = 0; c < a.channels; ++c) {
        const double from = a.origin[c], sum = a.first[c];
        first[c] += sum + count * from;
        second[c] += a.second[c] + from * (2 * sum + count * from);
    }
}

template <bool kRelu6, class G, class Z> inline void sums(const Sums<G, Z> &a) {
    for (std::ptrdiff_t p = 0; p < a.pixels; p += kGroup) {
        const int rows = min(a.pixels - p, kGroup);
        each_vector(a.channels, [&](int c, auto vector) __attribute__((always_inline)) {
            // Read once: a store to `masked` could change them for all the compiler knows.
            const Vec mean = vector.get(a.norm.mean + c);
            const Vec scale = kRelu6 ? vector.get(a.norm.scale + c) : zero();
            const Vec shift = kRelu6 ? vector.get(a.norm.shift + c) : zero();
            Vec sum = zero(), dot = zero();
            const Z *z = a.z + p * a.z_ld + c;
            const G *from = a.g + p * a.g_ld + c;
            Z *to = a.masked ? a.masked + p * a.masked_ld + c : nullptr;
            for (int r = 0; r < rows; ++r, z += a.z_ld, from += a.g_ld) {
                prefetch_later(z);
                prefetch_later(from);
                const Vec at = vector.get(z);
                Vec g = vector.get(from);
                if (kRelu6)
                    g = relu6_gradient(fma(at, scale, shift), g);
                if (to) {
                    if constexpr (sizeof(Z) == sizeof(float)) {
                        if (a.stream)
                            stream(to, g);
                        else
                            vector.put(to, g);
                    } else {
                        prefetch_later(to);
                        vector.put(to, g);
                    }
                    to += a.masked_ld;
                }
                sum = add(sum, g);
                dot = fma(g, sub(at, mean), dot);
            }
            add_group(vector, a.sum + c, sum, p == 0);
            add_group(vector, a.dot + c, dot, p == 0);
        });
    }
    if (a.stream)
        drain();
}

template <class G, class Z> inline void masked_sums(const Sums<G, Z> &a) {
    if (a.norm.relu6)
        sums<true>(a);
    else
        sums<false>(a);
}

void train_sums(const SumsArgs &a) { masked_sums(a); }
void train_sums_narrow(const SumsNarrowArgs &a) { masked_sums(a); }
void train_sums_bf16(const SumsBf16Args &a) { masked_sums(a); }

} // namespace
} // namespace mnv2::MNV2_ISA
