// AMX, few tokens: tiles of sums of 16 rows of the weight with 16 tokens.
//
// C [16 rows of w, 16 columns] += A [16, 32] B [32, 16] in bf16, with the weight as A: decoded rows can be used as A
// tiles directly, while B needs pairs of k interleaved, so x is transposed once, when it is packed, and so are sums. A
// token is one column if x is bf16; fp16 and fp32 are split into 2 and 3 bf16 parts with exactly their sum, one column
// each, and the columns are added at the end. Of all that can be done with AMX, this decodes a weight the fastest.

#pragma once

#include "amx_few_operands.h"

BEGIN_TARGET(TARGET_AMX)
namespace {
namespace amx_few {

// c[2][COLUMNS] (+)= sum over `steps` of a[2] b[COLUMNS], all tiles; the strides of a, b and c are in bytes.
template <int COLUMNS>
INLINE void multiply(const uint8_t* a, const uint8_t* b, int64_t stride, int64_t steps, uint8_t* c, int64_t c_stride,
                     bool accumulate) {
    if (accumulate) {
        _tile_loadd(0, c, 64);
        _tile_loadd(2, c + c_stride, 64);
        if (COLUMNS > 1) _tile_loadd(1, c + TILE, 64);
        if (COLUMNS > 1) _tile_loadd(3, c + c_stride + TILE, 64);
    } else amx::zero_sums();
    for (int64_t step = 0; step < steps; ++step, a += TILE, b += TILE) {
        _tile_stream_loadd(6, b, 64);
        if (COLUMNS > 1) _tile_stream_loadd(7, b + stride, 64);
        _tile_loadd(4, a, 64);
        _tile_loadd(5, a + stride, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (COLUMNS > 1) _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        if (COLUMNS > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 64);
    _tile_stored(2, c + c_stride, 64);
    if (COLUMNS > 1) _tile_stored(1, c + TILE, 64);
    if (COLUMNS > 1) _tile_stored(3, c + c_stride + TILE, 64);
}

// The same, where scales, [blocks of this chunk][MAX_ROWS], multiply each block's own sums, in `tiles`.
template <int COLUMNS>
INLINE void multiply_blocks(const Problem& p, const uint8_t* a, const uint8_t* b, int64_t stride, int64_t chunk,
                            int64_t count, const float* scales, uint8_t* c, int64_t c_stride, uint8_t* tiles) {
    for (int64_t k = chunk; k < chunk + count; scales += MAX_ROWS) {
        int64_t end = smaller(chunk + count, (k / p.cols + 1) * p.cols), offset = (k - chunk) / 32 * TILE;
        multiply<COLUMNS>(a + offset, b + offset, stride, ceil_div(end - k, 32), tiles, 2 * TILE, false);
        for (int64_t i = 0; i < 2; ++i)
            for (int64_t j = 0; j < COLUMNS; ++j)
                for (int64_t r = 0; r < 16; ++r) {
                    __m512 sums = _mm512_load_ps(tiles + (2 * i + j) * TILE + r * 64);
                    uint8_t* total = c + i * c_stride + j * TILE + r * 64;
                    __m512 before = k > 0 ? _mm512_load_ps(total) : _mm512_setzero_ps();
                    _mm512_store_ps(total, _mm512_fmadd_ps(sums, _mm512_set1_ps(scales[16 * i + r]), before));
                }
        k = end;
    }
}

INLINE void store_row(const Problem& p, int64_t token, int64_t row, __mmask16 mask, __m512 y) {
    uint8_t* out = p.out_row(token) + row * size_of(p.out_type);
    if (p.out_type == FP32) _mm512_mask_storeu_ps(out, mask, y);
    else if (p.out_type == BF16) _mm256_mask_storeu_epi16(out, mask, (__m256i)_mm512_cvtneps_pbh(y));
    else _mm256_mask_storeu_epi16(out, mask, _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// One tile of sums, [16 rows of w][16 columns] -> out [tokens][rows], scaled unless the sums already are.
INLINE void finish(const Problem& p, const uint8_t* sums, int64_t row, int64_t token, int64_t tokens) {
    alignas(64) float scale[16] = {}, bias[16] = {};
    int64_t rows = smaller<int64_t>(p.n - row, 16), width = parts(p.x_type);
    if (rows <= 0) return;
    for (int64_t r = 0; r < rows; ++r) {
        scale[r] = p.scales_vary_along_k() ? 1.0f : *p.scale_row(row + r);
        bias[r] = p.bias_at(row + r);
    }
    __m512i columns[16];
    for (int i = 0; i < 16; ++i) columns[i] = _mm512_load_si512(sums + 64 * i);
    transpose(columns);
    for (int64_t t = 0; t < tokens; ++t) {
        __m512 y = _mm512_castsi512_ps(columns[t * width + width - 1]);
        for (int64_t part = width - 2; part >= 0; --part)
            y = _mm512_add_ps(y, _mm512_castsi512_ps(columns[t * width + part]));
        y = _mm512_mul_ps(y, _mm512_load_ps(scale));
        if (p.bias) y = _mm512_add_ps(y, _mm512_load_ps(bias));
        store_row(p, token + t, row, __mmask16((1u << rows) - 1), y);
    }
}

// All tiles of sums of a panel, token by token; in tile order, stores would miss on one line of out after the other.
INLINE void finish_panel(const Problem& p, Tokens tokens, Rows rows, const uint8_t* sums) {
    int64_t per_tile = tokens_per_tile(p.x_type), columns = tile_columns(p, tokens.count);
    for (int64_t j = 0; j < columns; ++j) {
        int64_t first = j * per_tile, last = smaller(tokens.count, first + per_tile);
        for (int64_t t = last; t < smaller(tokens.count, last + per_tile); ++t)
            for (int64_t i = 0; i < rows.count; i += 64 / size_of(p.out_type))
                __builtin_prefetch(p.out_row(tokens.start + t) + (rows.start + i) * size_of(p.out_type), 1);
        for (int64_t i = 0; i < rows.count; i += 16)
            finish(p, sums + (i / 16 * columns + j) * TILE, rows.start + i, tokens.start + first, last - first);
    }
}

// Workspace: a decoded chunk [tiles of 16 rows][steps], sums [tiles of 16 rows][columns of tiles], 4 more tiles.
void panel(const Problem& p, Tokens tokens, Rows rows, uint8_t* weight) {
    const amx::Shapes shapes(16);
    _tile_loadconfig(&shapes);
    int64_t columns = tile_columns(p, tokens.count), padded_rows = round_up(rows.count, 32), size = chunk_of(columns);
    uint8_t *sums = weight + padded_rows * size * 2, *tiles = sums + padded_rows * columns * 64;
    const float* scale_rows[MAX_ROWS];
    float scales[8][MAX_ROWS];
    // For few tokens it is cheaper to scale the sums of long blocks than the weights.
    bool vary = p.scales_vary_along_k(), folded = vary && (columns > 4 || p.cols < 64);
    for (int64_t r = 0; r < padded_rows; ++r) {
        scale_rows[r] = p.scale_row(smaller(rows.start + r, p.n - 1));
        for (int64_t block = 0; folded && block < ceil_div(p.k, p.cols); ++block)
            folded = amx::folds(scale_rows[r][block]);
    }
    for (int64_t chunk = 0; chunk < p.k; chunk += size) {
        int64_t count = smaller(size, p.k - chunk), stride = size / 32 * TILE, c_stride = columns * TILE;
        const uint8_t* next = chunk + count < p.k ? p.data_row(rows.start) + chunk + count : rows.next;
        int64_t blocks[8];
        for (int64_t step = 0; step < size / 32; ++step) blocks[step] = smaller(chunk + 32 * step, p.k - 1) / p.cols;
        for (int64_t i = 0; i < padded_rows; i += 16)
            decode(p, rows.start + i, chunk, count, next ? next + i * p.data_stride : nullptr,
                   folded ? scale_rows + i : nullptr, blocks, weight + i * size * 2);
        if (vary && !folded)
            for (int64_t block = chunk / p.cols; block * p.cols < chunk + count; ++block)
                for (int64_t r = 0; r < padded_rows; ++r) scales[block - chunk / p.cols][r] = scale_rows[r][block];
        for (int64_t i = 0; i < padded_rows; i += 32)
            for (int64_t j = 0; j < columns; j += 2) {
                const uint8_t *a = weight + i * size * 2, *b = tokens.packed + packed_tile(p, tokens, j, chunk / 32);
                uint8_t* c = sums + (i / 16 * columns + j) * TILE;
                bool two = j + 1 < columns;
                if (vary && !folded)
                    (two ? multiply_blocks<2> : multiply_blocks<1>)(p, a, b, stride, chunk, count, scales[0] + i, c,
                                                                    c_stride, tiles);
                else
                    (two ? multiply<2> : multiply<1>)(a, b, stride, ceil_div(count, 32), c, c_stride, chunk > 0);
            }
    }
    _tile_release();
    finish_panel(p, tokens, rows, sums);
}

const Kernel kernel = {NAMES[AMX], block_tokens, plan, pack, panel};

}  // namespace amx_few
}  // namespace
END_TARGET
