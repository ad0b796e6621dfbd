// AVX-512 with VNNI: vec_avx512.h, whose int8 half takes vpdpbusd where the compiler has it.
#pragma once

#include "vec_avx512.h"
