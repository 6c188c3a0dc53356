// Whether the single-pass step fits a problem, and into how large a cluster. Plain arithmetic, for the host and for tests.
//
// A cluster of c blocks holds all columns of X, 512 a block. The sums Xᵀ·[Z, dU] of a block's columns stay in its registers:
// 512 · 64 floats = 128 KB = 128 registers of each of 256 threads.
#pragma once

#include "types.h"

namespace byol::cuda {

struct ClusterTile {
  static constexpr int kRank = 32, kWidth = 2 * kRank;  // columns of [Weᵀ, Wd], and of [Z, dU]
  static constexpr int kRows = 64;                      // of a tile: one wgmma is 64 rows high
  static constexpr int kColumns = 512;                  // of a block
  static constexpr int kBox = 64;                       // columns of one TMA copy: 128 bytes, the width of the swizzle
  static constexpr int kBoxBytes = kRows * kBox * 2;
  static constexpr int kStages = 2;
  static constexpr int kMaxCluster = 16;

  // Shared memory, in bytes from its beginning.
  static constexpr int kStageBytes = kColumns / kBox * kBoxBytes;        // X
  static constexpr int kWeightBytes = kColumns / kBox * kWidth * kBox * 2;
  static constexpr int kCodeBytes = kRows * kWidth * 2;                  // [Z, dU] of the tile
  static constexpr int kPartialBytes = kRows * kWidth * 4;                // a slot for each block, of 64/c rows
  static constexpr int kWeights = kStages * kStageBytes;
  static constexpr int kCodes = kWeights + kWeightBytes;
  static constexpr int kPartials = kCodes + kCodeBytes;
  static constexpr int kBarriers = kPartials + kPartialBytes;
  static constexpr int kShared = kBarriers + 64;
  static_assert(kShared <= 232448, "all of it fits the 227 KB a block may have on sm_90");
  static_assert(kWeights % 1024 == 0 && kCodes % 1024 == 0, "swizzled tiles begin at a multiple of 1024 bytes");
  static_assert(kRows % kMaxCluster == 0, "each block of a cluster owns whole rows");
};

struct ClusterPlan {
  int cluster;      // blocks of a cluster; 0: two passes
  int clusters;
  int64_t tiles;
};

// The smallest power of two of blocks that holds all columns; as many clusters as run at a time.
BYOL_HD constexpr ClusterPlan plan_cluster(int64_t rows, int64_t features, int rank, int multiprocessors) {
  using Tile = ClusterTile;
  if (rank > Tile::kRank || features > int64_t(Tile::kMaxCluster) * Tile::kColumns || features < 1) return {0, 0, 0};
  int cluster = 1;
  while (cluster * Tile::kColumns < features) cluster *= 2;
  const int64_t tiles = ceil_div(rows, Tile::kRows);
  const int64_t fit = multiprocessors / cluster;
  if (fit < 1) return {0, 0, 0};
  return {cluster, int(tiles < fit ? tiles : fit), tiles};
}

// The byte at which element (row, column) of a tile of 64-column boxes lies: 128-byte rows, the 16-byte pieces of which are
// permuted by the row (the copy engine's and wgmma's "128-byte swizzle").
BYOL_HD constexpr int swizzled(int row, int column, int box_rows) {
  const int piece = (column % 64 / 8) ^ (row % 8);
  return column / 64 * box_rows * 128 + row * 128 + piece * 16 + column % 8 * 2;
}

// The matrix descriptor of wgmma: address and stride of groups of eight 128-byte rows, in 16 bytes; 128-byte swizzle.
BYOL_HD constexpr uint64_t wgmma_descriptor(uint32_t address) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

}  // namespace byol::cuda
