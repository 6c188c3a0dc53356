// Which instruction set runs: the best this processor has, or the one BYOL_FAST_CPU names.
#pragma once

#include <string>
#include <vector>

#include "abi.h"

namespace byol {

// Throws std::runtime_error, naming the valid choices, when BYOL_FAST_CPU asks for what cannot run here.
const KernelTable& kernels();

// Names of the instruction sets that are compiled in and that this processor has, best first.
std::vector<std::string> runnable_instruction_sets();

}  // namespace byol
