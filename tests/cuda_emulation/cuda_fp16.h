// Stands in for the toolkit's header of this name: the type, and its conversions.
#pragma once

struct __half {
  _Float16 value;

  __half() = default;
  explicit __half(float x) : value(_Float16(x)) {}
  operator float() const { return float(value); }
};
