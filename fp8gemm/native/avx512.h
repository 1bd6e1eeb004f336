// AVX-512: vectors of 16 fp32.

#pragma once

#include "levels.h"
#include "problems.h"

BEGIN_TARGET(TARGET_AVX512)
namespace {
namespace avx512 {

constexpr int LANES = 16, STEP = LANES, TOKENS = 6, CODES = 2 * LANES;
using Vec = float __attribute__((vector_size(LANES * 4)));
using Element = float;
using Operand = Vec;

INLINE Vec multiply_add(Vec sum, Operand a, Operand b) { return sum + a * b; }  // becomes fma where there is one

// A code's bits, moved to an fp16's, have 2^-8 of its value; subnormals convert to fp32 at full speed.
INLINE void decode_step(const uint8_t* codes, Operand* out) {
    const __m512i largest = _mm512_set1_epi16(0x3F80);
    __m512i half = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    half = _mm512_and_si512(_mm512_slli_epi16(half, 7), _mm512_set1_epi16(short(0xBF80)));
    __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(half, largest), largest);
    half = _mm512_mask_blend_epi16(nan, half, _mm512_or_si512(half, _mm512_set1_epi16(0x7C00)));
    out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(half)) * 256.0f;
    out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)) * 256.0f;
}

#include "vector_product.h"
#include "vector_quantize.h"
#include "vector_lookup.h"

const Kernel kernel = {NAMES[AVX512], block_tokens, plan, pack, panel};
const Quantizer quantizer = {amax_rows, cast_rows, look_up_rows};

}  // namespace avx512
}  // namespace
END_TARGET
