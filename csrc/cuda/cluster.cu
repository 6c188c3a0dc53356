// The single-pass kernel, compiled for sm_90a alone, and its launch.
#include "cluster.h"

namespace byol::cuda {

template <class T, int Kp>
static void launch_cluster(const ClusterKernelArgs& args, cudaStream_t stream) {
  const ClusterPlan& plan = args.plan;
  launch_clusters(cluster_kernel<T, Kp>, plan.cluster, plan.cluster * plan.clusters, kThreads, ClusterTile::kShared, stream,
                  args);
}

#if defined(BYOL_EMULATE)

template <class T, int Kp>
void launch_cluster(const ClusterArgs& args, const Source& input, cudaStream_t stream) {
  const TensorMap map{static_cast<const uint16_t*>(input.data), input.columns, input.rows, input.stride};
  launch_cluster<T, Kp>(ClusterKernelArgs{args, map}, stream);
}

#else

// The driver's function by name: nothing is linked against the driver, which build machines lack.
static PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess || !function) throw std::runtime_error("CUDA: the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

template <class T>
static CUtensorMap tensor_map(const Source& input) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {cuuint64_t(input.columns), cuuint64_t(input.rows)};
  const cuuint64_t strides[1] = {cuuint64_t(input.stride) * sizeof(T)};
  const cuuint32_t box[2] = {ClusterTile::kBox, ClusterTile::kRows}, steps[2] = {1, 1};
  const auto type = T::kIsBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  static const auto encode = tensor_map_encoder();
  const CUresult result =
      encode(&map, type, 2, const_cast<void*>(input.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("CUDA: cuTensorMapEncodeTiled failed: " + std::to_string(int(result)));
  return map;
}

template <class T, int Kp>
void launch_cluster(const ClusterArgs& args, const Source& input, cudaStream_t stream) {
  launch_cluster<T, Kp>(ClusterKernelArgs{args, tensor_map<T>(input)}, stream);
}

#endif

#define BYOL_CLUSTER(type, width) template void launch_cluster<type, width>(const ClusterArgs&, const Source&, cudaStream_t)
BYOL_CLUSTER(Bf16, 32);
BYOL_CLUSTER(Bf16, 64);
BYOL_CLUSTER(Fp16, 32);
BYOL_CLUSTER(Fp16, 64);

}  // namespace byol::cuda
