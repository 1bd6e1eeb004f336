// AMX, many tokens: tiles of sums of 16 tokens with 16 rows of the weight.
//
// C [16 tokens][16 rows] += A [16 tokens][32 along k] B [16 pairs along k][16 rows] in bf16. Tokens in bf16 can be used
// as A where they lie, and sums are stored as they are: only the weight is transposed, once for all tokens of a block;
// decoded for AVX512_BF16, it is made of such B already. Tokens in fp16 and fp32 are split into 2 and 3 bf16 parts with
// exactly their sum, each an A of its own.

#pragma once

#include "amx_operands.h"

BEGIN_TARGET(TARGET_AMX)
namespace {
namespace amx_many {

using amx::STEP;
using avx512_bf16::decode_strip, avx512_bf16::store;
using avx512_bf16::Element, avx512_bf16::Vec;

constexpr const char* NAME = NAMES[AMX];
constexpr int LANES = 16, VECTORS = 2, ROWS = VECTORS * LANES, GRAIN = 2;
constexpr int64_t CHUNK = 512, PANEL = 256, RESTART = CHUNK;
constexpr bool DECODES_NANS = true;
constexpr float FACTOR = 1.0f;

#include "strips.h"

constexpr int64_t WEIGHTS = STEP * ROWS;  // elements of w in a step: lines of B of 16 rows and of the others alternate
constexpr int64_t LINE = 2 * 64;          // bytes from one line of B to the next

// Tokens of a tile. All tiles have as many; the last has some that the tile before it has, too.
INLINE int64_t height_of(int64_t tokens) { return ceil_div(tokens, ceil_div(tokens, 16)); }
INLINE int64_t first_of(int64_t tokens, int64_t tile) {
    return smaller(tile * height_of(tokens), tokens - height_of(tokens));
}
INLINE int64_t pack_unit(int64_t tokens) { return height_of(tokens); }
INLINE int64_t room_for(int64_t tokens) { return round_up(tokens, height_of(tokens)); }
INLINE int64_t packed_stride(const Problem& p) { return chunk_size(p) * parts(p.x_type); }

// Tiles that lie in one piece are loaded faster. That is worth a copy, for which threads wait, unless there are few rows
// to multiply it by. Tokens far apart, or in few sets of the caches, are always copied.
INLINE bool in_place(const Problem& p) {
    bool apart = p.x_stride >= 4096 || p.x_stride % 1024 == 0;
    return p.x_type == BF16 && p.k % STEP == 0 && p.n < 1024 && !apart;
}

// So few that they and sums that are kept from chunk to chunk stay in the L2 cache.
int64_t block_tokens(const Problem& p) {
    return (chunks(p) > 1 ? 256 : in_place(p) ? 1024 : 512) / parts(p.x_type);
}

// The packed elements of a tile's tokens, from the chunk that begins at `chunk` on.
INLINE Element* packed(const Problem& p, Tokens tokens, int64_t chunk, int64_t tile) {
    int64_t before = chunk / chunk_size(p) * room_for(tokens.count) + tile * height_of(tokens.count);
    return reinterpret_cast<Element*>(tokens.packed) + before * packed_stride(p);
}

// Packed: [chunks][tiles][parts][steps][height][STEP].
void pack(const Problem& p, Tokens tokens, int64_t first, int64_t last) {
    int64_t height = height_of(tokens.count), size = chunk_size(p), width = parts(p.x_type);
    for (int64_t tile = first; !in_place(p) && tile < last; ++tile)
        for (int64_t chunk = 0; chunk < p.k; chunk += size)
            for (int64_t t = 0; t < height; ++t) {
                const uint8_t* x = p.x_row(tokens.start + first_of(tokens.count, tile) + t);
                Element* out = packed(p, tokens, chunk, tile) + t * STEP;
                int64_t k = chunk, end = smaller(chunk + size, p.k), whole = p.x_type == BF16 ? end - STEP : -1;
                for (; k <= whole; k += STEP, out += height * STEP)
                    _mm512_storeu_si512(out, _mm512_loadu_si512(x + k * 2));
                for (; k < end; k += STEP, out += height * STEP) {
                    __m512i several[3];
                    amx::split(x + k * size_of(p.x_type), p.x_type, p.k - k, several);
                    for (int64_t i = 0; i < width; ++i) _mm512_storeu_si512(out + i * size * height, several[i]);
                }
            }
}

// Elements of one or two tiles of tokens: `row` bytes from a token to the next, and in elements from a step along k and
// from a part to the next.
struct Pair { const Element *first, *second; int64_t row, step, part, parts, height; };

INLINE Pair pair_of(const Problem& p, Tokens tokens, int64_t chunk, int64_t tile, int64_t second) {
    int64_t height = height_of(tokens.count);
    if (!in_place(p))
        return {packed(p, tokens, chunk, tile), packed(p, tokens, chunk, second), STEP * 2, STEP * height,
                chunk_size(p) * height, parts(p.x_type), height};
    auto x = [&](int64_t i) {
        return reinterpret_cast<const Element*>(p.x_row(tokens.start + first_of(tokens.count, i))) + chunk;
    };
    return {x(tile), x(second), p.x_stride * 2, STEP, 0, 1, height};
}

// Sums [tokens][ROWS] of one or two tiles of tokens to memory.
template <int TILES> INLINE void store_sums(float* sums, int64_t height) {
    _tile_stored(0, sums, ROWS * 4);
    _tile_stored(1, sums + LANES, ROWS * 4);
    if (TILES > 1) _tile_stored(2, sums + height * ROWS, ROWS * 4);
    if (TILES > 1) _tile_stored(3, sums + height * ROWS + LANES, ROWS * 4);
}

// Adds `steps` of x times w to the sums in tiles. Tokens are loaded so that w stays in the L1 cache.
template <int TILES>
INLINE void multiply_steps(Pair x, const Element* w, int64_t steps, Next& next, Ahead& ahead) {
    for (int64_t step = 0; step < steps; ++step, x.first += x.step, x.second += x.step, w += WEIGHTS) {
        next.fetch(), ahead.fetch<true>();
        _tile_loadd(6, w, LINE);
        _tile_loadd(7, w + LANES * GRAIN, LINE);
        const Element *a = x.first, *b = x.second;
        for (int64_t part = 0; part < x.parts; ++part, a += x.part, b += x.part) {
            _tile_stream_loadd(4, a, x.row);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (TILES > 1) _tile_stream_loadd(5, b, x.row);
            if (TILES > 1) _tile_dpbf16ps(2, 5, 6);
            if (TILES > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
}

INLINE Ahead sums_ahead(const float* sums, int64_t tokens) {
    const int64_t bytes = tokens * ROWS * 4;
    return {reinterpret_cast<const uint8_t*>(sums), 0, bytes, bytes / 64};
}

// Adds several segments' own sums [COUNT][2 x 16][ROWS], times their factors, to what is `kept` unless that is null.
template <int COUNT>
INLINE void add_up(const float* added, const float* const* factors, int64_t tokens, const float* kept, float* out) {
    for (int j = 0; j < VECTORS; ++j) {
        Vec factor[COUNT];
        for (int i = 0; i < COUNT; ++i) factor[i] = floats(factors[i] + j * LANES);
        for (int64_t t = 0; t < tokens; ++t) {
            Vec sum = kept ? floats(kept + t * ROWS + j * LANES) : Vec{};
            for (int i = 0; i < COUNT; ++i) sum += floats(added + (i * 32 + t) * ROWS + j * LANES) * factor[i];
            put(out + t * ROWS + j * LANES, sum);
        }
    }
}

// Multiplies a strip by one or two tiles of tokens. Each segment is multiplied by its factors if `scaled`. Sums start
// from zero in each chunk, so that less is lost by rounding; to `out` go those and what `sums` were before.
template <int TILES>
NOINLINE void multiply_tiles(Pair x, const Strip& strip, bool scaled, const float* sums, float* out, Next& next,
                             Ahead& ahead) {
    constexpr int SEVERAL = 4;  // segments: sums are loaded and stored once for all
    auto steps_of = [](const Segment* segment) { return ceil_div(segment->units * GRAIN, STEP); };
    const Element* w = strip.w;
    alignas(64) float added[SEVERAL][32 * ROWS];
    if (!scaled) {
        int64_t steps = 0;
        for (const Segment* segment = strip.segments; segment < strip.end; ++segment) steps += steps_of(segment);
        amx::zero_sums();
        multiply_steps<TILES>(x, w, steps, next, ahead);
        if (strip.first) return store_sums<TILES>(out, x.height);
        float ones[ROWS];
        for (float& one : ones) one = 1.0f;
        const float* factors[] = {ones};
        store_sums<TILES>(added[0], x.height);
        return add_up<1>(added[0], factors, TILES * x.height, sums, out);
    }
    const float* kept = strip.first ? nullptr : sums;
    for (const Segment* segment = strip.segments; segment < strip.end; kept = out) {
        const float* factors[SEVERAL];
        int count = 0;
        for (; count < SEVERAL && segment < strip.end; ++count, ++segment) {
            int64_t steps = steps_of(segment);
            amx::zero_sums();
            multiply_steps<TILES>(x, w, steps, next, ahead);
            store_sums<TILES>(added[count], x.height);
            factors[count] = strip.factors + segment->factor * PANEL;
            x.first += steps * x.step, x.second += steps * x.step, w += steps * WEIGHTS;
        }
        auto* add = count == 4 ? add_up<4> : count == 3 ? add_up<3> : count == 2 ? add_up<2> : add_up<1>;
        add(added[0], factors, TILES * x.height, kept, out);
    }
}

// Whether all factors can be added to exponents, see amx::folds.
INLINE bool folds(const Strip& strip) {
    bool all = true;
    for (const Segment* segment = strip.segments; all && segment < strip.end; ++segment)
        for (int64_t r = 0; all && r < strip.rows; ++r)
            all = amx::folds(strip.factors[segment->factor * PANEL + r]);
    return all;
}

// Multiplies the decoded weight by such factors: what is neither zero, as all of a missing row is, nor NaN.
INLINE void fold(const Strip& strip) {
    Element* w = strip.w;
    const __m512i magnitude_bits = _mm512_set1_epi16(0x7FFF), nan = _mm512_set1_epi16(0x7FC0);
    for (const Segment* segment = strip.segments; segment < strip.end; ++segment) {
        __m512i exponents[VECTORS];
        for (int j = 0; j < VECTORS; ++j) {
            const float* factors = strip.factors + segment->factor * PANEL + j * LANES;
            __m512i upper = _mm512_srli_epi32(_mm512_loadu_si512(factors), 16);
            __m512i both = _mm512_or_si512(upper, _mm512_slli_epi32(upper, 16));
            exponents[j] = _mm512_sub_epi16(both, _mm512_set1_epi16(0x3F80));
        }
        for (int64_t i = 0; i < segment->units * VECTORS; ++i, w += LANES * GRAIN) {
            __m512i values = _mm512_loadu_si512(w), magnitudes = _mm512_and_si512(values, magnitude_bits);
            __mmask32 ordinary = _mm512_test_epi16_mask(magnitudes, magnitudes) &
                                 ~_mm512_cmpeq_epi16_mask(magnitudes, nan);
            _mm512_storeu_si512(w, _mm512_mask_add_epi16(values, ordinary, values, exponents[i % VECTORS]));
        }
    }
}

// Rounds complete sums [tokens][ROWS] to bf16; as finish does, which is for any type and number of rows.
INLINE void finish_bf16(const Problem& p, const Ending& ending, int64_t first, const float* sums, int64_t tokens,
                        uint8_t* out) {
    const Vec low = floats(ending.scale + first), high = floats(ending.scale + first + LANES);
    const Vec low_bias = floats(ending.bias + first), high_bias = floats(ending.bias + first + LANES);
    for (; tokens > 0; --tokens, sums += ROWS, out += p.out_stride * 2) {
        Vec y = floats(sums) * low + low_bias, z = floats(sums + LANES) * high + high_bias;
        _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(z, y));
    }
}

// Multiplies a strip by all tokens' elements from `chunk` on. What sums are added to, or where they are stored, is
// fetched while they are added up: there are more such lines than can be on their way at a time.
INLINE void multiply_strip(const Problem& p, Tokens tokens, int64_t chunk, const Strip& strip, const Ending& ending,
                           Next next) {
    int64_t height = height_of(tokens.count), tiles = ceil_div(tokens.count, height), steps = 0;
    int64_t out_stride = p.out_stride * size_of(p.out_type);
    for (const Segment* segment = strip.segments; segment < strip.end; ++segment)
        steps += ceil_div(segment->units * GRAIN, STEP);
    next.spread(steps * ceil_div(tiles, 2));
    // For few tokens it is cheaper to multiply the sums of long blocks than the weight.
    bool scaled = strip.factors;
    if (scaled && (tokens.count > 64 || p.cols < 64) && folds(strip)) fold(strip), scaled = false;
    alignas(64) float complete[32 * ROWS];
    for (int64_t tile = 0; tile < tiles; tile += 2) {
        int64_t second = smaller(tile + 1, tiles - 1), first = first_of(tokens.count, tile);
        float* sums = strip.sums + tile * height * ROWS;
        Ahead ahead = strip.first || strip.out
                          ? out_ahead(p, strip, first, first_of(tokens.count, second) + height - first)
                          : sums_ahead(sums, (second - tile + 1) * height);
        ahead.spread(steps);
        (second > tile ? multiply_tiles<2> : multiply_tiles<1>)(pair_of(p, tokens, chunk, tile, second), strip, scaled,
                                                                sums, strip.out ? complete : sums, next, ahead);
        for (int64_t i = tile; strip.out && i <= second; ++i) {
            const float* of_tile = complete + (i - tile) * height * ROWS;
            uint8_t* to = strip.out + first_of(tokens.count, i) * out_stride;
            if (p.out_type == BF16 && strip.rows == ROWS) finish_bf16(p, ending, strip.row, of_tile, height, to);
            else finish(p, ending, strip.row, of_tile, ROWS, height, strip.rows, to);
        }
    }
}

#include "panels.h"

void tile_panel(const Problem& p, Tokens tokens, Rows rows, uint8_t* scratch) {
    const amx::Shapes shapes(height_of(tokens.count));
    _tile_loadconfig(&shapes);
    panel(p, tokens, rows, scratch);
    _tile_release();
}

const Kernel kernel = {NAME, block_tokens, plan, pack, tile_panel};

}  // namespace amx_many
}  // namespace
END_TARGET
