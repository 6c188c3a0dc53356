// What the single-pass step is asked for, and its launch: it makes the copy engine's map of X, and asks for clusters.
#pragma once

#include "cluster_plan.h"
#include "rows.h"

namespace byol::cuda {

struct ClusterArgs {
  int64_t rows, tiles;
  int features, rank, cluster, clusters;
  Activation activation;
  Source encoder, decoder;     // packed [32, Dp]
  const float *encoder_bias, *decoder_bias, *gram;
  const double* offset;
  bool gradients;
  float *code, *slope;         // [rows, rank] or null
  float* out;                  // [clusters, 512 c, 64]
  double* column_sums;         // [clusters, 512 c]: Σ (t − bd)
  double* sums;                // [clusters·c, sum_count]
  float* products;             // [clusters·c, 32, 64]: ZᵀZ
};

// Of Bf16 and Fp16.
template <class T>
void launch_cluster(const ClusterArgs& args, const Source& input, cudaStream_t stream);

}  // namespace byol::cuda
