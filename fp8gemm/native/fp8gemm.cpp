// y = x @ (data * scale).T + bias on a CPU, for FP8 (e4m3) weights and bf16, fp16 or fp32 activations; also the
// quantizer for such weights. A plain C interface without dependencies beyond a C++17 compiler.
//
//   1  Numbers            formats, and tables of all 128 magnitudes of e4m3
//   2  Problem, Kernel    the arguments of a product; what each instruction set implements
//   3  AMX kernel         tiles of 16 x 16 outputs
//   4  Driver             distributes panels of the weight's rows over threads
//   5  C interface
//   6  Vector kernels     dot products along k, and the quantizer: the file includes itself to compile this last
//                         section once per instruction set
//
// Each output is summed over k in an order that depends neither on the number of threads nor on timing. Weights are
// decoded to bf16 or fp32, exactly; sums are fp32; scales multiply the sums, or the weights where that is exact; only
// out is ever rounded to bf16.

#ifndef FP8GEMM_SECTION  // sections 1 to 5

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

// gcc 11 and clang 12 introduced the intrinsics for AMX, gcc 10 and clang 9 those for bf16.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define FP8GEMM_HAS_AMX 1
#endif
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define FP8GEMM_HAS_BF16 1
#endif

#define INLINE inline __attribute__((always_inline))

// torch's OpenMP runtime, which is already in the process: the threads of a second one would compete with it, at a
// tenth of the speed. Null if no such runtime is loaded; then a single thread runs.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
extern "C" __attribute__((weak)) int omp_get_thread_num();

namespace {

enum Type : int { BF16 = 0, FP16 = 1, FP32 = 2 };
enum Level : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AMX = 4 };
const char* const NAMES[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

template <class T> INLINE T smaller(T a, T b) { return a < b ? a : b; }
template <class T> INLINE T larger(T a, T b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

INLINE uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
INLINE float float_of(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
INLINE int64_t size_of(int64_t type) { return type == FP32 ? 4 : 2; }
// The number of bf16 whose sum is a number of this type: each holds 8 of its 8, 11 or 24 significant bits.
INLINE int64_t parts(int64_t type) { return type == BF16 ? 1 : type == FP16 ? 2 : 3; }

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

// x [m, k], data [n, k], scale [ceil(n / rows), ceil(k / cols)], bias [n] or null, out [m, n]; types are as in Type,
// strides in elements. library.py fills in this struct, field by field.
struct Problem {
    const uint8_t *x, *data;
    const float* scale;
    const uint8_t* bias;
    uint8_t* out;
    int64_t x_type, bias_type, out_type, x_stride, data_stride, out_stride, m, n, k, rows, cols;

    bool scales_vary_along_k() const { return cols < k; }
    const float* scale_row(int64_t row) const { return scale + row / rows * ceil_div(larger<int64_t>(k, 1), cols); }
    float bias_at(int64_t row) const { return bias ? load_number(bias, row, bias_type) : 0.0f; }
    const uint8_t* data_row(int64_t row) const { return data + row * data_stride; }
    const uint8_t* x_row(int64_t token) const { return x + token * x_stride * size_of(x_type); }
    uint8_t* out_row(int64_t token) const { return out + token * out_stride * size_of(out_type); }
};

// Tokens [start, start + count) of a problem, packed in a kernel's own order at `packed`.
struct Tokens { int64_t start, count; uint8_t* packed; };
// Rows [start, start + count) of the weight; `next` are the rows to prefetch meanwhile, or null.
struct Rows { int64_t start, count; const uint8_t* next; };
// The number of tokens packed at a time, the number of rows of a panel (the unit of work), and the memory for both.
struct Plan { int64_t pack_unit, panel_rows, packed_bytes, scratch_bytes; };

// An instruction set's product: `pack` packs units [first, last) of the tokens, `panel` computes some rows of out.
struct Kernel {
    const char* name;
    int64_t (*block_tokens)(const Problem&);
    Plan (*plan)(const Problem&, int64_t tokens, int threads);
    void (*pack)(const Problem&, Tokens, int64_t first, int64_t last);
    void (*panel)(const Problem&, Tokens, Rows, uint8_t* scratch);
};

// x [n, k] of any type -> data [n, k] and scale [ceil(n / rows), ceil(k / cols)], as fp8gemm/numerics.py defines it.
struct Quantization {
    const uint8_t* x;
    uint8_t* data;
    float* scale;
    int64_t x_type, x_stride, data_stride, n, k, rows, cols, ue8m0;

    int64_t blocks() const { return ceil_div(k, cols); }
    const uint8_t* x_row(int64_t row) const { return x + row * x_stride * size_of(x_type); }
};

// out [m, k] of any type: rows ids[0], ids[1], ... of data * scale, or all rows in order if ids is null.
struct Lookup {
    const int64_t* ids;
    const uint8_t* data;
    const float* scale;
    uint8_t* out;
    int64_t out_type, data_stride, m, n, k, rows, cols;
};

struct Quantizer {
    void (*amax)(const Quantization&, int64_t first, int64_t last, float* amax);
    void (*cast)(const Quantization&, int64_t first, int64_t last);
    void (*look_up)(const Lookup&, int64_t first, int64_t last);
};

}  // namespace

#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif
#define TARGET_AVX2 "avx2,fma,f16c"
#define TARGET_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define TARGET_AVX512_BF16 "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c"
#define TARGET_AMX "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16"

#define FP8GEMM_SECTION portable
#define FP8GEMM_LEVEL 0
#include __FILE__
#undef FP8GEMM_SECTION
#undef FP8GEMM_LEVEL

#if defined(__x86_64__)
BEGIN_TARGET(TARGET_AVX2)
#define FP8GEMM_SECTION avx2
#define FP8GEMM_LEVEL 1
#include __FILE__
#undef FP8GEMM_SECTION
#undef FP8GEMM_LEVEL
END_TARGET

BEGIN_TARGET(TARGET_AVX512)
#define FP8GEMM_SECTION avx512
#define FP8GEMM_LEVEL 2
#include __FILE__
#undef FP8GEMM_SECTION
#undef FP8GEMM_LEVEL
END_TARGET
#endif

#if FP8GEMM_HAS_BF16
BEGIN_TARGET(TARGET_AVX512_BF16)
#define FP8GEMM_SECTION avx512_bf16
#define FP8GEMM_LEVEL 3
#include __FILE__
#undef FP8GEMM_SECTION
#undef FP8GEMM_LEVEL
END_TARGET
#endif

// ---- 3  AMX kernel
//
// C [16 rows of w, 16 columns] += A [16, 32] B [32, 16] in bf16, with the weight as A: decoded rows can be used as A
// tiles directly, while B needs pairs of k interleaved, so x is transposed once, when it is packed. A token is one
// column if x is bf16; fp16 and fp32 are split into 2 and 3 bf16 parts with exactly their sum, one column each, and the
// columns are added at the end.

#if FP8GEMM_HAS_AMX
BEGIN_TARGET(TARGET_AMX)
namespace {
namespace amx {

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

// The upper 16 bits of two vectors of 16 fp32.
INLINE __m512i upper_halves(__m512 first, __m512 second) {
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(_mm512_castps_si512(first), odd, _mm512_castps_si512(second));
}

// Truncates `value` to its first 8 significant bits, a bf16; `rest` is exact, and zero for infinity and NaN.
INLINE __m512 cut(__m512 value, __m512& rest) {
    __mmask16 special = _mm512_fpclass_ps_mask(value, 0x99), nan = _mm512_fpclass_ps_mask(value, 0x81);
    __m512i bits = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(int(0xFFFF0000)));
    bits = _mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x00400000));
    rest = _mm512_maskz_sub_ps(_mm512_knot(special), value, _mm512_castsi512_ps(bits));
    return _mm512_castsi512_ps(bits);
}

// Columns of up to 32 elements of one token, from `first` on: its bf16 parts, zero from `count` on.
INLINE void split(const Problem& p, int64_t token, int64_t first, int64_t count, __m512i* columns) {
    uint32_t mask = count >= 32 ? ~0u : (1u << larger<int64_t>(count, 0)) - 1;
    const uint8_t* x = p.x_row(token) + first * size_of(p.x_type);
    if (p.x_type == BF16) {
        columns[0] = _mm512_maskz_loadu_epi16(mask, x);
        return;
    }
    __m512 low, high;
    if (p.x_type == FP16) {
        __m512i half = _mm512_maskz_loadu_epi16(mask, x);
        low = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
        high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
    } else {
        low = _mm512_maskz_loadu_ps(__mmask16(mask), x);
        high = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), x + 64);
    }
    for (int64_t part = 0; part < parts(p.x_type); ++part) {
        __m512 low_rest, high_rest;
        columns[part] = upper_halves(cut(low, low_rest), cut(high, high_rest));
        low = low_rest, high = high_rest;
    }
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
                split(p, tokens.start + start + i, step * 32, p.k - step * 32, columns + i * width);
            transpose(columns);
            uint8_t* out = tokens.packed + packed_tile(p, tokens, tile, step);
            for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(out + i * 64, columns[i]);
        }
    }
}

// Whether e4m3 values times this are exact and normal as bf16: a power of two from 2^-117 to 2^118, as MX scales are.
INLINE bool folds(float scale) {
    uint32_t bits = bits_of(scale);
    return (bits & 0x807FFFFF) == 0 && bits >= (127 - 117) << 23 && bits <= (127 + 118) << 23;
}

// bf16 `values` of 32 codes times a power of two: added to the exponent, unless the value is zero or NaN.
INLINE __m512i fold(__m512bh values, __mmask32 ordinary, float scale) {
    __m512i exponent = _mm512_set1_epi16(short(bits_of(scale) >> 16) - 0x3F80);
    return _mm512_mask_add_epi16((__m512i)values, ordinary, (__m512i)values, exponent);
}

// Decodes elements [first, first + count) of 16 rows to A tiles [steps][16 rows][32], with zeros for missing rows.
// Scales [16][blocks along k] multiply them, unless null; the 32 elements of step i are in block blocks[i].
INLINE void decode(const Problem& p, int64_t row, int64_t first, int64_t count, const uint8_t* next,
                   const float* const* scale_rows, const int64_t* blocks, uint8_t* out) {
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
            avx512_bf16::decode_register(code, values);
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

// c[2][COLUMNS] (+)= sum over `steps` of a[2] b[COLUMNS], all tiles; the strides of a, b and c are in bytes.
template <int COLUMNS>
INLINE void multiply(const uint8_t* a, const uint8_t* b, int64_t stride, int64_t steps, uint8_t* c, int64_t c_stride,
                     bool accumulate) {
    if (accumulate) {
        _tile_loadd(0, c, 64);
        _tile_loadd(2, c + c_stride, 64);
        if (COLUMNS > 1) _tile_loadd(1, c + TILE, 64);
        if (COLUMNS > 1) _tile_loadd(3, c + c_stride + TILE, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step, a += TILE, b += TILE) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (COLUMNS > 1) _tile_loadd(7, b + stride, 64);
        if (COLUMNS > 1) _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + stride, 64);
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

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_in_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

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
    static constexpr TileConfig config;
    _tile_loadconfig(&config);
    int64_t columns = tile_columns(p, tokens.count), padded_rows = round_up(rows.count, 32), size = chunk_of(columns);
    uint8_t *sums = weight + padded_rows * size * 2, *tiles = sums + padded_rows * columns * 64;
    const float* scale_rows[MAX_ROWS];
    float scales[8][MAX_ROWS];
    // For few tokens it is cheaper to scale the sums of long blocks than the weights.
    bool vary = p.scales_vary_along_k(), folded = vary && (columns > 4 || p.cols < 64);
    for (int64_t r = 0; r < padded_rows; ++r) {
        scale_rows[r] = p.scale_row(smaller(rows.start + r, p.n - 1));
        for (int64_t block = 0; folded && block < ceil_div(p.k, p.cols); ++block) folded = folds(scale_rows[r][block]);
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

}  // namespace amx
}  // namespace
END_TARGET
#endif

// ---- 4  Driver

namespace {

// Runs body(task, following task or -1, thread) for each task. Each thread has a range of tasks, the same in every
// call, so that its data stays in its caches; a thread that is done continues with the next range, to balance the load.
template <class Body> struct Shared {
    static constexpr int MAX_THREADS = 256;
    const Body& body;
    int64_t tasks;
    int threads;
    std::atomic<int64_t> claimed[MAX_THREADS] = {};

    Shared(const Body& body, int64_t tasks, int threads) : body(body), tasks(tasks), threads(threads) {}
    int64_t claim(int range) {
        int64_t first = tasks * range / threads, end = tasks * (range + 1) / threads;
        int64_t task = first + claimed[range].fetch_add(1, std::memory_order_relaxed);
        return task < end ? task : -1;
    }
    static void run(void* data) {
        auto& self = *static_cast<Shared*>(data);
        int thread = self.threads > 1 ? omp_get_thread_num() : 0;
        for (int i = 0; i < self.threads; ++i) {
            int range = (thread + i) % self.threads;
            for (int64_t task = self.claim(range); task >= 0;) {
                int64_t following = self.claim(range);
                self.body(task, following, thread);
                task = following;
            }
        }
    }
};

// The threads of an OpenMP runtime do not survive a fork, and the child would wait for them forever.
std::atomic<bool> forked{false};

template <class Body> void parallel(int threads, int64_t tasks, const Body& body) {
    bool alone = forked || threads <= 1 || tasks <= 1 || !GOMP_parallel || !omp_get_thread_num;
    threads = alone ? 1 : int(smaller<int64_t>(smaller<int64_t>(threads, tasks), Shared<Body>::MAX_THREADS));
    Shared<Body> shared(body, tasks, threads);
    if (alone) Shared<Body>::run(&shared);
    else GOMP_parallel(Shared<Body>::run, &shared, unsigned(threads), 0);
}

// Memory of the calling thread, kept between calls, since fresh pages cost more than small products.
struct Workspace {
    static constexpr int64_t KEPT = int64_t(32) << 20;
    uint8_t* memory = nullptr;
    int64_t size = 0;
    uint8_t* reserve(int64_t bytes) {
        if (bytes <= size) return memory;
        release();
        memory = static_cast<uint8_t*>(aligned_alloc(4096, size_t(round_up(bytes, 4096))));
        size = memory ? bytes : 0;
        return memory;
    }
    void release() { free(memory); memory = nullptr; size = 0; }
    void trim() { if (size > KEPT) release(); }
    ~Workspace() { release(); }
};
thread_local Workspace workspace;

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

// The level of this CPU and operating system. Linux allows a process to use the AMX tiles, 8 KB of context per thread,
// only after a request; that the tiles multiply bf16 is bit 22 of CPUID 7's EDX (Intel's SDM, volume 2).
int detect() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PORTABLE;  // CPUs with both have F16C
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx512) return AVX2;
#if FP8GEMM_HAS_BF16
    if (!__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512bf16")) return AVX512;
#if FP8GEMM_HAS_AMX && defined(__linux__)
    uint32_t a, b, c, d;
    constexpr long REQUEST = 0x1023 /* ARCH_REQ_XCOMP_PERM */, TILES = 18 /* XFEATURE_XTILEDATA */;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && syscall(SYS_arch_prctl, REQUEST, TILES) == 0)
        return AMX;
#endif
    return AVX512_BF16;
#else
    return AVX512;
#endif
#else
    return PORTABLE;
#endif
}

}  // namespace

// ---- 5  C interface: levels as in Level; 0 is success, -1 out of memory, -2 ends that do not ascend to m, -3 a null
// pointer to elements, -4 an index out of range

extern "C" {

int fp8gemm_level() {
    static const int level = [] {
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
        return detect();
    }();
    return level;
}

int fp8gemm_has_threads() { return GOMP_parallel && omp_get_thread_num; }

const char* fp8gemm_kernel(int level, const Problem* p) { return choose(smaller(level, fp8gemm_level()), *p)->name; }

int fp8gemm_linear(int level, int threads, const Problem* p) {
    if (p->m && p->n && (!p->out || !p->scale || (p->k && (!p->x || !p->data)))) return -3;
    return multiply(*p, *choose(smaller(level, fp8gemm_level()), *p), threads) ? 0 : -1;
}

// data, scale and bias of each expert follow those of the previous one; tokens of expert e end before ends[e].
int fp8gemm_grouped(int level, int threads, const Problem* p, int64_t expert_stride, const int32_t* ends,
                    int64_t experts) {
    int64_t start = 0;
    if (experts && !ends) return -3;
    for (int64_t e = 0; e < experts; start = ends[e++])
        if (ends[e] < start) return -2;
    if (start != p->m) return -2;
    Problem expert = *p;
    start = 0;
    for (int64_t e = 0; e < experts; start = ends[e++]) {
        expert.x = p->x_row(start), expert.out = p->out_row(start), expert.m = ends[e] - start;
        if (int status = fp8gemm_linear(level, threads, &expert)) return status;
        expert.data += expert_stride;
        expert.scale += ceil_div(p->n, p->rows) * ceil_div(larger<int64_t>(p->k, 1), p->cols);
        if (p->bias) expert.bias += p->n * size_of(p->bias_type);
    }
    return 0;
}

int fp8gemm_quantize(int level, int threads, const Quantization* q) {
    if (q->n && q->k && (!q->x || !q->data || !q->scale)) return -3;
    return quantize(*q, choose_quantizer(smaller(level, fp8gemm_level())), threads) ? 0 : -1;
}

int fp8gemm_lookup(int level, int threads, const Lookup* l) {
    if (l->m && l->k && (!l->data || !l->scale || !l->out)) return -3;
    if (l->ids)
        for (int64_t i = 0; i < l->m; ++i)
            if (l->ids[i] < 0 || l->ids[i] >= l->n) return -4;
    look_up(*l, choose_quantizer(smaller(level, fp8gemm_level())), threads);
    return 0;
}

}  // extern "C"

#else  // ---- 6  Vector kernels: FP8GEMM_SECTION names the instruction set, FP8GEMM_LEVEL is its Level

namespace {
namespace FP8GEMM_SECTION {

// Vec: LANES fp32 sums. Operand: STEP elements of a weight or of x, in the form in which they are multiplied. TOKENS x
// ROWS sums and their operands fill the registers.
constexpr int ROWS = 4;

#if FP8GEMM_LEVEL == 3
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

#else
constexpr int LANES = FP8GEMM_LEVEL == 0 ? 4 : FP8GEMM_LEVEL == 1 ? 8 : 16;
using Vec = float __attribute__((vector_size(LANES * 4)));
using Element = float;
using Operand = Vec;
constexpr int STEP = LANES, TOKENS = FP8GEMM_LEVEL == 0 ? 2 : FP8GEMM_LEVEL == 1 ? 3 : 6;
constexpr int CODES = FP8GEMM_LEVEL == 0 ? 4 : 2 * LANES;

INLINE Vec multiply_add(Vec sum, Operand a, Operand b) { return sum + a * b; }  // becomes fma where there is one

// With AVX: a code's bits, moved to an fp16's, have 2^-8 of its value; subnormals convert to fp32 at full speed.
INLINE void decode_step(const uint8_t* codes, Operand* out) {
#if FP8GEMM_LEVEL == 0
    for (int i = 0; i < CODES; ++i) out[0][i] = tables.fp32[codes[i]];
#elif FP8GEMM_LEVEL == 1
    const __m256i largest = _mm256_set1_epi16(0x3F80);
    __m256i half = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    half = _mm256_and_si256(_mm256_slli_epi16(half, 7), _mm256_set1_epi16(short(0xBF80)));
    __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, largest), largest);
    half = _mm256_or_si256(half, _mm256_slli_epi16(nan, 10));
    out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(half)) * 256.0f;
    out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)) * 256.0f;
#else
    const __m512i largest = _mm512_set1_epi16(0x3F80);
    __m512i half = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    half = _mm512_and_si512(_mm512_slli_epi16(half, 7), _mm512_set1_epi16(short(0xBF80)));
    __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(half, largest), largest);
    half = _mm512_mask_blend_epi16(nan, half, _mm512_or_si512(half, _mm512_set1_epi16(0x7C00)));
    out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(half)) * 256.0f;
    out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)) * 256.0f;
#endif
}
#endif

INLINE Operand load(const Element* address) {
    Operand operand;
    memcpy(&operand, address, sizeof operand);
    return operand;
}

INLINE float sum(Vec vector) {
    float lanes[LANES];
    memcpy(lanes, &vector, sizeof lanes);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

constexpr int64_t SPAN = 512;       // elements along k that are decoded at a time
constexpr int64_t PREFETCH = 4096;  // bytes ahead; half and double measured alike or slower

// Blocks along k start at multiples of STEP in packed rows, so that the padding of one is separate from the next.
INLINE int64_t padded_block(const Problem& p) {
    return p.scales_vary_along_k() ? round_up(p.cols, STEP) : round_up(p.k, CODES);
}
INLINE int64_t padded_k(const Problem& p) {
    return p.scales_vary_along_k() ? ceil_div(p.k, p.cols) * padded_block(p) : padded_block(p);
}

// CODES codes, of which `count` exist; the others are zeros.
INLINE void decode_some(const uint8_t* codes, int64_t count, Operand* out) {
    if (count >= CODES) return decode_step(codes, out);
    uint8_t last[CODES] = {};
    memcpy(last, codes, size_t(count));
    decode_step(last, out);
}

// Decodes `count` codes followed by zeros, CODES at a time, prefetching as many at `next`.
INLINE void decode(const uint8_t* codes, const uint8_t* next, Element* out, int64_t count) {
    for (int64_t i = 0; i < count; i += CODES) {
        Operand operands[CODES / STEP];
        if (CODES == 64 || i % 64 == 0) __builtin_prefetch(next + i);
        decode_some(codes + i, count - i, operands);
        memcpy(out + i, operands, sizeof operands);
    }
}

// The dot product of a row of the weight with one token, directly from the codes; blocks are multiples of CODES.
INLINE Vec dot_row(const Problem& p, int64_t row, const Element* x) {
    const uint8_t* codes = p.data_row(row);
    bool vary = p.scales_vary_along_k();
    Vec total{};
    const float* scales = p.scale_row(row);
    for (int64_t k = 0; k < p.k;) {
        int64_t end = vary ? smaller(p.k, k + p.cols) : p.k;
        float scale = vary ? *scales++ : 1.0f;
        Vec sums[CODES / STEP] = {};
        for (; k < end; k += CODES) {
            Operand w[CODES / STEP];
            __builtin_prefetch(codes + k + PREFETCH);
            decode_some(codes + k, end - k, w);
            for (int i = 0; i < CODES / STEP; ++i) sums[i] = multiply_add(sums[i], w[i], load(x + k + i * STEP));
        }
        for (int i = 0; i < CODES / STEP; ++i) total += sums[i] * scale;
    }
    return total;
}

// total[t][r] (+)= scale[r] * sum over span of w[r] x[t]; scale is null for 1.
template <int COUNT>
INLINE void dot(const Element* w, const Element* x, int64_t x_stride, int64_t span, const float* scale, Vec* total) {
    Vec sums[COUNT][ROWS];
    for (int t = 0; t < COUNT; ++t)
        for (int r = 0; r < ROWS; ++r) sums[t][r] = scale ? Vec{} : total[t * ROWS + r];
    for (int64_t k = 0; k < span; k += STEP) {
        Operand xs[COUNT];
        for (int t = 0; t < COUNT; ++t) xs[t] = load(x + t * x_stride + k);
        for (int r = 0; r < ROWS; ++r) {
            Operand ws = load(w + r * SPAN + k);
            for (int t = 0; t < COUNT; ++t) sums[t][r] = multiply_add(sums[t][r], ws, xs[t]);
        }
    }
    for (int t = 0; t < COUNT; ++t)
        for (int r = 0; r < ROWS; ++r)
            total[t * ROWS + r] = scale ? total[t * ROWS + r] + sums[t][r] * scale[r] : sums[t][r];
}

template <int COUNT>
INLINE void dot_at_most(int64_t count, const Element* w, const Element* x, int64_t x_stride, int64_t span,
                        const float* scale, Vec* total) {
    if (count >= COUNT) dot<COUNT>(w, x, x_stride, span, scale, total);
    else if constexpr (COUNT > 1) dot_at_most<COUNT - 1>(count, w, x, x_stride, span, scale, total);
}

int64_t block_tokens(const Problem&) { return 64; }

Plan plan(const Problem& p, int64_t tokens, int) {
    int64_t scratch = ROWS * (SPAN * int64_t(sizeof(Element)) + tokens * int64_t(sizeof(Vec)));
    return {1, 32, tokens * padded_k(p) * int64_t(sizeof(Element)), scratch};
}

#if FP8GEMM_LEVEL == 3
INLINE void copy(const uint8_t* x, int64_t, Element* out, int64_t count) { memcpy(out, x, size_t(count) * 2); }
#else
INLINE void copy(const uint8_t* x, int64_t type, float* out, int64_t count) {
    if (type == FP32) memcpy(out, x, size_t(count) * 4);
    else if (type == BF16) for (int64_t i = 0; i < count; ++i) out[i] = load_number(x, i, BF16);
    else for (int64_t i = 0; i < count; ++i) out[i] = load_number(x, i, FP16);
}
#endif

// Packed: [tokens][padded_k] elements.
void pack(const Problem& p, Tokens tokens, int64_t first, int64_t last) {
    int64_t block = padded_block(p);
    for (int64_t t = first; t < last; ++t) {
        const uint8_t* x = p.x_row(tokens.start + t);
        Element* out = reinterpret_cast<Element*>(tokens.packed) + t * padded_k(p);
        for (int64_t k = 0; k < p.k; k += smaller(p.cols, p.k), out += block) {
            int64_t count = smaller(p.cols, p.k - k);
            copy(x + k * size_of(p.x_type), p.x_type, out, count);
            memset(out + count, 0, size_t(block - count) * sizeof(Element));
        }
    }
}

// Sums of ROWS rows of the weight from `row` on with all tokens, before the lanes are added.
INLINE void sum_rows(const Problem& p, Tokens tokens, int64_t row, Element* w, Vec* total) {
    const Element* x = reinterpret_cast<const Element*>(tokens.packed);
    bool vary = p.scales_vary_along_k();
    int64_t rows = smaller<int64_t>(ROWS, p.n - row), x_stride = padded_k(p);
    for (int64_t i = 0; i < tokens.count * ROWS; ++i) total[i] = Vec{};
    for (int64_t k = 0, block = 0; k < p.k;) {
        int64_t end = vary ? smaller(p.k, (block + 1) * p.cols) : p.k;
        int64_t count = smaller(SPAN, end - k), span = round_up(count, STEP);
        const uint8_t* next = k + count < p.k ? p.data_row(row) + k + count : p.data_row(row + ROWS);
        float scale[ROWS] = {};
        memset(w + rows * SPAN, 0, size_t(ROWS - rows) * SPAN * sizeof(Element));
        for (int64_t r = 0; r < rows; ++r) {
            decode(p.data_row(row + r) + k, next + r * p.data_stride, w + r * SPAN, count);
            scale[r] = p.scale_row(row + r)[block];
        }
        for (int64_t t = 0; t < tokens.count; t += TOKENS)
            dot_at_most<TOKENS>(tokens.count - t, w, x + t * x_stride, x_stride, span, vary ? scale : nullptr,
                                total + t * ROWS);
        k += count, x += span;
        if (k == end) ++block;
    }
}

void panel(const Problem& p, Tokens tokens, Rows rows, uint8_t* scratch) {
    Vec* total = reinterpret_cast<Vec*>(scratch);
    Element* w = reinterpret_cast<Element*>(total + tokens.count * ROWS);
    const Element* x = reinterpret_cast<const Element*>(tokens.packed);
    bool alone = tokens.count == 1 && (!p.scales_vary_along_k() || p.cols % CODES == 0);
    for (int64_t row = rows.start; row < rows.start + rows.count; row += ROWS) {
        if (!alone) sum_rows(p, tokens, row, w, total);
        for (int64_t r = 0; r < ROWS && row + r < p.n; ++r) {
            if (alone) total[r] = dot_row(p, row + r, x);
            float scale = p.scales_vary_along_k() ? 1.0f : *p.scale_row(row + r), bias = p.bias_at(row + r);
            for (int64_t t = 0; t < tokens.count; ++t) {
                float y = sum(total[t * ROWS + r]) * scale;
                store_number(p.out_row(tokens.start + t), row + r, p.out_type, p.bias ? y + bias : y);
            }
        }
    }
}

const Kernel kernel = {NAMES[FP8GEMM_LEVEL], block_tokens, plan, pack, panel};

#if FP8GEMM_LEVEL < 3
// The largest finite magnitude; as integers, floats have the same order.
template <class Bits>
INLINE Bits largest_magnitude(const uint8_t* address, int64_t count, Bits infinity) {
    const Bits* x = reinterpret_cast<const Bits*>(address);
    constexpr Bits magnitude_bits = Bits(~Bits(0)) >> 1;
    Bits largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        Bits magnitude = x[i] & magnitude_bits;
        magnitude = magnitude < infinity ? magnitude : Bits(0);
        largest = largest < magnitude ? magnitude : largest;
    }
    return largest;
}

// amax [blocks along k] of rows [first, last).
void amax_rows(const Quantization& q, int64_t first, int64_t last, float* amax) {
    memset(amax, 0, size_t(q.blocks()) * 4);
    for (int64_t row = first; row < last; ++row)
        for (int64_t b = 0; b < q.blocks(); ++b) {
            int64_t count = smaller(q.cols, q.k - b * q.cols);
            const uint8_t* x = q.x_row(row) + b * q.cols * size_of(q.x_type);
            float largest;
            if (q.x_type == FP32) largest = float_of(largest_magnitude<uint32_t>(x, count, 0x7F800000));
            else if (q.x_type == BF16) largest = from_bf16(largest_magnitude<uint16_t>(x, count, 0x7F80));
            else largest = from_fp16(largest_magnitude<uint16_t>(x, count, 0x7C00));
            amax[b] = larger(amax[b], largest);
        }
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

void cast_rows(const Quantization& q, int64_t first, int64_t last) {
    constexpr int64_t BUFFER = 512;
    float buffer[BUFFER];
    for (int64_t row = first; row < last; ++row)
        for (int64_t k = 0; k < q.k;) {
            int64_t end = smaller(smaller(k + BUFFER, q.k), (k / q.cols + 1) * q.cols);
            float scale = q.scale[row / q.rows * q.blocks() + k / q.cols];
            copy(q.x_row(row) + k * size_of(q.x_type), q.x_type, buffer, end - k);
            uint8_t* data = q.data + row * q.data_stride + k;
            for (int64_t i = 0; i < end - k; ++i) data[i] = to_e4m3(buffer[i], scale);
            k = end;
        }
}

void look_up_rows(const Lookup& l, int64_t first, int64_t last) {
    int64_t blocks = ceil_div(larger<int64_t>(l.k, 1), l.cols);
    for (int64_t i = first; i < last; ++i) {
        int64_t row = l.ids ? l.ids[i] : i;
        const uint8_t* codes = l.data + row * l.data_stride;
        uint8_t* out = l.out + i * l.k * size_of(l.out_type);
        for (int64_t k = 0; k < l.k;) {
            int64_t end = smaller(l.k, (k / l.cols + 1) * l.cols);
            float scale = l.scale[row / l.rows * blocks + k / l.cols];
            for (; k < end; k += CODES) {
                Operand w[CODES / STEP];
                float values[CODES];
                int64_t count = smaller<int64_t>(end - k, CODES);
                decode_some(codes + k, count, w);
                for (int j = 0; j < CODES / STEP; ++j) w[j] *= scale;
                memcpy(values, w, sizeof values);
                if (l.out_type == FP32) memcpy(out + k * 4, values, size_t(count) * 4);
                else if (l.out_type == BF16 && count == CODES)
                    for (int64_t j = 0; j < CODES; ++j) reinterpret_cast<uint16_t*>(out)[k + j] = to_bf16(values[j]);
                else
                    for (int64_t j = 0; j < count; ++j) store_number(out, k + j, l.out_type, values[j]);
            }
            k = end;
        }
    }
}

const Quantizer quantizer = {amax_rows, cast_rows, look_up_rows};
#endif

}  // namespace FP8GEMM_SECTION
}  // namespace

#endif
