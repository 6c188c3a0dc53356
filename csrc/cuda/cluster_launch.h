// What the single-pass step is asked for, and its launch: it makes the copy engine's map of X, and asks for clusters.
#pragma once

#include "cluster_plan.h"
#include "rows.h"

namespace byol::cuda {

struct ClusterArgs {
  int64_t rows;
  ClusterPlan plan;
  int features, rank;
  Activation activation;
  Source encoder, decoder;     // packed [Kp, Dp]
  const float *encoder_bias, *decoder_bias, *gram;
  const double* offset;
  float *code, *slope;         // [rows, rank] or null
  float* out;                  // [clusters, 512 c, 64]
  double* column_sums;         // [clusters, 512 c]: Σ (t − bd)
  double* sums;                // [clusters·c, sum_count]
  void* codes;                 // [rows, CodeTile::kParts · Kp] or null
};

// Of Bf16 and Fp16; Kp is 32, or 64 for tied weights.
template <class T, int Kp>
void launch_cluster(const ClusterArgs& args, const Source& input, cudaStream_t stream);

}  // namespace byol::cuda
