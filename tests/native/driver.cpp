// The CPU library as a C program uses it, on every instruction set of the processor it runs on. `make native-check` runs it
// here, `make sanitize` with sanitizers, `make neon` on an emulated ARM. What the numbers mean is tested in Python
// (test_kernels.py); here every instruction set is held against the portable one, where promised bit for bit, and sums
// against float64. Exits with 1 at the first difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "decoder.h"
#include "encode.h"
#include "sweep.h"

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

std::mt19937 rng(1);
int comparisons = 0;

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }  // both included
uint8_t random_byte(int high) { return static_cast<uint8_t>(pick(0, high)); }
float normal() { return std::normal_distribution<float>()(rng); }

Floats normals(int64_t n) {
    Floats out(static_cast<size_t>(n));
    for (float &x : out) x = normal();
    return out;
}

[[noreturn]] void fail(const std::string &what, const std::string &how) {
    std::printf("FAILED: %s: %s\n", what.c_str(), how.c_str());
    std::exit(1);
}

template <class T> void same(const std::vector<T> &a, const std::vector<T> &b, const std::string &what) {
    for (size_t i = 0; i < a.size(); i++) {
        if (std::memcmp(&a[i], &b[i], sizeof(T))) {
            fail(what, "element " + std::to_string(i) + " is " + std::to_string(b[i]) + ", portable " + std::to_string(a[i]));
        }
    }
    comparisons++;
}

void near(const Floats &got, const Doubles &want, const Doubles &bound, const std::string &what) {
    for (size_t i = 0; i < want.size(); i++) {
        if (!(std::fabs(got[i] - want[i]) <= bound[i])) {
            fail(what, "element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", not " + std::to_string(want[i]));
        }
    }
    comparisons++;
}

std::vector<std::string> isa_names() {
    std::vector<std::string> out;
    std::istringstream names(nf_isa_names());
    for (std::string name; std::getline(names, name, ',');) out.push_back(name);
    return out;
}

void use(const std::string &isa) {
    char error[NF_ERROR];
    if (nf_set_isa(isa.c_str(), error)) fail(isa, error);
    if (isa != nf_isa()) fail(isa, std::string("asked for, but in use is ") + nf_isa());
}

// -- matrices ---------------------------------------------------------------------------------------------------------

struct Kind {
    const char *name;
    int bits, members, block, unit;  // block 0: the row; unit 0: no members
    nf_scale scale;
    bool zero = false, mant = false;
};

const Kind kKinds[] = {
    {"1-bit", 1, 1, 64, 0, NF_FP16},
    {"int2-g128", 2, 1, 128, 0, NF_FP16},
    {"uint2-g16", 2, 1, 16, 0, NF_U8, true},
    {"int3-g128", 3, 1, 128, 0, NF_BF16},
    {"uint3-g20", 3, 1, 20, 0, NF_FP16, true},
    {"int4-g128", 4, 1, 128, 0, NF_FP16},
    {"uint4-g32", 4, 1, 32, 0, NF_FP16, true},
    {"int4-e8m0", 4, 1, 32, 0, NF_E8M0},
    {"int4-e4m3", 4, 1, 16, 0, NF_E4M3},
    {"int5-g64", 5, 1, 64, 0, NF_FP16},
    {"int6-row", 6, 1, 0, 0, NF_ROW},
    {"int7-g64", 7, 1, 64, 0, NF_FP16},
    {"int8-row", 8, 1, 0, 0, NF_ROW},
    {"uint8-g32", 8, 1, 32, 0, NF_E3M3, true},
    {"mant4-g64", 4, 16, 64, 64, NF_FP16, false, true},
    {"mant4-g32@e3m3", 4, 16, 32, 32, NF_E3M3, false, true},
    {"mant4-row", 4, 16, 0, 64, NF_ROW, false, true},
    {"tables2-g128", 2, 4, 128, 128, NF_U8},
    {"tables3-g64", 3, 8, 64, 64, NF_FP16},
    {"tables4-g64", 4, 16, 64, 64, NF_FP16},
    {"tables4-31", 4, 31, 64, 64, NF_FP16},
    {"tables5-g48", 5, 9, 48, 48, NF_FP16},
    {"fp4.25", 4, 2, 0, 4, NF_ROW},
    {"fp4.25-g128", 4, 2, 128, 4, NF_FP16},
    {"fp5.33", 5, 2, 0, 3, NF_ROW},
    {"fp5.33-g96", 5, 2, 96, 3, NF_FP16},
    {"quads3", 3, 2, 0, 4, NF_ROW},
    {"quads2", 2, 2, 64, 4, NF_U8},
    {"pairs4", 4, 2, 64, 8, NF_FP16},
};

struct Packed {
    nf_linear *linear = nullptr;
    int64_t n, k;
    Floats weights;  // decoded
    std::string name;
    Packed(const Packed &) = delete;
    ~Packed() { nf_free(linear); }

    Packed(const Kind &kind, int64_t rows, int64_t cols) : n(rows), k(cols) {
        name = std::string(kind.name) + " " + std::to_string(n) + "x" + std::to_string(k);
        const int64_t block = kind.block && kind.block < k ? kind.block : k;
        const int64_t unit = kind.unit && kind.unit < block ? kind.unit : block;
        const int64_t blocks = (k + block - 1) / block, tail = k - (blocks - 1) * block;
        const int64_t units = (blocks - 1) * ((block + unit - 1) / unit) + (tail + unit - 1) / unit;
        std::vector<uint8_t> codes(static_cast<size_t>(n * ((k * kind.bits + 7) / 8)));
        for (uint8_t &byte : codes) byte = random_byte(255);
        std::vector<uint8_t> member(static_cast<size_t>(n * units)), zero(static_cast<size_t>(n * blocks));
        for (uint8_t &m : member) m = random_byte(kind.members - 1);
        for (uint8_t &z : zero) z = random_byte((1 << kind.bits) - 1);
        const std::vector<uint8_t> scale = scales(kind.scale, n * (kind.scale == NF_ROW ? 1 : blocks));
        Floats parent = normals(n);
        const Floats levels = levels_of(kind);
        const bool two_level = kind.scale == NF_U8 || kind.scale == NF_E3M3 || kind.scale == NF_E4M3;
        const nf_matrix matrix = {n, k, kind.bits, kind.members, block, unit, kind.scale, 0, codes.data(), scale.data(),
                                  two_level ? parent.data() : nullptr, kind.unit ? member.data() : nullptr,
                                  kind.zero ? zero.data() : nullptr, levels.data()};
        char error[NF_ERROR];
        linear = nf_repack(&matrix, error);
        if (!linear) fail(name, error);
        weights = gather();
    }

    static std::vector<uint8_t> scales(nf_scale kind, int64_t count) {
        std::vector<uint8_t> out;
        for (int64_t i = 0; i < count; i++) {
            const float row = std::ldexp(1 + std::fabs(normal()), -7);
            uint8_t bytes[4];
            std::memcpy(bytes, &row, 4);
            if (kind == NF_ROW) out.insert(out.end(), bytes, bytes + 4);
            if (kind == NF_BF16) out.insert(out.end(), bytes + 2, bytes + 4);
            if (kind == NF_FP16) out.push_back(random_byte(255)), out.push_back(random_byte(0x2f));
            if (kind == NF_E8M0) out.push_back(static_cast<uint8_t>(pick(110, 128)));
            if (kind == NF_E4M3) out.push_back(random_byte(0x7e));
            if (kind == NF_U8) out.push_back(random_byte(255));
            if (kind == NF_E3M3) out.push_back(random_byte(63));
        }
        return out;
    }

    static Floats levels_of(const Kind &kind) {
        Floats out;
        for (int m = 0; m < kind.members; m++) {
            for (int c = 0; c < 1 << kind.bits; c++) {
                const int i = c % 8;
                if (kind.zero) out.push_back(static_cast<float>(c));
                else if (kind.mant) out.push_back(static_cast<float>((c < 8 ? 1 : -1) * (m == 15 ? i : 8 * m * i + (1 << i))));
                else if (kind.members == 1) out.push_back(static_cast<float>(c - (1 << (kind.bits - 1))));
                else if (kind.members == 2) out.push_back(0.5f * static_cast<float>(2 * c + m - (1 << kind.bits)));
                else out.push_back(normal());  // a table that int8 has to round
            }
        }
        return out;
    }

    Floats gather() const {
        std::vector<int64_t> rows;
        for (int64_t r = 0; r < n; r++) rows.push_back(r);
        Floats out(static_cast<size_t>(n * k), NAN);
        char error[NF_ERROR];
        if (nf_gather(linear, rows.data(), n, out.data(), error)) fail(name, error);
        return out;
    }

    // y [m][ldy], poisoned before the call.
    Floats apply(const Floats &x, int64_t m, int64_t ldx, int64_t ldy, const float *bias, int mode) const {
        Floats y(static_cast<size_t>(m * ldy), -12345.0f);
        char error[NF_ERROR];
        if (nf_apply(linear, x.data(), m, ldx, y.data(), ldy, bias, mode, error)) fail(name, error);
        for (int64_t t = 0; t < m; t++) {
            for (int64_t r = n; r < ldy; r++) {
                if (y[static_cast<size_t>(t * ldy + r)] != -12345.0f) fail(name, "wrote beside the output");
            }
        }
        return y;
    }
};

void check_apply(const Packed &w, int64_t m, bool with_bias, const std::vector<std::string> &isas) {
    const int64_t ldx = w.k + pick(0, 3), ldy = w.n + pick(0, 3);
    const Floats x = normals(m * ldx), bias = normals(w.n);
    const float *add = with_bias ? bias.data() : nullptr;
    Doubles want(static_cast<size_t>(m * ldy), -12345.0), exact_bound(want.size(), 0.0), int8_bound(want.size(), 0.0);
    const double rounding = nf_linear_rounding(w.linear);
    for (int64_t t = 0; t < m; t++) {
        double most = 0;
        for (int64_t c = 0; c < w.k; c++) most = std::fmax(most, std::fabs(x[static_cast<size_t>(t * ldx + c)]));
        for (int64_t r = 0; r < w.n; r++) {
            double sum = with_bias ? bias[static_cast<size_t>(r)] : 0.0, size = std::fabs(sum), total = 0;
            for (int64_t c = 0; c < w.k; c++) {
                const double weight = w.weights[static_cast<size_t>(r * w.k + c)];
                const double product = weight * x[static_cast<size_t>(t * ldx + c)];
                sum += product, size += std::fabs(product), total += std::fabs(weight);
            }
            const auto i = static_cast<size_t>(t * ldy + r);
            want[i] = sum;
            exact_bound[i] = 1e-6 * static_cast<double>(w.k) * size + 1e-30;
            // half a step of each activation; a rounded level errs by a part of the largest, of which blocks have their own:
            // only tables of whole numbers are held against float64
            int8_bound[i] = rounding > 1e-6 ? INFINITY : most / 253 * total + 1e-5 * size + 1e-30;
        }
    }
    use(isas[0]);
    nf_set_threads(1);
    const Floats portable = w.apply(x, m, ldx, ldy, add, 0), exact = w.apply(x, m, ldx, ldy, add, 1);
    near(portable, want, int8_bound, w.name + ", int8");
    near(exact, want, exact_bound, w.name + ", exact");
    for (const std::string &isa : isas) {
        const std::string what = w.name + ", " + std::to_string(m) + " tokens, " + isa;
        use(isa);
        same(w.weights, w.gather(), what + ", decoded");
        nf_set_threads(1);
        const Floats one = w.apply(x, m, ldx, ldy, add, 0), exact_one = w.apply(x, m, ldx, ldy, add, 1);
        same(portable, one, what + ", int8");
        near(exact_one, want, exact_bound, what + ", exact");
        nf_set_threads(pick(2, 4));
        same(one, w.apply(x, m, ldx, ldy, add, 0), what + ", int8, threads");
        same(exact_one, w.apply(x, m, ldx, ldy, add, 1), what + ", exact, threads");
    }
}

// -- encoders ---------------------------------------------------------------------------------------------------------

void check_encoders(int64_t rows, int64_t cols, int64_t block, const std::vector<std::string> &isas) {
    constexpr int kMembers = 5, kRanks = 15;
    const std::string what = "encoders " + std::to_string(rows) + "x" + std::to_string(cols) + "-g" + std::to_string(block);
    Floats levels, thresholds, tops, factors = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f};
    std::vector<uint8_t> codes;
    for (int m = 0; m < kMembers; m++) {  // sign · (m i + 2^i − 1), ascending
        for (int r = 0; r < kRanks; r++) {
            const int i = std::abs(r - 7);
            levels.push_back(static_cast<float>((r < 7 ? -1 : 1) * (4 * m * i + (1 << i) - 1)));
            codes.push_back(static_cast<uint8_t>(r));
            if (r) thresholds.push_back((levels.back() + levels[levels.size() - 2]) / 2);
        }
        tops.push_back(levels.back());
    }
    nf_search search = {};
    search.members = kMembers, search.ranks = kRanks;
    search.levels = levels.data(), search.thresholds = thresholds.data(), search.tops = tops.data();
    search.block = block, search.unit = 0;
    search.rounding = NF_FLOAT, search.mantissa = 10, search.quantum = 0x1p-24f, search.low = 0x1p-24f, search.high = 65504;
    search.least = 0x1p-24f, search.most = 65504;
    search.factors = factors.data(), search.candidates = static_cast<int>(factors.size()), search.unpruned = 1;
    const Floats w = normals(rows * cols);
    const int64_t blocks = (cols + block - 1) / block;
    Floats scale0, error0;
    std::vector<uint8_t> member0, code0;
    for (const std::string &isa : isas) {
        use(isa);
        nf_set_threads(isa == isas[0] ? 1 : pick(1, 4));
        Floats scale(static_cast<size_t>(rows * blocks), NAN), error(scale.size(), NAN);
        std::vector<uint8_t> member(scale.size(), 255), code(w.size(), 255);
        char message[NF_ERROR];
        if (nf_fit(&search, w.data(), rows, cols, nullptr, nullptr, scale.data(), error.data(), member.data(), nullptr,
                   message)) {
            fail(what + ", " + isa, message);
        }
        nf_codes how = {};
        how.members = kMembers, how.ranks = kRanks, how.thresholds = thresholds.data(), how.codes = codes.data();
        how.block = block, how.unit = block, how.scale = scale.data(), how.member = member.data();
        if (nf_encode(&how, w.data(), rows, cols, code.data(), message)) fail(what + ", " + isa, message);
        if (isa == isas[0]) scale0 = scale, error0 = error, member0 = member, code0 = code;
        for (size_t i = 0; i < code.size(); i++) {
            if (code[i] >= kRanks) fail(what + ", " + isa, "no such code");
        }
        same(scale0, scale, what + ", scale, " + isa);
        same(error0, error, what + ", error, " + isa);
        same(member0, member, what + ", member, " + isa);
        same(code0, code, what + ", code, " + isa);
    }
}

// -- sweeps -----------------------------------------------------------------------------------------------------------

// Panels of a sweep and runs of descent; `unit` > 0: units of so many columns choose one of two members.
void check_sweeps(int64_t rows, int64_t width, int64_t unit, bool zeros, const std::vector<std::string> &isas) {
    constexpr int kEntries = 8, kRanks = 7;
    const std::string what = "sweeps " + std::to_string(rows) + "x" + std::to_string(width) + "/" + std::to_string(unit);
    const int members = unit ? 2 : 1;
    Floats levels, thresholds, codes;
    for (int m = 0; m < members; m++) {
        for (int r = 0; r < kEntries; r++) {
            const int rank = r < kRanks ? r : kRanks - 1;
            levels.push_back(static_cast<float>(rank - 3) * (m ? 1.0f : 1.5f));
            codes.push_back(static_cast<float>(rank));
            thresholds.push_back(r < kRanks - 1 ? (static_cast<float>(r) - 2.5f) * (m ? 1.0f : 1.5f) : INFINITY);
        }
    }
    const int64_t block = 16, blocks = (width + block - 1) / block, units = unit ? (width + unit - 1) / unit : blocks;
    std::vector<int64_t> block_of, unit_of;
    for (int64_t j = 0; j < width; j++) block_of.push_back(j / block), unit_of.push_back(unit ? j / unit : j / block);
    Floats scale(static_cast<size_t>(rows * blocks)), zero(scale.size());
    for (float &v : scale) v = 0.1f + 0.01f * static_cast<float>(pick(0, 9));
    for (float &v : zero) v = static_cast<float>(pick(0, 3));
    Floats u = normals(width * width), h(u.size());
    for (int64_t i = 0; i < width; i++) {
        for (int64_t j = 0; j < width; j++) {
            float &v = u[static_cast<size_t>(i * width + j)];
            v = i == j ? 1.0f + std::fabs(v) : j > i ? 0.1f * v : 0.0f;
            h[static_cast<size_t>(i * width + j)] = i == j ? 2.0f : 1.0f / static_cast<float>(2 + std::abs(i - j));
        }
    }
    h[0] = 0;  // an input that is never on
    const Floats w0 = normals(rows * width), original = normals(rows * width), gradient0 = normals(rows * width);
    std::vector<uint8_t> member0, codes0, moved0;
    Floats after0, error0, before0, q0;
    for (const std::string &isa : isas) {
        use(isa);
        nf_set_threads(isa == isas[0] ? 1 : pick(1, 4));
        std::vector<uint8_t> member(static_cast<size_t>(rows * units), 0), found(w0.size(), 0);
        Floats w = w0, error(w0.size(), 0.0f), before(w0.size(), 0.0f), gradient = gradient0;
        nf_lattice l = {};
        l.rows = rows, l.blocks = blocks, l.units = units, l.members = members, l.entries = kEntries;
        l.thresholds = thresholds.data(), l.levels = levels.data(), l.codes = codes.data(), l.scale = scale.data();
        l.zero = zeros ? zero.data() : nullptr, l.member = unit ? member.data() : nullptr, l.choose = unit > 0;
        nf_panel p = {};
        p.width = width, p.w = w.data(), p.ldw = width, p.u = u.data(), p.ldu = width;
        p.p = u.data(), p.ldp = width, p.r = u.data(), p.ldr = width, p.original = original.data();
        p.block = block_of.data(), p.unit = unit_of.data(), p.codes = found.data(), p.ldc = width;
        p.error = error.data(), p.before = before.data();
        char message[NF_ERROR];
        const int64_t middle = unit ? width / 2 / unit * unit : width / 2;
        for (int part = 0; part < 2; part++) {
            p.start = part ? middle : 0, p.stop = part ? width : middle;
            if (nf_sweep(&l, &p, message)) fail(what + ", " + isa, message);
        }
        std::vector<uint8_t> moved = found;
        Floats q = w0;
        nf_run r = {};
        r.width = width, r.h = h.data(), r.ldh = width, r.gradient = gradient.data(), r.w = w0.data(), r.q = q.data();
        r.ldw = width, r.block = block_of.data(), r.unit = unit_of.data(), r.codes = moved.data(), r.ldc = width;
        r.margin = 1e-6f;
        if (nf_descend(&l, &r, message)) fail(what + ", descent, " + isa, message);
        if (isa == isas[0]) member0 = member, codes0 = found, moved0 = moved, after0 = w, error0 = error, before0 = before, q0 = q;
        for (size_t i = 0; i < found.size(); i++) {
            if (found[i] >= kRanks || moved[i] >= kRanks) fail(what + ", " + isa, "no such code");
        }
        same(codes0, found, what + ", codes, " + isa);
        same(moved0, moved, what + ", codes of descent, " + isa);
        same(member0, member, what + ", member, " + isa);
        same(after0, w, what + ", weights, " + isa);
        same(error0, error, what + ", error, " + isa);
        same(before0, before, what + ", before, " + isa);
        same(q0, q, what + ", values, " + isa);
        p.stop = width + 1;
        if (!nf_sweep(&l, &p, message)) fail(what + ", " + isa, "a panel beyond its end was swept");
    }
}

// -- decoder ----------------------------------------------------------------------------------------------------------

void check_decoder(const std::vector<std::string> &isas) {
    constexpr int64_t kHidden = 96, kHeads = 4, kDim = 32, kFfn = 160, kVocab = 70, kLayers = 2, kTokens = 21;
    const Kind kind = {"mant4-g32", 4, 16, 32, 32, NF_FP16, false, true};
    const Packed q(kind, kHeads * kDim, kHidden), kv(kind, 2 * kDim, kHidden), o(kind, kHidden, kHeads * kDim);
    const Packed up(kind, kFfn, kHidden), down(kind, kHidden, kFfn);
    const Floats embedding = normals(kVocab * kHidden), norm(kHidden, 1.0f);
    const auto packed = [](const Packed &p) { return nf_decoder_linear{p.linear, nullptr, 0, 0, p.n, p.k, nullptr}; };
    const nf_decoder_linear linears[] = {packed(q), packed(kv), packed(kv), packed(o), packed(up), packed(up), packed(down)};
    std::vector<nf_decoder_layer> layers(kLayers);
    for (int64_t i = 0; i < kLayers; i++) {
        nf_decoder_layer &layer = layers[static_cast<size_t>(i)];
        layer = {};
        layer.qkv = 3, layer.o = 1, layer.gate_up = 2, layer.down = 1, layer.linears = linears;
        layer.input_norm = layer.ffn_norm = norm.data();
        layer.window = i == 1 ? 7 : 0;
    }
    nf_decoder_spec spec = {};
    spec.layers = kLayers, spec.heads = kHeads, spec.kv_heads = 2, spec.head_dim = kDim, spec.hidden = kHidden, spec.ffn = kFfn;
    spec.vocab = kVocab, spec.rotary = kDim, spec.ropes = 1, spec.activation = NF_SILU;
    spec.eps = 1e-5f, spec.embedding_scale = 1, spec.attention_scale = 0.2f;
    spec.layer = layers.data(), spec.final_norm = norm.data();
    spec.embedding = spec.head = {nullptr, embedding.data(), NF_DENSE_FP32, 0, kVocab, kHidden, nullptr};
    Floats cosine, sine;
    for (int64_t i = 0; i < kTokens * kDim; i++) {
        const double angle = static_cast<double>(i / kDim) * std::pow(100.0, -2.0 * static_cast<double>(i % (kDim / 2)) / kDim);
        cosine.push_back(static_cast<float>(std::cos(angle))), sine.push_back(static_cast<float>(std::sin(angle)));
    }
    std::vector<int64_t> tokens;
    for (int64_t i = 0; i < kTokens; i++) tokens.push_back(pick(0, kVocab - 1));
    Doubles want, bound;
    for (const std::string &isa : isas) {
        use(isa);
        nf_set_threads(pick(1, 3));
        char error[NF_ERROR];
        nf_decoder *decoder = nf_decoder_create(&spec, error);
        if (!decoder || nf_decoder_reserve(decoder, kTokens, cosine.data(), sine.data(), error)) fail("decoder, " + isa, error);
        Floats logits(kTokens * kVocab, NAN);  // a prompt, then token by token
        constexpr int64_t kPrompt = 13;
        for (int64_t at = 0; at < kTokens; at = at ? at + 1 : kPrompt) {
            float *out = logits.data() + at * kVocab;
            if (nf_decoder_forward(decoder, tokens.data() + at, at ? 1 : kPrompt, at, 1, 1, out, error)) {
                fail("decoder, " + isa, error);
            }
        }
        nf_decoder_free(decoder);
        double most = 0;
        for (float l : logits) most = std::fmax(most, std::fabs(l));
        if (want.empty()) want.assign(logits.begin(), logits.end()), bound.assign(want.size(), 1e-3 * most);
        near(logits, want, bound, "decoder, " + isa);
    }
}

}  // namespace

int main() {
    const std::vector<std::string> isas = isa_names();
    if (nf_abi() != NF_ABI || isas.empty() || isas[0] != "portable") fail("library", "is not the one of this header");
    const int64_t shapes[][2] = {{1, 17}, {3, 64}, {16, 100}, {33, 576}, {40, 331}};
    const int64_t counts[] = {1, 2, 3, 4, 5, 8, 9, 17, 70};
    use(isas[0]);
    for (const Kind &kind : kKinds) {
        for (const auto &shape : shapes) {
            use(isas[0]);
            const Packed w(kind, shape[0], shape[1]);
            check_apply(w, counts[pick(0, 8)], false, isas);
            check_apply(w, counts[pick(0, 8)], true, isas);
        }
    }
    for (int64_t block : {16, 32, 64, 100}) check_encoders(5, 331, block, isas);
    for (int64_t unit : {0, 3, 4}) {
        for (int64_t rows : {1, 16, 21, 37}) check_sweeps(rows, 50, unit, unit == 0, isas);
    }
    check_decoder(isas);
    std::printf("%s: %d comparisons passed\n", nf_isa_names(), comparisons);
    return 0;
}
