// Numbers: bf16, fp16 and fp32, decoding and rounding of e4m3, and a table of its 128 magnitudes.

#pragma once

#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
// Keeps a vector in a register. An emulator of instructions, which has no such registers, defines its own.
#ifndef KEEP
#define KEEP(vector) asm("" : "+v"(vector))
#endif
#define NOINLINE __attribute__((noinline))

namespace {

enum Type : int { BF16 = 0, FP16 = 1, FP32 = 2 };

template <class T> INLINE T smaller(T a, T b) { return a < b ? a : b; }
template <class T> INLINE T larger(T a, T b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

INLINE uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
INLINE float float_of(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
INLINE int64_t size_of(int64_t type) { return type == FP32 ? 4 : 2; }
// The number of bf16 whose sum is a number of this type: each holds 8 of its 8, 11 or 24 significant bits.
INLINE int64_t parts(int64_t type) { return type == BF16 ? 1 : type == FP16 ? 2 : 3; }

// A constant made where it is used: compilers would keep it in a register, of which loops before need all.
INLINE float fresh(float constant) {
    uint32_t bits = bits_of(constant);
    asm volatile("" : "+r"(bits));
    return float_of(bits);
}

INLINE float from_bf16(uint16_t half) { return float_of(uint32_t(half) << 16); }

// An fp16's magnitude shifted into an fp32 is too small by 2^112; the product is exact, for subnormals as well.
INLINE float from_fp16(uint16_t half) {
    uint32_t magnitude = half & 0x7FFF;
    float value = magnitude < 0x7C00 ? float_of(magnitude << 13) * 0x1p112f : float_of(magnitude << 13 | 0x7F800000);
    return float_of(bits_of(value) | uint32_t(half & 0x8000) << 16);
}

INLINE float load_number(const void* address, int64_t i, int64_t type) {
    if (type == FP32) return static_cast<const float*>(address)[i];
    uint16_t half = static_cast<const uint16_t*>(address)[i];
    return type == BF16 ? from_bf16(half) : from_fp16(half);
}

// Round to nearest, ties to even.
INLINE uint16_t to_bf16(float value) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

INLINE uint16_t to_fp16(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00);
    if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);  // 65520 and more round to infinity
    if (magnitude < 0x38800000)  // subnormal: added to 0.5, whose last bit is worth 2^-24, it is rounded there
        return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000));
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13));
}

INLINE void store_number(void* address, int64_t i, int64_t type, float value) {
    if (type == FP32) static_cast<float*>(address)[i] = value;
    else static_cast<uint16_t*>(address)[i] = type == BF16 ? to_bf16(value) : to_fp16(value);
}

// An e4m3 is rounded at bit 2^20 of an fp32, to even; below 2^-6 at 2^-9, where the last bit of 2^14 is.
INLINE uint8_t to_e4m3(float x, float scale) {
    uint32_t sign = bits_of(x) >> 24 & 0x80;
    float scaled = float_of(bits_of(x / scale) & 0x7FFFFFFF);
    scaled = scaled < 448.0f ? scaled : 448.0f;
    uint32_t bits = bits_of(scaled);
    uint32_t normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3);
    uint32_t subnormal = bits_of(scaled + 0x1p14f) & 0xFF;
    uint32_t code = (bits < 0x3C800000 ? subnormal : normal) | sign;
    return uint8_t((bits_of(x) & 0x7FFFFFFF) < 0x7F800000 ? code : 0x7F);
}

// The values of the e4m3 magnitudes 0x00 to 0x7F: as fp32 followed by the negative ones, and as the upper and lower
// byte of a bf16, which represents each exactly and as a normal number (AMX flushes subnormals to zero).
struct Tables {
    float fp32[256];
    alignas(64) uint8_t upper[128], lower[128];
    Tables() {
        for (int code = 0; code < 128; ++code) {
            int exponent = code >> 3, mantissa = code & 7;
            float unit = float_of(uint32_t(larger(exponent, 1) + 117) << 23);  // 2^(exponent - 10)
            uint32_t bits = code == 0x7F ? 0x7FC00000 : bits_of(float(exponent ? mantissa + 8 : mantissa) * unit);
            fp32[code] = float_of(bits);
            fp32[code + 128] = float_of(bits | 0x80000000);
            upper[code] = uint8_t(bits >> 24);
            lower[code] = uint8_t(bits >> 16);
        }
    }
};
const Tables tables;

}  // namespace
