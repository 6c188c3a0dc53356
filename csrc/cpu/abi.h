// What the bindings and the kernels of every instruction set agree upon: plain data, raw pointers.
//
// Matrices are row-major with column stride 1 and any row stride, in elements; a null pointer means "absent".
// Sums, codes and gradients of weights are written unscaled in the accumulation type: double for f64, else float.
#pragma once

#include <cstdint>

namespace byol {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
enum class Activation : int { identity = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4, tanh = 5 };
enum class Form : int { automatic = 0, gram = 1, direct = 2 };

struct Matrix {
  const void* data;
  int64_t stride;
};

struct SquaredErrorArgs {
  DType dtype;
  int threads;
  int64_t rows, cols;
  Matrix input, target;
  // Backward only: scale·(input − target) and its negative, in the input's type.
  double scale;
  void* d_input;
  int64_t d_input_stride;
  void* d_target;
  int64_t d_target_stride;
};

// Shapes: input [rows, in_features], encoder_weight [rank, in_features], decoder_weight [out_features, rank].
// An absent decoder_weight means tied weights: the encoder's, transposed.
struct LayerArgs {
  DType dtype;
  Activation activation;
  int threads;
  int64_t rows, in_features, out_features, rank;
  Matrix input, encoder_weight, decoder_weight;
  const void *encoder_bias, *decoder_bias;
};

struct ForwardArgs : LayerArgs {
  bool residual;
  void* output;         // [rows, out_features], contiguous, input's type
  void* preactivation;  // [rows, rank] or null
};

struct BackwardArgs : LayerArgs {
  bool residual;
  Matrix grad;                // [rows, out_features], input's type
  const void* preactivation;  // [rows, rank]; null when only d_decoder_bias is wanted
  void* d_input;              // contiguous, input's type; null when not wanted, like all below
  void *d_encoder_weight, *d_decoder_weight, *d_encoder_bias, *d_decoder_bias;
};

struct StepArgs : LayerArgs {
  Form form;
  double scale;   // of Σ R²; of the gradients of ½ Σ R², twice that
  Matrix target;  // absent: the input
  void *d_encoder_weight, *d_decoder_weight, *d_encoder_bias, *d_decoder_bias;
  void *code, *code_gradient;  // [rows, rank] or null
};

// X in CSR form; `input` and `out_features` are not used, the target is X.
struct SparseArgs : LayerArgs {
  double scale;  // as in StepArgs
  const int64_t *row_starts, *columns;
  const void* values;
  void *d_encoder_weight, *d_decoder_weight, *d_encoder_bias, *d_decoder_bias;
};

struct InputGradientArgs : LayerArgs {
  Matrix target;
  const void *code, *code_gradient;
  double scale;
  void *d_input, *d_target;  // contiguous, input's type, or null
};

// Rows [rows, features] of f32 or f64, and the point they are shifted by in the same type.
struct ScatterArgs {
  DType dtype;
  int threads;
  int64_t rows, features;
  Matrix input;
  const void* shift;
  double* image;  // [features, features], contiguous; its upper triangle is added to
  double* sums;   // [features], added to
};

// Σ R², and the Σ A² it is a share of.
struct SparseSums {
  double squared_error, energy;
};

// One instruction set's kernels. squared_error and step return the sum of squares; scatter how many rows it added: all, or
// those of the rounds before the first that holds NaN or infinity.
struct KernelTable {
  const char* name;
  double (*squared_error)(const SquaredErrorArgs&);
  void (*squared_error_backward)(const SquaredErrorArgs&);
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
  double (*step)(const StepArgs&);
  SparseSums (*sparse_step)(const SparseArgs&);
  void (*step_input_gradients)(const InputGradientArgs&);
  int64_t (*scatter)(const ScatterArgs&);
};

}  // namespace byol
