// The operands of few tokens with AMX: x packed and the weight decoded, in tiles that amx_few.h multiplies.

#pragma once

#include "amx_operands.h"

BEGIN_TARGET(TARGET_AMX)
namespace {
namespace amx_few {

constexpr int64_t TILE = 1024;  // bytes, of any of the three kinds: 16 rows of 64
constexpr int64_t MAX_ROWS = 256;

INLINE int64_t tokens_per_tile(int64_t x_type) { return 16 / parts(x_type); }
INLINE int64_t tile_columns(const Problem& p, int64_t tokens) { return ceil_div(tokens, tokens_per_tile(p.x_type)); }

int64_t block_tokens(const Problem& p) { return 32 * tokens_per_tile(p.x_type); }

// Elements along k decoded at a time. Measured on 2 cores of a Xeon with AMX (L1 48 KB, L2 2 MB), gcc 12, November
// 2026: while memory is the bottleneck, short chunks let decoding and multiplying overlap; with more tokens, longer
// chunks load and store sums less often.
INLINE int64_t chunk_of(int64_t columns) { return columns <= 4 ? 128 : 256; }

// Many tokens do not fit in the L2 cache and are read once per panel; the panel's sums then take a quarter of it.
Plan plan(const Problem& p, int64_t tokens, int threads) {
    int64_t columns = tile_columns(p, tokens), chunk = chunk_of(columns);
    int64_t share = round_up(ceil_div(p.n, 4 * threads), 32);
    int64_t rows = columns <= 4 ? 32 : columns <= 8 ? 64 : larger<int64_t>(64, smaller(MAX_ROWS, share));
    int64_t packed = columns * round_up(p.k, chunk) / 32 * TILE;
    return {tokens_per_tile(p.x_type), rows, packed, rows * chunk * 2 + rows * columns * 64 + 4 * TILE};
}

// Tiles that are multiplied together are adjacent: a power-of-two distance would map them to few sets of the caches.
INLINE int64_t packed_tile(const Problem& p, Tokens tokens, int64_t column, int64_t step) {
    int64_t columns = tile_columns(p, tokens.count), steps = chunk_of(columns) / 32;
    return ((step / steps * columns + column) * steps + step % steps) * TILE;
}

INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
        __m512i c = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        __m512i d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xDD);
        t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// Packed: [chunks of k][columns of tiles][steps in a chunk][16 pairs of k][16 columns] of pairs of bf16.
void pack(const Problem& p, Tokens tokens, int64_t first, int64_t last) {
    int64_t per_tile = tokens_per_tile(p.x_type), width = parts(p.x_type);
    for (int64_t tile = first; tile < last; ++tile) {
        int64_t start = tile * per_tile, count = smaller(per_tile, tokens.count - start);
        for (int64_t step = 0; step < round_up(p.k, 64) / 32; ++step) {
            __m512i columns[16];
            for (int64_t i = 0; i < 16; ++i) columns[i] = _mm512_setzero_si512();
            for (int64_t i = 0; i < count; ++i)
                amx::split(p.x_row(tokens.start + start + i) + step * 32 * size_of(p.x_type), p.x_type, p.k - step * 32,
                           columns + i * width);
            transpose(columns);
            uint8_t* out = tokens.packed + packed_tile(p, tokens, tile, step);
            for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(out + i * 64, columns[i]);
        }
    }
}

// bf16 `values` of 32 codes times a power of two: added to the exponent, unless the value is zero or NaN.
INLINE __m512i fold(__m512bh values, __mmask32 ordinary, float scale) {
    __m512i added = _mm512_set1_epi16(short((bits_of(scale) >> 16) - 0x3F80));
    return _mm512_mask_add_epi16((__m512i)values, ordinary, (__m512i)values, added);
}

// 64 codes: the bf16 of the first 32 and of the others.
INLINE void decode_in_order(__m512i code, __m512bh* values) {
    const __m512i in_order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    avx512_bf16::decode_register(_mm512_permutexvar_epi64(in_order, code), values);
}

// Decodes GROUPS x 64 codes of 16 rows to A tiles [steps][16 rows][32], and fetches the same of `next`.
template <int GROUPS>
INLINE void decode_whole(const uint8_t* codes, const uint8_t* next, int64_t stride, uint8_t* out) {
    for (int64_t r = 0; r < 16; ++r, codes += stride, next += stride, out += 64) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < GROUPS; ++i) {
            __m512bh values[2];
            decode_in_order(_mm512_loadu_si512(codes + i * 64), values);
            _mm_prefetch(reinterpret_cast<const char*>(next + i * 64), _MM_HINT_T0);
            _mm512_store_si512(out + 2 * i * TILE, (__m512i)values[0]);
            _mm512_store_si512(out + (2 * i + 1) * TILE, (__m512i)values[1]);
        }
    }
}

// Decodes elements [first, first + count) of 16 rows to A tiles [steps][16 rows][32], with zeros for missing rows.
// Scales [16][blocks along k] multiply them, unless null; the 32 elements of step i are in block blocks[i].
INLINE void decode(const Problem& p, int64_t row, int64_t first, int64_t count, const uint8_t* next,
                   const float* const* scale_rows, const int64_t* blocks, uint8_t* out) {
    if (row + 16 <= p.n && !scale_rows && (count == 128 || count == 256)) {
        const uint8_t *codes = p.data_row(row) + first, *ahead = next ? next : codes;
        return (count == 128 ? decode_whole<2> : decode_whole<4>)(codes, ahead, p.data_stride, out);
    }
    const __m512i magnitude_bits = _mm512_set1_epi8(0x7F);
    for (int64_t r = 0; r < 16; ++r) {
        bool exists = row + r < p.n;
        const uint8_t* codes = p.data_row(exists ? row + r : 0) + first;
        for (int64_t k = 0; k < count; k += 64, out += 2 * TILE) {
            int64_t left = exists ? smaller<int64_t>(count - k, 64) : 0;
            __m512i code = left == 64 ? _mm512_loadu_si512(codes + k)
                                      : _mm512_maskz_loadu_epi8((uint64_t(1) << left) - 1, codes + k);
            if (next) _mm_prefetch(reinterpret_cast<const char*>(next + r * p.data_stride + k), _MM_HINT_T0);
            __m512bh values[2];
            decode_in_order(code, values);
            if (scale_rows && left) {
                __m512i magnitude = _mm512_and_si512(code, magnitude_bits);
                uint64_t ordinary = _mm512_test_epi8_mask(magnitude, magnitude) &
                                    _mm512_cmpneq_epi8_mask(magnitude, magnitude_bits);
                const float* scales = scale_rows[r];
                values[0] = (__m512bh)fold(values[0], __mmask32(ordinary), scales[blocks[k / 32]]);
                values[1] = (__m512bh)fold(values[1], __mmask32(ordinary >> 32), scales[blocks[k / 32 + 1]]);
            }
            _mm512_store_si512(out, (__m512i)values[0]);
            _mm512_store_si512(out + TILE, (__m512i)values[1]);
        }
        out += 64 - round_up(count, 64) / 32 * TILE;
    }
}

}  // namespace amx_few
}  // namespace
END_TARGET
