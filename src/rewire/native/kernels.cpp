// The kernels for one instruction set. Compiled several times, with REWIRE_KERNELS naming the table and the compiler's
// flags naming the instruction set; rewire.cpp picks a table when it runs.
#include "product.h"

#define REWIRE_TEXT_OF(name) #name
#define REWIRE_TEXT(name) REWIRE_TEXT_OF(name)

extern const Kernels REWIRE_KERNELS;
const Kernels REWIRE_KERNELS = {
    REWIRE_TEXT(REWIRE_KERNELS),
    LANES,
    1
#if defined(REWIRE_PAIRS)
        | 2
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
        | 4
#endif
    ,
    attention_scratch,
    run_attention,
    packed_bytes,
    panels,
    pack,
    product_scratch,
    run_product,
};
