// Compiled once per row of isa.def with MNV2_ISA, MNV2_VEC_HEADER and the row's flags. No STL here: a template it left
// behind as a weak symbol could replace the portable one for everybody.
#include "types.h"

#include MNV2_VEC_HEADER

#include "kernels/gemm_tile.h"

#include "kernels/convert.h"
#include "kernels/depthwise.h"
#include "kernels/head.h"
#include "kernels/pointwise.h"
#include "kernels/pointwise_pairs.h"
#include "kernels/pointwise_tiles.h"

#include "kernels/pointwise_bf16.h"
#include "kernels/stem.h"

#include "kernels/int8_tile.h"
#include "kernels/int8_pointwise_tiles.h"

#include "kernels/int8_depthwise.h"
#include "kernels/int8_pointwise.h"
#include "kernels/int8_stem.h"

#include "kernels/train_rows.h"

#include "kernels/train_depthwise.h"
#include "kernels/train_stem.h"
#include "kernels/train_weight.h"
#include "kernels/train_weight_pairs.h"

#include "kernels/peak.h"

#define MNV2_STRING_(x) #x
#define MNV2_STRING(x) MNV2_STRING_(x)
#define MNV2_JOIN_(a, b) a##b
#define MNV2_JOIN(a, b) MNV2_JOIN_(a, b)

namespace mnv2::MNV2_ISA {
namespace {

#define ISA(name, flags, features, groups) constexpr unsigned groups_##name = groups;
#include "isa.def"
#undef ISA
// Null where the row leaves a kernel to another one: dispatch.cpp puts that one's in its place.
template <class F> constexpr F *own(KernelGroup group, F *f) {
    return (MNV2_JOIN(groups_, MNV2_ISA) & group) != 0 ? f : nullptr;
}

} // namespace

extern const KernelTable table;
const KernelTable table = {
    MNV2_STRING(MNV2_ISA),
    kLanes,
    kPanel,
    kTileRows,
    kBf16TileRows,
    kDot2,
    kBf16RingBytes,
#define KERNEL(group, name, Args) own<void(const Args &)>(group, name),
#include "kernels.def"
#undef KERNEL
    own(kFp32, fma_peak),
    own(kBf16, dot2_peak),
    own(kInt8, dot4_peak),
};

} // namespace mnv2::MNV2_ISA
