// Products of many tokens, with lanes along N. This is included once per instruction set, inside its namespace, which
// defines:
//
//   Vec, LANES           a vector of fp32 sums: of one token with LANES rows of the weight
//   Element, GRAIN       an element of x and of a decoded weight; each lane multiplies GRAIN of them at a time
//   Operand              a vector of elements
//   Weights              LANES x GRAIN elements of a decoded weight: an operand, or several `parts`
//   load, broadcast      an operand from memory; one that stands for GRAIN elements of a token
//   multiply_add         sums plus the products of weights and such an operand
//   FACTOR               decoded weights times this are the weight's values
//   decode_strip         64 codes of ROWS rows -> Weights [64 / GRAIN][VECTORS]
//   store                rounds sums to the type of out
//   TOKENS               TOKENS x VECTORS sums and their operands fill the registers
//   CHUNK                the most codes of a row that are decoded before they are multiplied
//
// A panel of the weight is decoded strip by strip, a chunk of codes of ROWS rows at a time, to the order in which they
// are multiplied. Tiles of TOKENS x ROWS sums then stay in registers: they are never added across lanes, and are stored
// contiguously, to out as soon as they are complete. While a strip is multiplied, the codes of the next one are fetched,
// and a share of the next chunk of the tokens if they are too large to stay in the cache.

constexpr int64_t RESTART = 256;  // elements along k after which sums start again from zero: less is lost by rounding
constexpr int64_t PANEL = 128;    // rows: as many as share a scale where blocks are 128 x 128
constexpr int64_t MOST_ROWS = 512;  // of a panel of dots
constexpr int WIDTH = sizeof(Operand) / sizeof(Element);
// No power of two, at which all tokens would share few sets of the caches.
constexpr int64_t X_STRIDE = CHUNK + 64 / int64_t(sizeof(Element));

// Lines that come next, `left` of rows of `width` bytes, of which `burst` are fetched at a time.
struct Ahead {
    const uint8_t* row;
    int64_t stride, width, left = 0, burst = 0, column = 0;

    INLINE void fetch() {
        for (int64_t i = 0; i < burst && left > 0; ++i, --left) {
            __builtin_prefetch(row + column, 0, 2);
            column += 64;
            if (column >= width) column = 0, row += stride;
        }
    }
};

INLINE Vec floats(const float* address) {
    Vec vector;
    memcpy(&vector, address, sizeof vector);
    return vector;
}

template <class Several> INLINE Several load_all(const Element* address) {
    if constexpr (sizeof(Several) == sizeof(Operand)) return load(address);
    else {
        Several all;
        for (int i = 0; i < int(sizeof(Several) / sizeof(Operand)); ++i) all.parts[i] = load(address + i * WIDTH);
        return all;
    }
}

// `count` elements of x: bf16 as they are; those of any type as fp32.
INLINE void copy(const uint8_t* x, int64_t, uint16_t* out, int64_t count) { memcpy(out, x, size_t(count) * 2); }
INLINE void copy(const uint8_t* x, int64_t type, float* out, int64_t count) {
    if (type == FP32) memcpy(out, x, size_t(count) * 4);
    else if (type == BF16) for (int64_t i = 0; i < count; ++i) out[i] = load_number(x, i, BF16);
    else for (int64_t i = 0; i < count; ++i) out[i] = load_number(x, i, FP16);
}

// Units of GRAIN elements along k that are summed from zero, and where their factors are if scales vary along k.
struct Segment { int32_t units, factor; };

// Adds w, Weights [units][VECTORS], times x [COUNT] to sums [COUNT][PANEL], segment by segment; `factors`, unless null,
// multiply what each adds. The first segment's sums replace what is in memory if `first`.
template <int COUNT>
NOINLINE void multiply_tile(const Element* x, const Element* w, const Segment* segment, const Segment* end,
                            const float* factors, bool first, float* sums, Ahead& codes, Ahead& ahead) {
    for (; segment < end; ++segment, first = false) {
        Vec added[COUNT][VECTORS];
        for (int t = 0; t < COUNT; ++t)
            for (int j = 0; j < VECTORS; ++j) added[t][j] = Vec{};
        for (int64_t unit = 0; unit < segment->units;) {
            codes.fetch(), ahead.fetch();
            for (int64_t stop = smaller<int64_t>(segment->units, unit + 16); unit < stop; ++unit) {
                Weights rows[VECTORS];
                for (int j = 0; j < VECTORS; ++j) rows[j] = load_all<Weights>(w + j * LANES * GRAIN);
#pragma GCC unroll 16
                for (int t = 0; t < COUNT; ++t) {
                    Operand token = broadcast(x + t * X_STRIDE);
                    for (int j = 0; j < VECTORS; ++j) added[t][j] = multiply_add(added[t][j], rows[j], token);
                }
                w += ROWS * GRAIN, x += GRAIN;
            }
        }
        const float* factor = factors ? factors + segment->factor * PANEL : nullptr;
#pragma GCC unroll 16
        for (int t = 0; t < COUNT; ++t)
            for (int j = 0; j < VECTORS; ++j) {
                float* kept = sums + t * PANEL + j * LANES;
                if (factor) added[t][j] = added[t][j] * FACTOR * floats(factor + j * LANES);
                if (!first) added[t][j] += floats(kept);
                memcpy(kept, &added[t][j], sizeof(Vec));
            }
    }
}

template <int COUNT, class... Arguments> INLINE void multiply_tile_of(int64_t count, Arguments&&... arguments) {
    if (count == COUNT) return multiply_tile<COUNT>(arguments...);
    if constexpr (COUNT > 1) multiply_tile_of<COUNT - 1>(count, arguments...);
}

// What the sums of each row become: times factor and scale, plus bias.
struct Ending {
    float factor, scale[MOST_ROWS], bias[MOST_ROWS];

    Ending(const Problem& p, int64_t row, int64_t rows) : factor(p.scales_vary_along_k() ? 1.0f : FACTOR) {
        const float* scales = p.scale_row(row);
        if (p.rows == 1 && p.blocks == 1) memcpy(scale, scales, size_t(rows) * 4);
        else for (int64_t r = 0; r < rows; ++r) scale[r] = p.scales_vary_along_k() ? 1.0f : *p.scale_row(row + r);
        if (p.bias) copy(p.bias + row * size_of(p.bias_type), p.bias_type, bias, rows);
    }
};

// out [tokens][rows] from sums [tokens][stride], rounded; `first` is the row's place in `ending`.
NOINLINE void finish(const Problem& p, const Ending& ending, int64_t first, const float* sums, int64_t stride,
                     int64_t tokens, int64_t rows, uint8_t* out) {
    for (; tokens > 0; --tokens, sums += stride, out += p.out_stride * size_of(p.out_type))
        for (int64_t r = 0; r < rows; r += LANES) {
            Vec y = floats(sums + r) * ending.factor * floats(ending.scale + first + r);
            if (p.bias) y += floats(ending.bias + first + r);
            if (rows - r >= LANES) {
                store(out + r * size_of(p.out_type), p.out_type, y);
                continue;
            }
            float values[LANES];
            memcpy(values, &y, sizeof values);
            for (int64_t i = 0; i < rows - r; ++i) store_number(out, r + i, p.out_type, values[i]);
        }
}

int64_t block_tokens(const Problem&) { return 256; }

// Chunks of about the same size: what a pass over all tokens costs, a short one costs as well.
INLINE int64_t chunks(const Problem& p) { return larger<int64_t>(1, ceil_div(p.k, CHUNK)); }
INLINE int64_t chunk_size(const Problem& p) { return larger<int64_t>(64, round_up(ceil_div(p.k, chunks(p)), 64)); }

// Panels are smaller where there would be too few for all threads.
Plan plan(const Problem& p, int64_t tokens, int threads) {
    int64_t rows = smaller(PANEL, round_up(ceil_div(p.n, 4 * threads), ROWS));
    int64_t factors = p.scales_vary_along_k() ? PANEL * (CHUNK / smaller(p.cols, CHUNK) + 2) : 0;
    int64_t scratch = CHUNK * ROWS * int64_t(sizeof(Element)) + (tokens * PANEL + factors) * 4;
    return {1, rows, tokens * chunks(p) * X_STRIDE * int64_t(sizeof(Element)), scratch};
}

// Packed: [chunks][tokens][X_STRIDE].
void pack(const Problem& p, Tokens tokens, int64_t first, int64_t last) {
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
INLINE void multiply_strip(const Problem& p, int64_t tokens, const Element* x, const Strip& strip, const Ending& ending,
                           Ahead codes, Ahead ahead) {
    int64_t tiles = ceil_div(tokens, TOKENS), bursts = 0, stride = p.out_stride * size_of(p.out_type);
    for (const Segment* segment = strip.segments; segment < strip.end; ++segment)
        bursts += tiles * ceil_div(segment->units, 16);
    codes.burst = ceil_div(codes.left, larger<int64_t>(bursts, 1));
    ahead.burst = ceil_div(ahead.left, larger<int64_t>(bursts, 1));
    for (int64_t tile = 0, token = 0, stop; tile < tiles; ++tile, token = stop) {
        stop = tokens * (tile + 1) / tiles;
        float* sums = strip.sums + token * PANEL;
        uint8_t* out = strip.out ? strip.out + token * stride : nullptr;
        for (int64_t t = 0; out && t < stop - token; ++t)
            for (int64_t byte = 0; byte < strip.rows * size_of(p.out_type); byte += 64)
                __builtin_prefetch(out + t * stride + byte, 1);
        multiply_tile_of<TOKENS>(stop - token, x + token * X_STRIDE, strip.w, strip.segments, strip.end, strip.factors,
                                 strip.first, sums, codes, ahead);
        if (out) finish(p, ending, strip.row, sums, PANEL, stop - token, strip.rows, out);
    }
}

// While the strip from `row` on is multiplied: its share of the tokens' next chunk, which is the first one if another
// panel follows.
INLINE Ahead tokens_ahead(const Problem& p, Tokens tokens, Rows rows, int64_t row, int64_t following) {
    constexpr int64_t BYTES = X_STRIDE * int64_t(sizeof(Element)), CACHED = 1 << 19;  // half of a large L2 cache
    bool more = following < p.k;
    if (tokens.count * chunks(p) * BYTES <= CACHED || !(more || rows.next)) return {nullptr, 0, 0};
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
    const Element* x = reinterpret_cast<const Element*>(tokens.packed);
    bool vary = p.scales_vary_along_k();
    Segment segments[CHUNK / GRAIN + CHUNK / RESTART];
    int64_t size = chunk_size(p);
    for (int64_t chunk = 0, following; chunk < larger<int64_t>(p.k, 1); chunk = following) {
        int64_t count = smaller(size, p.k - chunk), block = chunk / p.cols;
        following = chunk + size;
        const Segment* end = cut(p, chunk, count, segments);
        for (int64_t r = 0; vary && r < rows.count; ++r) {
            const float* scales = p.scale_row(rows.start + r);
            for (int64_t b = block; b * p.cols < chunk + count; ++b) factors[(b - block) * PANEL + r] = scales[b];
        }
        for (int64_t row = 0; row < rows.count; row += ROWS) {
            int64_t first = rows.start + row, here = smaller<int64_t>(rows.count - row, ROWS);
            decode(p.data_row(first) + chunk, p.data_stride, here, count, p.nans, w);
            uint8_t* out = following < p.k ? nullptr : p.out_row(tokens.start) + first * size_of(p.out_type);
            const float* scales = vary ? factors + row : nullptr;
            multiply_strip(p, tokens.count, x, {w, segments, end, scales, sums + row, row, here, chunk == 0, out},
                           ending, codes_ahead(p, rows, row, chunk, count, following),
                           tokens_ahead(p, tokens, rows, row, following));
        }
        x += tokens.count * X_STRIDE;
    }
}

const Kernel panels = {NAME, block_tokens, plan, pack, panel};
