// PyTorch's stable C interface, the part of it that the ops use: declared here, so that the kernels are built with a
// compiler alone, and one file of them serves every torch from 2.10 on. Names and signatures are those of
// torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h of torch 2.10.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

extern "C" {
struct AtenTensorOpaque;
struct TorchLibraryOpaque;
struct StableListOpaque;
struct StringOpaque;
struct DeviceGuardOpaque;

int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_int64();
size_t aoti_torch_dtype_element_size(int32_t dtype);

int32_t aoti_torch_get_data_ptr(AtenTensorOpaque*, void**);
int32_t aoti_torch_get_dim(AtenTensorOpaque*, int64_t*);
int32_t aoti_torch_get_numel(AtenTensorOpaque*, int64_t*);
int32_t aoti_torch_get_sizes(AtenTensorOpaque*, int64_t**);
int32_t aoti_torch_get_strides(AtenTensorOpaque*, int64_t**);
int32_t aoti_torch_get_dtype(AtenTensorOpaque*, int32_t*);
int32_t aoti_torch_get_device_type(AtenTensorOpaque*, int32_t*);
int32_t aoti_torch_get_device_index(AtenTensorOpaque*, int32_t*);
int32_t aoti_torch_is_contiguous(AtenTensorOpaque*, bool*);
int32_t aoti_torch_new_tensor_handle(AtenTensorOpaque*, AtenTensorOpaque**);
int32_t aoti_torch_delete_tensor_object(AtenTensorOpaque*);
int32_t aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                 int32_t device_type, int32_t device_index, AtenTensorOpaque**);

int32_t aoti_torch_library_init_impl(const char* ns, const char* key, const char* file, uint32_t line, TorchLibraryOpaque**);
int32_t torch_library_impl(TorchLibraryOpaque*, const char* name, void (*)(uint64_t*, uint64_t, uint64_t), uint64_t version);
int32_t torch_call_dispatcher(const char* name, const char* overload, uint64_t* stack, uint64_t version);
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void* context);

int32_t torch_new_list_reserve_size(size_t size, StableListOpaque**);
int32_t torch_list_size(StableListOpaque*, size_t*);
int32_t torch_list_get_item(StableListOpaque*, size_t index, uint64_t*);
int32_t torch_list_push_back(StableListOpaque*, uint64_t);
int32_t torch_delete_list(StableListOpaque*);
int32_t torch_string_length(StringOpaque*, size_t*);
int32_t torch_string_c_str(StringOpaque*, const char**);
int32_t torch_delete_string(StringOpaque*);

int32_t aoti_torch_create_device_guard(int32_t device_index, DeviceGuardOpaque**);
int32_t aoti_torch_delete_device_guard(DeviceGuardOpaque*);
int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void**);  // in libtorch_cuda

// from torch 2.13 on; null before
const char* torch_exception_get_what_without_backtrace() __attribute__((weak));
}

namespace unigen {

constexpr uint64_t kTorchVersion = uint64_t(2) << 56 | uint64_t(10) << 48;

template <class... Words>
[[noreturn]] void fail(const Words&... words) {
  std::ostringstream text;
  (text << ... << words);
  throw std::runtime_error(text.str());
}

// Throws where a call of the interface has failed.
inline void check_call(int32_t code, const char* call) {
  if (code == 0) return;
  const char* what = torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  fail("unigen_fast: ", what && *what ? what : call);
}
#define UNIGEN_CALL(function, ...) ::unigen::check_call(function(__VA_ARGS__), #function " failed")
#define UNIGEN_CHECK(condition, ...) \
  if (__builtin_expect(!(condition), 0)) ::unigen::fail(__VA_ARGS__)

// X(name, name in the interface): those that an op reads or makes
#define UNIGEN_DTYPES(X) \
  X(Half, float16)       \
  X(BFloat16, bfloat16)  \
  X(Float, float32)      \
  X(Double, float64)     \
  X(Byte, uint8)         \
  X(Long, int64)

enum class ScalarType {
#define UNIGEN_DTYPE(name, stable) name,
  UNIGEN_DTYPES(UNIGEN_DTYPE)
#undef UNIGEN_DTYPE
  Other
};

constexpr const char* kDtypeNames[] = {
#define UNIGEN_DTYPE(name, stable) #name,
    UNIGEN_DTYPES(UNIGEN_DTYPE)
#undef UNIGEN_DTYPE
    "another dtype"};

inline const char* toString(ScalarType dtype) { return kDtypeNames[int(dtype)]; }

// torch's own numbers, which only torch knows
inline const int32_t* dtype_codes() {
  static const int32_t codes[] = {
#define UNIGEN_DTYPE(name, stable) aoti_torch_dtype_##stable(),
      UNIGEN_DTYPES(UNIGEN_DTYPE)
#undef UNIGEN_DTYPE
  };
  return codes;
}

struct Shape {
  const int64_t* items;
  size_t count;

  size_t size() const { return count; }
  const int64_t* data() const { return items; }
  const int64_t* begin() const { return items; }
  const int64_t* end() const { return items + count; }
  int64_t operator[](size_t i) const { return items[i]; }
};

struct Device {
  int32_t type, index;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

// Owns a reference to a tensor. The methods are those of at::Tensor.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorOpaque* stolen) : handle_(stolen) {}
  Tensor(const Tensor& other) {
    if (other.handle_) UNIGEN_CALL(aoti_torch_new_tensor_handle, other.handle_, &handle_);
  }
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorOpaque* release() { return std::exchange(handle_, nullptr); }

  void* data_ptr() const { return get<void*>(aoti_torch_get_data_ptr); }
  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel); }
  Shape sizes() const { return {get<int64_t*>(aoti_torch_get_sizes), size_t(dim())}; }
  Shape strides() const { return {get<int64_t*>(aoti_torch_get_strides), size_t(dim())}; }
  int64_t size(int64_t d) const { return of_dimension(sizes(), d); }
  int64_t stride(int64_t d) const { return of_dimension(strides(), d); }
  bool is_contiguous() const { return get<bool>(aoti_torch_is_contiguous); }
  ScalarType scalar_type() const {
    const int32_t code = get<int32_t>(aoti_torch_get_dtype), *codes = dtype_codes();
    int dtype = 0;
    while (dtype < int(ScalarType::Other) && codes[dtype] != code) ++dtype;
    return ScalarType(dtype);
  }
  size_t element_size() const { return aoti_torch_dtype_element_size(get<int32_t>(aoti_torch_get_dtype)); }
  int32_t get_device_index() const { return get<int32_t>(aoti_torch_get_device_index); }
  Device device() const { return {get<int32_t>(aoti_torch_get_device_type), get_device_index()}; }
  bool is_cpu() const { return device().type == aoti_torch_device_type_cpu(); }

 private:
  template <class T>
  T get(int32_t (*function)(AtenTensorOpaque*, T*)) const {
    T result;
    check_call(function(handle_, &result), "a question about a tensor failed");
    return result;
  }

  static int64_t of_dimension(const Shape& shape, int64_t d) {
    if (d < 0) d += int64_t(shape.count);
    UNIGEN_CHECK(0 <= d && d < int64_t(shape.count), "unigen_fast: dim out of range");
    return shape[size_t(d)];
  }

  AtenTensorOpaque* handle_ = nullptr;
};

// ---- what an op takes and gives, as the dispatcher's stack has it ----------------------------------------------------

// Each has the word of its type in a schema; `take` owns what was on the stack, `give` gives it away.
template <class T>
struct Boxed {  // a number
  static constexpr const char* word = std::is_same_v<T, bool> ? "bool" : std::is_same_v<T, double> ? "float" : "int";
  static_assert(std::is_same_v<T, bool> || std::is_same_v<T, double> || std::is_same_v<T, int64_t>);

  static T take(uint64_t boxed) {
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(&boxed), sizeof(T));  // of a bool the first byte
    return value;
  }
};

template <>
struct Boxed<Tensor> {
  static constexpr const char* word = "Tensor";

  static Tensor take(uint64_t boxed) { return Tensor(reinterpret_cast<AtenTensorOpaque*>(boxed)); }
  static uint64_t give(Tensor&& tensor) { return reinterpret_cast<uint64_t>(tensor.release()); }
};

template <>
struct Boxed<std::string> {
  static constexpr const char* word = "str";

  static std::string take(uint64_t boxed) {
    auto* handle = reinterpret_cast<StringOpaque*>(boxed);
    const char* data;
    size_t length;
    UNIGEN_CALL(torch_string_c_str, handle, &data);
    UNIGEN_CALL(torch_string_length, handle, &length);
    std::string text(data, length);
    UNIGEN_CALL(torch_delete_string, handle);
    return text;
  }
};

template <class T>
struct Boxed<std::optional<T>> {
  static constexpr const char* word = std::is_same_v<T, Tensor> ? "Tensor?" : "int?";
  static_assert(std::is_same_v<T, Tensor> || std::is_same_v<T, int64_t>);

  static std::optional<T> take(uint64_t boxed) {
    auto* inner = reinterpret_cast<uint64_t*>(boxed);
    if (!inner) return std::nullopt;
    const uint64_t value = *inner;
    delete inner;
    return Boxed<T>::take(value);
  }
};

template <class T>
struct Boxed<std::vector<T>> {
  static constexpr const char* word = std::is_same_v<T, Tensor> ? "Tensor[]" : "float[]";
  static_assert(std::is_same_v<T, Tensor> || std::is_same_v<T, double>);

  static std::vector<T> take(uint64_t boxed) {
    auto* handle = reinterpret_cast<StableListOpaque*>(boxed);
    size_t size;
    UNIGEN_CALL(torch_list_size, handle, &size);
    std::vector<T> items;
    items.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      uint64_t item;
      UNIGEN_CALL(torch_list_get_item, handle, i, &item);
      items.push_back(Boxed<T>::take(item));
    }
    UNIGEN_CALL(torch_delete_list, handle);
    return items;
  }
  static uint64_t give(std::vector<T>&& items) {
    StableListOpaque* handle;
    UNIGEN_CALL(torch_new_list_reserve_size, items.size(), &handle);
    for (T& item : items) UNIGEN_CALL(torch_list_push_back, handle, Boxed<T>::give(std::move(item)));
    return reinterpret_cast<uint64_t>(handle);
  }
};

template <class Result>
struct Results {
  static constexpr uint64_t count = 1;
  static std::string words() { return Boxed<Result>::word; }
  static void give(uint64_t* stack, Result&& result) { *stack = Boxed<Result>::give(std::move(result)); }
};

template <class... T>
struct Results<std::tuple<T...>> {
  static constexpr uint64_t count = sizeof...(T);
  static std::string words() {
    std::string text;
    ((text += (text.empty() ? "" : ", ") + std::string(Boxed<T>::word)), ...);
    return "(" + text + ")";
  }
  static void give(uint64_t* stack, std::tuple<T...>&& results) {
    std::apply([&](T&... result) { ((*stack++ = Boxed<T>::give(std::move(result))), ...); }, results);
  }
};

// A function of tensors and options as a kernel of the dispatcher.
template <auto function>
struct Kernel;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Kernel<function> {
  // as a schema has it, less the names
  static std::string signature() {
    std::string text;
    ((text += (text.empty() ? "" : ", ") + std::string(Boxed<std::decay_t<Arguments>>::word)), ...);
    return "(" + text + ") -> " + Results<Result>::words();
  }

  static void run(uint64_t* stack, uint64_t arguments, uint64_t results) {
    UNIGEN_CHECK(arguments == sizeof...(Arguments) && results == Results<Result>::count,
                 "unigen_fast: the op has another number of arguments or results than its kernel");
    run(stack, std::index_sequence_for<Arguments...>());
  }

 private:
  template <size_t... i>
  static void run(uint64_t* stack, std::index_sequence<i...>) {
    std::tuple<std::decay_t<Arguments>...> unboxed{Boxed<std::decay_t<Arguments>>::take(stack[i])...};
    Results<Result>::give(stack, std::apply(function, unboxed));
  }
};

}  // namespace unigen
