#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mnv2 {

#define ISA(name, flags, features, groups)                                                                             \
    namespace name {                                                                                                   \
    extern const KernelTable table;                                                                                    \
    }
#include "isa_built.def"
#undef ISA

namespace {

#if defined(__x86_64__)
std::uint64_t xgetbv() {
    std::uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<std::uint64_t>(high) << 32) | low;
}

// vdpbf16ps does 45 GMAC/s on a core of Intel's Emerald Rapids, where float32 does 92, and 118 on AMD's Zen 4, where
// float32 does 59.
bool intel() {
    std::uint32_t a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
}

// Linux gives tiles to a process that asks for them (Documentation/arch/x86/xstate.rst), once for all its threads. It
// does not where a thread has a signal stack too small to save them on, and lets none have such a stack afterwards:
// so only who is about to use them asks.
bool tiles_granted() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return granted;
}

// Intel SDM vol. 1, 14.3 and 15.2: an instruction set needs its CPUID bit and its registers saved by the system (XCR0).
std::uint32_t detect() {
    std::uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return 0;
    const bool osxsave = c & (1u << 27);
    const bool fma = c & (1u << 12);
    const std::uint64_t saved = osxsave ? xgetbv() : 0;
    const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6;
    std::uint32_t found = 0;
    if (ymm && fma)
        found |= kFma;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return found;
    if (ymm && (b & (1u << 5)))
        found |= kAvx2;
    constexpr std::uint32_t kSubsets = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; // F, DQ, BW, VL
    if (zmm && (b & kSubsets) == kSubsets)
        found |= kAvx512;
    if (zmm && (c & (1u << 11)))
        found |= kAvx512vnni;
    constexpr std::uint32_t kTiles = 1u << 22 | 1u << 24 | 1u << 25; // AMX-BF16, AMX-TILE, AMX-INT8
    if (zmm && (saved & 0x60000) == 0x60000 && (d & kTiles) == kTiles)
        found |= kAmx;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) {
        if (zmm && (a & (1u << 5)))
            found |= intel() ? kAvx512bf16 : kAvx512bf16 | kFastBf16;
        if (ymm && (a & (1u << 4)))
            found |= kAvxVnni;
    }
    return found;
}
#else
bool tiles_granted() { return false; }
std::uint32_t detect() { return 0; }
#endif

std::uint32_t features() {
    static const std::uint32_t found = detect();
    return found;
}

struct Row {
    KernelTable table;
    std::uint32_t needs;
};

// What a row has not is the next row's, and so is what is said of it. Both read the same packed weights.
void complete(KernelTable &row, const KernelTable &next) {
    if (!row.pointwise_bf16) {
        row.dot2 = next.dot2;
        row.bf16_ring_bytes = next.bf16_ring_bytes;
        row.bf16_tile_rows = next.bf16_tile_rows;
    }
    bool takes = false;
    const auto take = [&takes](auto &kernel, auto other) {
        if (kernel)
            return;
        kernel = other;
        takes = true;
    };
#define KERNEL(group, name, Args) take(row.name, next.name);
#include "kernels.def"
#undef KERNEL
    take(row.fma_peak, next.fma_peak);
    take(row.dot2_peak, next.dot2_peak);
    take(row.dot4_peak, next.dot4_peak);
    if (takes && (row.lanes != next.lanes || row.panel != next.panel))
        throw std::logic_error(std::string(row.isa) + " cannot take kernels from " + next.isa + ": other widths");
}

const std::vector<Row> &rows() {
    static const std::vector<Row> all = [] {
        std::vector<Row> made = {
#define ISA(name, flags, features, groups) {name::table, features},
#include "isa_built.def"
#undef ISA
        };
        for (std::size_t i = made.size() - 1; i-- > 0;)
            complete(made[i].table, made[i + 1].table);
        return made;
    }();
    return all;
}

bool runs(const Row &row) { return (features() & row.needs) == row.needs && (!(row.needs & kAmx) || tiles_granted()); }

const KernelTable *best() {
    for (const Row &row : rows())
        if (runs(row))
            return &row.table;
    throw std::runtime_error("the build has no row without requirements");
}

std::atomic<const KernelTable *> chosen{nullptr};

} // namespace

const std::vector<std::pair<std::string, bool>> &cpu_features() {
    static const std::vector<std::pair<std::string, bool>> named = {
        {"avx2", features() & kAvx2},
        {"fma", features() & kFma},
        {"avx512", features() & kAvx512},
        {"avx512_vnni", features() & kAvx512vnni},
        {"avx512_bf16", features() & kAvx512bf16},
        {"avx_vnni", features() & kAvxVnni},
        {"amx", features() & kAmx},
    };
    return named;
}

std::vector<std::string> runnable_isas() {
    std::vector<std::string> names;
    for (const Row &row : rows())
        if (runs(row))
            names.push_back(row.table.isa);
    return names;
}

const KernelTable &kernels() {
    const KernelTable *table = chosen.load(std::memory_order_acquire);
    if (!table) {
        table = best(); // two threads may both get here: they store the same
        chosen.store(table, std::memory_order_release);
    }
    return *table;
}

const KernelTable &kernels(const std::string &name) {
    for (const Row &row : rows())
        if (name == row.table.isa && runs(row))
            return row.table;
    std::string valid;
    for (const std::string &each : runnable_isas())
        valid += (valid.empty() ? "" : ", ") + each;
    throw std::invalid_argument("no instruction set '" + name + "' here: use one of " + valid);
}

void select_isa(const std::string &name) { chosen.store(&kernels(name), std::memory_order_release); }

} // namespace mnv2
