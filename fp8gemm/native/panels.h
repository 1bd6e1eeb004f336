// Products of many tokens. This is included once per instruction set, inside its namespace, which defines what tiles.h
// needs and, in addition:
//
//   decode_strip         64 codes of ROWS rows -> Weights [64 / GRAIN][VECTORS]
//   CHUNK                the most codes of a row that are decoded before they are multiplied
//   PANEL                the most rows of a panel
//   IN_PLACE             whether tokens in fp32 are multiplied where they lie, instead of being copied
//   FETCHES_TOKENS       whether the next chunk of copied tokens is fetched ahead
//
// A panel of the weight is decoded strip by strip, a chunk of codes of ROWS rows at a time, to the order in which they
// are multiplied, tile by tile. What is complete is stored to out at once. While a strip is multiplied, the codes of
// the next one are fetched, and a share of the next chunk of the tokens if they are too large to stay in the cache.
// The constants were measured with AVX2 on AMD Zen 3, and with AVX-512 on Zen 4.

#include "tiles.h"

int64_t block_tokens(const Problem&) { return 256; }

// Chunks of about the same size: what a pass over all tokens costs, a short one costs as well.
INLINE int64_t chunks(const Problem& p) { return larger<int64_t>(1, ceil_div(p.k, CHUNK)); }
INLINE int64_t chunk_size(const Problem& p) { return larger<int64_t>(64, round_up(ceil_div(p.k, chunks(p)), 64)); }

// Whether tokens are multiplied where they lie: not if they share few sets of the caches, or if each has pages of its
// own.
INLINE bool in_place(const Problem& p) {
    return IN_PLACE && p.x_type == FP32 && p.x_stride < 2048 && p.x_stride % 1024;
}

// Panels are smaller where there would be too few for all threads.
Plan plan(const Problem& p, int64_t tokens, int threads) {
    int64_t rows = smaller(PANEL, round_up(ceil_div(p.n, 4 * threads), ROWS));
    int64_t factors = p.scales_vary_along_k() ? PANEL * (CHUNK / smaller(p.cols, CHUNK) + 2) : 0;
    int64_t scratch = CHUNK * ROWS * int64_t(sizeof(Element)) + (tokens * PANEL + factors) * 4;
    int64_t packed = in_place(p) ? 0 : tokens * chunks(p) * X_STRIDE * int64_t(sizeof(Element));
    return {1, rows, packed, scratch};
}

// Packed: [chunks][tokens][X_STRIDE].
void pack(const Problem& p, Tokens tokens, int64_t first, int64_t last) {
    if (in_place(p)) return;
    Element* packed = reinterpret_cast<Element*>(tokens.packed);
    int64_t size = chunk_size(p);
    for (int64_t t = first; t < last; ++t)
        for (int64_t k = 0; k < p.k; k += size) {
            int64_t count = smaller(size, p.k - k);
            Element* out = packed + (k / size * tokens.count + t) * X_STRIDE;
            copy(p.x_row(tokens.start + t) + k * size_of(p.x_type), p.x_type, out, count);
            memset(out + count, 0, size_t(round_up(count, GRAIN) - count) * sizeof(Element));
        }
}

// Decodes `count` codes of `rows` rows, followed by zeros up to a multiple of 64 codes and of ROWS rows.
INLINE void decode(const uint8_t* codes, int64_t stride, int64_t rows, int64_t count, bool nans, Element* out) {
    for (int64_t k = 0; k < count; k += 64, out += 64 * ROWS) {
        alignas(64) uint8_t group[ROWS * 64];
        if (rows >= ROWS && count - k >= 64)
            for (int64_t r = 0; r < ROWS; ++r) memcpy(group + r * 64, codes + r * stride + k, 64);
        else {
            memset(group, 0, sizeof group);
            for (int64_t r = 0; r < smaller<int64_t>(rows, ROWS); ++r)
                memcpy(group + r * 64, codes + r * stride + k, size_t(smaller<int64_t>(64, count - k)));
        }
        nans && !DECODES_NANS ? decode_strip<!DECODES_NANS>(group, out) : decode_strip<false>(group, out);
    }
}

// The segments of `count` elements from `chunk` on; returns their end. There is one if there are no elements.
INLINE Segment* cut(const Problem& p, int64_t chunk, int64_t count, Segment* segment) {
    int64_t first = chunk / p.cols, block = first, k = 0;
    do {
        int64_t stop = smaller(count, k / RESTART * RESTART + RESTART);
        int32_t factor = int32_t(block - first);
        if (p.scales_vary_along_k() && (block + 1) * p.cols - chunk <= stop) stop = ++block * p.cols - chunk;
        *segment++ = {int32_t(ceil_div(stop - k, GRAIN)), factor};
        k = stop;
    } while (k < count);
    return segment;
}

// A strip of one chunk: decoded, and where its sums are added up. `row` is its first in the panel; `out` is null before
// the last chunk, of which the sums are complete.
struct Strip {
    const Element* w;
    const Segment *segments, *end;
    const float* factors;
    float* sums;
    int64_t row, rows;
    bool first;
    uint8_t* out;
};

// Multiplies a strip by all tokens, of which `x` are the elements of this chunk. What is stored is fetched before.
INLINE void multiply_strip(const Problem& p, int64_t tokens, Elements x, const Strip& strip, const Ending& ending,
                           Ahead codes, Ahead ahead) {
    int64_t tiles = ceil_div(tokens, TOKENS), bursts = 0, out_stride = p.out_stride * size_of(p.out_type);
    for (const Segment* segment = strip.segments; segment < strip.end; ++segment)
        bursts += tiles * ceil_div(segment->units, 16);
    codes.burst = ceil_div(codes.left, larger<int64_t>(bursts, 1));
    ahead.burst = ceil_div(ahead.left, larger<int64_t>(bursts, 1));
    for (int64_t tile = 0, token = 0, stop; tile < tiles; ++tile, token = stop) {
        stop = tokens * (tile + 1) / tiles;
        float* sums = strip.sums + token * PANEL;
        uint8_t* out = strip.out ? strip.out + token * out_stride : nullptr;
        for (int64_t t = 0; out && t < stop - token; ++t)
            for (int64_t byte = 0; byte < strip.rows * size_of(p.out_type); byte += 64)
                __builtin_prefetch(out + t * out_stride + byte, 1);
        multiply_tile_of<TOKENS>(stop - token, x.from(token), strip.w, strip.segments, strip.end, strip.factors,
                                 strip.first, sums, codes, ahead);
        if (out) finish(p, ending, strip.row, sums, PANEL, stop - token, strip.rows, out);
    }
}

// The tokens' elements of the chunk that begins at `chunk`.
INLINE Elements elements(const Problem& p, Tokens tokens, int64_t chunk) {
    if (in_place(p)) return {reinterpret_cast<const Element*>(p.x_row(tokens.start)) + chunk, p.x_stride};
    const Element* packed = reinterpret_cast<const Element*>(tokens.packed);
    return {packed + chunk / chunk_size(p) * tokens.count * X_STRIDE, X_STRIDE};
}

// While the strip from `row` on is multiplied: its share of the tokens' next chunk, which is the first one if another
// panel follows.
INLINE Ahead tokens_ahead(const Problem& p, Tokens tokens, Rows rows, int64_t row, int64_t following) {
    constexpr int64_t BYTES = X_STRIDE * int64_t(sizeof(Element)), CACHED = 1 << 19;  // half of a large L2 cache
    bool more = following < p.k, large = tokens.count * chunks(p) * BYTES > CACHED;
    if (!FETCHES_TOKENS || !large || !(more || rows.next)) return {nullptr, 0, 0};
    int64_t share = ceil_div(tokens.count, ceil_div(rows.count, ROWS));
    int64_t first = smaller(tokens.count, row / ROWS * share), count = smaller(share, tokens.count - first);
    const uint8_t* start = tokens.packed + ((more ? following / chunk_size(p) : 0) * tokens.count + first) * BYTES;
    return {start, BYTES, BYTES, count * ceil_div(BYTES, 64)};
}

// While the strip at `codes` is multiplied: the next strip, of this chunk, of the next one, or of another panel.
INLINE Ahead codes_ahead(const Problem& p, Rows rows, int64_t row, int64_t chunk, int64_t count, int64_t following) {
    Ahead next = {p.data_row(rows.start + row + ROWS) + chunk, p.data_stride, count};
    if (row + ROWS >= rows.count) {
        bool more = following < p.k;
        next.row = more ? p.data_row(rows.start) + following : rows.next;
        next.width = smaller(chunk_size(p), more ? p.k - following : p.k);
    }
    if (next.row) next.left = ceil_div(next.width, 64) * ROWS;
    return next;
}

// Scratch: a decoded strip, sums [tokens][PANEL], factors [blocks of a chunk][PANEL].
void panel(const Problem& p, Tokens tokens, Rows rows, uint8_t* scratch) {
    Element* w = reinterpret_cast<Element*>(scratch);
    float *sums = reinterpret_cast<float*>(w + CHUNK * ROWS), *factors = sums + tokens.count * PANEL;
    const Ending ending(p, rows.start, rows.count);
    bool vary = p.scales_vary_along_k();
    Segment segments[CHUNK / GRAIN + CHUNK / RESTART];
    int64_t size = chunk_size(p);
    for (int64_t chunk = 0, following; chunk < larger<int64_t>(p.k, 1); chunk = following) {
        int64_t count = smaller(size, p.k - chunk), block = chunk / p.cols;
        following = chunk + size;
        const Segment* end = cut(p, chunk, count, segments);
        const Elements x = elements(p, tokens, chunk);
        for (int64_t r = 0; vary && r < rows.count; ++r) {
            const float* scales = p.scale_row(rows.start + r);
            for (int64_t b = block; b * p.cols < chunk + count; ++b) factors[(b - block) * PANEL + r] = scales[b];
        }
        for (int64_t row = 0; row < rows.count; row += ROWS) {
            int64_t first = rows.start + row, here = smaller<int64_t>(rows.count - row, ROWS);
            decode(p.data_row(first) + chunk, p.data_stride, here, count, p.nans, w);
            uint8_t* out = following < p.k ? nullptr : p.out_row(tokens.start) + first * size_of(p.out_type);
            const float* scales = vary ? factors + row : nullptr;
            Strip strip = {w, segments, end, scales, sums + row, row, here, chunk == 0, out};
            multiply_strip(p, tokens.count, x, strip, ending, codes_ahead(p, rows, row, chunk, count, following),
                           tokens_ahead(p, tokens, rows, row, following));
        }
    }
}

const Kernel panels = {NAME, block_tokens, plan, pack, panel};
