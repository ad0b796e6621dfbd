// 3x3 depthwise convolution in int8, from the hidden to the pixels layout, a group of four output rows at a time.
//
// A lane holds four rows of a channel, so one dot product is a whole column of taps. Of the four output rows two read
// bytes 0..2 of some lane and two bytes 1..3: the weights come in these two forms. Rows that straddle two row groups
// are joined as the hidden layout has them, a row four bytes of every 16, and then transposed: one operation each,
// where shifting lanes of rows takes three (all depthwise layers of an image: 260 us, 234 so). Nine taps of 64 outputs
// are 12 dot products and 4 shuffles (stride 1), not 36 dot products.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

// Lanes of a channel's four rows.
inline Unsigned4 by_rows(Bytes hidden) { return as_unsigned(transpose4(hidden)); }

// For output rows 0..3 of the group, the lanes with the three rows that each reads: in bytes 0..2 of rows 0 and 2,
// in bytes 1..3 of rows 1 and 3.
template <int S> struct Int8Column;

template <> struct Int8Column<1> {
    Unsigned4 even, odd; // rows -1..2 and 1..4 around the group

    Int8Column() : even(as_unsigned(zero_bytes())), odd(even) {}
    Int8Column(const std::uint8_t *above, const std::uint8_t *at, const std::uint8_t *below)
        : even(by_rows(rows_from<3>(load_bytes(above), load_bytes(at)))),
          odd(by_rows(rows_from<1>(load_bytes(at), load_bytes(below)))) {}
    Unsigned4 rows(int r) const { return r < 2 ? even : odd; }
};

template <> struct Int8Column<2> {
    Unsigned4 lanes[kGroup]; // rows -1..2, 0..3, 3..6, 4..7

    Int8Column() : lanes{as_unsigned(zero_bytes()), lanes[0], lanes[0], lanes[0]} {}
    Int8Column(const std::uint8_t *above, const std::uint8_t *at, const std::uint8_t *below)
        : lanes{by_rows(rows_from<3>(load_bytes(above), load_bytes(at))), by_rows(load_bytes(at)),
                by_rows(rows_from<3>(load_bytes(at), load_bytes(below))), by_rows(load_bytes(below))} {}
    Unsigned4 rows(int r) const { return lanes[r]; }
};

// A vector of channels of a row group; `groups` are those above, at and below.
template <int S> class Int8Filter {
  public:
    Int8Filter(const std::uint8_t *const (&groups)[3], const std::int8_t *weight, const Int8Scales &scales, int vector)
        : above_(groups[0]), at_(groups[1]), below_(groups[2]), bias_(load(scales.bias + vector * kLanes)),
          scale_(load(scales.scale + vector * kLanes)) {
#pragma GCC unroll 6
        for (int i = 0; i < kInt8FilterForms; ++i)
            w_[i / 2][i % 2] = as_signed(load_bytes(weight + i * kLanes * 4));
    }

    inline void run(int columns, std::uint8_t *y, std::ptrdiff_t y_column) const {
        Int8Column<S> left;
        if constexpr (S == 1) {
            Int8Column<S> middle = column(0);
            for (int o = 0; o + 1 < columns; ++o, y += y_column) {
                const Int8Column<S> right = column(o + 1);
                output(left, middle, right, y, y_column);
                left = middle;
                middle = right;
            }
            output(left, middle, Int8Column<S>(), y, y_column);
        } else {
            int c = 0;
            for (; c + 1 < columns; c += 2, y += y_column) {
                const Int8Column<S> right = column(c + 1);
                output(left, column(c), right, y, y_column);
                left = right;
            }
            if (c < columns)
                output(left, column(c), Int8Column<S>(), y, y_column);
        }
    }

  private:
    Int8Column<S> column(int c) const {
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(c) * kLanes * 4;
        return Int8Column<S>(above_ + at, at_ + at, below_ + at);
    }

    inline void output(const Int8Column<S> &left, const Int8Column<S> &middle, const Int8Column<S> &right,
                       std::uint8_t *y, std::ptrdiff_t y_column) const {
        Int acc[kGroup];
#pragma GCC unroll 4
        for (int r = 0; r < kGroup; ++r) {
            acc[r] = dot4(bias_, left.rows(r), w_[0][r % 2]);
            acc[r] = dot4(acc[r], middle.rows(r), w_[1][r % 2]);
            acc[r] = dot4(acc[r], right.rows(r), w_[2][r % 2]);
        }
        store_pixels(y, y_column, pack4(int8_steps(acc, scale_)));
    }

    const std::uint8_t *const above_, *const at_, *const below_;
    const Int bias_;
    const Vec scale_;
    Signed4 w_[3][2];
};

void int8_depthwise(const Int8DepthwiseArgs &a) {
    for (int v = a.vector_begin; v < a.vector_end; ++v) {
        const std::uint8_t *const x = a.x + (v - a.vector_begin) * a.vector;
        const auto group = [&](long g) { return g < 0 || g >= a.groups ? a.zeros : x + g % a.ring * a.group; };
        const std::int8_t *const weight = a.weight + static_cast<std::ptrdiff_t>(v) * kInt8FilterForms * kLanes * 4;
        for (int g = a.begin; g < a.end; ++g) {
            const long at = static_cast<long>(g) * a.stride;
            std::uint8_t *const y = a.y + (g - a.begin) * a.y_group + v * kPixelsVector;
            if (a.stride == 1)
                Int8Filter<1>({group(at - 1), group(at), group(at + 1)}, weight, a.scales, v)
                    .run(a.columns, y, a.y_column);
            else
                Int8Filter<2>({group(at - 1), group(at), group(at + 1)}, weight, a.scales, v)
                    .run(a.columns, y, a.y_column);
        }
    }
}

} // namespace
} // namespace mnv2::MNV2_ISA
