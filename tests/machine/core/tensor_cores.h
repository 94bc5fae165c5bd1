// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "semantics.h"

namespace machine {

// half `h` of a word of two halves, or a word of tf32
double tensor_factor(const Step& x, std::uint32_t word, int h);
// the 16 x depth matrix A of a product, from the registers of operand 1: rows l / 4 and l / 4 + 8 of each lane l
void rows_in_registers(const Step& x, int depth, double (*a)[16]);
// c + the terms, as the schedule says: exact and rounded once, or aligned and cut
float tensor_sum(const Step& x, float c, const double* terms, int n);

}  // namespace machine
