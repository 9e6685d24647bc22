// The C interface: checks, the choice of an instruction set, conversions. See numfit.h.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <vector>

#include "repack.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#endif

namespace nf {
namespace {

#if defined(__x86_64__)
// Whether the system lets this process use the tiles of AMX (Linux grants them on demand).
[[maybe_unused]] bool amx_granted() {
#if defined(__linux__)
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

[[maybe_unused]] bool cpu_has_amx_int8() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1) && (d >> 22 & 1);
}

[[maybe_unused]] bool cpu_has_avx_vnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

// Those that this machine can run, best last. Plain arrays: what has no way to say that it failed allocates nothing.
struct Available {
    const Kernels *table[6];
    int count = 0;
    char names[64] = "";
    void push_back(const Kernels *kernels) {
        if (count) std::strcat(names, ",");
        std::strcat(names, kernels->name);
        table[count++] = kernels;
    }
    const Kernels *const *begin() const { return table; }
    const Kernels *const *end() const { return table + count; }
};

Available available() {
    Available out;
    out.push_back(portable_kernels());
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                        __builtin_cpu_supports("gfni");
#ifdef NF_HAVE_AVX2
    if (avx2) out.push_back(avx2_kernels());
#endif
#ifdef NF_HAVE_AVXVNNI
    if (avx2 && cpu_has_avx_vnni()) out.push_back(avxvnni_kernels());
#endif
#ifdef NF_HAVE_AVX512
    if (avx2 && avx512) out.push_back(avx512_kernels());
#endif
#ifdef NF_HAVE_AMX
    if (avx2 && avx512 && cpu_has_amx_int8() && amx_granted()) out.push_back(amx_kernels());
#endif
    (void)avx512, (void)avx2;
#elif defined(__aarch64__) && defined(NF_HAVE_NEON)
    if (getauxval(AT_HWCAP) >> 20 & 1) out.push_back(neon_kernels());  // HWCAP_ASIMDDP
#endif
    return out;
}

const Available &all() {
    static const Available found = available();
    return found;
}

std::atomic<const Kernels *> chosen{nullptr};

int fail(char *error, const char *format, long long a = 0, long long b = 0) {
    std::snprintf(error, NF_ERROR, format, a, b);
    return 1;
}

bool ready(const nf_linear *l, char *error) {
    if (!l) return fail(error, "the matrix is null"), false;
    return true;
}

template <class T> T *buffer(std::vector<T> &v, int64_t n) {
    if (static_cast<int64_t>(v.size()) < n) v.resize(static_cast<size_t>(n));
    return v.data();
}

}  // namespace

const Kernels &kernels() {
    const Kernels *k = chosen.load(std::memory_order_relaxed);
    if (!k) {
        k = all().table[all().count - 1];
        chosen.store(k);
    }
    return *k;
}

int caught(char *error, const char *what) noexcept {
    try {
        throw;
    } catch (const std::bad_alloc &) {
        std::snprintf(error, NF_ERROR, "there is not enough memory %s", what);
        return NF_NO_MEMORY;
    } catch (const std::exception &e) {
        std::snprintf(error, NF_ERROR, "a kernel failed: %s", e.what());
    } catch (...) {
        std::snprintf(error, NF_ERROR, "a kernel failed");
    }
    return 1;
}

}  // namespace nf

using namespace nf;

NF_API int nf_abi(void) { return NF_ABI; }

NF_API const char *nf_isa_names(void) { return all().names; }

NF_API const char *nf_isa(void) { return kernels().name; }

NF_API int nf_set_isa(const char *name, char *error) {
    for (const Kernels *k : all()) {
        if (!std::strcmp(k->name, name)) {
            chosen.store(k);
            return 0;
        }
    }
    std::snprintf(error, NF_ERROR, "this machine or this build has no '%.40s' kernels; it has %s", name, nf_isa_names());
    return 1;
}

NF_API nf_linear *nf_repack(const nf_matrix *matrix, char *error) try {
    if (!matrix || !matrix->codes || !matrix->scale || !matrix->levels) return fail(error, "a plane of the matrix is null"), nullptr;
    return repack(*matrix, error);
} catch (...) {
    return caught(error, "to pack this matrix"), nullptr;
}

NF_API void nf_free(nf_linear *l) {
    if (!l) return;
    arena_free(l->arena);
    delete l;
}

NF_API int64_t nf_linear_bytes(const nf_linear *l) { return l->arena_bytes; }
NF_API const char *nf_linear_kernel(const nf_linear *l) { return l->kernel.c_str(); }
NF_API double nf_linear_rounding(const nf_linear *l) { return l->rounding; }
NF_API int nf_huge_pages(const nf_linear *l) { return l->huge; }

NF_API int nf_apply(const nf_linear *l, const float *x, int64_t m, int64_t ldx, float *y, int64_t ldy, const float *bias, int mode,
                    char *error) try {
    if (!ready(l, error)) return 1;
    if (m < 0 || ldx < l->k || ldy < l->n) return fail(error, "rows of %lld inputs and %lld outputs are too short", ldx, ldy);
    if (mode != 0 && mode != 1) return fail(error, "unknown mode %lld", mode);
    const Job job = {l, y, ldy, bias};
    apply_many(&job, 1, x, m, ldx, mode == 1);
    return 0;
} catch (...) {
    return caught(error, "to apply a matrix to so many tokens");
}

static float from_bf16(uint16_t b) {
    const uint32_t bits = static_cast<uint32_t>(b) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

static uint16_t to_bf16(float value) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

NF_API int nf_apply_bf16(const nf_linear *l, const uint16_t *x, int64_t m, int64_t ldx, uint16_t *y, int64_t ldy, const float *bias,
                         int mode, char *error) try {
    if (!ready(l, error)) return 1;
    if (m < 0 || ldx < l->k || ldy < l->n) return fail(error, "rows of %lld inputs and %lld outputs are too short", ldx, ldy);
    thread_local std::vector<float> input, output;
    float *in = buffer(input, m * l->k), *out = buffer(output, m * l->n);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t c = 0; c < l->k; c++) in[i * l->k + c] = from_bf16(x[i * ldx + c]);
    }
    if (const int failed = nf_apply(l, in, m, l->k, out, l->n, bias, mode, error)) return failed;
    for (int64_t i = 0; i < m; i++) {
        for (int64_t c = 0; c < l->n; c++) y[i * ldy + c] = to_bf16(out[i * l->n + c]);
    }
    return 0;
} catch (...) {
    return caught(error, "to apply a matrix to so many tokens");
}

static int check_rows(const nf_linear *l, const int64_t *rows, int64_t count, char *error) {
    if (!ready(l, error)) return 1;
    for (int64_t i = 0; i < count; i++) {
        if (rows[i] < 0 || rows[i] >= l->n) return fail(error, "there is no row %lld in a matrix of %lld", rows[i], l->n);
    }
    return 0;
}

NF_API int nf_gather(const nf_linear *l, const int64_t *rows, int64_t count, float *out, char *error) try {
    if (check_rows(l, rows, count, error)) return 1;
    parallel(count, [&](int64_t i) { gather_row(*l, rows[i], out + i * l->k); });
    return 0;
} catch (...) {
    return caught(error, "to decode rows");
}

NF_API int nf_unpack(const nf_linear *l, const int64_t *rows, int64_t count, uint8_t *codes, void *scale, uint8_t *member, uint8_t *zero,
                     char *error) try {
    if (check_rows(l, rows, count, error)) return 1;
    if (l->trellis) return fail(error, "a trellis has no codes of single rows");
    const int64_t blocks = (l->k + l->block - 1) / l->block, tail = l->k - (blocks - 1) * l->block;
    const int64_t units = (blocks - 1) * ((l->block + l->unit - 1) / l->unit) + (tail + l->unit - 1) / l->unit;
    const int64_t words = blocks * (l->scale_bytes / kRows);
    parallel(count, [&](int64_t i) {
        unpack_row(*l, rows[i], codes ? codes + i * l->k : nullptr, scale ? static_cast<uint8_t *>(scale) + i * words : nullptr,
                   member && l->has_member ? member + i * units : nullptr, zero ? zero + i * blocks : nullptr);
    });
    return 0;
} catch (...) {
    return caught(error, "to unpack this matrix");
}

NF_API void *nf_arena(int64_t bytes) {
    bool huge;
    return arena_alloc(bytes, &huge);
}
NF_API void nf_arena_free(void *arena) { arena_free(arena); }

NF_API int64_t nf_read_stream(const void *arena, int64_t bytes) {
    const auto *p = static_cast<const uint8_t *>(arena);
    const int64_t chunk = 1 << 18, chunks = (bytes + chunk - 1) / chunk;
    std::atomic<int64_t> total{0};
    parallel(chunks, [&](int64_t i) { total += kernels().read(p + i * chunk, std::min(chunk, bytes - i * chunk)); });
    return total;
}
