// Runs every kernel on buffers of exactly their size, against sums in double; made for the sanitizers and for emulators.
// Returns 1 where a product is wrong.

#include "../../fp8gemm/native/fp8gemm.cpp"

#include <cmath>
#include <cstdio>
#include <iterator>
#include <vector>

namespace {

uint64_t digest = 0;  // of all results

// Small integers, as codes of e4m3 and as numbers of any type.
uint8_t code_of(int value) {
    for (int code = 0; code < 256; ++code)
        if (tables.fp32[code] == float(value)) return uint8_t(code);
    return 0;
}

std::vector<uint8_t> integers(int64_t count, int64_t type, int range) {
    std::vector<uint8_t> bytes(size_t(count * size_of(type)));
    for (int64_t i = 0; i < count; ++i) store_number(bytes.data(), i, type, float(rand() % (2 * range + 1) - range));
    return bytes;
}

// Numbers of many magnitudes.
std::vector<uint8_t> fractions(int64_t count, int64_t type) {
    std::vector<uint8_t> bytes(size_t(count * size_of(type)));
    for (int64_t i = 0; i < count; ++i)
        store_number(bytes.data(), i, type, std::ldexp(float(rand() % 65536 - 32768), -15 - rand() % 8));
    return bytes;
}

// Adds the products of k numbers to y, and their magnitudes to a sum of their own. Unchecked and optimized in any build:
// these sums are most of what the driver does.
#if defined(__clang__)
__attribute__((no_sanitize("address", "undefined")))
#else
__attribute__((no_sanitize("address", "undefined"), optimize("O2"), noinline))
#endif
void add_products(const double* token, const double* row, int64_t k, double& y, double& magnitude) {
    for (int64_t i = 0; i < k; ++i) {
        double product = token[i] * row[i];
        y += product, magnitude += std::fabs(product);
    }
}

// A product of small integers, with powers of two as scales, must be exact; one of other numbers, without a bias, may err
// by K units of 2^-24 of the sum of magnitudes, and by two more for the scale. Some rows may have a NaN.
bool correct(int level, bool small, int64_t type, int64_t m, int64_t n, int64_t k, int64_t rows, int64_t cols) {
    int64_t blocks = ceil_div(k, cols), bias_type = rand() % 2 ? type : int64_t(FP32);
    std::vector<uint8_t> x = small ? integers(m * k, type, 2) : fractions(m * k, type);
    std::vector<uint8_t> bias = integers(n, bias_type, 3), data(size_t(n * k));
    std::vector<uint8_t> out(size_t(m * n * size_of(type))), wide(size_t(m * n * size_of(FP32)));
    std::vector<float> scale(size_t(ceil_div(n, rows) * blocks));
    for (auto& code : data) code = small ? code_of(rand() % 9 - 4) : uint8_t(rand() % 127 + rand() % 2 * 128);
    for (auto& factor : scale) factor = std::ldexp(small ? 1.0f : 1.0f + float(rand() % 999) / 999, rand() % 4 - 2);
    bool nans = rand() % 2;
    for (int64_t r = 0; nans && r < n; ++r) {
        if (rand() % 4 == 0) data[size_t(r * k + rand() % k)] = rand() % 2 ? 0x7F : 0xFF;
        if (rand() % 4 == 0) memset(&bias[size_t(r * size_of(bias_type))], 0xFF, size_t(size_of(bias_type)));
    }
    Problem p = {x.data(), data.data(), scale.data(), small ? bias.data() : nullptr, out.data(), type, bias_type, type,
                 k, k, n, m, n, k, rows, cols, blocks, nans};
    if (fp8gemm_linear(level, 3, &p) != 0) return false;
    p.out = wide.data(), p.out_type = FP32;
    if (fp8gemm_linear(level, 3, &p) != 0) return false;
    for (auto& result : {out, wide})
        for (uint8_t byte : result) digest = digest * 31 + byte;
    std::vector<double> tokens(x.size() / size_t(size_of(type))), row(size_t(k), 0.0);
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = load_number(x.data(), int64_t(i), type);
    for (int64_t r = 0; r < n; ++r) {
        for (int64_t i = 0; i < k; ++i)
            row[size_t(i)] = double(tables.fp32[data[size_t(r * k + i)]]) * p.scale_row(r)[i / cols];
        for (int64_t t = 0; t < m; ++t) {
            double y = small ? load_number(bias.data(), r, bias_type) : 0.0, magnitude = 0.0;
            add_products(tokens.data() + t * k, row.data(), k, y, magnitude);
            float sum = load_number(wide.data(), t * n + r, FP32), stored = load_number(out.data(), t * n + r, type);
            uint8_t rounded[4] = {};
            store_number(rounded, 0, type, sum);
            if (y != y ? sum == sum : !(std::fabs(sum - y) <= (small ? 0.0 : double(k + 2) * 0x1p-24 * magnitude)))
                return false;
            if (y != y ? stored == stored : !(stored == load_number(rounded, 0, type))) return false;
        }
    }
    return true;
}

void cast(int level, int64_t type, int64_t n, int64_t k, int64_t rows, int64_t cols) {
    std::vector<uint8_t> x(size_t(n * k * size_of(type))), data(size_t(n * k));
    std::vector<float> scale(size_t(ceil_div(n, rows) * ceil_div(k, cols)));
    for (auto& byte : x) byte = uint8_t(rand());
    Quantization q = {x.data(), data.data(), scale.data(), type, k, k, n, k, rows, cols, 0};
    fp8gemm_quantize(level, 3, &q);
}

// Rows that are looked up: of each code of a row, with its scale, in any order.
bool looked_up(int level, int64_t type, int64_t n, int64_t k, int64_t rows, int64_t cols) {
    std::vector<uint8_t> data(size_t(n * k)), out(size_t(3 * k * size_of(type)));
    std::vector<float> scale(size_t(ceil_div(n, rows) * ceil_div(k, cols)));
    for (auto& code : data) code = uint8_t(rand() % 256);
    for (auto& factor : scale) factor = std::ldexp(1.25f, rand() % 40 - 20);
    int64_t ids[3] = {n - 1, 0, n / 2};
    Lookup l = {ids, data.data(), scale.data(), out.data(), type, k, 3, n, k, rows, cols};
    if (fp8gemm_lookup(level, 3, &l) != 0) return false;
    for (int64_t i = 0; i < 3; ++i)
        for (int64_t j = 0; j < k; ++j) {
            float value = tables.fp32[data[size_t(ids[i] * k + j)]];
            value *= scale[size_t(ids[i] / rows * ceil_div(k, cols) + j / cols)];
            uint8_t rounded[4] = {};
            store_number(rounded, 0, type, value);
            if (value == value && memcmp(rounded, &out[size_t((i * k + j) * size_of(type))], size_t(size_of(type))))
                return false;
        }
    ids[1] = n;
    return fp8gemm_lookup(level, 3, &l) == -4;
}

// All problems at one level, or those of the first `most` shapes; returns how many results are wrong.
int check(int level, int64_t most) {
    const int64_t shapes[][2] = {{1, 1}, {1, 7}, {17, 33}, {33, 64}, {40, 130}, {130, 200}, {5, 1030}, {20, 2100},
                                {70, 416}};
    const int64_t blocks[][2] = {{1, 1 << 20}, {1 << 20, 1 << 20}, {1, 32}, {128, 128}, {3, 50}};
    const char* name = fp8gemm_level_name(level);
    int wrong = 0;
    for (int64_t type : {BF16, FP16, FP32})
        for (int64_t i = 0; i < smaller<int64_t>(most, std::size(shapes)); ++i)
            for (auto& block : blocks) {
                int64_t n = shapes[i][0], k = shapes[i][1], rows = smaller(block[0], n), cols = smaller(block[1], k);
                cast(level, type, n, k, rows, cols);
                if (!looked_up(level, type, n, k, rows, cols) && ++wrong)
                    printf("%s, type %d: rows of %d x %d are wrong\n", name, int(type), int(n), int(k));
                for (int64_t m : {0, 1, 2, 3, 4, 5, 6, 7, 8, 18, 37, k == 1030 || k == 64 ? 530 : 19})
                    for (bool small : {true, false})
                        if (!correct(level, small, type, m, n, k, rows, cols) && ++wrong)
                            printf("%s, type %d: %d x %d x %d is wrong, with blocks of %d x %d and %s numbers\n", name,
                                   int(type), int(m), int(n), int(k), int(rows), int(cols), small ? "small" : "any");
            }
    return wrong;
}

// Multiplies `times` times, with row scales, and checks nothing: for counting instructions.
void multiply_only(int level, int64_t type, int64_t m, int64_t n, int64_t k, int64_t times) {
    std::vector<uint8_t> x = integers(m * k, type, 2), data(size_t(n * k), 0x38), out(size_t(m * n * size_of(type)));
    std::vector<float> scale(size_t(n), 1.0f);
    Problem p = {x.data(), data.data(), scale.data(), nullptr, out.data(), type, type, type, k, k, n, m, n, k, 1, k, 1, 0};
    for (int64_t i = 0; i < times; ++i) fp8gemm_linear(level, 1, &p);
    printf("%s\n", fp8gemm_kernel(level, &p));
}

}  // namespace

// Without arguments, checks all levels and prints a digest of their results; with LEVEL, only that level; with
// LEVEL SHAPES, only the first so many shapes; with LEVEL TYPE M N K TIMES, only multiplies.
int main(int count, char** arguments) {
    fast_pairs = true;  // so that their kernels are run on any CPU
    int64_t given[7] = {};
    for (int i = 1; i < smaller(count, 7); ++i) given[i] = atoll(arguments[i]);
    if (count == 7) return multiply_only(int(given[1]), given[2], given[3], given[4], given[5], given[6]), 0;
    if (given[1] > fp8gemm_level()) return printf("this CPU has no level %d\n", int(given[1])), 2;
    int wrong = 0;
    for (int level = 0; level <= fp8gemm_level(); ++level)
        if (count == 1 || level == given[1]) wrong += check(level, count == 3 ? given[2] : INT64_MAX);
    printf("%016llx\n", (unsigned long long)digest);
    return wrong > 0;
}
