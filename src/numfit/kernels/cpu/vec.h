// The vectors of the instruction set that this file is being compiled for.
#pragma once
#if defined(__AVX512VBMI__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "vec_neon.h"
#else
#include "vec_portable.h"
#endif
