// A CPU with all instruction sets, whose system allows the AMX tiles: what detect() in levels.h asks for.

#pragma once

#include <unistd.h>

inline int __get_cpuid_count(unsigned, unsigned, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
    *a = *b = *c = 0, *d = 1u << 22;
    return 1;
}
#define __builtin_cpu_supports(feature) 1
#define syscall(...) 0
