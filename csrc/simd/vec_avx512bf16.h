// AVX-512 with BF16 and VNNI, which comes with it: vec_avx512.h has the bf16 half, for where the compiler has it.
#pragma once

#include "vec_avx512vnni.h"
