// Sweeps and coordinate descent: the C interface of sweep.h, and how rows are dealt out.
#include "sweep.h"

#include <cstdio>

#include "kernels.h"

namespace nf {
namespace {

const Sweepers &sweepers() { return NF_CHOSEN_TABLE(sweepers); }

int fail(char *message, const char *what) {
    std::snprintf(message, NF_ERROR, "%s", what);
    return 1;
}

bool sound(const nf_lattice &l) {
    return l.rows >= 0 && l.blocks > 0 && l.units > 0 && l.members > 0 && l.members <= 256 && l.entries > 0 && l.entries <= 256 &&
           (l.entries & (l.entries - 1)) == 0 && l.thresholds && l.levels && l.codes && l.scale && (l.member || !l.choose) &&
           !(l.choose && l.one_member);
}

bool inside(const nf_lattice &l, const int64_t *block, const int64_t *unit, int64_t width) {
    if (!block || !unit) return false;
    for (int64_t i = 0; i < width; i++) {
        if (block[i] < 0 || block[i] >= l.blocks || unit[i] < 0 || unit[i] >= l.units) return false;
    }
    return true;
}

// body(row, count, scratch) for all rows, `lanes` at a time.
template <class Body> void over_rows(int64_t rows, int lanes, int64_t bytes, const Body &body) {
    parallel((rows + lanes - 1) / lanes, [&](int64_t i) {
        void *scratch = aligned_work(static_cast<size_t>(bytes));
        const int64_t row = i * lanes;
        body(row, static_cast<int>(rows - row < lanes ? rows - row : lanes), scratch);
    });
}

}  // namespace
}  // namespace nf

using namespace nf;

NF_API int nf_sweep(const nf_lattice *lattice, const nf_panel *panel, char *message) try {
    if (!lattice || !panel) return fail(message, "there is nothing to sweep");
    const nf_lattice &l = *lattice;
    const nf_panel &p = *panel;
    if (!sound(l) || p.width < 1 || p.start < 0 || p.stop > p.width || p.start > p.stop || (p.r && !p.original) ||
        ((p.p || p.r) && !p.before) || !p.w || !p.u || !p.codes || !p.error || !inside(l, p.block, p.unit, p.width)) {
        return fail(message, "the parts of this sweep do not fit together");
    }
    const Sweepers &s = sweepers();
    over_rows(l.rows, s.sweep_lanes, s.sweep_scratch(p.width),
              [&](int64_t row, int count, void *scratch) { s.sweep(l, p, row, count, scratch); });
    return 0;
} catch (...) {
    return caught(message, "to sweep this tensor");
}

NF_API int nf_descend(const nf_lattice *lattice, const nf_run *run, char *message) try {
    if (!lattice || !run) return fail(message, "there is nothing to descend on");
    const nf_lattice &l = *lattice;
    const nf_run &r = *run;
    if (!sound(l) || r.width < 1 || !r.h || !r.gradient || !r.w || !r.q || !r.codes || !inside(l, r.block, r.unit, r.width)) {
        return fail(message, "the parts of this descent do not fit together");
    }
    const Sweepers &s = sweepers();
    over_rows(l.rows, s.descend_lanes, s.descend_scratch(r.width),
              [&](int64_t row, int count, void *scratch) { s.descend(l, r, row, count, scratch); });
    return 0;
} catch (...) {
    return caught(message, "to sweep this tensor");
}
