// A probe, no part of an operation: how fast the blocks of a cluster push to each other, which bounds the single-pass step.
#pragma once

#include "types.h"

namespace byol::cuda {

// Queues as many clusters as run at a time, of which each block pushes so many rounds; returns the bytes pushed.
int64_t push_in_clusters(int cluster, int rounds, void* stream);

}  // namespace byol::cuda
