// For building llama-cpp-python with a GCC whose _tile_loadconfig claims to read 8 of its 64 bytes (12.2 does): the compiler
// then drops the stores of a tile's rows as dead, and the first AMX instruction is illegal. See peers.py for how to use it.
#if defined(__AMX_TILE__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))
#endif
