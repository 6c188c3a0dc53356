// The launchers of one element type, BYOL_ELEMENT: sizes, workspace, and the order of the kernels. Compiled once for each
// type, in parallel.
#include "cluster_launch.h"
#include "dispatch.h"
#include "finish.h"
#include "prepare.h"
#include "squared_error.h"

namespace byol::cuda {
namespace {

using T = BYOL_ELEMENT;

// Hands out workspace; without any it only counts.
class Workspace {
 public:
  explicit Workspace(const Where& where) : base(static_cast<char*>(where.workspace)) {}
  template <class V>
  V* take(int64_t count) {
    const size_t at = used;
    used += size_t(round_up(count * int64_t(sizeof(V)), 256));
    return base ? reinterpret_cast<V*>(base + at) : nullptr;
  }
  bool counts_only() const { return !base; }
  size_t size() const { return used; }

 private:
  char* base;
  size_t used = 0;
};

cudaStream_t stream_of(const Where& where) { return static_cast<cudaStream_t>(where.stream); }

bool is_aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * int64_t(sizeof(T)) % 16 == 0;
}

Source source(const Matrix& matrix, int64_t rows, int columns) {
  return {matrix.data, matrix.stride, rows, columns, is_aligned(matrix.data, matrix.stride)};
}

// The weights in the form the kernels read.
template <int Kp>
struct Weights {
  Source encoder, decoder;
  float *encoder_bias, *decoder_bias, *gram, *gram_low;
  double* offset;
  PrepareArgs prepare;

  Weights(const LayerArgs& args, bool gram_form, bool separate, Workspace& space) : prepare{} {
    const bool tied = !args.decoder_weight.data;
    // Whole chunks of columns, so that products and biases need no mask.
    const int in = int(round_up(args.in_features, 64)), out = int(round_up(args.out_features, 64));
    T* packed_encoder = space.take<T>(int64_t(Kp) * in);
    T* packed_decoder = tied ? packed_encoder : space.take<T>(int64_t(Kp) * out);
    encoder_bias = space.take<float>(Kp), decoder_bias = space.take<float>(out);
    gram = gram_form ? space.take<float>(Kp * Kp) : nullptr;
    gram_low = gram_form ? space.take<float>(Kp * Kp) : nullptr;
    offset = gram_form ? space.take<double>(Kp) : nullptr;
    encoder = {packed_encoder, in, Kp, in, true};
    decoder = {packed_decoder, out, Kp, out, true};
    prepare.encoder_weight = args.encoder_weight, prepare.decoder_weight = args.decoder_weight;
    prepare.encoder_bias = args.encoder_bias, prepare.decoder_bias = args.decoder_bias;
    prepare.in_features = args.in_features, prepare.out_features = args.out_features, prepare.rank = args.rank;
    prepare.padded_rank = Kp, prepare.in_padded = in, prepare.out_padded = out;
    prepare.bias_in_offset = tied && !separate;
    prepare.encoder = packed_encoder, prepare.decoder = tied ? nullptr : packed_decoder;
    prepare.encoder_bias_out = encoder_bias, prepare.decoder_bias_out = decoder_bias;
    prepare.gram = gram, prepare.gram_low = gram_low, prepare.offset = offset;
  }

  void launch_on(const Where& where) const {
    launch(prepare_kernel<T>, Kp, 1, kPrepareThreads, kPrepareThreads * sizeof(double), stream_of(where), prepare);
  }
};

template <int Kp>
RowsArgs rows_args(Mode mode, const LayerArgs& args, const Matrix& target, bool separate, const Weights<Kp>& weights) {
  RowsArgs rows{};
  rows.mode = mode, rows.activation = Activation(args.activation);
  rows.tied = !args.decoder_weight.data, rows.separate = separate;
  rows.combined = mode == Mode::step && rows.tied && !separate;
  rows.rank = args.rank, rows.rows = args.rows;
  rows.input = source(args.input, args.rows, args.in_features);
  rows.target = separate ? source(target, args.rows, args.out_features) : rows.input;
  rows.encoder = weights.encoder, rows.decoder = weights.decoder;
  rows.encoder_bias = weights.encoder_bias, rows.decoder_bias = weights.decoder_bias;
  rows.gram = weights.gram, rows.gram_low = weights.gram_low, rows.offset = weights.offset;
  return rows;
}

template <int Kp>
void launch_rows(const RowsArgs& rows, const Where& where) {
  using Tile = RowTile<T, Kp>;
  launch(rows_kernel<T, Kp>, int(ceil_div(rows.rows, Tile::kRows)), 1, kThreads, Tile::kShared, stream_of(where), rows);
}

template <int Kp>
void launch_finish(const FinishArgs& finish, bool gradients, const Where& where) {
  const int blocks = int(ceil_div(sum_count(Kp), 32) + ceil_div(Kp * Kp, kReduceThreads));
  if (finish.sums)
    launch(reduce_kernel, blocks, 1, kReduceThreads, kReduceThreads * sizeof(double), stream_of(where), finish);
  if (gradients)
    launch(finish_kernel<T>, int(ceil_div(larger(finish.in_features, finish.out_features), kThreads / Kp)), 1, kThreads, 0,
           stream_of(where), finish);
}

// What is the same however the sums were made.
template <int Kp>
FinishArgs finish_args(const LayerArgs& args, const Weights<Kp>& weights, const WeightGradients& out, bool is_step) {
  FinishArgs finish{};
  finish.is_step = is_step, finish.tied = !args.decoder_weight.data;
  finish.in_features = args.in_features, finish.out_features = args.out_features;
  finish.rank = args.rank, finish.padded_rank = Kp;
  finish.decoder = weights.decoder, finish.decoder_bias = weights.decoder_bias;
  finish.sums_width = 2 * Kp, finish.slope_column = Kp;
  finish.out = out;
  return finish;
}

// The codes in memory, [rows, parts · Kp], as operands.
template <int Kp>
struct Codes {
  const void* data;
  int64_t rows;
  int parts;

  Source part(int first, int count) const {
    return {static_cast<const T*>(data) + first * Kp, parts * Kp, rows, count * Kp, true};
  }
  // The job that makes ZᵀZ or, of two parts, ZᵀZ′.
  ColumnsJob products(int count) const {
    return {part(0, kCodeTerms<T>), part(kCodeTerms<T> - 1, count), true, count == 2, Kp, Form::gram};
  }
};

// Tiles of a job, and its columns rounded up to whole ones.
template <int Kp>
int set_tiles(ColumnsJob& job) {
  return job.tiles = int(ceil_div(job.left.columns, ColumnTile<T, Kp>::kColumns));
}
template <int Kp>
int width_of(const ColumnsJob& job) {
  return job.tiles * ColumnTile<T, Kp>::kColumns;
}

// About two blocks for each multiprocessor; a split is whole row tiles, so that each step has one flag. Returns the splits.
int split_rows(ColumnsArgs& columns, int tiles, const Where& where) {
  const int64_t most = ceil_div(columns.rows, 128), wanted = ceil_div(2 * where.multiprocessors, tiles);
  columns.rows_per_split = ceil_div(most, smaller(wanted, most)) * 128;
  return int(ceil_div(columns.rows, columns.rows_per_split));
}

template <int Kp>
void launch_columns(const ColumnsArgs& columns, int tiles, int splits, const Where& where) {
  launch(columns_kernel<T, Kp>, tiles, splits, kThreads, ColumnTile<T, Kp>::kShared, stream_of(where), columns);
}

// The second pass and the end of a call.
template <int Kp>
class Gradients {

 public:
  Gradients(const LayerArgs& args, const Weights<Kp>& weights, const WeightGradients& out, bool is_step, const RowsArgs& rows)
      : columns{}, finish(finish_args<Kp>(args, weights, out, is_step)) {
    wants_code = finish.tied ? out.encoder_weight : out.decoder_weight;
    columns.rows = args.rows, columns.direct = rows.direct;
    columns.decoder = weights.decoder, columns.decoder_bias = weights.decoder_bias;
    finish.code_terms = kCodeTerms<T>;
    finish.row_tiles = ceil_div(args.rows, RowTile<T, Kp>::kRows);
    finish.sums = rows.sums;
  }

  void plan(const RowsArgs& rows, const Where& where, Workspace& space) {
    const bool slope = finish.out.encoder_weight, sums = finish.out.decoder_bias;
    const bool joint = finish.is_step && !rows.separate;
    int target = -1, input = -1, products = -1;
    const int parts = code_parts<T>(rows.combined), code = kCodeTerms<T> - 1;
    const Codes<Kp> codes{rows.codes, rows.rows, parts};
    // Tiles in direct form, which only float has, need Z to make S of T; combined, they alone multiply it with X.
    constexpr bool kDirect = sizeof(T) == 4;
    const bool apart = wants_code && (kDirect || !rows.combined), beside = apart || kDirect;
    if (joint && (wants_code || slope || sums))
      target = input = add({rows.input, beside ? codes.part(code, 2) : codes.part(parts - 1, 1), apart, slope, beside ? Kp : 0,
                            rows.combined ? Form::direct : Form::any, true});
    if (!joint && slope) input = add({rows.input, codes.part(parts - 1, 1), false, true});
    if (!joint && (wants_code || sums))
      target = add({rows.target, codes.part(code, 1), wants_code, false, 0, Form::any, finish.is_step});
    if (finish.is_step && wants_code) {
      finish.product_parts = rows.combined ? parts - 1 - code : 1;
      products = add(codes.products(finish.product_parts));
    }
    for (int i = 0; i < jobs; ++i) tiles += set_tiles<Kp>(columns.jobs[i]);
    if (jobs) finish.splits = split_rows(columns, tiles, where);
    for (int i = 0; i < jobs; ++i) columns.jobs[i].out = space.take<float>(int64_t(finish.splits) * width(i) * 2 * Kp);
    if (sums) {
      finish.column_sums = columns.jobs[target].column_sums = space.take<double>(int64_t(finish.splits) * width(target));
      columns.jobs[target].bias = finish.is_step ? finish.decoder_bias : nullptr;
    }
    if (input >= 0) finish.input_sums = columns.jobs[input].out, finish.input_columns = width(input);
    if (target >= 0) finish.target_columns = width(target);
    if (target >= 0 && columns.jobs[target].first) finish.target_sums = columns.jobs[target].out;
    if (products >= 0) finish.products = columns.jobs[products].out, finish.product_rows = width(products), finish.product_splits = finish.splits;
    finish.totals = space.take<double>(sum_count(Kp));
    finish.gram = space.take<double>(Kp * Kp);
  }

  void launch_on(const Where& where) const {
    if (jobs) launch_columns<Kp>(columns, tiles, finish.splits, where);
    launch_finish<Kp>(finish, jobs > 0, where);
  }

  void set_total(float* total) { finish.total = total; }

 private:
  int add(const ColumnsJob& job) {
    columns.jobs[jobs] = job;
    return jobs++;
  }
  int width(int job) const { return width_of<Kp>(columns.jobs[job]); }

  ColumnsArgs columns;
  FinishArgs finish;
  bool wants_code;
  int jobs = 0, tiles = 0;
};

// The step in one pass over X, where it fits; ZᵀZ follows.
template <int Kp>
size_t single_pass_step(const StepArgs& args, const ClusterPlan& plan, const Where& where) {
  using Tile = CodeTile<Kp>;
  Workspace space(where);
  // The bias is added to what has come from all blocks: Q is read off a product without it, tied or not.
  const Weights<Kp> weights(args, true, true, space);
  FinishArgs finish = finish_args<Kp>(args, weights, args.d_weights, true);
  const bool wants_code = finish.tied ? finish.out.encoder_weight : finish.out.decoder_weight;
  const int blocks = plan.cluster * plan.clusters, columns = plan.cluster * ClusterTile::kColumns;
  ClusterArgs cluster{};
  cluster.rows = args.rows, cluster.plan = plan;
  cluster.features = args.in_features, cluster.rank = args.rank;
  cluster.activation = Activation(args.activation);
  cluster.encoder = weights.encoder, cluster.decoder = weights.decoder;
  cluster.encoder_bias = weights.encoder_bias, cluster.decoder_bias = weights.decoder_bias;
  cluster.gram = weights.gram, cluster.offset = weights.offset;
  cluster.code = args.code, cluster.slope = args.code_gradient;
  cluster.out = space.take<float>(int64_t(plan.clusters) * columns * ClusterTile::kWidth);
  cluster.column_sums = space.take<double>(int64_t(plan.clusters) * columns);
  cluster.sums = space.take<double>(int64_t(blocks) * sum_count(Kp));
  if (wants_code) cluster.codes = space.take<T>(args.rows * Tile::kParts * Kp);
  finish.row_tiles = blocks, finish.sums = cluster.sums, finish.total = args.total;
  finish.splits = plan.clusters, finish.input_columns = finish.target_columns = columns;
  finish.column_sums = cluster.column_sums, finish.input_sums = cluster.out;
  // A pair has XᵀZ apart; V = dU − Z has it in it. The halves of 2·Kp = 64 columns, or all 64 of Kp.
  finish.target_sums = Tile::kTied ? nullptr : cluster.out;
  finish.slope_column = Tile::kTied ? 0 : Kp, finish.sums_width = ClusterTile::kWidth;

  ColumnsArgs products{};
  products.rows = args.rows;
  const Codes<Kp> codes{cluster.codes, args.rows, Tile::kParts};
  products.jobs[0] = codes.products(Tile::kParts - 1);
  const int tiles = set_tiles<Kp>(products.jobs[0]);
  finish.product_splits = split_rows(products, tiles, where);
  finish.product_rows = width_of<Kp>(products.jobs[0]), finish.product_parts = Tile::kParts - 1, finish.code_terms = kCodeTerms<T>;
  if (wants_code)
    finish.products = products.jobs[0].out = space.take<float>(int64_t(finish.product_splits) * finish.product_rows * 2 * Kp);
  finish.totals = space.take<double>(sum_count(Kp)), finish.gram = space.take<double>(Kp * Kp);
  if (space.counts_only()) return space.size();
  weights.launch_on(where);
  launch_cluster<T, Kp>(cluster, source(args.input, args.rows, args.in_features), stream_of(where));
  if (wants_code) launch_columns<Kp>(products, tiles, finish.product_splits, where);
  launch_finish<Kp>(finish, true, where);
  return space.size();
}

// In one pass if the device and the problem allow it and there are gradients to gain by it.
ClusterPlan single_pass_plan(const StepArgs& args, const Where& where) {
  const bool gradients = args.d_weights.encoder_weight || args.d_weights.decoder_weight;
  if (!where.single_pass || args.target.data || !gradients) return {};
  if (!is_aligned(args.input.data, args.input.stride)) return {};
  return plan_cluster(args.rows, args.in_features, args.rank, !args.decoder_weight.data, where.multiprocessors);
}

template <int Kp>
size_t step_of_rank(const StepArgs& args, const Where& where) {
  // Of Kp = 16 it takes the tile of 32.
  if constexpr (sizeof(T) == 2 && Kp <= ClusterTile::kTiedRank)
    if (const ClusterPlan plan = single_pass_plan(args, where); plan.cluster)
      return single_pass_step<larger_of(Kp, ClusterTile::kPairRank)>(args, plan, where);
  Workspace space(where);
  const bool separate = args.target.data;
  const Weights<Kp> weights(args, true, separate, space);
  RowsArgs rows = rows_args<Kp>(Mode::step, args, args.target, separate, weights);
  const int64_t tiles = ceil_div(args.rows, RowTile<T, Kp>::kRows);
  // The second pass reads it as an operand even where it only adds up Σ (t − bd).
  const WeightGradients& d = args.d_weights;
  if (d.encoder_weight || d.decoder_weight || d.decoder_bias)
    rows.codes = space.take<T>(args.rows * code_parts<T>(rows.combined) * Kp);
  rows.code = args.code, rows.slope = args.code_gradient;
  rows.sums = space.take<double>(tiles * sum_count(Kp));
  rows.direct = sizeof(T) == 4 ? space.take<int>(tiles) : nullptr;
  Gradients<Kp> gradients(args, weights, args.d_weights, true, rows);
  gradients.set_total(args.total);
  gradients.plan(rows, where, space);
  if (space.counts_only()) return space.size();
  weights.launch_on(where);
  launch_rows<Kp>(rows, where);
  gradients.launch_on(where);
  return space.size();
}

template <int Kp>
size_t forward_of_rank(const ForwardArgs& args, const Where& where) {
  Workspace space(where);
  const Weights<Kp> weights(args, false, false, space);
  RowsArgs rows = rows_args<Kp>(Mode::forward, args, {}, false, weights);
  rows.code = args.preactivation;
  ExpandArgs& out = rows.expand;
  out.rows = args.rows, out.columns = args.out_features, out.rank = args.rank;
  out.code_sign = 1, out.decoder = weights.decoder;
  out.bias = weights.decoder_bias, out.bias_weight = 1;
  out.addend = rows.input, out.addend_weight = args.residual;
  out.output = args.output, out.output_aligned = is_aligned(args.output, args.out_features);
  if (space.counts_only()) return space.size();
  weights.launch_on(where);
  launch_rows<Kp>(rows, where);
  return space.size();
}

template <int Kp>
void launch_expand(const ExpandArgs& expand, const Where& where) {
  using E = Expand<T, Kp>;
  launch(expand_kernel<T, Kp>, int(ceil_div(expand.rows, E::kRows)), 1, kThreads, E::kShared, stream_of(where), expand);
}

template <int Kp>
size_t backward_of_rank(const BackwardArgs& args, const Where& where) {
  Workspace space(where);
  const Weights<Kp> weights(args, false, true, space);
  RowsArgs rows = rows_args<Kp>(Mode::backward, args, args.grad, true, weights);
  const int64_t tiles = ceil_div(args.rows, RowTile<T, Kp>::kRows);
  // Read as an operand even where no product with it is wanted.
  rows.codes = space.take<T>(args.rows * code_parts<T>(false) * Kp);
  rows.preactivation = args.preactivation;
  rows.slope = args.d_input ? space.take<float>(args.rows * args.rank) : nullptr;
  rows.sums = args.preactivation ? space.take<double>(tiles * sum_count(Kp)) : nullptr;
  Gradients<Kp> gradients(args, weights, args.d_weights, false, rows);
  gradients.plan(rows, where, space);
  if (space.counts_only()) return space.size();
  weights.launch_on(where);
  if (args.preactivation) launch_rows<Kp>(rows, where);
  gradients.launch_on(where);
  if (args.d_input) {
    ExpandArgs out{};
    out.rows = args.rows, out.columns = args.in_features, out.rank = args.rank;
    out.slope = rows.slope, out.encoder = weights.encoder;
    out.addend = rows.target, out.addend_weight = args.residual;
    out.output = args.d_input, out.output_aligned = is_aligned(args.d_input, args.in_features);
    launch_expand<Kp>(out, where);
  }
  return space.size();
}

template <int Kp>
size_t input_gradients_of_rank(const InputGradientArgs& args, const Where& where) {
  Workspace space(where);
  const bool separate = args.target.data;
  const Weights<Kp> weights(args, false, separate, space);
  if (space.counts_only()) return space.size();
  weights.launch_on(where);
  ExpandArgs out{};
  out.rows = args.rows, out.rank = args.rank, out.scale = args.scale;
  out.encoder = weights.encoder, out.decoder = weights.decoder, out.bias = weights.decoder_bias;
  out.code = args.code;
  if (args.d_input) {
    ExpandArgs input = out;
    input.columns = args.in_features, input.slope = args.code_gradient;
    if (!separate) {
      input.code_sign = -1, input.addend_weight = 1, input.bias_weight = -1;
      input.addend = source(args.input, args.rows, args.in_features);
    }
    input.output = args.d_input, input.output_aligned = is_aligned(args.d_input, args.in_features);
    launch_expand<Kp>(input, where);
  }
  if (args.d_target) {
    ExpandArgs target = out;
    target.columns = args.out_features;
    target.code_sign = -1, target.addend_weight = 1, target.bias_weight = -1;
    target.addend = source(separate ? args.target : args.input, args.rows, args.out_features);
    target.output = args.d_target, target.output_aligned = is_aligned(args.d_target, args.out_features);
    launch_expand<Kp>(target, where);
  }
  return space.size();
}

// Calls the instance whose tile is the narrowest that holds the rank.
#define BYOL_BY_RANK(function)                                       \
  [](const auto& args, const Where& where) -> size_t {               \
    if (args.rank <= 16) return function<16>(args, where);           \
    if (args.rank <= 32) return function<32>(args, where);           \
    if (args.rank <= 64) return function<64>(args, where);           \
    return function<128>(args, where);                               \
  }

SquaredErrorKernelArgs squared_error_args(const SquaredErrorArgs& args, const Where& where) {
  SquaredErrorKernelArgs kernel{};
  kernel.rows = args.rows, kernel.columns = args.columns;
  kernel.units = args.rows * ceil_div(args.columns, kVector<T>);
  // `columns` of a source is an int and not used here: a flat tensor has more.
  kernel.input = source(args.input, args.rows, 0), kernel.target = source(args.target, args.rows, 0);
  kernel.blocks = int(smaller(ceil_div(kernel.units, kThreads), int64_t(8 * where.multiprocessors)));
  kernel.total = args.total, kernel.scale = args.scale;
  kernel.d_input = args.d_input, kernel.d_input_stride = args.d_input_stride;
  kernel.d_target = args.d_target, kernel.d_target_stride = args.d_target_stride;
  kernel.d_aligned = is_aligned(args.d_input, args.d_input_stride) && is_aligned(args.d_target, args.d_target_stride);
  return kernel;
}

size_t squared_error_launcher(const SquaredErrorArgs& args, const Where& where) {
  Workspace space(where);
  SquaredErrorKernelArgs kernel = squared_error_args(args, where);
  kernel.partial = space.take<double>(kernel.blocks);
  if (space.counts_only()) return space.size();
  constexpr size_t kScratch = kThreads / 32 * sizeof(double);
  launch(squared_error_kernel<T>, kernel.blocks, 1, kThreads, kScratch, stream_of(where), kernel);
  launch(total_kernel, 1, 1, kThreads, kScratch, stream_of(where), kernel);
  return space.size();
}

size_t squared_error_backward_launcher(const SquaredErrorArgs& args, const Where& where) {
  const SquaredErrorKernelArgs kernel = squared_error_args(args, where);
  launch(squared_error_backward_kernel<T>, kernel.blocks, 1, kThreads, 0, stream_of(where), kernel);
  return 0;
}

}  // namespace

#define BYOL_CONCATENATE(a, b) a##b
#define BYOL_TABLE(element) BYOL_CONCATENATE(table_, element)

const LauncherTable BYOL_TABLE(BYOL_ELEMENT) = {
    squared_error_launcher,        squared_error_backward_launcher, BYOL_BY_RANK(forward_of_rank),
    BYOL_BY_RANK(backward_of_rank), BYOL_BY_RANK(step_of_rank),      BYOL_BY_RANK(input_gradients_of_rank),
};

}  // namespace byol::cuda
