// AVX512_BF16 and VBMI: dot products of pairs of bf16, for x in bf16.

#pragma once

#include "levels.h"
#include "problems.h"

BEGIN_TARGET(TARGET_AVX512_BF16)
namespace {
namespace avx512_bf16 {

using Vec = __m512;
using Element = uint16_t;
using Operand = __m512bh;
constexpr int LANES = 16, STEP = 32, TOKENS = 6, CODES = 64;

INLINE Vec multiply_add(Vec sum, Operand a, Operand b) { return _mm512_dpbf16_ps(sum, a, b); }

// Decodes 64 codes by tables of their upper and lower bytes, to two vectors of 32 in order.
INLINE void decode_register(__m512i code, Operand* out) {
    const __m512i upper0 = _mm512_load_si512(tables.upper), upper1 = _mm512_load_si512(tables.upper + 64);
    const __m512i lower0 = _mm512_load_si512(tables.lower), lower1 = _mm512_load_si512(tables.lower + 64);
    const __m512i sign = _mm512_set1_epi8(char(0x80)), order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    code = _mm512_permutexvar_epi64(order, code);
    __m512i upper = _mm512_permutex2var_epi8(upper0, code, upper1);
    __m512i lower = _mm512_permutex2var_epi8(lower0, code, lower1);
    upper = _mm512_ternarylogic_epi64(upper, code, sign, 0xF8);  // upper | code & sign
    out[0] = (__m512bh)_mm512_unpacklo_epi8(lower, upper);
    out[1] = (__m512bh)_mm512_unpackhi_epi8(lower, upper);
}
INLINE void decode_step(const uint8_t* codes, Operand* out) { decode_register(_mm512_loadu_si512(codes), out); }

#include "vector_product.h"

const Kernel kernel = {NAMES[AVX512_BF16], block_tokens, plan, pack, panel};

}  // namespace avx512_bf16
}  // namespace
END_TARGET
