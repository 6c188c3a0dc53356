// The training step in one pass over X, for sm_90a: 16-bit elements, T is X, rank up to 32, up to 8192 features.
//
//   P = X·[Weᵀ, Wd],  Z = f(P₁ + be),  E = Z G − (P₂ − bd Wd),  dU = E ⊙ f′(U),  C += Xᵀ·[Z, dU]
//
// A cluster of c blocks takes 64 rows at a time; each block owns 512 columns of X, and keeps its slice of C in registers, so X
// is read from memory exactly once. What crosses blocks is narrow: each pushes its partial P to the owner of the rows (64/c of
// them a block), which makes their Z and dU and pushes these to all.
//
// Layouts (an element is 2 bytes, a box is 64 rows of 128 bytes, its 16-byte pieces permuted by the row: the 128-byte
// swizzle; the descriptor's stride is that of eight rows, 1024 bytes; every box begins at a multiple of 1024):
//
//   operand  product  as stored                          major  step of 16 along k
//   X        P, A     8 boxes [64 rows, 64 columns]      K      + 32 bytes
//   weights  P, B     8 boxes [64 of We|Wdᵀ, 64 columns] K      + 32 bytes; a warpgroup takes 32 rows of a box
//   Xᵀ       C, A     the boxes of X                     M      + 16 rows, 2048 bytes
//   [Z, dU]  C, B     1 box [64 rows, 64]                N      + 16 rows, 2048 bytes
//   P        slots    float [c, 64/c, 64]                a slot for each block, summed in this order
//
// Two warpgroups: of P, one has X Weᵀ and the other X Wd, 16 registers of a thread; of C, each has 4 boxes of columns, 128
// registers. A tensor core truncates its sums: C is added to memory, and begun afresh, every 4096 rows. Waiting, a tile, is
// for three barriers that count bytes: X has come (copy engine), P has come, Z and dU have come (pushed). They also keep the
// buffers: a block pushes the next P only when it has all Z and dU, hence after every owner has read its slots; and an owner
// pushes the next Z only when it has all P, hence after every block is done with the former ones.
//
// Not run on hardware yet: the emulation in tests/ reads the operands as the descriptors say.
#pragma once

#include "cluster_launch.h"
#include "hopper.h"

namespace byol::cuda {

struct ClusterKernelArgs : ClusterArgs {
  TensorMap map;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <class T>
BYOL_DEVICE uint32_t packed(float low, float high) {
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}

// The weights of this block's columns, in the layout of an operand.
template <class T>
BYOL_DEVICE void load_weights(const ClusterArgs& args, unsigned char* to, int first_column) {
  using Tile = ClusterTile;
  constexpr int kPieces = Tile::kColumns / 8;
  for (int i = thread(); i < Tile::kWidth * kPieces; i += kThreads) {
    const int n = i / kPieces, column = i % kPieces * 8;
    const Source& from = n < Tile::kRank ? args.encoder : args.decoder;
    Pack<T> pack;
    if (first_column + column < from.columns) {
      pack = *reinterpret_cast<const Pack<T>*>(at<T>(from, n % Tile::kRank, first_column + column));
    } else {
      for (int j = 0; j < 8; ++j) pack.values[j] = from_float<T>(0.0f);
    }
    *reinterpret_cast<Pack<T>*>(to + swizzled(n, column, Tile::kWidth)) = pack;
  }
}

// Pushes a warpgroup's [64, 32] of P to the owners of its rows. Two lanes share, so that each has 16 bytes of a row.
BYOL_DEVICE void push_partial(const ClusterArgs& args, const float (&p)[4][4], unsigned char* partials, Barrier* barrier) {
  const int lane = thread() % 32, odd = lane % 2, own_rows = ClusterTile::kRows / args.cluster;
  const int row = thread() / 32 % 4 * 16 + lane / 4 + 8 * odd;
  const int column = thread() / 128 * ClusterTile::kRank + lane % 4 / 2 * 4;
  unsigned char* to = partials + ((cluster_rank() * own_rows + row % own_rows) * ClusterTile::kWidth + column) * 4;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float first = shuffle_xor(odd ? p[n][0] : p[n][2], 1), second = shuffle_xor(odd ? p[n][1] : p[n][3], 1);
    const uint32_t value[4] = {bits_of_float(odd ? first : p[n][0]), bits_of_float(odd ? second : p[n][1]),
                               bits_of_float(odd ? p[n][2] : first), bits_of_float(odd ? p[n][3] : second)};
    push(to + 8 * n * 4, value, barrier, row / own_rows);
  }
}

// What a thread adds up over all tiles. A warp makes one row of Z at a time, lane k its element k.
struct ClusterSums {
  double energy = 0, code = 0, rounded = 0, slope = 0;
  float columns[8] = {}, gram[ClusterTile::kRank] = {};
};

// Σ (t − bd)² and Σ (t − bd) of 8 columns of 16 rows.
template <class T>
BYOL_DEVICE void add_columns(const ClusterArgs& args, const unsigned char* stage, int64_t row, int first_column, ClusterSums& sums) {
  const int column = thread() % 64 * 8;
  float energy = 0;
#pragma unroll 4
  for (int r = thread() / 64; r < ClusterTile::kRows; r += 4) {
    if (row + r >= args.rows) break;
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(stage + swizzled(r, column, ClusterTile::kRows));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int d = first_column + column + j;
      const float a = d < args.features ? to_float(pack.values[j]) - args.decoder_bias[d] : 0.0f;
      sums.columns[j] += a;
      energy += a * a;
    }
  }
  sums.energy += double(energy);
}

// Z and dU of the rows this block owns, pushed to every block.
template <class T>
BYOL_DEVICE void finish_rows(const ClusterArgs& args, const float* partials, unsigned char* codes, Barrier* barrier, int64_t row,
                             ClusterSums& sums) {
  using Tile = ClusterTile;
  const int own_rows = Tile::kRows / args.cluster, k = thread() % 32, first = cluster_rank() * own_rows;
#pragma unroll 1
  for (int r = thread() / 32; r < own_rows; r += kThreads / 32) {
    const bool inside = row + first + r < args.rows;
    float u = args.encoder_bias[k], q = 0;
#pragma unroll 1
    for (int slot = 0; slot < args.cluster; ++slot) {
      u += partials[(slot * own_rows + r) * Tile::kWidth + k];
      q += partials[(slot * own_rows + r) * Tile::kWidth + Tile::kRank + k];
    }
    const Activated f = activate(args.activation, u);
    const float z = inside ? f.value : 0.0f, rounded = to_float(from_float<T>(z));
    float e = 0;
#pragma unroll
    for (int j = 0; j < Tile::kRank; ++j) {
      const float zj = shuffle_from(z, j);
      e += zj * args.gram[j * Tile::kRank + k];
      sums.gram[j] += zj * rounded;
    }
    const double shifted = double(q) - args.offset[k], error = double(e) - shifted;
    const float slope = inside ? float(error) * f.slope : 0.0f;
    if (inside) sums.energy += double(z) * (error - shifted);
    sums.code += double(z), sums.rounded += double(rounded), sums.slope += double(slope);
    if (inside && k < args.rank) {
      if (args.code) args.code[(row + first + r) * args.rank + k] = z;
      if (args.slope) args.slope[(row + first + r) * args.rank + k] = slope;
    }
    // Eight lanes have a 16-byte piece of the row together; each pushes it to some of the blocks.
    const float next_z = shuffle_xor(z, 1), next_slope = shuffle_xor(slope, 1);
    const uint32_t z_pair = packed<T>(z, next_z), slope_pair = packed<T>(slope, next_slope);
    uint32_t z_piece[4], slope_piece[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      z_piece[j] = shuffle_from(z_pair, k / 8 * 8 + 2 * j), slope_piece[j] = shuffle_from(slope_pair, k / 8 * 8 + 2 * j);
    for (int target = k % 8; target < args.cluster; target += 8) {
      push(codes + swizzled(first + r, k / 8 * 8, Tile::kRows), z_piece, barrier, target);
      push(codes + swizzled(first + r, Tile::kRank + k / 8 * 8, Tile::kRows), slope_piece, barrier, target);
    }
  }
}

// The end: what this block has added up, to memory.
BYOL_DEVICE void write_sums(const ClusterArgs& args, unsigned char* shared, int cluster, int first_column, const ClusterSums& sums) {
  using Tile = ClusterTile;
  const int block = block_x(), warp = thread() / 32, k = thread() % 32;
  double* scratch = reinterpret_cast<double*>(shared);
  double* out = args.sums + int64_t(block) * sum_count(Tile::kRank);
  const double total = block_sum<kThreads>(sums.energy, scratch);
  if (thread() == 0) out[0] = total;
  const double parts[3] = {sums.code, sums.rounded, sums.slope};
#pragma unroll
  for (int part = 0; part < 3; ++part) {
    sync();
    scratch[thread()] = parts[part];
    sync();
    if (warp == 0) {
      double sum = 0;
      for (int w = 0; w < kThreads / 32; ++w) sum += scratch[w * 32 + k];
      out[1 + part * Tile::kRank + k] = sum;
    }
  }
  if (!args.gradients) return;
  sync();
  float* tile = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int j = 0; j < Tile::kRank; ++j) tile[(warp * Tile::kRank + j) * Tile::kRank + k] = sums.gram[j];
  sync();
  for (int i = thread(); i < Tile::kRank * Tile::kRank; i += kThreads) {
    float sum = 0;
    for (int w = 0; w < kThreads / 32; ++w) sum += tile[w * Tile::kRank * Tile::kRank + i];
    args.products[(int64_t(block) * Tile::kRank + i / Tile::kRank) * Tile::kWidth + i % Tile::kRank] = sum;
  }
  sync();
#pragma unroll
  for (int j = 0; j < 8; ++j) tile[thread() / 64 * Tile::kColumns + thread() % 64 * 8 + j] = sums.columns[j];
  sync();
  for (int i = thread(); i < Tile::kColumns; i += kThreads) {
    double sum = 0;
    for (int part = 0; part < 4; ++part) sum += double(tile[part * Tile::kColumns + i]);
    args.column_sums[int64_t(cluster) * args.cluster * Tile::kColumns + first_column + i] = sum;
  }
}

// Tiles after which C begins afresh.
constexpr int kFreshTiles = 4096 / ClusterTile::kRows;

// A warpgroup's four boxes of C: stored, or added to what this thread stored before; and begun afresh.
BYOL_DEVICE void add_sums(float (&c)[4][8][4], float* out, int first_box, bool more) {
  const int lane = thread() % 32;
#pragma unroll
  for (int box = 0; box < 4; ++box)
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int d = (first_box + box) * 64 + thread() / 32 % 4 * 16 + lane / 4 + i / 2 * 8;
        float& to = out[d * ClusterTile::kWidth + 8 * n + lane % 4 * 2 + i % 2];
        to = more ? to + c[box][n][i] : c[box][n][i];
        c[box][n][i] = 0;
      }
}

template <class T>
BYOL_DEVICE void cluster_step(const ClusterKernelArgs& args) {
  using Tile = ClusterTile;
  unsigned char* shared = shared_memory();
  unsigned char *weights = shared + Tile::kWeights, *codes = shared + Tile::kCodes, *partials = shared + Tile::kPartials;
  Barrier* barriers = reinterpret_cast<Barrier*>(shared + Tile::kBarriers);
  Barrier *has_input = barriers, *has_partials = barriers + Tile::kStages, *has_codes = has_partials + 1;
  const int cluster = block_x() / args.cluster, first_column = cluster_rank() * Tile::kColumns, group = thread() / 128;
  const int first_box = group * 4;
  float* out = args.out + (int64_t(cluster) * args.cluster * Tile::kColumns + first_column) * Tile::kWidth;

  if (thread() == 0) {
    for (int i = 0; i < Tile::kStages + 2; ++i) barrier_init(barriers + i, 1);
    barrier_init_visible();
  }
  load_weights<T>(args, weights, first_column);
  async_fence();
  sync();
  cluster_sync();

  const auto load = [&](int64_t i) {
    const int64_t tile = cluster + i * args.clusters;
    if (thread() != 0 || tile >= args.tiles) return;
    const int stage = int(i % Tile::kStages);
    barrier_expect(has_input + stage, Tile::kStageBytes);
    for (int box = 0; box < Tile::kColumns / Tile::kBox; ++box)
      copy_box(shared + stage * Tile::kStageBytes + box * Tile::kBoxBytes, &args.map, first_column + box * Tile::kBox,
               int(tile * Tile::kRows), has_input + stage);
  };
  float c[4][8][4] = {};
  ClusterSums sums;
  load(0);
#pragma unroll 1
  for (int64_t i = 0; cluster + i * args.clusters < args.tiles; ++i) {
    const int64_t row = (cluster + i * args.clusters) * Tile::kRows;
    const unsigned char* stage = shared + i % Tile::kStages * Tile::kStageBytes;
    // The other stage is free since the end of the former tile.
    load(i + 1);
    if (thread() == 0) {
      barrier_expect(has_partials, Tile::kPartialBytes);
      barrier_expect(has_codes, Tile::kCodeBytes);
    }
    barrier_wait(has_input + i % Tile::kStages, int(i / Tile::kStages % 2));
    float p[4][4] = {};
    wgmma_begin();
#pragma unroll
    for (int box = 0; box < Tile::kColumns / Tile::kBox; ++box)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint64_t a = wgmma_descriptor(shared_address(stage) + box * Tile::kBoxBytes + 32 * k);
        const uint32_t mine = box * Tile::kWidth * 128 + group * Tile::kRank * 128;
        wgmma<T, false>(p, a, wgmma_descriptor(shared_address(weights) + mine + 32 * k));
      }
    wgmma_end();
    push_partial(args, p, partials, has_partials);
    add_columns<T>(args, stage, row, first_column, sums);
    barrier_wait(has_partials, int(i % 2));
    finish_rows<T>(args, reinterpret_cast<const float*>(partials), codes, has_codes, row, sums);
    barrier_wait(has_codes, int(i % 2));
    if (args.gradients) {
      async_fence();
      wgmma_begin();
#pragma unroll
      for (int box = 0; box < 4; ++box)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const uint64_t a = wgmma_descriptor(shared_address(stage) + (first_box + box) * Tile::kBoxBytes + 2048 * k);
          wgmma<T, true>(c[box], a, wgmma_descriptor(shared_address(codes) + 2048 * k));
        }
      wgmma_end();
      const bool last = cluster + (i + 1) * args.clusters >= args.tiles;
      if (last || i % kFreshTiles == kFreshTiles - 1) add_sums(c, out, first_box, i >= kFreshTiles);
    }
    sync();
  }
  write_sums(args, shared, cluster, first_column, sums);
  // No block leaves while another may still push to it.
  cluster_sync();
}

#endif  // sm_90a

template <class T>
__global__ void __launch_bounds__(kThreads, 1) cluster_kernel(const __grid_constant__ ClusterKernelArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  cluster_step<T>(args);
#endif
}

}  // namespace byol::cuda
