// The ops as plain functions on the CPU: what the dispatcher would run, without it. Of a small loss, boxing arguments for
// the dispatcher and unboxing them behind the stable ABI is a good part.
#pragma once

#define UNIGEN_ATEN
#include <ATen/core/ivalue.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "../cpu/kernels.h"
#include "ops.h"

namespace unigen {

namespace direct {

inline const cpu::ChosenKernels* kernels = nullptr;  // of the module `_cpu`; null where it does not serve CPU tensors

struct Backend {
#define UNIGEN_RUN(function, Arguments)                             \
  static void function(const Arguments& arguments, const Tensor&) { \
    kernels->function(arguments);                                   \
    Copies::of_this_thread().finish();                              \
  }
  UNIGEN_KERNELS(UNIGEN_RUN)
#undef UNIGEN_RUN
};

using Tensors = std::vector<Tensor>;
using Options = std::vector<c10::IValue>;

// The arguments of a call, one after the other: every op takes its tensors first, then its options.
class Reader {
 public:
  // `listed` of the tensors, wherever the op takes a list
  Reader(const Tensors& tensors, size_t listed, const Options& options) : tensors_(tensors), listed_(listed), options_(options) {}

  template <class T>
  T next() {
    if constexpr (std::is_same_v<T, Tensor>) {
      return tensors_[tensor_++];
    } else if constexpr (std::is_same_v<T, optional<Tensor>>) {
      const Tensor& tensor = tensors_[tensor_++];
      return tensor.defined() ? optional<Tensor>(tensor) : std::nullopt;
    } else if constexpr (std::is_same_v<T, vector<Tensor>>) {
      const auto first = tensors_.begin() + std::exchange(tensor_, tensor_ + listed_);
      return vector<Tensor>(first, first + listed_);
    } else {
      return options_[option_++].template to<T>();
    }
  }

 private:
  const Tensors& tensors_;
  size_t listed_;
  const Options& options_;
  size_t tensor_ = 0, option_ = 0;
};

inline Tensors listed(Tensor&& result) { return {std::move(result)}; }
inline Tensors listed(vector<Tensor>&& results) { return std::move(results); }
template <class... T>
Tensors listed(tuple<T...>&& results) {
  return std::apply([](T&... result) { return Tensors{std::move(result)...}; }, results);
}

template <class Result, class... Arguments>
Tensors call(Result (*op)(Arguments...), Reader reader) {
  tuple<std::decay_t<Arguments>...> arguments{reader.next<std::decay_t<Arguments>>()...};  // in braces: in order
  return listed(std::apply(op, arguments));
}

using Function = Tensors (*)(Reader);

// null: no such op
inline Function find(const char* name) {
#define UNIGEN_FIND(op) \
  if (std::strcmp(name, #op) == 0) return [](Reader reader) { return call(&unigen::op<Backend>, reader); };
  UNIGEN_OPS(UNIGEN_FIND)
#undef UNIGEN_FIND
  return nullptr;
}

// whether a tensor is one of PyTorch's own, and nothing that stands for one
inline bool plain(const Tensor& tensor) {
  using c10::DispatchKey;
  // the ops have no kernel of their own for autocast
  constexpr c10::DispatchKeySet cpu({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView,
                                     DispatchKey::AutocastCPU});
  constexpr c10::DispatchKeySet cuda({DispatchKey::CUDA, DispatchKey::AutogradCUDA, DispatchKey::ADInplaceOrView,
                                      DispatchKey::AutocastCUDA});
  const c10::DispatchKeySet keys = tensor.key_set();
  return (keys | cpu) == cpu || (keys | cuda) == cuda;
}

// Whether nobody but the kernel would see a call: plain tensors on the CPU, no mode or transform, no profiler.
inline bool possible(const Tensors& tensors) {
  using c10::DispatchKey;
  if (!kernels) return false;
  for (const Tensor& tensor : tensors)
    if (tensor.defined() && !(tensor.is_cpu() && plain(tensor))) return false;
  constexpr c10::DispatchKeySet usual = c10::default_included_set | c10::DispatchKeySet(DispatchKey::AutocastCPU);
  if ((c10::impl::tls_local_dispatch_key_set().included_ | usual) != usual) return false;
  return !at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value();
}

}  // namespace direct
}  // namespace unigen
