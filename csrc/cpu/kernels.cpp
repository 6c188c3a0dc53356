// All kernels of one instruction set. The build compiles this file once per set, with BYOL_ISA naming it.
#include "layer.h"
#include "scatter.h"
#include "sparse.h"
#include "squared_error.h"
#include "step.h"

#define BYOL_STRINGIFY_(x) #x
#define BYOL_STRINGIFY(x) BYOL_STRINGIFY_(x)
#define BYOL_CONCAT_(a, b) a##b
#define BYOL_CONCAT(a, b) BYOL_CONCAT_(a, b)

namespace byol {
namespace BYOL_ISA {

// body(zero of the storage type) with the storage type that the call names.
template <class Body>
auto with_storage(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f64:
      return body(double{});
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(f16{});
    case DType::f32:
      break;
  }
  return body(float{});
}

const KernelTable table{
    BYOL_STRINGIFY(BYOL_ISA),
    [](const SquaredErrorArgs& args) {
      return with_storage(args.dtype, [&](auto zero) { return squared_error<decltype(zero)>(args); });
    },
    [](const SquaredErrorArgs& args) {
      with_storage(args.dtype, [&](auto zero) { squared_error_backward<decltype(zero)>(args); });
    },
    [](const ForwardArgs& args) { with_storage(args.dtype, [&](auto zero) { forward<decltype(zero)>(args); }); },
    [](const BackwardArgs& args) {
      with_storage(args.dtype, [&](auto zero) { Backward<decltype(zero)>(args).run(); });
    },
    [](const StepArgs& args) {
      return with_storage(args.dtype, [&](auto zero) { return Step<decltype(zero)>(args).run(); });
    },
    [](const SparseArgs& args) {
      return with_storage(args.dtype, [&](auto zero) { return SparseStep<decltype(zero)>(args).run(); });
    },
    [](const InputGradientArgs& args) {
      with_storage(args.dtype, [&](auto zero) { step_input_gradients<decltype(zero)>(args); });
    },
    [](const ScatterArgs& args) {
      return args.dtype == DType::f64 ? Scatter<double>(args).run() : Scatter<float>(args).run();
    },
};

}  // namespace BYOL_ISA

const KernelTable* BYOL_CONCAT(BYOL_ISA, _kernels)() { return &BYOL_ISA::table; }

}  // namespace byol
