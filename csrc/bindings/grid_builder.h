// From tensors to a Grid and its Operands: which dimensions are columns, collapsed as far as all strides allow.
#pragma once

#include <algorithm>
#include <deque>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "../kernels.h"
#include "tensor.h"

namespace unigen {

// double for float64, else float: what rows, statistics and results are held in
inline ScalarType arithmetic_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: UNIGEN_CHECK(false, "unigen_fast: expected float32, float64, bfloat16 or float16");
  }
  return DType::float32;
}

constexpr int kMaxTensorDims = 64;

// Sizes or strides of a tensor, without a heap: a small call cannot afford one allocation for each of its tensors.
class Dims {
 public:
  Dims() = default;
  Dims(std::initializer_list<int64_t> items) {
    for (int64_t item : items) push_back(item);
  }
  explicit Dims(const Shape& items) {
    for (int64_t item : items) push_back(item);
  }

  void push_back(int64_t item) { insert(size_, item); }

  void insert(int64_t place, int64_t item) {
    UNIGEN_CHECK(size_ < kMaxTensorDims && 0 <= place && place <= size_, "unigen_fast: expected fewer dimensions");
    for (int64_t i = size_++; i > place; --i) items_[i] = items_[i - 1];
    items_[place] = item;
  }

  void pop_back() { --size_; }

  void erase(int64_t place) {
    UNIGEN_CHECK(0 <= place && place < size_, "unigen_fast: dim out of range");
    for (int64_t i = place + 1; i < size_; ++i) items_[i - 1] = items_[i];
    --size_;
  }

  int64_t size() const { return size_; }
  const int64_t* data() const { return items_; }
  int64_t operator[](int64_t i) const { return items_[i]; }

  int64_t product() const {
    int64_t result = 1;
    for (int64_t i = 0; i < size_; ++i) result *= items_[i];
    return result;
  }

 private:
  int64_t size_ = 0;
  int64_t items_[kMaxTensorDims];
};

inline Tensor empty_contiguous(const Tensor& like, const Dims& sizes, ScalarType dtype) {
  int64_t strides[kMaxTensorDims], stride = 1;
  for (int64_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(like, sizes.size(), sizes.data(), strides, dtype);
}

// Contiguous copies that a call's kernel sees in the place of tensors.
class Copies {
 public:
  static Copies& of_this_thread() {
    static thread_local Copies copies;
    return copies;
  }

  const Tensor& add(const Tensor& tensor, bool result) {
    Tensor copy = empty_contiguous(tensor, Dims(tensor.sizes()), tensor.scalar_type());
    if (!result) copy_into(copy, tensor);
    copies_.push_back({tensor, copy, result});
    return copies_.back().copy;
  }

  // Behind the kernel. Those of a call that failed before it are let go.
  void finish() {
    if (copies_.empty()) return;
    const auto copies = std::exchange(copies_, {});
    for (const Copy& copy : copies)
      if (copy.result) copy_into(copy.tensor, copy.copy);
  }

 private:
  struct Copy {
    Tensor tensor, copy;
    bool result;
  };
  std::deque<Copy> copies_;  // which stay where they are as more come
};

class GridBuilder {
 public:
  // The shape that every element operand has; the dimensions from `first_column` on, or those of `is_column`, are columns.
  GridBuilder(const Tensor& shape_of, int64_t first_column)
      : shape_of_(shape_of), size_(shape_of.sizes()), ndim_(int(size_.size())), dtype_(shape_of.scalar_type()) {
    UNIGEN_CHECK(0 <= first_column && first_column <= ndim_, "unigen_fast: event_ndims out of range");
    for (int d = 0; d < ndim_; ++d) is_column_[d] = d >= first_column;
  }

  // One column dimension, or all of them.
  static GridBuilder over(const Tensor& shape_of, std::optional<int64_t> dim) {
    GridBuilder builder(shape_of, dim ? shape_of.dim() : 0);
    if (dim) {
      UNIGEN_CHECK(0 <= *dim && *dim < shape_of.dim(), "unigen_fast: dim out of range");
      builder.is_column_[*dim] = true;
    }
    return builder;
  }

  // What all of a contiguous tensor as columns comes to, where many small tensors cannot afford a builder each.
  static Grid flat(int64_t numel) {
    Grid grid;
    grid.cols = grid.col_size[0] = numel;
    grid.col_dims = numel == 1 ? 0 : 1;
    return grid;
  }
  static Operand flat(void* data) {
    Operand operand;
    operand.data = data;
    operand.col[0] = 1;
    return operand;
  }

  // The grid of the other dimensions, of which the last `event_ndims` are columns: `skipped` is that of vectors.
  static GridBuilder without(const Tensor& shape_of, int64_t skipped, int64_t event_ndims) {
    UNIGEN_CHECK(0 <= skipped && skipped < shape_of.dim(), "unigen_fast: dim out of range");
    GridBuilder builder(shape_of, shape_of.dim());
    const Dims all = builder.size_;
    builder.size_ = Dims();
    builder.ndim_ = int(all.size()) - 1;
    UNIGEN_CHECK(0 <= event_ndims && event_ndims <= builder.ndim_, "unigen_fast: event_ndims out of range");
    for (int d = 0; d < builder.ndim_; ++d) {
      builder.size_.push_back(all[d < skipped ? d : d + 1]);
      builder.is_column_[d] = d >= builder.ndim_ - event_ndims;
    }
    return builder;
  }

  // Samples of examples: the dimensions before `first_column` are rows, in this order but for `samples`, the innermost.
  static GridBuilder of_samples(const Tensor& shape_of, int64_t first_column, int64_t samples) {
    GridBuilder builder(shape_of, first_column);
    UNIGEN_CHECK(0 <= samples && samples < first_column, "unigen_fast: dim out of range");
    builder.samples_ = int(samples);
    return builder;
  }

  // how many examples these have samples of
  int64_t examples() const {
    int64_t product = 1;
    for (int d = 0; d < ndim_; ++d)
      if (!is_column_[d] && d != samples_) product *= size_[d];
    return product;
  }

  Dims row_sizes() const {
    Dims sizes;
    for (int d = 0; d < ndim_; ++d)
      if (!is_column_[d]) sizes.push_back(size_[d]);
    return sizes;
  }

  // The next operand is written to.
  GridBuilder& result() {
    result_ = true;
    return *this;
  }

  void element(Operand& operand, const Tensor& tensor) { element(operand, tensor, dtype_); }
  void element(Operand& operand, const Tensor& tensor, ScalarType dtype) { add<Form::element>(operand, tensor, dtype); }

  // A tensor over the leading dimensions, of the arithmetic type, as an element operand: the same all along the others.
  void leading(Operand& operand, const Tensor& tensor) { add<Form::leading>(operand, tensor, arithmetic_type(dtype_)); }

  // An element operand with one dimension more, which is skipped, and its stride.
  void element_without(Operand& operand, const Tensor& tensor, int64_t skipped, int64_t& stride) {
    UNIGEN_CHECK(0 <= skipped && skipped < tensor.dim(), "unigen_fast: dim out of range");
    add<Form::without>(operand, tensor, dtype_, int(skipped), &stride);
  }
  void vectors(Vectors& vectors, const Tensor& tensor, int64_t skipped) {
    element_without(vectors.at, tensor, skipped, vectors.step);
  }

  // An element operand without the dimension of the samples: the same for all of them.
  void of_example(Operand& operand, const Tensor& tensor) { add<Form::example>(operand, tensor, dtype_); }

  // An element operand of the columns alone: the same in all rows.
  void of_event(Operand& operand, const Tensor& tensor) { add<Form::event>(operand, tensor, dtype_); }

  // Over the rows; a tensor without dimensions is the same for every row.
  void row(Operand& operand, const Tensor& tensor) { add<Form::row>(operand, tensor, arithmetic_type(dtype_)); }

  // A row operand without the dimension of the samples.
  void row_of_example(Operand& operand, const Tensor& tensor) {
    add<Form::row>(operand, tensor, arithmetic_type(dtype_), samples_);
  }

  // One number for each column of a grid of one dimension, in a row.
  void contiguous_columns(Operand& operand) {
    std::fill_n(add(operand, operand.data).stride, ndim_, int64_t(1));
  }

  // Planes of rows, [count, rows…] contiguous: strides of one plane.
  void planes(Operand& operand, const Tensor& tensor, int64_t count) {
    check_dtype(tensor, arithmetic_type(dtype_));
    UNIGEN_CHECK(tensor.device() == shape_of_.device(), "unigen_fast: expected tensors on one device");
    UNIGEN_CHECK(tensor.dim() > 0 && tensor.size(0) == count && tensor.is_contiguous(), "unigen_fast: expected ", count,
                    " planes of rows");
    Source& source = add(operand, tensor.data_ptr());
    int64_t stride = 1, from = tensor.dim();
    for (int d = ndim_ - 1; d >= 0; --d) {
      if (is_column_[d]) continue;
      UNIGEN_CHECK(--from > 0 && tensor.size(from) == size_[d], "unigen_fast: a row tensor has the wrong shape");
      source.stride[d] = stride;
      stride *= size_[d];
    }
    UNIGEN_CHECK(from == 1, "unigen_fast: a row tensor has the wrong shape");
  }

  // Sums do not care for the order of dimensions: with `reorder` the innermost one is that of the smallest strides.
  Grid finish(bool reorder = true) { return finish(reorder, reorder); }

  // Rows keep their order: two grids of the same samples number them alike.
  Grid finish_samples() { return finish(false, true); }

 private:
  static constexpr int kMaxOperands = 14;

  enum class Form { element, leading, without, example, event, row };

  struct Source {
    Operand* operand;
    int64_t stride[kMaxTensorDims];
    int held = -1;  // which of those that may have to be copied
    void (GridBuilder::*place)(Source&, const Tensor&) const;
    int64_t* skipped_stride;
    int skipped;
    bool result;
  };

  Grid finish(bool reorder_rows, bool reorder_cols) {
    Grid grid;
    if (!collapse(grid, reorder_rows, reorder_cols)) {
      make_contiguous();
      UNIGEN_CHECK(collapse(grid, reorder_rows, reorder_cols), "unigen_fast: expected fewer dimensions");
    }
    return grid;
  }

  bool collapse(Grid& grid, bool reorder_rows, bool reorder_cols) {
    grid.row_dims = collapse(false, reorder_rows, grid.rows, grid.row_size);
    grid.col_dims = collapse(true, reorder_cols, grid.cols, grid.col_size);
    return grid.row_dims <= kMaxDims && grid.col_dims <= kMaxDims;
  }

  // Strides that leave more dimensions than the kernels count: contiguous copies take the tensors' places. They live, and
  // results go back to where they belong, until the kernel has run: see `Copies`.
  void make_contiguous() {
    for (int s = 0; s < count_; ++s) {
      Source& source = sources_[s];
      if (source.held < 0 || held_[source.held].is_contiguous()) continue;
      const Tensor& copy = Copies::of_this_thread().add(held_[source.held], source.result);
      source.operand->data = copy.data_ptr();
      std::fill_n(source.stride, ndim_, int64_t(0));
      (this->*source.place)(source, copy);
    }
  }

  static void check_dtype(const Tensor& tensor, ScalarType dtype) {
    UNIGEN_CHECK(tensor.scalar_type() == dtype, "unigen_fast: got ", toString(tensor.scalar_type()),
                    ", expected ", toString(dtype));
  }

  Source& add(Operand& operand, void* data) {
    UNIGEN_CHECK(count_ < kMaxOperands, "unigen_fast: expected fewer tensors");
    operand.data = data;
    Source& source = sources_[count_++];
    source.operand = &operand;
    std::fill_n(source.stride, ndim_, int64_t(0));
    return source;
  }

  template <Form form>
  void add(Operand& operand, const Tensor& tensor, ScalarType dtype, int skipped = -1, int64_t* skipped_stride = nullptr) {
    check_dtype(tensor, dtype);
    UNIGEN_CHECK(tensor.device() == shape_of_.device(), "unigen_fast: expected tensors on one device");
    Source& source = add(operand, tensor.data_ptr());
    if (ndim_ > kMaxDims) {  // else its strides are few enough, whatever they are
      source.held = int(held_.size());
      held_.push_back(tensor);
    }
    source.place = &GridBuilder::place<form>;
    source.skipped = skipped;
    source.skipped_stride = skipped_stride;
    source.result = std::exchange(result_, false);
    place<form>(source, tensor);
  }

  // The strides of a tensor along the dimensions of the grid, all of its sizes checked: of every dimension, or of those that
  // its form says.
  template <Form form>
  void place(Source& source, const Tensor& tensor) const {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    const int ndim = int(sizes.size());
    if (form == Form::row && ndim == 0) return;
    int from = 0;
    for (int d = 0; d < ndim_; ++d) {
      if (form == Form::leading && d >= ndim) break;
      if (form == Form::example && d == samples_) continue;
      if (form == Form::event && !is_column_[d]) continue;
      if (form == Form::row && (is_column_[d] || d == source.skipped)) continue;
      if (form == Form::without && from == source.skipped) ++from;
      UNIGEN_CHECK(from < ndim && sizes[from] == size_[d], "unigen_fast: got a tensor of shape ", written(sizes),
                      " beside one of shape ", written(shape_of_.sizes()));
      source.stride[d] = strides[from++];
    }
    if (form == Form::without) {
      if (from == source.skipped) ++from;
      *source.skipped_stride = strides[source.skipped];
    }
    UNIGEN_CHECK(from == ndim, "unigen_fast: got a tensor of shape ", written(sizes), " beside one of shape ",
                    written(shape_of_.sizes()));
  }

  template <class Sizes>
  static std::string written(const Sizes& sizes) {
    std::string text = "[";
    for (size_t d = 0; d < sizes.size(); ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
    return text + "]";
  }

  // Merges the dimensions of one side; returns how many are left.
  int collapse(bool columns, bool reorder, int64_t& total, int64_t* out_size) {
    int order[kMaxTensorDims], n = 0;
    total = 1;
    for (int d = 0; d < ndim_; ++d) {
      if (is_column_[d] != columns) continue;
      total *= size_[d];
      if (size_[d] != 1 && d != samples_) order[n++] = d;
    }
    if (!columns && samples_ >= 0 && size_[samples_] != 1) order[n++] = samples_;
    if (total == 0) {
      out_size[0] = 0;
      return 1;
    }
    if (reorder) {
      int64_t key[kMaxTensorDims];
      for (int i = 0; i < n; ++i) {
        key[order[i]] = 0;
        for (int s = 0; s < count_; ++s) key[order[i]] = std::max(key[order[i]], std::abs(sources_[s].stride[order[i]]));
      }
      for (int i = 1; i < n; ++i)  // few: insertion, which is stable
        for (int j = i; j > 0 && key[order[j]] > key[order[j - 1]]; --j) std::swap(order[j], order[j - 1]);
    }
    int kept = 0;  // order[0 .. kept) stay, each with the size of what was merged into it
    int64_t size[kMaxTensorDims];
    for (int i = 0; i < n; ++i) {
      const int d = order[i];
      if (kept > 0 && mergeable(order[kept - 1], d)) {
        size[kept - 1] *= size_[d];
        order[kept - 1] = d;
      } else {
        size[kept] = size_[d];
        order[kept++] = d;
      }
    }
    if (kept > kMaxDims) return kept;
    for (int i = 0; i < kept; ++i) {
      out_size[i] = size[i];
      for (int s = 0; s < count_; ++s) {
        Operand& operand = *sources_[s].operand;
        (columns ? operand.col : operand.row)[i] = sources_[s].stride[order[i]];
      }
    }
    return kept;
  }

  bool mergeable(int outer, int inner) const {
    for (int s = 0; s < count_; ++s)
      if (sources_[s].stride[outer] != sources_[s].stride[inner] * size_[inner]) return false;
    return true;
  }

  const Tensor& shape_of_;
  Dims size_;
  int ndim_, samples_ = -1;  // the dimension of the samples, if there is one
  ScalarType dtype_;
  int count_ = 0;
  bool result_ = false;
  std::vector<Tensor> held_;
  bool is_column_[kMaxTensorDims];
  Source sources_[kMaxOperands];
};

}  // namespace unigen
