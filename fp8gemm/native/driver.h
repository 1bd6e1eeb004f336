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
#include "amx.h"
#endif

#include "levels.h"
#include "parallel.h"
#include "problems.h"

namespace {

// Few tokens are multiplied by dot products, unless blocks along k are not made of the codes decoded at a time.
#define CHOOSE(set) (p.m <= set::FEW && (p.cols >= p.k || p.cols % set::CODES == 0) ? &set::dots : &set::panels)

const Kernel* choose([[maybe_unused]] int level, [[maybe_unused]] const Problem& p) {
    [[maybe_unused]] auto whole = [&](int64_t codes) { return p.cols >= p.k || p.cols % codes == 0; };
#if FP8GEMM_HAS_AMX
    bool small_blocks = p.cols < smaller<int64_t>(p.k, 64);
    bool worthwhile = p.k >= 32 && (p.m * parts(p.x_type) >= 2 || small_blocks);
    if (level >= AMX && whole(32) && worthwhile) return &amx::kernel;
#endif
#if FP8GEMM_HAS_BF16
    if (level >= AVX512_BF16 && p.x_type == BF16 && whole(avx512_bf16::GRAIN)) return CHOOSE(avx512_bf16);
#endif
#if defined(__x86_64__)
    if (level >= AVX512) return CHOOSE(avx512);
    if (level >= AVX2) return CHOOSE(avx2);
#endif
    return CHOOSE(portable);
}

// Blocks of tokens are packed and multiplied one after the other; several at once where that gives all threads work.
bool multiply(const Problem& p, const Kernel& kernel, int threads) {
    if (p.m == 0 || p.n == 0) return true;
    // Waking a thread takes some microseconds, which some tens of thousands of weights are worth.
    threads = int(smaller<int64_t>(larger(threads, 1), 1 + p.n * p.k * (p.m + 16) / (1 << 20)));
    int64_t blocks = ceil_div(p.m, kernel.block_tokens(p)), unit = kernel.plan(p, 1, threads).pack_unit;
    int64_t block = smaller(p.m, round_up(ceil_div(p.m, blocks), unit));
    Plan most = kernel.plan(p, block, threads);
    int64_t panels = ceil_div(p.n, most.panel_rows), together = smaller(ceil_div(2 * threads, panels), blocks);
    int64_t packed_bytes = round_up(most.packed_bytes, 64), scratch_bytes = round_up(most.scratch_bytes, 64);
    uint8_t* memory = workspace.reserve(together * packed_bytes + threads * scratch_bytes);
    if (!memory) return false;
    for (int64_t start = 0; start < p.m; start += together * block) {
        auto tokens = [&](int64_t i) {
            int64_t first = start + i * block;
            return Tokens{first, smaller(block, p.m - first), memory + i * packed_bytes};
        };
        int64_t end = smaller(p.m, start + together * block), units = ceil_div(block, unit);
        int64_t here = ceil_div(end - start, block);
        parallel((end - start) * p.k < (1 << 18) ? 1 : threads, here * units, [&](int64_t i, int64_t, int64_t) {
            Tokens some = tokens(i / units);
            if (i % units * unit < some.count) kernel.pack(p, some, i % units, i % units + 1);
        });
        parallel(threads, here * panels, [&](int64_t i, int64_t following, int64_t thread) {
            int64_t row = i % panels * most.panel_rows;
            const uint8_t* next = following < 0 ? nullptr : p.data_row(following % panels * most.panel_rows);
            kernel.panel(p, tokens(i / panels), {row, smaller(most.panel_rows, p.n - row), next},
                         memory + together * packed_bytes + thread * scratch_bytes);
        });
    }
    workspace.trim();
    return true;
}

const Quantizer& choose_quantizer([[maybe_unused]] int level) {
#if defined(__x86_64__)
    if (level >= AVX512) return avx512::quantizer;
    if (level >= AVX2) return avx2::quantizer;
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
