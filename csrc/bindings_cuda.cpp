// Python bindings of the CUDA kernels, thin: Python has checked shapes, dtypes, devices and strides; addresses arrive as
// integers (0 = absent). Each function returns the bytes of workspace it needs, and queues its kernels if it is given some.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <tuple>

#include "cuda/cluster_plan.h"
#include "cuda/dispatch.h"
#include "cuda/driver.h"
#include "cuda/push_rate.h"

namespace py = pybind11;

namespace byol::cuda {

const LauncherTable& launchers(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return table_float;
    case DType::bf16:
      return table_Bf16;
    case DType::f16:
      return table_Fp16;
    default:
      throw std::invalid_argument("there are no CUDA kernels for float64");
  }
}

namespace {

using Address = uintptr_t;
using PyMatrix = std::pair<Address, int64_t>;
// (rows, in_features, out_features, rank)
using Sizes = std::tuple<int64_t, int, int, int>;
// (workspace or 0, stream, multiprocessors, single pass)
using PyWhere = std::tuple<Address, Address, int, bool>;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}
Matrix matrix(const PyMatrix& pair) { return {at(pair.first), pair.second}; }
Where where_of(const PyWhere& where) {
  return {at(std::get<0>(where)), at(std::get<1>(where)), std::get<2>(where), std::get<3>(where)};
}
WeightGradients gradients(const std::array<Address, 4>& d) {
  return {at<float>(d[0]), at<float>(d[1]), at<float>(d[2]), at<float>(d[3])};
}

template <class Args>
Args layer(int dtype, int activation, const Sizes& sizes, const PyMatrix& input, const PyMatrix& encoder_weight,
           const PyMatrix& decoder_weight, Address encoder_bias, Address decoder_bias) {
  Args args{};
  args.dtype = DType(dtype), args.activation = activation;
  std::tie(args.rows, args.in_features, args.out_features, args.rank) = sizes;
  args.input = matrix(input);
  args.encoder_weight = matrix(encoder_weight), args.decoder_weight = matrix(decoder_weight);
  args.encoder_bias = at(encoder_bias), args.decoder_bias = at(decoder_bias);
  return args;
}

size_t squared_error(const PyWhere& where, int dtype, int64_t rows, int64_t columns, const PyMatrix& input,
                     const PyMatrix& target, Address total) {
  SquaredErrorArgs args{};
  args.dtype = DType(dtype), args.rows = rows, args.columns = columns;
  args.input = matrix(input), args.target = matrix(target), args.total = at<float>(total);
  py::gil_scoped_release unlocked;
  return launchers(args.dtype).squared_error(args, where_of(where));
}

size_t squared_error_backward(const PyWhere& where, int dtype, int64_t rows, int64_t columns, const PyMatrix& input,
                              const PyMatrix& target, Address scale, const PyMatrix& d_input, const PyMatrix& d_target) {
  SquaredErrorArgs args{};
  args.dtype = DType(dtype), args.rows = rows, args.columns = columns;
  args.input = matrix(input), args.target = matrix(target), args.scale = at<float>(scale);
  args.d_input = at(d_input.first), args.d_input_stride = d_input.second;
  args.d_target = at(d_target.first), args.d_target_stride = d_target.second;
  py::gil_scoped_release unlocked;
  return launchers(args.dtype).squared_error_backward(args, where_of(where));
}

size_t forward(const PyWhere& where, int dtype, int activation, const Sizes& sizes, const PyMatrix& input,
               const PyMatrix& encoder_weight, const PyMatrix& decoder_weight, Address encoder_bias, Address decoder_bias,
               bool residual, Address output, Address preactivation) {
  auto args = layer<ForwardArgs>(dtype, activation, sizes, input, encoder_weight, decoder_weight, encoder_bias, decoder_bias);
  args.residual = residual, args.output = at(output), args.preactivation = at<float>(preactivation);
  py::gil_scoped_release unlocked;
  return launchers(args.dtype).forward(args, where_of(where));
}

size_t backward(const PyWhere& where, int dtype, int activation, const Sizes& sizes, const PyMatrix& input,
                const PyMatrix& encoder_weight, const PyMatrix& decoder_weight, bool residual, const PyMatrix& grad,
                Address preactivation, Address d_input, const std::array<Address, 4>& d_weights) {
  auto args = layer<BackwardArgs>(dtype, activation, sizes, input, encoder_weight, decoder_weight, 0, 0);
  args.residual = residual, args.grad = matrix(grad), args.preactivation = at<float>(preactivation);
  args.d_input = at(d_input), args.d_weights = gradients(d_weights);
  py::gil_scoped_release unlocked;
  return launchers(args.dtype).backward(args, where_of(where));
}

size_t step(const PyWhere& where, int dtype, int activation, const Sizes& sizes, const PyMatrix& input,
            const PyMatrix& encoder_weight, const PyMatrix& decoder_weight, Address encoder_bias, Address decoder_bias,
            const PyMatrix& target, Address total, const std::array<Address, 4>& d_weights, Address code,
            Address code_gradient) {
  auto args = layer<StepArgs>(dtype, activation, sizes, input, encoder_weight, decoder_weight, encoder_bias, decoder_bias);
  args.target = matrix(target), args.total = at<float>(total), args.d_weights = gradients(d_weights);
  args.code = at<float>(code), args.code_gradient = at<float>(code_gradient);
  py::gil_scoped_release unlocked;
  return launchers(args.dtype).step(args, where_of(where));
}

size_t step_input_gradients(const PyWhere& where, int dtype, const Sizes& sizes, const PyMatrix& input,
                            const PyMatrix& encoder_weight, const PyMatrix& decoder_weight, Address decoder_bias,
                            const PyMatrix& target, Address code, Address code_gradient, Address scale, Address d_input,
                            Address d_target) {
  auto args = layer<InputGradientArgs>(dtype, 0, sizes, input, encoder_weight, decoder_weight, 0, decoder_bias);
  args.target = matrix(target), args.scale = at<float>(scale);
  args.code = at<float>(code), args.code_gradient = at<float>(code_gradient);
  args.d_input = at(d_input), args.d_target = at(d_target);
  py::gil_scoped_release unlocked;
  return launchers(args.dtype).step_input_gradients(args, where_of(where));
}

}  // namespace
}  // namespace byol::cuda

#if !defined(BYOL_MODULE)
#define BYOL_MODULE _cuda
#endif

PYBIND11_MODULE(BYOL_MODULE, module) {
  using namespace byol::cuda;
  module.doc() = "CUDA kernels of byol_fast; see byol_fast.backends.cuda.";
  module.attr("max_rank") = kMaxRank;
  module.def("no_device", &no_device, "Why no kernel can run on this machine, or an empty string.");
  module.def(
      "plan_cluster",
      [](int64_t rows, int64_t features, int rank, bool tied, int multiprocessors) {
        const ClusterPlan plan = plan_cluster(rows, features, rank, tied, multiprocessors);
        return std::tuple(plan.cluster, plan.clusters, plan.tiles);
      },
      "Blocks of a cluster, clusters and tiles of rows of the single-pass step; zeros where it does not fit.");
  module.def("swizzled", [](int row, int column) { return swizzled(row, column, 64); });
  module.def("slot_byte", &slot_byte);
  module.def("wgmma_descriptor", &wgmma_descriptor);
  module.def(
      "push_in_clusters",
      [](int cluster, int rounds, Address stream) {
        py::gil_scoped_release unlocked;
        return push_in_clusters(cluster, rounds, at(stream));
      },
      "Queues a probe in which blocks of a cluster push to each other for so many rounds; returns the bytes pushed.");
  module.def("squared_error", &squared_error);
  module.def("squared_error_backward", &squared_error_backward);
  module.def("forward", &forward);
  module.def("backward", &backward);
  module.def("step", &step);
  module.def("step_input_gradients", &step_input_gradients);
}
