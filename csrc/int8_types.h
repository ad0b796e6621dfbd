// Plain structs of the int8 kernels. What the numbers mean, exactly, is said in mnv2_fast/int8.py.
//
// A uint8 tensor is stored four rows of a column together, a row group, and four channels of a row together:
// [4 rows][4 channels], what packing the accumulators of four rows gives for free. Four channels of a pixel are thus
// the four bytes of a lane of a dot product. Two layouts hold them, channels padded to kChannelPad:
//   pixels [row group][column][channels / 4][4 rows][4 channels]: the input of 1x1 layers; a group's rows below the
//          image's last hold anything. Where the kernels have tiles: [row group][column][4 rows][channels], a pixel's
//          channels together, and all pixels equally far apart
//   hidden [channels / lanes][row group][column][lanes / 4][4 rows][4 channels]: the input of depthwise layers; rows
//          below the last are zero
// Strides are in bytes, but for floats, whose strides are in floats. `vectors` are of `lanes` output channels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mnv2 {

constexpr int kGroup = 4;           // rows
constexpr int kInt8StemQuads = 9;   // a pixel is R, G, B, 0: 3 rows x 3 columns of them
constexpr int kInt8StemRows = 9;    // input rows of a group of output rows
constexpr int kInt8FilterForms = 6; // vectors of packed depthwise weights: 3 columns, each for an upper and a lower row

// From accumulators to the layer's output, channels padded to kChannelPad.
struct Int8Scales {
    const std::int32_t *bias;
    const float *scale;
    const float *output_scale; // of a linear convolution, with
    const std::int16_t *zero;  // [channels / 4][2][4]: its zeros, for each four channels twice
};

// Weights that are used later, fetched into L2: a cache line for every quad of a tile.
struct Int8Ahead {
    const std::int8_t *next;
    const std::int8_t *end; // fetch no further
};

// Where an expansion or the stem writes column c of group g: y + g * group + c * column, and its vector v in the hidden
// layout: v * vector further. Only the stem, where it is alone, writes to the pixels layout.
struct Int8Target {
    std::uint8_t *y;
    std::ptrdiff_t group;
    std::ptrdiff_t column;
    bool hidden; // or the pixels layout
    std::ptrdiff_t vector;
};

// A rectangle of pixels in the pixels layout: row groups from `x` on, of which the last has `last_rows` rows. Where
// they follow one another without a gap, so do those of the output.
struct Int8Pixels {
    const std::uint8_t *x;
    std::ptrdiff_t group;
    std::ptrdiff_t column;
    int groups;
    int last_rows;
    int columns;
};

// Pixels times weights: vectors [vector_begin, vector_end) of a 1x1 layer.
struct Int8Matrix {
    Int8Pixels x;
    const std::int8_t *weight; // [vectors][quads][lanes][4]
    int quads;                 // of input channels
    Int8Scales scales;
    int vector_begin;
    int vector_end;
    Int8Ahead *ahead;
};

// y = clamp(rne(acc * scale)): a 1x1 layer with ReLU6.
struct Int8ExpandArgs {
    Int8Matrix m;
    Int8Target y;
};

// A 1x1 layer without ReLU6: v = acc * scale, plus the residual's v, kept where asked;
// y = clamp(rne(v * output_scale) + zero).
struct Int8ProjectArgs {
    Int8Matrix m;
    std::uint8_t *y; // in the pixels layout
    std::ptrdiff_t y_group;
    std::ptrdiff_t y_column;
    float *v; // [row group][column][4 rows][channels]: of the residual before, of this layer after
    std::ptrdiff_t v_group;
    std::ptrdiff_t v_column;
    std::ptrdiff_t v_row;
    bool add;
    bool keep;
};

// A 1x1 layer with ReLU6, summed over the rectangle: sums[channel] += ...
struct Int8HeadArgs {
    Int8Matrix m; // of at most kInt8HeadPixels
    std::int64_t *sums;
};
constexpr std::ptrdiff_t kInt8HeadPixels = 1 << 22; // of 255 each, summed in int32

// The classifier, for images in groups of four.
struct Int8ClassifyArgs {
    const std::uint8_t *features; // [image group][low bytes, high bytes][quads][4 images][4]
    int images;
    const std::int8_t *weight;
    Int8Scales scales;
    int quads;
    int vector_begin;
    int vector_end;
    float *y; // [images, classes]
    std::ptrdiff_t y_ld;
    int classes;
};

// A group of rows of the stem, from kInt8StemRows input rows of R, G, B, 0, a pixel of padding at each side.
struct Int8StemArgs {
    const std::uint8_t *rows;
    std::ptrdiff_t row;        // from one to the next
    const std::int8_t *weight; // [vectors][9][lanes][4]
    Int8Scales scales;
    int vectors;
    int output_rows; // of the group
    int columns;     // of the output
    Int8Target y;
    Int8Ahead *ahead;
};

// A group of rows of a 3x3 depthwise layer with padding 1, from the hidden to the pixels layout.
struct Int8DepthwiseArgs {
    const std::uint8_t *x; // vector_begin of a ring of row groups
    std::ptrdiff_t vector;
    std::ptrdiff_t group;
    int ring;                  // group g is in slot g % ring
    int groups;                // of the whole tensor
    const std::uint8_t *zeros; // a group of zeros, for what is above the first and below the last
    const std::int8_t *weight; // [vectors][column][upper, lower][lanes][4 rows]
    Int8Scales scales;
    int vector_begin;
    int vector_end;
    int columns; // of the input; the output's are (columns - 1) / stride + 1
    int stride;
    int begin; // output row groups
    int end;
    std::uint8_t *y; // of group `begin`
    std::ptrdiff_t y_group;
    std::ptrdiff_t y_column;
};

// A row of the image, from floats of three colours to bytes R, G, B, 0. Writes whole vectors: up to lanes - 1 pixels
// past the last.
struct Int8LoadArgs {
    const float *colours[3];
    std::ptrdiff_t step;  // floats from a pixel to the next
    std::ptrdiff_t ahead; // and to a row that is read soon
    int width;
    const float *scale;       // [3]
    const std::uint8_t *zero; // [3]
    std::uint8_t *y;
    bool *finite; // set to false where a value is NaN or infinite
};

} // namespace mnv2
