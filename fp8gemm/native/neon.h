// NEON, which every 64-bit ARM CPU has: vectors of 4 fp32.

#pragma once

#include "levels.h"
#include "problems.h"

namespace {
namespace neon {

// Each lane multiplies four elements along k: a token's, one vector, are multiplied by their number in it.
constexpr const char* NAME = NAMES[NEON];
constexpr int LANES = 4, VECTORS = 2, ROWS = VECTORS * LANES, TOKENS = 8, UNROLL = 1, GRAIN = 4;
constexpr int64_t CHUNK = 512, PANEL = 32;
constexpr bool IN_PLACE = false;
using Vec = float32x4_t;
using Element = float;
using Operand = Vec;
struct Weights { Operand parts[GRAIN]; };

INLINE Operand load(const Element* address) { return vld1q_f32(address); }
INLINE Operand broadcast(const Element* address) { return vld1q_f32(address); }
INLINE Vec multiply_add(Vec sums, Operand a, Operand b) { return vfmaq_f32(sums, a, b); }
INLINE Vec multiply_add(Vec sums, const Weights& rows, Operand token) {
    sums = vfmaq_laneq_f32(sums, rows.parts[0], token, 0);
    sums = vfmaq_laneq_f32(sums, rows.parts[1], token, 1);
    sums = vfmaq_laneq_f32(sums, rows.parts[2], token, 2);
    return vfmaq_laneq_f32(sums, rows.parts[3], token, 3);
}

INLINE float sum(Vec vector) { return vaddvq_f32(vector); }

INLINE void store(uint8_t* out, int64_t type, Vec y) {
    if (type == FP32) return vst1q_f32(reinterpret_cast<float*>(out), y);
    uint16x4_t half;
    if (type == FP16) half = vreinterpret_u16_f16(vcvt_f16_f32(y));
    else {  // to nearest, ties to even; NaN stays NaN
        uint32x4_t bits = vreinterpretq_u32_f32(y), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        uint16x4_t rounded = vaddhn_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7FFF));
        uint16x4_t nan = vorr_u16(vshrn_n_u32(bits, 16), vdup_n_u16(0x40));
        half = vbsl_u16(vmovn_u32(vceqq_f32(y, y)), rounded, nan);
    }
    vst1_u16(reinterpret_cast<uint16_t*>(out), half);
}

// A code's bits, moved to an fp16's, have 2^-8 of its value; subnormals convert to fp32 at full speed. A NaN's bits
// become a number's, and are set apart where there may be some.
constexpr float FACTOR = 256.0f;
constexpr bool DECODES_NANS = false;
template <bool NANS> INLINE float16x8_t halves(int8x8_t codes) {
    uint16x8_t half = vandq_u16(vreinterpretq_u16_s16(vshll_n_s8(codes, 7)), vdupq_n_u16(0xBF80));
    if (NANS) {
        const uint16x8_t largest = vdupq_n_u16(0x3F80);
        uint16x8_t nan = vceqq_u16(vandq_u16(half, largest), largest);
        half = vorrq_u16(half, vshlq_n_u16(nan, 10));
    }
    return vreinterpretq_f16_u16(half);
}
INLINE Vec lower(float16x8_t half) { return vcvt_f32_f16(vget_low_f16(half)); }
INLINE Vec upper(float16x8_t half) { return vcvt_high_f32_f16(half); }

INLINE int8x16_t codes_at(const uint8_t* address) { return vreinterpretq_s8_u8(vld1q_u8(address)); }

// 8 vectors of 8 codes in each half -> 8 vectors of one code from each, in each half.
INLINE void transpose_codes(int8x16_t a[8]) {
    int16x8_t b[8];
    int32x4_t c[8];
    for (int i = 0; i < 8; i += 2) {
        b[i] = vreinterpretq_s16_s8(vtrn1q_s8(a[i], a[i + 1]));
        b[i + 1] = vreinterpretq_s16_s8(vtrn2q_s8(a[i], a[i + 1]));
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            c[i + j] = vreinterpretq_s32_s16(vtrn1q_s16(b[i + j], b[i + j + 2]));
            c[i + j + 2] = vreinterpretq_s32_s16(vtrn2q_s16(b[i + j], b[i + j + 2]));
        }
    for (int i = 0; i < 4; ++i) {
        a[i] = vreinterpretq_s8_s32(vtrn1q_s32(c[i], c[i + 4]));
        a[i + 4] = vreinterpretq_s8_s32(vtrn2q_s32(c[i], c[i + 4]));
    }
}

// 16 codes of each row are transposed at a time, bytes as they are. In the strip, each unit of four along k has its
// four vectors of the first four rows, and then those of the other rows.
template <bool NANS> INLINE void decode_strip(const uint8_t* codes, int64_t stride, Element* out) {
    for (int quarter = 0; quarter < 4; ++quarter, out += 16 * ROWS) {
        int8x16_t rows[8];
        for (int i = 0; i < 8; ++i) rows[i] = codes_at(codes + i * stride + quarter * 16);
        transpose_codes(rows);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            Element* to = out + i / GRAIN * GRAIN * ROWS + i % GRAIN * LANES;
            float16x8_t first = halves<NANS>(vget_low_s8(rows[i])), second = halves<NANS>(vget_high_s8(rows[i]));
            vst1q_f32(to, lower(first));
            vst1q_f32(to + GRAIN * LANES, upper(first));
            vst1q_f32(to + 8 * ROWS, lower(second));
            vst1q_f32(to + 8 * ROWS + GRAIN * LANES, upper(second));
        }
    }
}

constexpr int CODES = 16, FEW = 7;
constexpr int together(int tokens, bool) { return tokens <= 3 ? 4 : 2; }
constexpr int place(int code) { return code; }
template <bool NANS> INLINE void decode_codes(const uint8_t* codes, Operand* out) {
    int8x16_t all = codes_at(codes);
    float16x8_t first = halves<NANS>(vget_low_s8(all)), second = halves<NANS>(vget_high_s8(all));
    out[0] = lower(first), out[1] = upper(first), out[2] = lower(second), out[3] = upper(second);
}

constexpr int IN_ORDER = CODES;
INLINE void decode_in_order(const uint8_t* codes, Vec* out) {
    decode_codes<true>(codes, out);
    for (int i = 0; i < IN_ORDER / LANES; ++i) out[i] = out[i] * FACTOR;
}

#include "tiles.h"

#include "panels.h"

#include "dots.h"
#include "vector_lookup.h"
#include "vector_quantize.h"

const Quantizer quantizer = {amax_rows, cast_rows, look_up_rows};

}  // namespace neon
}  // namespace
