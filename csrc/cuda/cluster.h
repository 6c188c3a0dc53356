// The training step in one pass over X, for sm_90a: 16-bit elements, T is X, up to 8192 features, rank up to 32 or, of tied
// weights, 64.
//
//   pair (Kp = 32)  P = X·[Weᵀ, Wd],  U = P₁ + be,  Q = P₂ − bd Wd      C += Xᵀ·[Z, dU]
//   tied (Kp = 64)  P = X·Weᵀ,        U = P + be,   Q = P − bd Wd       C += XᵀV,  V = dU − Z
//                   Z = f(U),  E = Z G − Q,  dU = E ⊙ f′(U)
//
// A cluster of c blocks takes 64 rows at a time; each block owns 512 columns of X, and keeps its slice of C in registers, so X
// is read from memory exactly once. What crosses blocks is narrow: each pushes its partial P to the owner of the rows (64/c of
// them a block), which makes their [Z, dU] or V and pushes these to all. The owner writes Z to memory, too, in two 16-bit
// elements: ZᵀZ, which is K wide, is made of it by columns.h afterwards. (Made here, it would take Kp²/32 registers of every
// thread.) Rounding V is booked to Z as in rows.h, so that tied weights write Z′ − Z as well.
//
// Layouts (an element is 2 bytes, a box is 64 rows of 128 bytes, its 16-byte pieces permuted by the row: the 128-byte
// swizzle; the descriptor's stride is that of eight rows, 1024 bytes; every box begins at a multiple of 1024):
//
//   operand        product  as stored                              major  step of 16 along k
//   X              P, A     8 boxes [64 rows, 64 columns]          K      + 32 bytes
//   weights        P, B     8 boxes [64 of We|Wdᵀ or We, 64 cols]  K      + 32 bytes; a warpgroup takes 32 rows of a box
//   Xᵀ             C, A     the boxes of X                         M      + 16 rows, 2048 bytes
//   [Z, dU] or V   C, B     1 box [64 rows, 64]                    N      + 16 rows, 2048 bytes
//   P              slots    float [c, 64/c, 64]                    a slot for each block, summed in this order; the 32-byte
//                                                                  pieces of a row permuted by the row
//   Z              Z G, A   float [16, Kp + 4]                     K      a tile for each 16 rows in work, twice
//   G              Z G, B   float [Kp, Kp], in memory              K      symmetric
//
// Two warpgroups: of P, each has 32 columns, 16 registers of a thread; of C, each has 4 boxes of columns, 128 registers. Of
// Z G, a product of warps, each warp has 8 columns of 16 rows.
// A tensor core truncates its sums: C is added to memory, and begun afresh, every 4096 rows. Waiting, a tile, is for three
// barriers that count bytes: X has come (copy engine), P has come, codes have come (pushed). They also keep the buffers: a
// block pushes the next P only when it has all codes, hence after every owner has read its slots; and an owner pushes the
// next codes only when it has all P, hence after every block is done with the former ones.
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
template <class T, int Kp>
BYOL_DEVICE void load_weights(const ClusterArgs& args, unsigned char* to, int first_column) {
  using Tile = ClusterTile;
  constexpr int kPieces = Tile::kColumns / 8;
  for (int i = thread(); i < Tile::kWidth * kPieces; i += kThreads) {
    const int n = i / kPieces, column = i % kPieces * 8;
    const Source& from = n < Kp ? args.encoder : args.decoder;
    Pack<T> pack;
    if (first_column + column < from.columns) {
      pack = *reinterpret_cast<const Pack<T>*>(at<T>(from, n % Kp, first_column + column));
    } else {
      for (int j = 0; j < 8; ++j) pack.values[j] = from_float<T>(0.0f);
    }
    *reinterpret_cast<Pack<T>*>(to + swizzled(n, column, Tile::kWidth)) = pack;
  }
}

// Pushes a warpgroup's [64, 32] of P to the owners of its rows. Two lanes share, so that each has 16 bytes of a row.
BYOL_DEVICE void push_partial(const ClusterArgs& args, const float (&p)[4][4], unsigned char* partials, Barrier* barrier) {
  const int lane = thread() % 32, odd = lane % 2;
  const int row = thread() / 32 % 4 * 16 + lane / 4 + 8 * odd, column = thread() / 128 * 32 + lane % 4 / 2 * 4;
  const int at = slot_byte((cluster_rank() << args.plan.row_bits) + row % (1 << args.plan.row_bits), column);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float first = shuffle_xor(odd ? p[n][0] : p[n][2], 1), second = shuffle_xor(odd ? p[n][1] : p[n][3], 1);
    const uint32_t value[4] = {bits_of_float(odd ? first : p[n][0]), bits_of_float(odd ? second : p[n][1]),
                               bits_of_float(odd ? p[n][2] : first), bits_of_float(odd ? p[n][3] : second)};
    // At column + 8 n.
    push(partials + (at ^ n * 32), value, barrier, row >> args.plan.row_bits);
  }
}

// What a thread adds up over all tiles: of the codes, their columns k and k + 1 (CodeTile).
struct ClusterSums {
  double energy = 0, code[2] = {}, rounded[2] = {}, slope[2] = {};
  float columns[8] = {};
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

// Two neighbours of a row of P, summed over the slots.
struct alignas(8) Two {
  float of[2];
};
BYOL_DEVICE Two sum_slots(const ClusterArgs& args, const unsigned char* partials, int row, int column) {
  Two sum = {};
#pragma unroll 1
  for (int slot = 0; slot < args.plan.cluster; ++slot) {
    const Two part = *reinterpret_cast<const Two*>(partials + slot_byte((slot << args.plan.row_bits) + row, column));
    sum.of[0] += part.of[0], sum.of[1] += part.of[1];
  }
  return sum;
}

// Pushes a part of a row of codes to every block: four lanes have a 16-byte piece together, each pushes it to some of them.
BYOL_DEVICE void push_codes(const ClusterArgs& args, uint32_t word, bool owned, unsigned char* to, Barrier* barrier) {
  const int lane = thread() % 32;
  uint32_t piece[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) piece[j] = shuffle_from(word, lane / 4 * 4 + j);
  for (int target = lane % 4; owned && target < args.plan.cluster; target += 4) push(to, piece, barrier, target);
}

// The codes of the rows this block owns, pushed to every block; Z, and Z′ − Z, to memory. A warp makes 8 columns of 16 rows at
// a time, as fragments: lane 4g + t has columns k and k + 1, k = 2t, of rows g and g + 8.
template <class T, int Kp>
BYOL_DEVICE void finish_rows(const ClusterArgs& args, const unsigned char* partials, float* tiles, unsigned char* codes,
                             Barrier* barrier, int64_t row, ClusterSums& sums) {
  using Tile = CodeTile<Kp>;
  const int own_rows = 1 << args.plan.row_bits, first = cluster_rank() * own_rows;
  const int lane = thread() % 32, across = thread() / 32 % Tile::kAcross, down = thread() / 32 / Tile::kAcross;
  const int k = across * 8 + lane % 4 * 2;
#pragma unroll 1
  for (int step = 0; step * Tile::kDown * 16 < own_rows; ++step) {
    const int top = (step * Tile::kDown + down) * 16 + lane / 4;
    const auto row_of = [&](int i) { return top + i / 2 * 8; };
    const auto inside = [&](int i) { return row_of(i) < own_rows && row + first + row_of(i) < args.rows; };
    // The other tile may still be read by warps that are behind.
    float* tile = tiles + (step % 2 * Tile::kDown + down) * 16 * Tile::kStride;
    float z[4], slope[4], q[4];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      Two u = {}, other = {};
      if (row_of(i) < own_rows) {
        u = sum_slots(args, partials, row_of(i), k);
        other = Tile::kTied ? u : sum_slots(args, partials, row_of(i), Kp + k);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Activated f = activate(args.activation, args.encoder_bias[k + j] + u.of[j]);
        z[i + j] = inside(i) ? f.value : 0.0f, slope[i + j] = f.slope, q[i + j] = other.of[j];
        tile[(lane / 4 + i / 2 * 8) * Tile::kStride + k + j] = z[i + j];
      }
    }
    sync();
    float e[1][4] = {};
#pragma unroll 1
    for (int d = 0; d < Kp; d += 8)
      multiply<float, false, false, 8, 8>(e, tile + d, Tile::kStride, args.gram + across * 8 * Kp + d, Kp);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int r = row_of(i);
      float high[2], given[2], booked[2];  // of Z: rounded, and Z′; what all blocks get: dU, or V
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const double shifted = double(q[i + j]) - args.offset[k + j], error = double(e[0][i + j]) - shifted;
        const float code = z[i + j];
        slope[i + j] = inside(i) ? float(error) * slope[i + j] : 0.0f;
        if (inside(i)) sums.energy += double(code) * (error - shifted);
        high[j] = to_float(from_float<T>(code));
        given[j] = Tile::kTied ? slope[i + j] - code : slope[i + j];
        booked[j] = Tile::kTied ? slope[i + j] - to_float(from_float<T>(given[j])) : high[j];
        sums.code[j] += double(code), sums.rounded[j] += double(booked[j]), sums.slope[j] += double(slope[i + j]);
      }
      const uint32_t codes_high = packed<T>(high[0], high[1]);
      unsigned char* to = codes + swizzled(first + r, across * 8, ClusterTile::kRows);
      if (!Tile::kTied) {
        push_codes(args, codes_high, r < own_rows, to, barrier);
        to = codes + swizzled(first + r, Kp + across * 8, ClusterTile::kRows);
      }
      push_codes(args, packed<T>(given[0], given[1]), r < own_rows, to, barrier);
      if (!inside(i)) continue;
      if (args.codes) {
        uint32_t* out = static_cast<uint32_t*>(args.codes) + ((row + first + r) * Tile::kParts * Kp + k) / 2;
        out[0] = packed<T>(z[i] - high[0], z[i + 1] - high[1]);
        out[Kp / 2] = codes_high;
        if (Tile::kTied) out[Kp] = packed<T>(booked[0] - high[0], booked[1] - high[1]);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t at = (row + first + r) * args.rank + k + j;
        if (args.code && k + j < args.rank) args.code[at] = z[i + j];
        if (args.slope && k + j < args.rank) args.slope[at] = slope[i + j];
      }
    }
  }
}

// The end: what this block has added up, to memory.
template <int Kp>
BYOL_DEVICE void write_sums(const ClusterArgs& args, unsigned char* shared, int cluster, int first_column, const ClusterSums& sums) {
  using Tile = ClusterTile;
  double* scratch = reinterpret_cast<double*>(shared);
  double* out = args.sums + int64_t(block_x()) * sum_count(Kp);
  const double total = block_sum<kThreads>(sums.energy, scratch);
  if (thread() == 0) out[0] = total;
  const double* parts[3] = {sums.code, sums.rounded, sums.slope};
#pragma unroll
  for (int part = 0; part < 3; ++part) {
    sync();
    scratch[2 * thread()] = parts[part][0], scratch[2 * thread() + 1] = parts[part][1];
    sync();
    if (thread() < Kp) {
      double sum = 0;
      for (int down = 0; down < CodeTile<Kp>::kDown; ++down)
        for (int g = 0; g < 8; ++g)
          sum += scratch[((down * CodeTile<Kp>::kAcross + thread() / 8) * 32 + g * 4) * 2 + thread() % 8];
      out[1 + part * Kp + thread()] = sum;
    }
  }
  float* tile = reinterpret_cast<float*>(shared);
  sync();
#pragma unroll
  for (int j = 0; j < 8; ++j) tile[thread() / 64 * Tile::kColumns + thread() % 64 * 8 + j] = sums.columns[j];
  sync();
  for (int i = thread(); i < Tile::kColumns; i += kThreads) {
    double sum = 0;
    for (int part = 0; part < 4; ++part) sum += double(tile[part * Tile::kColumns + i]);
    args.column_sums[int64_t(cluster) * args.plan.cluster * Tile::kColumns + first_column + i] = sum;
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

template <class T, int Kp>
BYOL_DEVICE void cluster_step(const ClusterKernelArgs& args) {
  using Tile = ClusterTile;
  static_assert(Tile::kColumns * Tile::kWidth == 128 * kThreads, "C takes 128 registers of a thread, of 255");
  static_assert(Tile::kRows * Tile::kWidth == 16 * kThreads, "and P 16");
  unsigned char* shared = shared_memory();
  unsigned char *weights = shared + Tile::kWeights, *codes = shared + Tile::kCodes, *partials = shared + Tile::kPartials;
  float* code_tiles = reinterpret_cast<float*>(shared + Tile::kCodeTiles);
  Barrier* barriers = reinterpret_cast<Barrier*>(shared + Tile::kBarriers);
  Barrier *has_input = barriers, *has_partials = barriers + Tile::kStages, *has_codes = has_partials + 1;
  const int cluster = block_x() / args.plan.cluster, first_column = cluster_rank() * Tile::kColumns, group = thread() / 128;
  const int first_box = group * 4;
  float* out = args.out + (int64_t(cluster) * args.plan.cluster * Tile::kColumns + first_column) * Tile::kWidth;

  if (thread() == 0) {
    for (int i = 0; i < Tile::kStages + 2; ++i) barrier_init(barriers + i, 1);
    barrier_init_visible();
  }
  load_weights<T, Kp>(args, weights, first_column);
  async_fence();
  sync();
  cluster_sync();

  const auto load = [&](int64_t i) {
    const int64_t tile = cluster + i * args.plan.clusters;
    if (thread() != 0 || tile >= args.plan.tiles) return;
    const int stage = int(i % Tile::kStages);
    barrier_expect(has_input + stage, Tile::kStageBytes);
    for (int box = 0; box < Tile::kColumns / Tile::kBox; ++box)
      copy_box(shared + stage * Tile::kStageBytes + box * Tile::kBoxBytes, &args.map, first_column + box * Tile::kBox,
               int(tile * Tile::kRows), has_input + stage);
  };
  const uint64_t w = wgmma_descriptor(shared_address(weights)), v = wgmma_descriptor(shared_address(codes));
  float c[4][8][4] = {};
  ClusterSums sums;
  load(0);
#pragma unroll 1
  for (int64_t i = 0; cluster + i * args.plan.clusters < args.plan.tiles; ++i) {
    const int64_t row = (cluster + i * args.plan.clusters) * Tile::kRows;
    const unsigned char* stage = shared + i % Tile::kStages * Tile::kStageBytes;
    const uint64_t x = wgmma_descriptor(shared_address(stage));
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
        const int a = box * Tile::kBoxBytes + 32 * k, b = (box * Tile::kWidth + group * 32) * 128 + 32 * k;
        wgmma<T, false>(p, further(x, a), further(w, b));
      }
    wgmma_end();
    push_partial(args, p, partials, has_partials);
    add_columns<T>(args, stage, row, first_column, sums);
    barrier_wait(has_partials, int(i % 2));
    finish_rows<T, Kp>(args, partials, code_tiles, codes, has_codes, row, sums);
    barrier_wait(has_codes, int(i % 2));
    async_fence();
    wgmma_begin();
#pragma unroll
    for (int box = 0; box < 4; ++box)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int a = (first_box + box) * Tile::kBoxBytes + 2048 * k;
        wgmma<T, true>(c[box], further(x, a), further(v, 2048 * k));
      }
    wgmma_end();
    const bool last = cluster + (i + 1) * args.plan.clusters >= args.plan.tiles;
    if (last || i % kFreshTiles == kFreshTiles - 1) add_sums(c, out, first_box, i >= kFreshTiles);
    sync();
  }
  write_sums<Kp>(args, shared, cluster, first_column, sums);
  // No block leaves while another may still push to it.
  cluster_sync();
}

#endif  // sm_90a

template <class T, int Kp>
__global__ void __launch_bounds__(kThreads, 1) cluster_kernel(const __grid_constant__ ClusterKernelArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  cluster_step<T, Kp>(args);
#endif
}

}  // namespace byol::cuda
