// Python bindings, thin: Python has checked shapes, dtypes and strides; addresses arrive as integers (0 = absent).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace {

using byol::Matrix;
using Address = uintptr_t;

void* at(Address address) { return reinterpret_cast<void*>(address); }
Matrix matrix(const std::pair<Address, int64_t>& pair) { return {at(pair.first), pair.second}; }

using PyMatrix = std::pair<Address, int64_t>;

// The memory of a large result.
class LargeBlock {
 public:
  explicit LargeBlock(int64_t bytes) : data_(byol::take_memory(bytes)), bytes_(bytes) {}
  LargeBlock(const LargeBlock&) = delete;
  LargeBlock& operator=(const LargeBlock&) = delete;
  ~LargeBlock() { byol::give_memory(data_, bytes_); }

  py::buffer_info buffer() { return {static_cast<uint8_t*>(data_), py::ssize_t(bytes_)}; }

 private:
  void* data_;
  int64_t bytes_;
};

// (rows, in_features, out_features, rank)
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;

void set_layer(byol::LayerArgs& args, int dtype, int activation, int threads, const Sizes& sizes, const PyMatrix& input,
               const PyMatrix& encoder_weight, const PyMatrix& decoder_weight, Address encoder_bias,
               Address decoder_bias) {
  args.dtype = byol::DType(dtype);
  args.activation = byol::Activation(activation);
  args.threads = threads;
  std::tie(args.rows, args.in_features, args.out_features, args.rank) = sizes;
  args.input = matrix(input);
  args.encoder_weight = matrix(encoder_weight);
  args.decoder_weight = matrix(decoder_weight);
  args.encoder_bias = at(encoder_bias);
  args.decoder_bias = at(decoder_bias);
}

// A multiple of a sum of squares in the accumulation type; rounding may have left it just below zero. NaN stays NaN.
void store_total(Address out, byol::DType dtype, double total) {
  if (total < 0) total = 0;
  if (dtype == byol::DType::f64) {
    *static_cast<double*>(at(out)) = total;
  } else {
    *static_cast<float*>(at(out)) = float(total);
  }
}

void squared_error(int dtype, int threads, int64_t rows, int64_t cols, const PyMatrix& input, const PyMatrix& target,
                   Address total) {
  byol::SquaredErrorArgs args{};
  args.dtype = byol::DType(dtype);
  args.threads = threads;
  args.rows = rows, args.cols = cols;
  args.input = matrix(input), args.target = matrix(target);
  const byol::KernelTable& kernels = byol::kernels();
  py::gil_scoped_release unlocked;
  store_total(total, args.dtype, kernels.squared_error(args));
}

void squared_error_backward(int dtype, int threads, int64_t rows, int64_t cols, const PyMatrix& input,
                            const PyMatrix& target, double scale, const PyMatrix& d_input, const PyMatrix& d_target) {
  byol::SquaredErrorArgs args{};
  args.dtype = byol::DType(dtype);
  args.threads = threads;
  args.rows = rows, args.cols = cols;
  args.input = matrix(input), args.target = matrix(target);
  args.scale = scale;
  args.d_input = at(d_input.first), args.d_input_stride = d_input.second;
  args.d_target = at(d_target.first), args.d_target_stride = d_target.second;
  const byol::KernelTable& kernels = byol::kernels();
  py::gil_scoped_release unlocked;
  kernels.squared_error_backward(args);
}

void forward(int dtype, int activation, int threads, const Sizes& sizes, const PyMatrix& input,
             const PyMatrix& encoder_weight, const PyMatrix& decoder_weight, Address encoder_bias, Address decoder_bias,
             bool residual, Address output, Address preactivation) {
  byol::ForwardArgs args{};
  set_layer(args, dtype, activation, threads, sizes, input, encoder_weight, decoder_weight, encoder_bias, decoder_bias);
  args.residual = residual;
  args.output = at(output);
  args.preactivation = at(preactivation);
  const byol::KernelTable& kernels = byol::kernels();
  py::gil_scoped_release unlocked;
  kernels.forward(args);
}

void backward(int dtype, int activation, int threads, const Sizes& sizes, const PyMatrix& input,
              const PyMatrix& encoder_weight, const PyMatrix& decoder_weight, bool residual, const PyMatrix& grad,
              Address preactivation, Address d_input, const std::array<Address, 4>& d_weights) {
  byol::BackwardArgs args{};
  set_layer(args, dtype, activation, threads, sizes, input, encoder_weight, decoder_weight, 0, 0);
  args.residual = residual;
  args.grad = matrix(grad);
  args.preactivation = at(preactivation);
  args.d_input = at(d_input);
  args.d_encoder_weight = at(d_weights[0]), args.d_decoder_weight = at(d_weights[1]);
  args.d_encoder_bias = at(d_weights[2]), args.d_decoder_bias = at(d_weights[3]);
  const byol::KernelTable& kernels = byol::kernels();
  py::gil_scoped_release unlocked;
  kernels.backward(args);
}

void step(int dtype, int activation, int threads, const Sizes& sizes, const PyMatrix& input,
            const PyMatrix& encoder_weight, const PyMatrix& decoder_weight, Address encoder_bias, Address decoder_bias,
            int form, double scale, const PyMatrix& target, Address total, const std::array<Address, 4>& d_weights, Address code,
            Address code_gradient) {
  byol::StepArgs args{};
  set_layer(args, dtype, activation, threads, sizes, input, encoder_weight, decoder_weight, encoder_bias, decoder_bias);
  args.form = byol::Form(form);
  args.scale = scale;
  args.target = matrix(target);
  args.d_encoder_weight = at(d_weights[0]), args.d_decoder_weight = at(d_weights[1]);
  args.d_encoder_bias = at(d_weights[2]), args.d_decoder_bias = at(d_weights[3]);
  args.code = at(code), args.code_gradient = at(code_gradient);
  const byol::KernelTable& kernels = byol::kernels();
  py::gil_scoped_release unlocked;
  store_total(total, args.dtype, scale * kernels.step(args));
}

// Returns Σ R² and what it is compared with, too.
std::pair<double, double> sparse_step(int dtype, int activation, int threads, const Sizes& sizes, Address row_starts,
                                      Address columns, Address values, const PyMatrix& encoder_weight,
                                      const PyMatrix& decoder_weight, Address encoder_bias, Address decoder_bias,
                                      double scale, Address total, const std::array<Address, 4>& d_weights) {
  byol::SparseArgs args{};
  set_layer(args, dtype, activation, threads, sizes, {}, encoder_weight, decoder_weight, encoder_bias, decoder_bias);
  args.scale = scale;
  args.row_starts = static_cast<const int64_t*>(at(row_starts));
  args.columns = static_cast<const int64_t*>(at(columns));
  args.values = at(values);
  args.d_encoder_weight = at(d_weights[0]), args.d_decoder_weight = at(d_weights[1]);
  args.d_encoder_bias = at(d_weights[2]), args.d_decoder_bias = at(d_weights[3]);
  const byol::KernelTable& kernels = byol::kernels();
  py::gil_scoped_release unlocked;
  const byol::SparseSums sums = kernels.sparse_step(args);
  store_total(total, args.dtype, scale * sums.squared_error);
  return {sums.squared_error, sums.energy};
}

void step_input_gradients(int dtype, int threads, const Sizes& sizes, const PyMatrix& input,
                          const PyMatrix& encoder_weight, const PyMatrix& decoder_weight, Address decoder_bias,
                          const PyMatrix& target, Address code, Address code_gradient, double scale, Address d_input,
                          Address d_target) {
  byol::InputGradientArgs args{};
  set_layer(args, dtype, 0, threads, sizes, input, encoder_weight, decoder_weight, 0, decoder_bias);
  args.target = matrix(target);
  args.code = at(code), args.code_gradient = at(code_gradient);
  args.scale = scale;
  args.d_input = at(d_input), args.d_target = at(d_target);
  const byol::KernelTable& kernels = byol::kernels();
  py::gil_scoped_release unlocked;
  kernels.step_input_gradients(args);
}

int64_t scatter(int dtype, int threads, int64_t rows, int64_t features, const PyMatrix& input, Address shift,
                Address image, Address sums) {
  byol::ScatterArgs args{};
  args.dtype = byol::DType(dtype);
  args.threads = threads;
  args.rows = rows, args.features = features;
  args.input = matrix(input);
  args.shift = at(shift);
  args.image = static_cast<double*>(at(image));
  args.sums = static_cast<double*>(at(sums));
  const byol::KernelTable& kernels = byol::kernels();
  py::gil_scoped_release unlocked;
  return kernels.scatter(args);
}

py::dict info() {
  py::dict result;
  result["instruction_set"] = byol::kernels().name;
  result["runnable_instruction_sets"] = byol::runnable_instruction_sets();
  result["thread_pool"] = byol::thread_pool();
  result["compiler"] = BYOL_COMPILER;
  return result;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU kernels of byol_fast; see byol_fast.backends.native.";
  module.def("info", &info);
  module.def("squared_error", &squared_error);
  module.def("squared_error_backward", &squared_error_backward);
  module.def("forward", &forward);
  module.def("backward", &backward);
  module.def("step", &step);
  module.def("sparse_step", &sparse_step);
  module.def("step_input_gradients", &step_input_gradients);
  module.def("scatter", &scatter);
  module.def("release_memory", &byol::release_memory);
  py::class_<LargeBlock>(module, "LargeBlock", py::module_local(), py::buffer_protocol())
      .def(py::init<int64_t>())
      .def_buffer(&LargeBlock::buffer);
}
