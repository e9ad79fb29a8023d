// What a library of kernels exports, in C: Python opens it with ctypes, so that it needs no header of Python's, and one file
// serves every Python.
#pragma once

#include "ops.h"

#define UNIGEN_EXPORT extern "C" __attribute__((visibility("default")))

// unigen_ops: a line for each op, its name and the types of what it takes and gives, which are to be those of its schema
// before unigen_register hands the ops to the dispatcher. That returns what went wrong, or null.
#define UNIGEN_LIBRARY(key, Backend)                                                              \
  UNIGEN_EXPORT const char* unigen_ops() {                                                        \
    static const std::string text = unigen::signatures<Backend>();                                \
    return text.c_str();                                                                          \
  }                                                                                               \
  UNIGEN_EXPORT const char* unigen_register() {                                                   \
    static std::string error;                                                                     \
    try {                                                                                         \
      unigen::register_ops<Backend>(#key);                                                        \
    } catch (const std::exception& exception) {                                                   \
      error = exception.what();                                                                   \
      return error.c_str();                                                                       \
    }                                                                                             \
    return nullptr;                                                                               \
  }                                                                                               \
  UNIGEN_EXPORT const char* unigen_sources() { return UNIGEN_SOURCES; }

namespace unigen {

template <class Backend>
std::string signatures() {
  std::string text;
#define UNIGEN_SIGNATURE(op) text += #op + Kernel<&unigen::op<Backend>>::signature() + "\n";
  UNIGEN_OPS(UNIGEN_SIGNATURE)
#undef UNIGEN_SIGNATURE
  return text;
}

template <class Backend>
void register_ops(const char* key) {
  TorchLibraryOpaque* library;  // never freed: the ops are to stay
  UNIGEN_CALL(aoti_torch_library_init_impl, "unigen_fast", key, "unigen_fast", 0, &library);
#define UNIGEN_REGISTER(op) UNIGEN_CALL(torch_library_impl, library, #op, Kernel<&unigen::op<Backend>>::run, kTorchVersion);
  UNIGEN_OPS(UNIGEN_REGISTER)
#undef UNIGEN_REGISTER
}

}  // namespace unigen
