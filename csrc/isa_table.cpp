// Compiled once per row of isa.def with MNV2_ISA, MNV2_VEC_HEADER and the row's flags. No STL here: a template it left
// behind as a weak symbol could replace the portable one for everybody.
#include "types.h"

#include MNV2_VEC_HEADER

#include "kernels/gemm_tile.h"

#include "kernels/convert.h"
#include "kernels/depthwise.h"
#include "kernels/head.h"
#include "kernels/pointwise.h"
#include "kernels/pointwise_bf16.h"
#include "kernels/stem.h"

#include "kernels/int8_tile.h"

#include "kernels/int8_depthwise.h"
#include "kernels/int8_pointwise.h"
#include "kernels/int8_stem.h"

#include "kernels/peak.h"

#define MNV2_STRING_(x) #x
#define MNV2_STRING(x) MNV2_STRING_(x)

namespace mnv2::MNV2_ISA {

extern const KernelTable table;
const KernelTable table = {
    MNV2_STRING(MNV2_ISA),
    kLanes,
    kPanel,
    kTileRows,
    kDot2,
#define KERNEL(name, Args) name,
#include "kernels.def"
#undef KERNEL
    fma_peak,
    dot4_peak,
};

} // namespace mnv2::MNV2_ISA
