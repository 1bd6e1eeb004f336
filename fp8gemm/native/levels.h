// Levels of instruction sets: which the compiler can compile, how code is compiled for one, and which this CPU has.

#pragma once

#include "numbers.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

// gcc 11 and clang 12 introduced the intrinsics for AMX, gcc 10 and clang 9 those for bf16.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define FP8GEMM_HAS_AMX 1
#endif
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define FP8GEMM_HAS_BF16 1
#endif

#define PRAGMA(text) _Pragma(#text)
#if defined(BEGIN_TARGET)  // by an emulator of instructions, which compiles for none
#elif defined(__clang__)
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

namespace {

// Each includes those before it.
#if defined(__aarch64__)
enum Level : int { PORTABLE = 0, NEON = 1 };
constexpr const char* NAMES[] = {"portable", "neon"};
#else
enum Level : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AMX = 4 };
constexpr const char* NAMES[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
#endif
constexpr int LEVELS = sizeof NAMES / sizeof *NAMES;

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
#elif defined(__aarch64__)
    return NEON;
#else
    return PORTABLE;
#endif
}

// Whether a CPU with AVX512_BF16 multiplies pairs of bf16 faster than fp32: AMD's cores start as many vdpbf16ps as
// fused multiply-adds (Zen 4), Intel's a fourth (measured on Emerald Rapids; Cooper Lake has no VBMI, which the level
// needs).
bool detect_fast_pairs() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return !__builtin_cpu_is("intel");
#else
    return false;
#endif
}

bool fast_pairs = detect_fast_pairs();  // programs that test kernels decide themselves

}  // namespace
