// The list of instruction sets: tables of functions that there is one of for each, and the choice among them.
// isa.cpp and *_isa.cpp are compiled once for each with -DNF_ISA=<its name>; CMakeLists.txt defines NF_HAVE_<NAME> for those that
// this build has. A table's first member is `name`.
#pragma once
#include <cstring>
#include <initializer_list>

// Declares portable_<kind>(), avx2_<kind>() and so on; those that this build does not have are defined nowhere.
#define NF_DECLARE_TABLES(Table, kind)                                                                    \
    const Table *portable_##kind(); const Table *avx2_##kind(); const Table *avxvnni_##kind();            \
    const Table *avx512_##kind(); const Table *amx_##kind(); const Table *neon_##kind();

// Defines <NF_ISA>_<kind>() as a table of these functions.
#define NF_TABLE_NAME_(isa, kind) isa##_##kind
#define NF_TABLE_NAME(isa, kind) NF_TABLE_NAME_(isa, kind)
#define NF_STRING_(isa) #isa
#define NF_STRING(isa) NF_STRING_(isa)
#define NF_DEFINE_TABLE(Table, kind, ...)                       \
    const Table *NF_TABLE_NAME(NF_ISA, kind)() {                \
        static const Table table = {NF_STRING(NF_ISA), __VA_ARGS__}; \
        return &table;                                          \
    }

#ifdef NF_HAVE_AVX2
#define NF_AND_AVX2(kind) , avx2_##kind()
#else
#define NF_AND_AVX2(kind)
#endif
#ifdef NF_HAVE_AVXVNNI
#define NF_AND_AVXVNNI(kind) , avxvnni_##kind()
#else
#define NF_AND_AVXVNNI(kind)
#endif
#ifdef NF_HAVE_AVX512
#define NF_AND_AVX512(kind) , avx512_##kind()
#else
#define NF_AND_AVX512(kind)
#endif
#ifdef NF_HAVE_AMX
#define NF_AND_AMX(kind) , amx_##kind()
#else
#define NF_AND_AMX(kind)
#endif
#ifdef NF_HAVE_NEON
#define NF_AND_NEON(kind) , neon_##kind()
#else
#define NF_AND_NEON(kind)
#endif

// The table of the instruction set in use, kernels() (kernels.h).
#define NF_CHOSEN_TABLE(kind)                                                                            \
    table_of(kernels().name, {portable_##kind() NF_AND_AVX2(kind) NF_AND_AVXVNNI(kind) NF_AND_AVX512(kind) \
                              NF_AND_AMX(kind) NF_AND_NEON(kind)})

namespace nf {

template <class Table> const Table &table_of(const char *isa, std::initializer_list<const Table *> tables) {
    for (const Table *table : tables) {
        if (std::strcmp(table->name, isa) == 0) return *table;
    }
    return **tables.begin();
}

}  // namespace nf
