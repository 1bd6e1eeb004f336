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

const Kernel* choose([[maybe_unused]] int level, [[maybe_unused]] const Problem& p) {
#if FP8GEMM_HAS_AMX
    bool whole_steps = p.cols >= p.k || p.cols % 32 == 0, small_blocks = p.cols < smaller<int64_t>(p.k, 64);
    bool worthwhile = p.k >= 32 && (p.m * parts(p.x_type) >= 2 || small_blocks);
    if (level >= AMX && whole_steps && worthwhile) return &amx::kernel;
#endif
#if FP8GEMM_HAS_BF16
    if (level >= AVX512_BF16 && p.x_type == BF16) return &avx512_bf16::kernel;
#endif
#if defined(__x86_64__)
    if (level >= AVX512) return &avx512::kernel;
    if (level >= AVX2) return &avx2::kernel;
#endif
    return &portable::kernel;
}

bool multiply(const Problem& p, const Kernel& kernel, int threads) {
    if (p.m == 0 || p.n == 0) return true;
    // Waking a thread takes some microseconds, which some tens of thousands of weights are worth.
    threads = int(smaller<int64_t>(larger(threads, 1), 1 + p.n * p.k * (p.m + 16) / (1 << 20)));
    int64_t blocks = ceil_div(p.m, kernel.block_tokens(p)), unit = kernel.plan(p, 1, threads).pack_unit;
    int64_t block = smaller(p.m, round_up(ceil_div(p.m, blocks), unit));
    Plan most = kernel.plan(p, block, threads);
    int64_t packed_bytes = round_up(most.packed_bytes, 64), scratch_bytes = round_up(most.scratch_bytes, 64);
    uint8_t* memory = workspace.reserve(packed_bytes + threads * scratch_bytes);
    if (!memory) return false;
    for (int64_t start = 0; start < p.m; start += block) {
        Tokens tokens = {start, smaller(block, p.m - start), memory};
        int64_t rows = kernel.plan(p, tokens.count, threads).panel_rows;
        parallel(tokens.count * p.k < (1 << 18) ? 1 : threads, ceil_div(tokens.count, unit),
                 [&](int64_t i, int64_t, int64_t) { kernel.pack(p, tokens, i, i + 1); });
        parallel(threads, ceil_div(p.n, rows), [&](int64_t i, int64_t following, int64_t thread) {
            const uint8_t* next = following < 0 ? nullptr : p.data_row(following * rows);
            kernel.panel(p, tokens, {i * rows, smaller(rows, p.n - i * rows), next},
                         memory + packed_bytes + thread * scratch_bytes);
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
