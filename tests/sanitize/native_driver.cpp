// Runs every kernel on buffers of exactly their size, against sums in double; made for the sanitizers. Returns 1 where
// a product is not exact.

#include "../../fp8gemm/native/fp8gemm.cpp"

#include <cmath>
#include <cstdio>
#include <vector>

namespace {

// Small integers, as codes of e4m3 and as numbers of any type.
uint8_t code_of(int value) {
    for (int code = 0; code < 256; ++code)
        if (tables.fp32[code] == float(value)) return uint8_t(code);
    return 0;
}

std::vector<uint8_t> numbers(int64_t count, int64_t type, int range) {
    std::vector<uint8_t> bytes(size_t(count * size_of(type)));
    for (int64_t i = 0; i < count; ++i) store_number(bytes.data(), i, type, float(rand() % (2 * range + 1) - range));
    return bytes;
}

bool exact(int level, int64_t type, int64_t m, int64_t n, int64_t k, int64_t rows, int64_t cols) {
    std::vector<uint8_t> x = numbers(m * k, type, 2), bias = numbers(n, type, 3), data(size_t(n * k));
    std::vector<uint8_t> out(size_t(m * n * size_of(type)));
    std::vector<float> scale(size_t(ceil_div(n, rows) * ceil_div(k, cols)));
    for (auto& code : data) code = code_of(rand() % 9 - 4);
    for (auto& factor : scale) factor = std::ldexp(1.0f, rand() % 4 - 2);
    Problem p = {x.data(), data.data(), scale.data(), bias.data(), out.data(), type, type, type,
                 k,        k,           n,            m,           n,          k,    rows, cols, ceil_div(k, cols)};
    p.nans = rand() % 2;  // there are none, whether or not they are looked for
    if (fp8gemm_linear(level, 3, &p) != 0) return false;
    for (int64_t t = 0; t < m; ++t)
        for (int64_t r = 0; r < n; ++r) {
            double y = load_number(bias.data(), r, type);
            for (int64_t i = 0; i < k; ++i)
                y += double(load_number(x.data(), t * k + i, type)) * tables.fp32[data[size_t(r * k + i)]] *
                     p.scale_row(r)[i / cols];
            uint8_t rounded[4] = {};
            store_number(rounded, 0, type, float(y));
            if (memcmp(rounded, &out[size_t((t * n + r) * size_of(type))], size_t(size_of(type)))) return false;
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

}  // namespace

int main() {
    const int64_t shapes[][2] = {{1, 1}, {1, 7}, {17, 33}, {33, 64}, {40, 130}, {130, 600}, {35, 2100}};
    const int64_t blocks[][2] = {{1, 1 << 20}, {1 << 20, 1 << 20}, {1, 32}, {128, 128}, {3, 50}};
    int wrong = 0;
    for (int level = 0; level <= fp8gemm_level(); ++level)
        for (int64_t type : {BF16, FP16, FP32})
            for (auto& shape : shapes)
                for (auto& block : blocks) {
                    int64_t n = shape[0], k = shape[1], rows = smaller(block[0], n), cols = smaller(block[1], k);
                    cast(level, type, n, k, rows, cols);
                    if (!looked_up(level, type, n, k, rows, cols)) {
                        printf("level %d type %d: rows of %d x %d are wrong\n", level, int(type), int(n), int(k));
                        wrong = 1;
                    }
                    for (int64_t m : {0, 1, 2, 5, 18, 70, k == 33 ? 530 : 3})
                        if (!exact(level, type, m, n, k, rows, cols)) {
                            printf("level %d type %d: %d x %d x %d is wrong\n", level, int(type), int(m), int(n), int(k));
                            wrong = 1;
                        }
                }
    return wrong;
}
