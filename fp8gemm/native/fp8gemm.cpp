// y = x @ (data * scale).T + bias on a CPU, for FP8 (e4m3) weights and bf16, fp16 or fp32 activations; also the
// quantizer for such weights. A plain C interface without dependencies beyond a C++17 compiler.
//
//   numbers.h      formats, decoding and rounding, and a table of all 128 magnitudes of e4m3
//   problems.h     the arguments of a product, a quantization and a lookup; what each instruction set implements
//   levels.h       the instruction sets, and which of them this CPU has
//   portable.h, avx2.h, avx512.h, avx512_bf16.h, neon.h
//                  the vectors of one instruction set each, and how it decodes; for each of them
//                    strips.h           what panels are made of
//                    tiles.h            sums of some tokens with some rows, in registers
//                    panels.h           products of many tokens: panels of the weight are decoded to memory
//                    dots.h             products of few tokens: codes are decoded in registers
//                    vector_quantize.h  the quantizer
//                    vector_lookup.h    decoded rows
//   amx_operands.h tiles of 16 x 16 sums, in registers of their own: what they are made of; then
//                    amx_many.h         panels of such tiles
//                    amx_few.h          products that are dominated by decoding, which is faster here
//   parallel.h     threads and their memory
//   driver.h       chooses a kernel, and distributes panels of the weight's rows over threads
//
// Weights are decoded to bf16 or fp32, exactly; sums are fp32; scales multiply the sums, or the weights where that is
// exact, or few tokens in fp32; only out is ever rounded to bf16. Each output is summed over k in an order that depends
// neither on the number of threads nor on timing. It does depend on the path that M takes, dots or panels or those of
// AMX; so a token's result may differ in its last bits if it is multiplied with more or fewer others.

#include "driver.h"

// Levels are as in Level. 0 is success, -1 out of memory, -2 ends that do not ascend to m, -3 a null pointer to
// elements, -4 an index out of range.
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

// The name of a level of this processor's family, the lowest first; null after the last.
const char* fp8gemm_level_name(int level) { return level >= 0 && level < LEVELS ? NAMES[level] : nullptr; }

int fp8gemm_has_threads() { return GOMP_parallel && omp_get_thread_num; }

const char* fp8gemm_kernel(int level, const Problem* p) { return choose(smaller(level, fp8gemm_level()), *p)->name; }

int fp8gemm_linear(int level, int threads, const Problem* p) {
    if (p->lacks_operands()) return -3;
    return multiply(*p, smaller(level, fp8gemm_level()), threads) ? 0 : -1;
}

// The same product of another x, to another out, and with other knowledge of NaN codes: `p` may be shared by threads.
int fp8gemm_linear_to(int level, int threads, const Problem* p, const uint8_t* x, uint8_t* out, int nans) {
    Problem other = *p;
    other.x = x, other.out = out, other.nans = nans;
    return fp8gemm_linear(level, threads, &other);
}

// data, scale and bias of each expert follow those of the previous one; tokens of expert e end before ends[e].
int fp8gemm_grouped(int level, int threads, const Problem* p, int64_t expert_stride, const int32_t* ends,
                    int64_t experts) {
    int64_t start = 0;
    if (experts && !ends) return -3;
    for (int64_t e = 0; e < experts; start = ends[e++])
        if (ends[e] < start) return -2;
    if (start != p->m) return -2;
    if (p->lacks_operands()) return -3;
    return multiply(*p, smaller(level, fp8gemm_level()), threads, experts, expert_stride, ends) ? 0 : -1;
}

// Whether a code of data [n, k] is NaN; 0 where there is nothing to read.
int fp8gemm_has_nans(int threads, const uint8_t* data, int64_t data_stride, int64_t n, int64_t k) {
    return n && k && data && has_nans(data, data_stride, n, k, threads);
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
