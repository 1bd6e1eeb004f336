// Tiles of a product: sums of some tokens with some rows of a decoded weight, in registers, with lanes along N. This is
// included once per instruction set, inside its namespace, which defines what strips.h needs and, in addition:
//
//   PANEL                the most rows of a panel
//   Operand              a vector of elements
//   Weights              LANES x GRAIN elements of a decoded weight: an operand, or several `parts`
//   load, broadcast      an operand from memory; one that stands for GRAIN elements of a token
//   multiply_add         sums plus the products of weights and such an operand
//   TOKENS               TOKENS x VECTORS sums and their operands fill the registers
//   UNROLL               units along k that one pass of the inner loop multiplies
//   IN_PLACE             whether tokens whose type is that of elements may be multiplied where they lie, without a copy
//
// It defines what panels.h asks of such tiles. Sums are never added across lanes, and are stored contiguously.

#include "strips.h"

constexpr int64_t RESTART = 256;  // elements along k after which sums start from zero: less is lost by rounding
constexpr int WIDTH = sizeof(Operand) / sizeof(Element);
// No power of two, at which all tokens would share few sets of the caches.
constexpr int64_t X_STRIDE = CHUNK + 64 / int64_t(sizeof(Element));

int64_t block_tokens(const Problem&) { return 256; }
INLINE int64_t pack_unit(int64_t) { return 1; }
INLINE int64_t room_for(int64_t tokens) { return tokens; }
INLINE int64_t packed_stride(const Problem&) { return X_STRIDE; }

// Whether tokens are multiplied where they lie: not if they share few sets of the caches, or if each has pages of its
// own.
INLINE bool in_place(const Problem& p) {
    constexpr int64_t TYPE = sizeof(Element) == 2 ? BF16 : FP32, PAGE = 4096;
    const int64_t bytes = p.x_stride * int64_t(sizeof(Element));
    return IN_PLACE && p.x_type == TYPE && p.k % GRAIN == 0 && bytes < 2 * PAGE && bytes % PAGE;
}

template <class Several> INLINE Several load_all(const Element* address) {
    if constexpr (sizeof(Several) == sizeof(Operand)) return load(address);
    else {
        Several all;
        for (int i = 0; i < int(sizeof(Several) / sizeof(Operand)); ++i) all.parts[i] = load(address + i * WIDTH);
        return all;
    }
}

// Elements of tokens, which follow each other at `stride`.
struct Elements {
    const Element* first;
    int64_t stride;

    Elements from(int64_t token) const { return {first + token * stride, stride}; }
};

// Elements of COUNT tokens. Where these may be anywhere, three share a pointer, as addresses are a pointer plus once or
// twice a register.
template <int COUNT> struct Cursor {
    static constexpr int SHARED = IN_PLACE ? 3 : COUNT, POINTERS = (COUNT + SHARED - 1) / SHARED;
    const Element* pointers[POINTERS];
    const int64_t stride;

    INLINE explicit Cursor(Elements x) : stride(IN_PLACE ? x.stride : X_STRIDE) {
        for (int i = 0; i < POINTERS; ++i) pointers[i] = x.first + SHARED * i * stride;
    }
    INLINE Operand token(int t, int unit) const {
        return broadcast(pointers[t / SHARED] + t % SHARED * (IN_PLACE ? stride : X_STRIDE) + unit * GRAIN);
    }
    INLINE void advance(int units) {
        for (int i = 0; i < POINTERS; ++i) pointers[i] += units * GRAIN;
    }
};

// Adds w, Weights [UNITS][VECTORS], times x [COUNT] to sums in registers, and advances both.
template <int UNITS, int COUNT>
INLINE void multiply_units(const Element*& w, Cursor<COUNT>& x, Vec (&added)[COUNT][VECTORS]) {
#pragma GCC unroll 16
    for (int unit = 0; unit < UNITS; ++unit) {
        Weights rows[VECTORS];
        for (int j = 0; j < VECTORS; ++j) rows[j] = load_all<Weights>(w + (unit * VECTORS + j) * LANES * GRAIN);
#pragma GCC unroll 16
        for (int t = 0; t < COUNT; ++t) {
            Operand token = x.token(t, unit);
            for (int j = 0; j < VECTORS; ++j) added[t][j] = multiply_add(added[t][j], rows[j], token);
        }
    }
    w += UNITS * ROWS * GRAIN, x.advance(UNITS);
}

// Adds w, Weights [units][VECTORS], times x [COUNT] to sums [COUNT][ROWS], segment by segment; `factors`, unless
// null, multiply what each adds. The first segment's sums replace what is in memory if `first`. Lines are fetched after
// each `burst` of units.
template <int COUNT>
NOINLINE void multiply_tile(Elements elements, const Element* w, const Segment* segment, const Segment* end,
                            const float* factors, bool first, float* sums, int64_t burst, Next& next) {
    Cursor<COUNT> x(elements);
    for (; segment < end; ++segment, first = false) {
        Vec added[COUNT][VECTORS];
        for (int t = 0; t < COUNT; ++t)
            for (int j = 0; j < VECTORS; ++j) added[t][j] = Vec{};
        for (int64_t left = segment->units; left > 0; left -= burst) {
            next.fetch();
            int64_t units = smaller(left, burst);
            for (; units >= UNROLL; units -= UNROLL) multiply_units<UNROLL>(w, x, added);
            for (; units > 0; --units) multiply_units<1>(w, x, added);
        }
        const float* factor = factors ? factors + segment->factor * PANEL : nullptr;
        const float unit = fresh(FACTOR);
#pragma GCC unroll 16
        for (int t = 0; t < COUNT; ++t)
            for (int j = 0; j < VECTORS; ++j) {
                float* kept = sums + t * ROWS + j * LANES;
                Vec sum = added[t][j];
                if (factor) sum = sum * unit * floats(factor + j * LANES);
                put(kept, first ? sum : sum + floats(kept));
            }
    }
}

template <int COUNT, class... Arguments> INLINE void multiply_tile_of(int64_t count, Arguments&&... arguments) {
    if (count == COUNT) return multiply_tile<COUNT>(arguments...);
    if constexpr (COUNT > 1) multiply_tile_of<COUNT - 1>(count, arguments...);
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

// The tokens' elements of the chunk that begins at `chunk`.
INLINE Elements elements(const Problem& p, Tokens tokens, int64_t chunk) {
    if (in_place(p)) return {reinterpret_cast<const Element*>(p.x_row(tokens.start)) + chunk, p.x_stride};
    const Element* packed = reinterpret_cast<const Element*>(tokens.packed);
    return {packed + chunk / chunk_size(p) * tokens.count * X_STRIDE, X_STRIDE};
}

// Multiplies a strip by all tokens' elements from `chunk` on. What is stored is fetched before.
INLINE void multiply_strip(const Problem& p, Tokens all, int64_t chunk, const Strip& strip, const Ending& ending,
                           Next next) {
    const Elements x = elements(p, all, chunk);
    int64_t tokens = all.count, tiles = ceil_div(tokens, TOKENS), units = 0, bursts = 0;
    int64_t out_stride = p.out_stride * size_of(p.out_type);
    for (const Segment* segment = strip.segments; segment < strip.end; ++segment) units += tiles * segment->units;
    // As seldom as about eight lines at a time allow.
    int64_t lines = larger<int64_t>(1, next.codes.left + next.tokens.left);
    const int64_t burst = larger<int64_t>(16, smaller<int64_t>(64, 8 * units / lines / UNROLL * UNROLL));
    for (const Segment* segment = strip.segments; segment < strip.end; ++segment)
        bursts += tiles * ceil_div(segment->units, burst);
    next.spread(bursts);
    for (int64_t tile = 0, token = 0, stop; tile < tiles; ++tile, token = stop) {
        stop = tokens * (tile + 1) / tiles;
        float* sums = strip.sums + token * ROWS;
        Ahead out = out_ahead(p, strip, token, stop - token);
        out.spread(1), out.fetch<true>();
        multiply_tile_of<TOKENS>(stop - token, x.from(token), strip.w, strip.segments, strip.end, strip.factors,
                                 strip.first, sums, burst, next);
        if (strip.out)
            finish(p, ending, strip.row, sums, ROWS, stop - token, strip.rows, strip.out + token * out_stride);
    }
}
