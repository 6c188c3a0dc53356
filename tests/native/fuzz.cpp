// A fuzz target for the native core: random shapes, strides, dtypes, activations, forms and absent operands, each buffer
// ending at a page that must not be touched and surrounded by bytes that must not change, each result compared with a naive
// loop in double. It is built plainly, with AddressSanitizer and UndefinedBehaviorSanitizer, and with ThreadSanitizer.
//
//   fuzz [first seed] [count]      runs that many cases, says which seed fails, and exits with 1 if one does
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

using namespace byol;

namespace {

std::string current;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n  in %s\n", what.c_str(), current.c_str());
  std::exit(1);
}

// ------------------------------------------------------------------------------------------------ guarded memory

// Bytes that end right before an inaccessible page; the rest of the first page is a canary.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t body = (bytes + page - 1) / page * page + page;
    total_ = body + page;
    base_ = static_cast<uint8_t*>(mmap(nullptr, total_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) fail("mmap");
    mprotect(base_ + body, page, PROT_NONE);
    data_ = base_ + body - bytes;
    std::memset(base_, kCanary, data_ - base_);
    // What a kernel forgets to write shows as NaN.
    std::memset(data_, 0xff, bytes);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, total_); }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  void check(const char* name) const {
    for (const uint8_t* byte = base_; byte < data_; ++byte)
      if (*byte != kCanary) fail(std::string("wrote before the start of ") + name);
  }
  std::vector<uint8_t> copy() const { return {data_, data_ + bytes_}; }

 private:
  static constexpr uint8_t kCanary = 0xa5;
  size_t bytes_, total_;
  uint8_t *base_, *data_;
};

// --------------------------------------------------------------------------------------------------- number types

size_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
DType accumulation(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                          : exponent     ? std::ldexp(float(1024 + fraction), exponent - 25)
                                         : std::ldexp(float(fraction), -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

double get(DType dtype, const void* data, int64_t i) {
  if (dtype == DType::f64) return static_cast<const double*>(data)[i];
  if (dtype == DType::f32) return double(static_cast<const float*>(data)[i]);
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (dtype == DType::f16) return double(half_to_float(bits));
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return double(value);
}

// Any bit pattern of a half type near `value` will do for an input.
void put(DType dtype, void* data, int64_t i, double value) {
  if (dtype == DType::f64) {
    static_cast<double*>(data)[i] = value;
  } else if (dtype == DType::f32) {
    static_cast<float*>(data)[i] = float(value);
  } else if (dtype == DType::bf16) {
    const float wide = float(value);
    uint32_t bits;
    std::memcpy(&bits, &wide, 4);
    static_cast<uint16_t*>(data)[i] = uint16_t(bits >> 16);
  } else if (value == 0) {
    static_cast<uint16_t*>(data)[i] = 0;
  } else {
    int exponent;
    const double fraction = std::frexp(std::fabs(value), &exponent);
    const int biased = exponent + 14;
    const uint16_t bits = biased <= 0 ? 0 : uint16_t(biased << 10 | (int(fraction * 2048) & 1023));
    static_cast<uint16_t*>(data)[i] = uint16_t(bits | (value < 0 ? 0x8000 : 0));
  }
}

// ---------------------------------------------------------------------------------------------------- the operands

using Dense = std::vector<double>;

struct Random {
  explicit Random(uint64_t seed) : engine(seed) {}
  int64_t below(int64_t n) { return int64_t(engine() % uint64_t(n)); }
  bool flip() { return below(2); }
  double normal() { return distribution(engine); }
  std::mt19937_64 engine;
  std::normal_distribution<double> distribution;
};

// A matrix in storage with a row stride of its own, and its values in double. Stride 0 repeats one row.
struct Operand {
  Operand(Random& random, DType dtype, int64_t rows, int64_t cols, double scale, bool may_expand = true)
      : dtype(dtype), rows(rows), cols(cols), stride(random.below(4) ? cols : cols + random.below(9)) {
    if (may_expand && random.below(12) == 0) stride = 0;
    const int64_t count = rows ? (rows - 1) * stride + cols : 0;
    memory = std::make_unique<Guarded>(size_t(count) * size_of(dtype));
    for (int64_t i = 0; i < count; ++i) put(dtype, memory->as<void>(), i, scale * random.normal());
    before = memory->copy();
    values.resize(size_t(rows * cols));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) values[r * cols + c] = get(dtype, memory->as<void>(), r * stride + c);
  }
  Matrix matrix() const { return {memory->as<void>(), stride}; }
  double at(int64_t r, int64_t c) const { return values[r * cols + c]; }
  void spoil(int64_t r, int64_t c) {
    put(dtype, memory->as<void>(), r * stride + c, NAN);
    before = memory->copy();
  }
  void check() const {
    memory->check("an operand");
    if (memory->copy() != before) fail("an operand was written");
  }

  DType dtype;
  int64_t rows, cols, stride;
  std::unique_ptr<Guarded> memory;
  std::vector<uint8_t> before;
  Dense values;
};

// A contiguous result.
struct Result {
  Result(DType dtype, int64_t count) : dtype(dtype), count(count), memory(size_t(count) * size_of(dtype)) {}
  void* data() const { return memory.as<void>(); }
  void expect(const Dense& truth, const char* name, double tolerance) const {
    memory.check(name);
    double error = 0, norm = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double difference = get(dtype, data(), i) - truth[i];
      error += difference * difference;
      norm += truth[i] * truth[i];
    }
    if (!(std::sqrt(error) <= tolerance * std::sqrt(norm) + 1e-30))
      fail(std::string(name) + ": relative error " + std::to_string(std::sqrt(error / norm)));
  }
  DType dtype;
  int64_t count;
  Guarded memory;
};

// ------------------------------------------------------------------------------------------------ the naive truth

double value_of(Activation activation, double u) {
  switch (activation) {
    case Activation::identity: return u;
    case Activation::relu: return u > 0 ? u : 0;
    case Activation::gelu: return 0.5 * u * (1 + std::erf(u / std::sqrt(2.0)));
    case Activation::gelu_tanh: return 0.5 * u * (1 + std::tanh(std::sqrt(2 / M_PI) * (u + 0.044715 * u * u * u)));
    case Activation::silu: return u / (1 + std::exp(-u));
    case Activation::tanh: return std::tanh(u);
  }
  return NAN;
}
double slope_of(Activation activation, double u) {
  if (activation == Activation::identity) return 1;
  if (activation == Activation::relu) return u > 0;
  const double h = 1e-5;
  return (value_of(activation, u + h) - value_of(activation, u - h)) / (2 * h);
}

struct Case {
  explicit Case(uint64_t seed) : random(seed) {
    dtype = DType(random.below(4));
    activation = Activation(random.below(6));
    threads = int(1 + random.below(3));
    rows = random.below(8) == 0 ? random.below(3) : 1 + random.below(random.flip() ? 40 : 300);
    D = 1 + random.below(random.flip() ? 20 : 150);
    K = 1 + random.below(random.flip() ? 9 : 70);
    tied = random.flip();
    O = tied || random.flip() ? D : 1 + random.below(random.flip() ? 20 : 420);
    // The naive derivative of an activation is good to about 1e-9.
    tolerance = dtype == DType::f64 ? 1e-7 : 2e-4;
    // Where bf16 is multiplied as it is, so are codes and their gradients, rounded; in a step a difference of their sums is left.
    const std::string set = kernels().name;
    const bool rounded = dtype == DType::bf16 && (set == "amx" || set == "avx512_bf16");
    weight_tolerance = rounded ? 3e-2 : tolerance;
    layer_tolerance = rounded ? 6e-3 : tolerance;
    output_tolerance = dtype == DType::bf16 ? 6e-3 : dtype == DType::f16 ? 2e-3 : tolerance;
  }

  template <class Args>
  void set(Args& args, const Operand& x, const Operand& we, const Operand* wd, const Operand* be, const Operand* bd) const {
    args.dtype = dtype, args.activation = activation, args.threads = threads;
    args.rows = rows, args.in_features = D, args.out_features = O, args.rank = K;
    args.input = x.matrix(), args.encoder_weight = we.matrix();
    args.decoder_weight = wd ? wd->matrix() : Matrix{};
    args.encoder_bias = be ? be->memory->as<void>() : nullptr;
    args.decoder_bias = bd ? bd->memory->as<void>() : nullptr;
  }

  Random random;
  DType dtype;
  Activation activation;
  int threads;
  int64_t rows, D, K, O;
  bool tied;
  double tolerance, weight_tolerance, layer_tolerance, output_tolerance;
};

struct Network {
  explicit Network(Case& c)
      : x(c.random, c.dtype, c.rows, c.D, 1), we(c.random, c.dtype, c.K, c.D, 1 / std::sqrt(double(c.D)), false) {
    if (!c.tied) wd = std::make_unique<Operand>(c.random, c.dtype, c.O, c.K, 1 / std::sqrt(double(c.K)), false);
    if (c.random.flip()) be = std::make_unique<Operand>(c.random, c.dtype, 1, c.K, 0.3, false);
    if (c.random.flip()) bd = std::make_unique<Operand>(c.random, c.dtype, 1, c.O, 0.3, false);
    u.resize(c.rows * c.K), z = u, slope = u, y.resize(c.rows * c.O);
    for (int64_t n = 0; n < c.rows; ++n) {
      for (int64_t k = 0; k < c.K; ++k) {
        double sum = be ? be->at(0, k) : 0;
        for (int64_t d = 0; d < c.D; ++d) sum += x.at(n, d) * we.at(k, d);
        u[n * c.K + k] = sum;
        z[n * c.K + k] = value_of(c.activation, sum);
        slope[n * c.K + k] = slope_of(c.activation, sum);
      }
      for (int64_t o = 0; o < c.O; ++o) {
        double sum = bd ? bd->at(0, o) : 0;
        for (int64_t k = 0; k < c.K; ++k) sum += z[n * c.K + k] * decoder(o, k);
        y[n * c.O + o] = sum;
      }
    }
  }
  double decoder(int64_t o, int64_t k) const { return wd ? wd->at(o, k) : we.at(k, o); }
  void check() const {
    for (const Operand* operand : {&x, &we, static_cast<const Operand*>(wd.get()), static_cast<const Operand*>(be.get()),
                                   static_cast<const Operand*>(bd.get())})
      if (operand) operand->check();
  }

  Operand x, we;
  std::unique_ptr<Operand> wd, be, bd;
  Dense u, z, slope, y;
};

// The gradients of the weights for a gradient g of y.
struct Gradients {
  Gradients(const Case& c, const Network& net, const Dense& g)
      : du(c.rows * c.K), dx(c.rows * c.D), dwe(c.K * c.D), dwd(c.O * c.K), dbe(c.K), dbd(c.O) {
    for (int64_t n = 0; n < c.rows; ++n) {
      for (int64_t k = 0; k < c.K; ++k) {
        double sum = 0;
        for (int64_t o = 0; o < c.O; ++o) sum += g[n * c.O + o] * net.decoder(o, k);
        du[n * c.K + k] = sum * net.slope[n * c.K + k];
        dbe[k] += du[n * c.K + k];
        for (int64_t o = 0; o < c.O; ++o) dwd[o * c.K + k] += g[n * c.O + o] * net.z[n * c.K + k];
        for (int64_t d = 0; d < c.D; ++d) {
          dwe[k * c.D + d] += du[n * c.K + k] * net.x.at(n, d);
          dx[n * c.D + d] += du[n * c.K + k] * net.we.at(k, d);
        }
      }
      for (int64_t o = 0; o < c.O; ++o) dbd[o] += g[n * c.O + o];
    }
    if (c.tied)
      for (int64_t k = 0; k < c.K; ++k)
        for (int64_t d = 0; d < c.D; ++d) dwe[k * c.D + d] += dwd[d * c.K + k];
  }
  Dense du, dx, dwe, dwd, dbe, dbd;
};

// The four weight gradients, some of them absent.
struct WeightResults {
  explicit WeightResults(Case& c) {
    const DType type = accumulation(c.dtype);
    if (c.random.below(4)) we = std::make_unique<Result>(type, c.K * c.D);
    if (!c.tied && c.random.below(4)) wd = std::make_unique<Result>(type, c.O * c.K);
    if (c.random.below(4)) be = std::make_unique<Result>(type, c.K);
    if (c.random.below(4)) bd = std::make_unique<Result>(type, c.O);
  }
  template <class Args>
  void set(Args& args) const {
    args.d_encoder_weight = we ? we->data() : nullptr, args.d_decoder_weight = wd ? wd->data() : nullptr;
    args.d_encoder_bias = be ? be->data() : nullptr, args.d_decoder_bias = bd ? bd->data() : nullptr;
  }
  void expect(const Gradients& truth, double tolerance, double scale = 1) const {
    const auto check = [&](const std::unique_ptr<Result>& result, Dense expected, const char* name) {
      for (double& value : expected) value *= scale;
      if (result) result->expect(expected, name, tolerance);
    };
    check(we, truth.dwe, "d_encoder_weight"), check(wd, truth.dwd, "d_decoder_weight");
    check(be, truth.dbe, "d_encoder_bias"), check(bd, truth.dbd, "d_decoder_bias");
  }
  std::unique_ptr<Result> we, wd, be, bd;
};

void expect_sum(double sum, double truth, double tolerance, const char* name) {
  if (!(std::fabs(sum - truth) <= tolerance * truth + 1e-30))
    fail(std::string(name) + ": " + std::to_string(sum) + ", expected " + std::to_string(truth));
}

// ------------------------------------------------------------------------------------------------------- the cases

void fuzz_squared_error(Case& c) {
  const Operand x(c.random, c.dtype, c.rows, c.D, 1), t(c.random, c.dtype, c.rows, c.D, 1);
  SquaredErrorArgs args{};
  args.dtype = c.dtype, args.threads = c.threads, args.rows = c.rows, args.cols = c.D;
  args.input = x.matrix(), args.target = t.matrix(), args.scale = 0.7;
  Dense dx(c.rows * c.D), dt(dx);
  double sum = 0;
  for (size_t i = 0; i < dx.size(); ++i) {
    const double difference = x.values[i] - t.values[i];
    sum += difference * difference, dx[i] = 0.7 * difference, dt[i] = -dx[i];
  }
  expect_sum(kernels().squared_error(args), sum, c.tolerance, "squared_error");
  const Result d_input(c.dtype, c.rows * c.D), d_target(c.dtype, c.rows * c.D);
  args.d_input = d_input.data(), args.d_target = c.random.flip() ? d_target.data() : nullptr;
  args.d_input_stride = args.d_target_stride = c.D;
  kernels().squared_error_backward(args);
  d_input.expect(dx, "d_input", c.output_tolerance);
  if (args.d_target) d_target.expect(dt, "d_target", c.output_tolerance);
  x.check(), t.check();
}

void fuzz_layer(Case& c) {
  const Network net(c);
  const bool residual = c.O == c.D && c.random.flip();
  const Result output(c.dtype, c.rows * c.O), code(accumulation(c.dtype), c.rows * c.K);
  ForwardArgs args{};
  c.set(args, net.x, net.we, net.wd.get(), net.be.get(), net.bd.get());
  args.residual = residual, args.output = output.data(), args.preactivation = code.data();
  kernels().forward(args);
  Dense y = net.y;
  for (size_t i = 0; residual && i < y.size(); ++i) y[i] += net.x.values[i];
  output.expect(y, "output", c.output_tolerance);
  code.expect(net.u, "preactivation", c.tolerance);

  const Operand grad(c.random, c.dtype, c.rows, c.O, 1);
  const Gradients truth(c, net, grad.values);
  const WeightResults weights(c);
  const Result d_input(c.dtype, c.rows * c.D);
  BackwardArgs back{};
  c.set(back, net.x, net.we, net.wd.get(), nullptr, nullptr);
  back.residual = residual, back.grad = grad.matrix(), back.preactivation = code.data();
  back.d_input = c.random.flip() ? d_input.data() : nullptr;
  weights.set(back);
  kernels().backward(back);
  weights.expect(truth, c.layer_tolerance);
  Dense dx = truth.dx;
  for (size_t i = 0; residual && i < dx.size(); ++i) dx[i] += grad.values[i];
  if (back.d_input) d_input.expect(dx, "d_input", c.output_tolerance);
  net.check(), grad.check();
}

void fuzz_step(Case& c) {
  if (!c.tied && c.O == c.D && c.random.flip()) c.O = c.D;
  const Network net(c);
  std::unique_ptr<Operand> target;
  if (c.O != c.D || c.random.flip()) target = std::make_unique<Operand>(c.random, c.dtype, c.rows, c.O, 1);
  const Operand& goal = target ? *target : net.x;
  Dense residual = net.y;
  double sum = 0;
  for (size_t i = 0; i < residual.size(); ++i) residual[i] -= goal.values[i], sum += residual[i] * residual[i];
  const Gradients truth(c, net, residual);
  const WeightResults weights(c);
  const DType type = accumulation(c.dtype);
  const Result code(type, c.rows * c.K), code_gradient(type, c.rows * c.K);
  const bool save = c.random.flip();
  StepArgs args{};
  c.set(args, net.x, net.we, net.wd.get(), net.be.get(), net.bd.get());
  args.form = Form(c.random.below(3)), args.scale = 0.3;
  args.target = target ? target->matrix() : Matrix{};
  weights.set(args);
  if (save) args.code = code.data(), args.code_gradient = code_gradient.data();
  expect_sum(kernels().step(args), sum, c.tolerance, "step");
  weights.expect(truth, c.weight_tolerance, 2 * args.scale);
  if (!save) return net.check();
  code.expect(net.z, "code", c.tolerance);
  code_gradient.expect(truth.du, "code_gradient", c.tolerance);

  const Result d_input(c.dtype, c.rows * c.D), d_target(c.dtype, c.rows * c.O);
  InputGradientArgs data{};
  c.set(data, net.x, net.we, net.wd.get(), nullptr, net.bd.get());
  data.target = args.target, data.code = code.data(), data.code_gradient = code_gradient.data(), data.scale = 0.7;
  data.d_input = d_input.data(), data.d_target = target ? d_target.data() : nullptr;
  kernels().step_input_gradients(data);
  Dense dx = truth.dx, dt = residual;
  for (size_t i = 0; i < dx.size(); ++i) dx[i] = 0.7 * (dx[i] - (target ? 0 : residual[i]));
  for (double& value : dt) value *= -0.7;
  d_input.expect(dx, "d_input", c.output_tolerance);
  if (target) d_target.expect(dt, "d_target", c.output_tolerance);
  net.check(), goal.check();
}

void fuzz_sparse(Case& c) {
  c.O = c.D;
  Network net(c);
  // Nine entries of ten become zero; the network is computed again on what is left.
  Guarded starts(size_t(c.rows + 1) * 8);
  std::vector<int64_t> columns;
  Dense values;
  starts.as<int64_t>()[0] = 0;
  for (int64_t n = 0; n < c.rows; ++n) {
    for (int64_t d = 0; d < c.D; ++d)
      if (c.random.below(10) == 0) columns.push_back(d), values.push_back(net.x.at(n, d));
    starts.as<int64_t>()[n + 1] = int64_t(columns.size());
  }
  const Guarded column_memory(columns.size() * 8), value_memory(columns.size() * size_of(c.dtype));
  Dense x(c.rows * c.D);
  for (int64_t n = 0; n < c.rows; ++n)
    for (int64_t i = starts.as<int64_t>()[n]; i < starts.as<int64_t>()[n + 1]; ++i) {
      column_memory.as<int64_t>()[i] = columns[i];
      put(c.dtype, value_memory.as<void>(), i, values[i]);
      x[n * c.D + columns[i]] = values[i];
    }
  net.x.values = x;
  Dense residual(c.rows * c.O);
  double sum = 0;
  for (int64_t n = 0; n < c.rows; ++n) {
    for (int64_t k = 0; k < c.K; ++k) {
      double u = net.be ? net.be->at(0, k) : 0;
      for (int64_t d = 0; d < c.D; ++d) u += x[n * c.D + d] * net.we.at(k, d);
      net.z[n * c.K + k] = value_of(c.activation, u), net.slope[n * c.K + k] = slope_of(c.activation, u);
    }
    for (int64_t o = 0; o < c.O; ++o) {
      double r = (net.bd ? net.bd->at(0, o) : 0) - x[n * c.D + o];
      for (int64_t k = 0; k < c.K; ++k) r += net.z[n * c.K + k] * net.decoder(o, k);
      residual[n * c.O + o] = r, sum += r * r;
    }
  }
  const Gradients truth(c, net, residual);
  const WeightResults weights(c);
  SparseArgs args{};
  c.set(args, net.x, net.we, net.wd.get(), net.be.get(), net.bd.get());
  args.input = {}, args.scale = 0.3;
  args.row_starts = starts.as<int64_t>(), args.columns = column_memory.as<int64_t>(), args.values = value_memory.as<void>();
  weights.set(args);
  expect_sum(kernels().sparse_step(args).squared_error, sum, c.tolerance, "sparse_step");
  weights.expect(truth, c.tolerance, 2 * args.scale);
}

void fuzz_scatter(Case& c) {
  if (c.dtype != DType::f64) c.dtype = DType::f32;
  c.rows *= 1 + c.random.below(9);
  Operand x(c.random, c.dtype, c.rows, c.D, 1);
  const Operand shift(c.random, c.dtype, 1, c.D, 1, false);
  const Result image(DType::f64, c.D * c.D), sums(DType::f64, c.D);
  int64_t finite = c.rows;
  if (c.rows && c.random.flip()) {
    finite = c.random.below(c.rows);
    x.spoil(finite, c.random.below(c.D));
    if (x.stride == 0) finite = 0;
  }
  // It adds to what is there.
  Dense s(c.D), truth(c.D * c.D);
  for (int64_t i = 0; i < c.D; ++i) static_cast<double*>(sums.data())[i] = s[i] = double(i);
  for (int64_t i = 0; i < c.D * c.D; ++i) static_cast<double*>(image.data())[i] = truth[i] = double(i % 7);
  ScatterArgs args{};
  args.dtype = c.dtype, args.threads = c.threads, args.rows = c.rows, args.features = c.D;
  args.input = x.matrix(), args.shift = shift.memory->as<void>();
  args.image = static_cast<double*>(image.data()), args.sums = static_cast<double*>(sums.data());
  const int64_t added = kernels().scatter(args);
  // Of a round that holds NaN, nothing; all else is added.
  if (added > finite || added < finite - 1024 || (finite == c.rows && added != finite))
    fail("scatter added " + std::to_string(added) + " of " + std::to_string(finite) + " finite rows");
  for (int64_t n = 0; n < added; ++n)
    for (int64_t i = 0; i < c.D; ++i) {
      const double left = x.at(n, i) - shift.at(0, i);
      s[i] += left;
      for (int64_t j = 0; j < c.D; ++j) truth[i * c.D + j] += left * (x.at(n, j) - shift.at(0, j));
    }
  // Nothing is promised of what is below the diagonal.
  for (int64_t i = 0; i < c.D; ++i)
    for (int64_t j = 0; j < i; ++j) args.image[i * c.D + j] = truth[i * c.D + j] = 0;
  image.expect(truth, "image", c.tolerance);
  sums.expect(s, "sums", c.tolerance);
  x.check(), shift.check();
}

void run(uint64_t seed) {
  Case c(seed);
  current = "seed " + std::to_string(seed) + ": dtype " + std::to_string(int(c.dtype)) + ", activation " +
            std::to_string(int(c.activation)) + ", threads " + std::to_string(c.threads) + ", N, D, K, Do = " +
            std::to_string(c.rows) + ", " + std::to_string(c.D) + ", " + std::to_string(c.K) + ", " + std::to_string(c.O) +
            (c.tied ? ", tied" : "");
  void (*const targets[])(Case&) = {fuzz_squared_error, fuzz_layer, fuzz_step, fuzz_step, fuzz_sparse, fuzz_scatter};
  targets[c.random.below(6)](c);
}

}  // namespace

#ifdef BYOL_LIBFUZZER
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  uint64_t seed = 0;
  std::memcpy(&seed, data, size < 8 ? size : 8);
  run(seed);
  return 0;
}
#else
int main(int argc, char** argv) try {
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const uint64_t count = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 500;
  for (uint64_t seed = first; seed < first + count; ++seed)
    run(seed);
  std::printf("%s: %llu cases passed\n", kernels().name, static_cast<unsigned long long>(count));
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
#endif
