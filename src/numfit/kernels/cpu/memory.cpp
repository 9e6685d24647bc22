// Memory for weights: aligned to 2 MiB and in huge pages where the system grants them. The same kernel on the same layout ran
// 1.5 times as fast from huge pages as from small ones (performance.md, finding 1). No file is mapped: a page cache has no huge
// pages to give.
#include <cstdlib>
#include <cstring>

#include "layout.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nf {

constexpr int64_t kHuge = int64_t{1} << 21;

// Small matrices do not fill a huge page: rounding each up to one would multiply the memory of a small model.
static bool wants_huge(int64_t bytes) { return bytes >= kHuge / 2; }

static size_t rounded(int64_t bytes) {
    const int64_t unit = wants_huge(bytes) ? kHuge : 64;
    return static_cast<size_t>((bytes + unit - 1) / unit * unit);
}

void *arena_alloc(int64_t bytes, bool *huge) {
    const size_t size = rounded(bytes);
    void *arena = nullptr;
    *huge = false;
    if (posix_memalign(&arena, wants_huge(bytes) ? kHuge : 64, size)) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (wants_huge(bytes)) *huge = madvise(arena, size, MADV_HUGEPAGE) == 0;  // before the first touch
#endif
    std::memset(arena, 0, static_cast<size_t>(bytes));
    return arena;
}

void arena_free(void *arena) { std::free(arena); }

// Measured (docs/kernels.md). Zen 4 has to be asked earlier than a Xeon, and twice: a loop that for a moment runs faster than
// memory seems to fill the queue of misses, and what is asked for then to be dropped.
Ahead ahead_here() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd")) return {16384, 6144};
#endif
    return {kFar, 0};
}

}  // namespace nf
