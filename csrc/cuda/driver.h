// What the machine has.
#pragma once

#include <string>

#if defined(BYOL_EMULATE)

namespace byol::cuda {
inline std::string no_device() { return ""; }
}  // namespace byol::cuda

#else

#include <cuda_runtime_api.h>

namespace byol::cuda {

// Empty, or why no kernel can run here: no driver, no GPU, or none of compute capability 8.0.
inline std::string no_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0)
    return std::string("no GPU (") + (status == cudaSuccess ? "no CUDA-capable device is detected" : cudaGetErrorString(status)) + ")";
  int major = 0;
  for (int device = 0; device < count; ++device) {
    int found = 0;
    if (cudaDeviceGetAttribute(&found, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && found > major) major = found;
  }
  return major >= 8 ? "" : "no GPU of compute capability 8.0 or newer";
}

}  // namespace byol::cuda

#endif
