// Decode tables: a family of grids as int8 levels and factors, exactly where that is possible.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "repack.h"

namespace nf {
namespace {

// The largest step of which all levels are multiples by an int8, or 0. Levels are multiples of 2**-e for a small
// e in every type but tables of measured numbers, so the step is found among integers.
double common_step(const float *levels, int count) {
    double most = 0;
    for (int i = 0; i < count; i++) most = std::max(most, std::fabs(static_cast<double>(levels[i])));
    if (most == 0) return 1;
    for (double unit : {1.0, 0x1p-2, 0x1p-4, 0x1p-8, 0x1p-12, 0x1p-16, 0x1p-20}) {
        int64_t divisor = 0;
        bool whole = most / unit < 0x1p40;
        for (int i = 0; i < count && whole; i++) {
            const double n = std::fabs(static_cast<double>(levels[i])) / unit;
            whole = n == std::floor(n);
            for (int64_t a = divisor, b = static_cast<int64_t>(n);;) {
                if (b == 0) { divisor = a; break; }
                const int64_t r = a % b;
                a = b, b = r;
            }
        }
        if (!whole) continue;
        const double step = static_cast<double>(divisor) * unit;
        const auto [low, high] = std::minmax_element(levels, levels + count);
        return *low / step >= -128 && *high / step <= 127 ? step : 0;
    }
    return 0;
}

// Levels → int8 and one factor; returns the largest error over the largest level.
double round_levels(const float *levels, int count, int8_t *out, float *factor) {
    double most = 0;
    for (int i = 0; i < count; i++) most = std::max(most, std::fabs(static_cast<double>(levels[i])));
    const double exact = common_step(levels, count);
    *factor = static_cast<float>(exact > 0 ? exact : most / 127);
    double worst = 0;
    for (int i = 0; i < count; i++) {
        const double q = std::nearbyint(levels[i] / static_cast<double>(*factor));
        out[i] = static_cast<int8_t>(q);
        if (most > 0) worst = std::max(worst, std::fabs(q * static_cast<double>(*factor) - levels[i]) / most);
    }
    return worst;
}

// M-ANT: every member is ±(a · i + 2**i) · 2**-s, or ±i · 2**-s, on sign-magnitude codes. With (a + 1) · i and 2**i − i
// both parts fit int8 for any a (performance.md 4.3).
bool two_lanes(Layout &l, const float *levels) {
    if (l.bits != 4 || l.members > 16 || l.member_kind != Members::group) return false;
    for (int m = 0; m < l.members; m++) {
        const float *v = levels + 16 * m;
        // v[1] = c1 + c2, v[2] = 2 c1 + 2 c2, v[3] = 3 c1 + 5 c2
        const float c2 = (v[3] - 3 * v[1]) / 2, c1 = v[1] - c2;
        l.c1[m] = c1, l.c2[m] = c2;
        for (int i = 0; i < 8; i++) {
            const float level = c1 * static_cast<float>(i) + c2 * static_cast<float>((1 << i) - i);
            if (v[i] != level || v[8 + i] != -level) return false;
        }
    }
    // integer sums stay below 2**24 steps of a power of two, so that c1 · P1 + c2 · P2 is exact
    for (int m = 0; m < l.members; m++) {
        const float step = l.c2[m] != 0 ? l.c2[m] : l.c1[m];
        int exponent;
        if (std::frexp(step, &exponent) != 0.5f || l.c1[m] / step != std::floor(l.c1[m] / step)) return false;
        if (64 * 127 * std::max(std::fabs(levels[16 * m + 7]), 7.0f * l.c1[m]) / step > 0x1p24f) return false;
    }
    for (int i = 0; i < 8; i++) {
        const auto first = static_cast<int8_t>(i), second = static_cast<int8_t>((1 << i) - i);
        l.table[i] = first, l.table[8 + i] = static_cast<int8_t>(-first);
        l.table2[i] = second, l.table2[8 + i] = static_cast<int8_t>(-second);
    }
    for (int i = 0; i < 16; i++) l.levels[i] = l.table[i], l.levels[16 + i] = l.table2[i];
    l.levels[8] = -0.0f;  // the sign of the integer member's minus zero
    return true;
}

}  // namespace

void build_tables(Layout &l, const float *levels) {
    const int grid = 1 << l.bits, own = l.members * grid;
    std::memset(l.table, 0, sizeof l.table);
    std::memset(l.table2, 0, sizeof l.table2);
    std::fill(l.c1, l.c1 + 32, 1.0f);
    std::fill(l.c2, l.c2 + 32, 0.0f);
    std::memset(l.levels, 0, sizeof l.levels);
    l.rounding = 0;
    l.zero_shift = l.has_zero && l.bits == 8 ? 128 : 0;
    l.two_lane = two_lanes(l, levels);
    l.entries = l.two_lane ? 16 : std::max(16, 1 << (32 - __builtin_clz(static_cast<unsigned>(own - 1) | 1)));
    if (!l.two_lane) {
        float shifted[kEntries];
        for (int i = 0; i < own; i++) shifted[i] = levels[i] - static_cast<float>(l.zero_shift);
        if (l.member_kind == Members::group) {
            for (int m = 0; m < l.members; m++) {
                l.rounding = std::max(l.rounding, round_levels(shifted + m * grid, grid, l.table + m * grid, l.c1 + m));
            }
        } else {
            float factor = 1;
            l.rounding = round_levels(shifted, own, l.table, &factor);
            std::fill(l.c1, l.c1 + 32, factor);
        }
        // kernel codes may carry undefined bits above their own, so tables repeat
        const bool whole = l.codes == Codes::triple || l.member_kind == Members::group;  // all bits of an index are defined
        const int period = whole ? l.entries : 1 << (l.width + (l.member_kind == Members::quad));
        for (int i = 0; i < kEntries; i++) {
            l.levels[i] = i % period < own ? shifted[i % period] : 0;
            l.table[i] = l.table[i % period];
        }
    }
}

const char *describe(const Layout &l, std::string &out) {
    static const char *const scales[] = {"row", "fp16", "bf16", "e8m0", "e4m3", "u8", "e3m3"};
    char text[128];
    const char *how = l.two_lane ? "two-lane" : l.rounding > 0 ? "int8-table" : l.has_zero ? "zero-point" : "exact-table";
    const char *members = l.codes == Codes::triple ? ", member per 3" : l.member_kind == Members::quad ? ", member per 4"
                        : l.member_kind == Members::group ? ", member per group" : "";
    std::snprintf(text, sizeof text, "%d-bit %s%s, %s scales, groups of %d", l.width, how, members, scales[l.scale_kind], l.group);
    out = text;
    return out.c_str();
}

}  // namespace nf
