// One table of launchers for each element type.
#pragma once

#include "abi.h"

namespace byol::cuda {

struct LauncherTable {
  size_t (*squared_error)(const SquaredErrorArgs&, const Where&);
  size_t (*squared_error_backward)(const SquaredErrorArgs&, const Where&);
  size_t (*forward)(const ForwardArgs&, const Where&);
  size_t (*backward)(const BackwardArgs&, const Where&);
  size_t (*step)(const StepArgs&, const Where&);
  size_t (*step_input_gradients)(const InputGradientArgs&, const Where&);
};

extern const LauncherTable table_Bf16, table_Fp16, table_float;

// The table of a dtype; throws for float64, which has no kernels.
const LauncherTable& launchers(DType dtype);

}  // namespace byol::cuda
