// Whether the single-pass step fits a problem, and into how large a cluster. Plain arithmetic, for the host and for tests.
//
// A cluster of c blocks holds all columns of X, 512 a block. The sums Xᵀ·[Z, dU] of a block's columns stay in its registers:
// 512 · 64 floats = 128 KB = 128 registers of each of 256 threads. Of tied weights they are XᵀV, V = dU − Z: twice the rank.
#pragma once

#include "types.h"

namespace byol::cuda {

// How the 8 warps of a block share the codes of its rows: 16 rows by 8 columns a warp, kAcross of them along a row.
template <int Kp>
struct CodeTile {
  static constexpr bool kTied = Kp == 64;
  static constexpr int kAcross = Kp / 8, kDown = 8 / kAcross;
  static constexpr int kStride = Kp + 4;                          // of a tile of Z, in floats
  static constexpr int kBytes = 2 * kDown * 16 * kStride * 4;      // the tiles in work, twice
  static constexpr int kParts = kTied ? 3 : 2;                    // to memory: [Z lo, Z] or [Z lo, Z, Z′ − Z]
};

struct ClusterTile {
  static constexpr int kPairRank = 32, kTiedRank = 64;
  static constexpr int kWidth = 64;                     // columns of [Weᵀ, Wd] and [Z, dU], or of Weᵀ and V
  static constexpr int kRows = 64;                      // of a tile: one wgmma is 64 rows high
  static constexpr int kColumns = 512;                  // of a block
  static constexpr int kBox = 64;                       // columns of one TMA copy: 128 bytes, the width of the swizzle
  static constexpr int kBoxBytes = kRows * kBox * 2;
  static constexpr int kStages = 2;
  static constexpr int kMaxCluster = 16;

  // Shared memory, in bytes from its beginning.
  static constexpr int kStageBytes = kColumns / kBox * kBoxBytes;        // X
  static constexpr int kWeightBytes = kColumns / kBox * kWidth * kBox * 2;
  static constexpr int kCodeBytes = kRows * kWidth * 2;                  // [Z, dU] or V of the tile
  static constexpr int kSlotRowBytes = kWidth * 4;
  static constexpr int kPartialBytes = kRows * kSlotRowBytes;            // a slot for each block, of 64/c rows
  static constexpr int kWeights = kStages * kStageBytes;
  static constexpr int kCodes = kWeights + kWeightBytes;
  static constexpr int kPartials = kCodes + kCodeBytes;
  static constexpr int kCodeTiles = kPartials + kPartialBytes;
  static constexpr int kBarriers = kCodeTiles + larger_of(CodeTile<kPairRank>::kBytes, CodeTile<kTiedRank>::kBytes);
  static constexpr int kShared = kBarriers + 64;
  static_assert(kShared <= 232448, "all of it fits the 227 KB a block may have on sm_90");
  static_assert(kWeights % 1024 == 0 && kCodes % 1024 == 0, "swizzled tiles begin at a multiple of 1024 bytes");
  static_assert(kPartials % 128 == 0 && kCodeTiles % 16 == 0 && kBarriers % 8 == 0, "slots begin at a bank, barriers are aligned");
  static_assert(kWidth == 2 * kPairRank && kWidth == kTiedRank, "either form fills the width");
  static_assert(kRows == 1 << 6 && kRows % kMaxCluster == 0, "each block of a cluster owns whole rows");
};

struct ClusterPlan {
  int cluster;   // blocks of a cluster; 0: two passes
  int row_bits;  // of a tile, a block owns 1 << row_bits = 64 / cluster rows
  int clusters;
  int64_t tiles;
};

// The smallest power of two of blocks that holds all columns; as many clusters as run at a time.
BYOL_HD constexpr ClusterPlan plan_cluster(int64_t rows, int64_t features, int rank, bool tied, int multiprocessors) {
  using Tile = ClusterTile;
  if (rank > (tied ? Tile::kTiedRank : Tile::kPairRank)) return {};
  if (features < 1 || features > int64_t(Tile::kMaxCluster) * Tile::kColumns) return {};
  int cluster = 1, row_bits = 6;
  while (cluster * Tile::kColumns < features) cluster *= 2, --row_bits;
  const int64_t tiles = ceil_div(rows, Tile::kRows);
  const int64_t fit = multiprocessors / cluster;
  if (fit < 1) return {};
  return {cluster, row_bits, int(tiles < fit ? tiles : fit), tiles};
}

// The byte at which element (row, column) of a tile of 64-column boxes lies: 128-byte rows, the 16-byte pieces of which are
// permuted by the row (the copy engine's and wgmma's "128-byte swizzle").
BYOL_HD constexpr int swizzled(int row, int column, int box_rows) {
  const int piece = (column % 64 / 8) ^ (row % 8);
  return column / 64 * box_rows * 128 + row * 128 + piece * 16 + column % 8 * 2;
}

// The byte at which a column of a row of a slot lies: 32-byte pieces, permuted by the row, so that eight rows of a fragment lie
// in different banks.
BYOL_HD constexpr int slot_byte(int row, int column) {
  return row * ClusterTile::kSlotRowBytes + ((column / 8) ^ (row % 8)) * 32 + column % 8 * 4;
}

// The matrix descriptor of wgmma: address and stride of groups of eight 128-byte rows, in 16 bytes; 128-byte swizzle.
BYOL_HD constexpr uint64_t wgmma_descriptor(uint32_t address) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// The descriptor of what lies so many bytes further: no more than an addition, the address has the lowest bits.
BYOL_HD constexpr uint64_t further(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

}  // namespace byol::cuda
