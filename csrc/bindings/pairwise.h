// The ops of unigen_fast/reference/pairwise.py.
#pragma once

#include "common.h"

namespace unigen {

inline Matrix matrix_of(const Tensor& tensor, const Tensor& like) {
  UNIGEN_CHECK(tensor.dim() == 2 && tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device(),
                  "unigen_fast: expected matrices of one dtype on one device");
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)};
}

inline PairWeights pair_weights(int64_t rows, int64_t dataset_size, const string& estimator) {
  const bool columns = estimator == "mss_columns";
  UNIGEN_CHECK(columns || estimator == "mss" || estimator == "mws", "unigen_fast: unknown estimator ", estimator);
  const double b = double(std::max<int64_t>(rows, 1)), n = std::max(double(dataset_size), b), m = b - 1;
  if (estimator == "mws") return {1 / (b * n), 1, 1};
  if (rows < 2) return {1, 1, 1};
  return {1 / m, m / n, (n - m) / n, columns};
}

template <class Arguments>
void describe_total_correlation(Arguments& a, const Tensor& z, const Tensor& mean, const Tensor& logvar,
                                int64_t dataset_size, const string& estimator) {
  a.dtype = dtype_of(z);
  a.z = matrix_of(z, z);
  a.rows = z.size(0);
  a.cols = z.size(1);
  for (const Tensor* tensor : {&mean, &logvar})
    UNIGEN_CHECK(tensor->dim() == 2 && tensor->size(0) == a.rows && tensor->size(1) == a.cols,
                    "unigen_fast: expected tensors of one shape");
  a.mean = matrix_of(mean, z);
  a.logvar = matrix_of(logvar, z);
  a.weights = pair_weights(a.rows, dataset_size, estimator);
}

template <class Backend>
tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> total_correlation(const Tensor& z, const Tensor& mean,
                                                                                const Tensor& logvar, int64_t dataset_size,
                                                                                const string& estimator) {
  TotalCorrelation a;
  describe_total_correlation(a, z, mean, logvar, dataset_size, estimator);
  const auto dtype = arithmetic_type(z.scalar_type());
  const auto row = [&] { return empty_contiguous(z, {a.rows}, dtype); };
  Tensor values[kTotalCorrelationRows] = {row(), row(), row(), row(), row(), row()};
  Tensor statistics = empty_contiguous(z, {a.cols + kShiftRows + 1, a.rows}, dtype);
  for (int i = 0; i < kTotalCorrelationRows; ++i) a.values[i] = values[i].data_ptr();
  a.statistics = statistics.data_ptr();
  Backend::total_correlation(a, z);
  return {values[0], values[1], values[2], values[3], values[4], values[5], statistics};
}

template <class Backend>
tuple<Tensor, Tensor, Tensor> total_correlation_backward(const Tensor& g0, const Tensor& g1, const Tensor& g2,
                                                         const Tensor& g3, const Tensor& g4, const Tensor& g5,
                                                         const Tensor& z, const Tensor& mean, const Tensor& logvar,
                                                         const Tensor& statistics, int64_t dataset_size,
                                                         const string& estimator, int64_t needed) {
  TotalCorrelationBackward a;
  describe_total_correlation(a, z, mean, logvar, dataset_size, estimator);
  const auto dtype = arithmetic_type(z.scalar_type());
  const Tensor* grads[kTotalCorrelationRows] = {&g0, &g1, &g2, &g3, &g4, &g5};
  for (int i = 0; i < kTotalCorrelationRows; ++i) {
    UNIGEN_CHECK(grads[i]->dim() == 1 && grads[i]->size(0) == a.rows && grads[i]->scalar_type() == dtype &&
                        grads[i]->device() == z.device(),
                    "unigen_fast: a gradient has the wrong shape or dtype");
    a.grads[i] = grads[i]->data_ptr();
    a.grad_stride[i] = grads[i]->stride(0);
  }
  check_buffer(statistics, z, (a.cols + kShiftRows + 1) * a.rows);
  a.statistics = statistics.data_ptr();
  const auto gradient = [&](int bit, const Tensor& tensor, Matrix& matrix) {
    if (!(needed >> bit & 1)) return empty_absent(z);
    Tensor grad = empty_gradient(tensor);
    matrix = matrix_of(grad, z);
    return grad;
  };
  Tensor grad_z = gradient(0, z, a.grad_z), grad_mean = gradient(1, mean, a.grad_mean);
  Tensor grad_logvar = gradient(2, logvar, a.grad_logvar);
  Backend::total_correlation_backward(a, z);
  return {grad_z, grad_mean, grad_logvar};
}

// the gradients of the points of x and of y that `wanted` names, one matrix below the other
struct MmdGradients {
  int64_t rows[2], cols;
  int64_t wanted;

  MmdGradients(const Tensor& x, const Tensor& y, int64_t wanted) : rows{x.size(0), y.size(0)}, cols(x.size(1)), wanted(wanted) {}

  bool has(int side) const { return wanted >> side & 1; }
  int64_t total() const { return (has(0) ? rows[0] : 0) + (has(1) ? rows[1] : 0); }
  void* of(int side, const Tensor& gradients) const {
    const int64_t element = gradients.scalar_type() == ScalarType::Double ? 8 : 4;
    return static_cast<char*>(gradients.data_ptr()) + (side == 1 && has(0) ? rows[0] * cols * element : 0);
  }
};

template <class Backend>
tuple<Tensor, Tensor> mmd(const Tensor& x, const Tensor& y, const string& kernel, vector<double> scales, bool unbiased,
                          int64_t gradients) {
  UNIGEN_CHECK(kernel == "imq" || kernel == "rbf", "unigen_fast: unknown kernel ", kernel);
  UNIGEN_CHECK(!scales.empty() && scales.size() <= kMaxScales, "unigen_fast: expected 1 to ", kMaxScales, " scales, got ",
                  scales.size());
  Mmd a;
  a.dtype = dtype_of(x);
  a.x = matrix_of(x, x);
  a.y = matrix_of(y, x);
  a.x_rows = x.size(0);
  a.y_rows = y.size(0);
  a.cols = x.size(1);
  UNIGEN_CHECK(y.size(1) == a.cols, "unigen_fast: expected points of one dimension");
  a.kernel = kernel == "rbf" ? PairKernel::rbf : PairKernel::imq;
  a.unbiased = unbiased;
  for (double scale : scales) {
    const double width = 2.0 * double(a.cols) * scale;
    a.parameters[a.scales++] = a.kernel == PairKernel::rbf ? 1 / width : width;
  }
  const auto dtype = arithmetic_type(x.scalar_type());
  const MmdGradients layout(x, y, gradients);
  Tensor value = empty_contiguous(x, Dims{}, dtype);
  Tensor found = gradients ? empty_contiguous(x, {layout.total(), a.cols}, dtype) : empty_contiguous(x, {0}, dtype);
  a.value = value.data_ptr();
  if (layout.has(0)) a.grad_x = {layout.of(0, found), a.cols, 1};
  if (layout.has(1)) a.grad_y = {layout.of(1, found), a.cols, 1};
  Backend::mmd(a, x);
  return {value, found};
}

template <class Backend>
tuple<Tensor, Tensor> mmd_backward(const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& gradients,
                                   const string& kernel, vector<double> scales, bool unbiased, int64_t saved, int64_t needed) {
  check_number(grad, x);
  UNIGEN_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1), "unigen_fast: expected points of one dimension");
  const bool complete = (needed & ~saved) == 0;
  const Tensor found = complete ? gradients : std::get<1>(mmd<Backend>(x, y, kernel, scales, unbiased, needed));
  const MmdGradients layout(x, y, complete ? saved : needed);
  check_buffer(found, x, layout.total() * layout.cols);
  MmdBackward a;
  a.dtype = dtype_of(x);
  a.cols = layout.cols;
  a.grad = grad.data_ptr();
  Tensor targets[2];
  for (int side = 0; side < 2; ++side) {
    const bool wanted = needed >> side & 1;
    targets[side] = wanted ? empty_gradient(side ? y : x) : empty_absent(x);
    if (!wanted) continue;
    a.rows[side] = layout.rows[side];
    a.gradients[side] = layout.of(side, found);
    a.targets[side] = matrix_of(targets[side], x);
  }
  Backend::mmd_backward(a, x);
  return {targets[0], targets[1]};
}

#define UNIGEN_PAIRWISE_OPS(X)  \
  X(total_correlation)          \
  X(total_correlation_backward) \
  X(mmd)                        \
  X(mmd_backward)

}  // namespace unigen
