// The driver chooses a kernel and distributes panels of the weight's rows over threads.

#pragma once

#include "portable.h"
#if defined(__x86_64__)
#include "avx2.h"
#include "avx512.h"
#endif
#if FP8GEMM_HAS_BF16
#include "avx512_bf16.h"
#endif
#if FP8GEMM_HAS_AMX
#include "amx_few.h"
#include "amx_many.h"
#endif
#if defined(__aarch64__)
#include "neon.h"
#endif

#include "levels.h"
#include "parallel.h"
#include "problems.h"

namespace {

// Few tokens are multiplied by dot products, unless blocks along k are not made of the codes decoded at a time.
#define CHOOSE(set) (p.m <= set::FEW && whole(set::CODES) ? &set::dots : &set::panels)

#if FP8GEMM_HAS_AMX
// For few tokens dot products are faster, unless blocks along k are too short for them.
bool suits_amx(const Problem& p) {
    constexpr int64_t DOTS[] = {3, 4, 6};  // tokens in bf16, fp16 and fp32
    return p.k >= 32 && (p.m > DOTS[p.x_type] || p.cols < smaller<int64_t>(p.k, 64));
}

// The weight is decoded more slowly for amx_many, but its tokens and sums are not transposed; amx_few loads all tokens
// for few rows, again and again once they do not fit in the L2 cache. Measured on 2 cores of Intel Granite Rapids and
// Emerald Rapids, November 2026.
const Kernel* choose_amx(const Problem& p) {
    const int64_t columns = p.m * parts(p.x_type);
    bool narrow = p.k <= (p.scales_vary_along_k() ? 512 : 1024) && 16 * p.m > p.k;
    bool large = p.m > 64 || (columns > 48 && columns * p.k > 3 << 18);
    return p.x_type == FP32 || narrow || large ? &amx_many::kernel : &amx_few::kernel;
}
#endif

const Kernel* choose([[maybe_unused]] int level, [[maybe_unused]] const Problem& p) {
    auto whole = [&](int64_t codes) { return p.cols >= p.k || p.cols % codes == 0; };
#if FP8GEMM_HAS_AMX
    if (level >= AMX && whole(32) && suits_amx(p)) return choose_amx(p);
#endif
#if FP8GEMM_HAS_BF16
    // One token's product is bound by decoding, which is shorter for pairs.
    bool pairs = p.x_type == BF16 && (fast_pairs || p.m == 1) && whole(avx512_bf16::GRAIN);
    if (level >= AVX512_BF16 && pairs) return CHOOSE(avx512_bf16);
#endif
#if defined(__x86_64__)
    if (level >= AVX512) return CHOOSE(avx512);
    if (level >= AVX2) return CHOOSE(avx2);
#endif
#if defined(__aarch64__)
    if (level >= NEON && whole(neon::GRAIN)) return CHOOSE(neon);
#endif
    return CHOOSE(portable);
}

// A block of tokens of one product: its share of a round.
struct Job {
    Problem p;
    const Kernel* kernel;
    Plan plan;
    Tokens tokens;
    int64_t first_unit, first_panel;

    int64_t units() const { return ceil_div(tokens.count, plan.pack_unit); }
};

// Products, or blocks of tokens of one, that are packed together and then multiplied together, so that all threads have
// work: all panels are distributed at once.
class Round {
    static constexpr int64_t JOBS = 64, PACKED = int64_t(8) << 20, PANELS = 64;  // a round has enough with one of these
    Job jobs[JOBS];
    int64_t count = 0, units = 0, panels = 0, packed_bytes = 0, scratch_bytes = 0;
    const int threads;

    // The job of a unit or of a panel, by the first of each job.
    const Job& job_of(int64_t Job::*first, int64_t index) const {
        int64_t low = 0;
        for (int64_t high = count; high - low > 1;) {
            int64_t middle = (low + high) / 2;
            (jobs[middle].*first <= index ? low : high) = middle;
        }
        return jobs[low];
    }
    const uint8_t* panel_codes(int64_t panel) const {
        const Job& job = job_of(&Job::first_panel, panel);
        return job.p.data_row((panel - job.first_panel) * job.plan.panel_rows);
    }

  public:
    explicit Round(int threads) : threads(threads) {}

    // Adds all tokens of a product, block by block, of which there are more where panels are fewer than threads. False
    // if memory is missing.
    bool add(const Problem& p, const Kernel& kernel) {
        if (p.m == 0 || p.n == 0) return true;
        constexpr int64_t WORTHWHILE = 128;  // tokens for which a panel may be decoded once more
        int64_t most = kernel.block_tokens(p);
        const Plan largest = kernel.plan(p, smaller(p.m, most), threads);
        int64_t for_all = smaller(ceil_div(2 * threads, ceil_div(p.n, largest.panel_rows)), p.m / WORTHWHILE);
        int64_t blocks = larger(ceil_div(p.m, most), for_all);
        int64_t block = smaller(p.m, round_up(ceil_div(p.m, blocks), largest.pack_unit));
        for (int64_t start = 0; start < p.m; start += block) {
            int64_t tokens = smaller(block, p.m - start);
            Plan plan = kernel.plan(p, tokens, threads);
            jobs[count++] = {p, &kernel, plan, {start, tokens, nullptr}, units, panels};
            units += jobs[count - 1].units(), panels += ceil_div(p.n, plan.panel_rows);
            packed_bytes += round_up(plan.packed_bytes, 64);
            scratch_bytes = larger(scratch_bytes, round_up(plan.scratch_bytes, 64));
            if ((count == JOBS || packed_bytes >= PACKED || panels >= PANELS * threads) && !run()) return false;
        }
        return true;
    }

    // Multiplies what was added. False if memory is missing.
    bool run() {
        if (count == 0) return true;
        uint8_t* memory = workspace.reserve(packed_bytes + threads * scratch_bytes);
        if (!memory) return false;
        uint8_t* packed = memory + threads * scratch_bytes;
        for (int64_t i = 0; i < count; packed += round_up(jobs[i++].plan.packed_bytes, 64))
            jobs[i].tokens.packed = packed;
        // Several units at a time, as claiming one costs about as much as packing it.
        int64_t together = ceil_div(units, 8 * threads);
        parallel(packed_bytes < (1 << 16) ? 1 : threads, ceil_div(units, together), [&](int64_t i, int64_t, int64_t) {
            for (int64_t unit = i * together, stop = smaller(units, unit + together); unit < stop;) {
                const Job& job = job_of(&Job::first_unit, unit);
                int64_t first = unit - job.first_unit, last = smaller(stop - job.first_unit, job.units());
                job.kernel->pack(job.p, job.tokens, first, last);
                unit = job.first_unit + last;
            }
        });
        parallel(threads, panels, [&](int64_t i, int64_t following, int64_t thread) {
            const Job& job = job_of(&Job::first_panel, i);
            int64_t row = (i - job.first_panel) * job.plan.panel_rows;
            const uint8_t* next = following < 0 ? nullptr : panel_codes(following);
            job.kernel->panel(job.p, job.tokens, {row, smaller(job.plan.panel_rows, job.p.n - row), next},
                              memory + thread * scratch_bytes);
        });
        count = units = panels = packed_bytes = scratch_bytes = 0;
        return true;
    }
};

// Waking a thread takes some microseconds, which some tens of thousands of weights are worth.
int useful_threads(int threads, const Problem& p) {
    return int(smaller<int64_t>(larger(threads, 1), 1 + p.n * p.k * (p.m + 16) / (1 << 20)));
}

// The product; or those of `experts`, whose data, scale and bias follow each other, and whose tokens end before
// ends[e].
bool multiply(const Problem& p, int level, int threads, int64_t experts = 1, int64_t expert_stride = 0,
              const int32_t* ends = nullptr) {
    Round round(useful_threads(threads, p));
    Problem expert = p;
    bool enough = true;
    for (int64_t e = 0, start = 0; e < experts && enough; ++e) {
        int64_t end = ends ? ends[e] : p.m;
        expert.x = p.x_row(start), expert.out = p.out_row(start), expert.m = end - start, start = end;
        enough = round.add(expert, *choose(level, expert));
        expert.data += expert_stride;
        expert.scale += ceil_div(p.n, p.rows) * p.blocks;
        if (p.bias) expert.bias += p.n * size_of(p.bias_type);
    }
    enough = enough && round.run();
    workspace.trim();
    return enough;
}

bool has_nans(const uint8_t* data, int64_t stride, int64_t n, int64_t k, int threads) {
    constexpr int64_t SHARE = 1 << 18;  // codes: some tens of microseconds
    int64_t rows = larger<int64_t>(1, SHARE / k);
    std::atomic<bool> found{false};
    parallel(threads, ceil_div(n, rows), [&](int64_t task, int64_t, int64_t) {
        for (int64_t row = task * rows; row < smaller(n, (task + 1) * rows) && !found; ++row) {
            uint8_t nan = 0;
            for (int64_t i = 0; i < k; ++i) nan |= uint8_t((data[row * stride + i] & 0x7F) == 0x7F);
            if (nan) found = true;
        }
    });
    return found;
}

const Quantizer& choose_quantizer([[maybe_unused]] int level) {
#if defined(__x86_64__)
    if (level >= AVX512) return avx512::quantizer;
    if (level >= AVX2) return avx2::quantizer;
#endif
#if defined(__aarch64__)
    if (level >= NEON) return neon::quantizer;
#endif
    return portable::quantizer;
}

float scale_of(float amax, const Quantization& q) {
    float scale = larger(amax / 448.0f, 0x1p-126f);
    return q.ue8m0 ? float_of((bits_of(scale) + 0x7FFFFF) & 0x7F800000) : scale;
}

// Blocks of rows are distributed over threads in strips, each with its own amax.
bool quantize(const Quantization& q, const Quantizer& quantizer, int threads) {
    constexpr int64_t STRIP = 64;
    int64_t blocks = q.blocks(), strips = ceil_div(smaller(q.rows, q.n), STRIP), bands = ceil_div(q.n, q.rows);
    float* amax = reinterpret_cast<float*>(workspace.reserve(bands * strips * blocks * 4));
    if (!amax) return false;
    auto first = [&](int64_t strip) {
        return smaller(strip / strips * q.rows + smaller(strip % strips * STRIP, q.rows), q.n);
    };
    parallel(threads, bands * strips, [&](int64_t strip, int64_t, int64_t) {
        quantizer.amax(q, first(strip), first(strip + 1), amax + strip * blocks);
    });
    parallel(threads, bands, [&](int64_t band, int64_t, int64_t) {
        for (int64_t b = 0; b < blocks; ++b) {
            float largest = 0.0f;
            for (int64_t i = 0; i < strips; ++i) largest = larger(largest, amax[(band * strips + i) * blocks + b]);
            q.scale[band * blocks + b] = scale_of(largest, q);
        }
    });
    parallel(threads, bands * strips,
             [&](int64_t strip, int64_t, int64_t) { quantizer.cast(q, first(strip), first(strip + 1)); });
    workspace.trim();
    return true;
}

void look_up(const Lookup& l, const Quantizer& quantizer, int threads) {
    constexpr int64_t SHARE = 1 << 16;  // elements: some tens of microseconds
    int64_t tokens = larger<int64_t>(1, SHARE / larger<int64_t>(l.k, 1));
    parallel(l.m <= tokens ? 1 : threads, ceil_div(l.m, tokens), [&](int64_t i, int64_t, int64_t) {
        quantizer.look_up(l, i * tokens, smaller(l.m, (i + 1) * tokens));
    });
}

}  // namespace
