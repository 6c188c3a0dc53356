// What the bindings and the launchers agree upon: plain data, raw device pointers.
//
// Matrices are row-major with column stride 1 and any row stride, in elements; a null pointer means "absent". Sums, codes
// and gradients of weights are float and unscaled. Every launcher returns the bytes of workspace it needs and, given
// workspace, queues its kernels on the stream; it never waits for the device.
#pragma once

#include <cstddef>
#include <cstdint>

namespace byol::cuda {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// The largest rank there are kernels for.
constexpr int kMaxRank = 128;

struct Matrix {
  const void* data;
  int64_t stride;
};

struct Where {
  void* workspace;  // null: only the size is asked for
  void* stream;
  int multiprocessors;
  bool single_pass;  // the device has clusters, wgmma and the copy engine (sm_90), and may use them
};

struct SquaredErrorArgs {
  DType dtype;
  int64_t rows, columns;
  Matrix input, target;
  float* total;
  // Backward: scale·(input − target) and its negative, in the input's type, or null.
  const float* scale;
  void* d_input;
  int64_t d_input_stride;
  void* d_target;
  int64_t d_target_stride;
};

// Shapes: input [rows, in_features], encoder_weight [rank, in_features], decoder_weight [out_features, rank].
// An absent decoder_weight means tied weights: the encoder's, transposed.
struct LayerArgs {
  DType dtype;
  int activation;
  int64_t rows;
  int in_features, out_features, rank;
  Matrix input, encoder_weight, decoder_weight;
  const void *encoder_bias, *decoder_bias;
};

struct WeightGradients {
  float *encoder_weight, *decoder_weight, *encoder_bias, *decoder_bias;  // null when not wanted
};

struct ForwardArgs : LayerArgs {
  bool residual;
  void* output;          // [rows, out_features], contiguous, input's type
  float* preactivation;  // [rows, rank] or null
};

struct BackwardArgs : LayerArgs {
  bool residual;
  Matrix grad;                 // [rows, out_features], input's type
  const float* preactivation;  // [rows, rank]; null when only the decoder bias' gradient is wanted
  void* d_input;               // contiguous, input's type, or null
  WeightGradients d_weights;
};

struct StepArgs : LayerArgs {
  Matrix target;  // absent: the input
  float* total;
  WeightGradients d_weights;
  float *code, *code_gradient;  // [rows, rank] or null
};

struct InputGradientArgs : LayerArgs {
  Matrix target;
  const float *code, *code_gradient;
  const float* scale;
  void *d_input, *d_target;  // contiguous, input's type, or null
};


}  // namespace byol::cuda
