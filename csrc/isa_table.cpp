// Compiled once per row of isa.def with MNV2_ISA, MNV2_VEC_HEADER and the row's flags. No STL here: a template it left
// behind as a weak symbol could replace the portable one for everybody.
#include "types.h"

#include MNV2_VEC_HEADER

#include "kernels/gemm_tile.h"

#include "kernels/depthwise.h"
#include "kernels/head.h"
#include "kernels/peak.h"
#include "kernels/pointwise.h"
#include "kernels/stem.h"

#define MNV2_STRING_(x) #x
#define MNV2_STRING(x) MNV2_STRING_(x)

namespace mnv2::MNV2_ISA {

extern const KernelTable table;
const KernelTable table = {
    MNV2_STRING(MNV2_ISA),
    kLanes,
    kPanel,
    kTileRows,
#define KERNEL(name, Args) name,
#include "kernels.def"
#undef KERNEL
    fma_peak,
};

} // namespace mnv2::MNV2_ISA
