// The module `unigen_fast._autograd`: what _Fused of unigen_fast/_fused.py does, without Python. One autograd node for
// every op: it runs the op below autograd, saves what backward needs, and runs the backward op. `create_graph=True` goes
// back to Python, where the reference is differentiated.
//
// A Python node costs about as much as the whole backward pass of a small loss. PyTorch's stable ABI has no autograd, so
// this module alone is tied to the torch it was built with; with any other one Python's node takes its place.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/version.h>

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace unigen {
namespace {

using at::Tensor;
using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

// A FusedOp. Never freed: nodes refer to it.
struct Op {
  c10::OperatorHandle forward;
  c10::optional<c10::OperatorHandle> backward;
  std::vector<int64_t> differentiable, saved;  // of the tensors; of the outputs
  int64_t differentiable_outputs;
  size_t options;  // how many
  bool tensor_list, takes_needed;
  PyObject* python;
};

c10::OperatorHandle find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("unigen_fast::" + name).c_str(), "");
}

// ---- from Python and back ------------------------------------------------------------------------------------------

IValue to_ivalue(PyObject* object) {
  if (object == Py_None) return {};
  if (PyBool_Check(object)) return object == Py_True;
  if (PyFloat_Check(object)) return PyFloat_AS_DOUBLE(object);
  if (PyLong_Check(object)) return int64_t(py::handle(object).cast<int64_t>());
  if (PyUnicode_Check(object)) return py::handle(object).cast<std::string>();
  TORCH_CHECK_TYPE(PyList_Check(object), "unigen_fast: an option of type ", Py_TYPE(object)->tp_name);
  c10::List<int64_t> list;
  list.reserve(PyList_GET_SIZE(object));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(object); ++i) list.push_back(py::handle(PyList_GET_ITEM(object, i)).cast<int64_t>());
  return list;
}

py::object to_python(const IValue& value) {
  if (value.isNone()) return py::none();
  if (value.isBool()) return py::bool_(value.toBool());
  if (value.isDouble()) return py::float_(value.toDouble());
  if (value.isInt()) return py::int_(value.toInt());
  if (value.isString()) return py::str(value.toStringRef());
  py::list list;
  for (int64_t item : value.toIntVector()) list.append(item);
  return list;
}

py::object to_python(const Tensor& tensor) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)); }

template <class Items>
py::tuple to_tuple(const Items& items) {
  py::tuple tuple(items.size());
  for (size_t i = 0; i < items.size(); ++i) tuple[i] = to_python(items[i]);
  return tuple;
}

// ---- running an op -------------------------------------------------------------------------------------------------

IValue optional_tensor(const Tensor& tensor) { return tensor.defined() ? IValue(tensor) : IValue(); }

template <class Tensors>
void push_tensors(Stack& stack, const Op& op, const Tensors& tensors) {
  if (op.tensor_list) {
    stack.emplace_back(c10::List<Tensor>(at::ArrayRef<Tensor>(tensors.data(), tensors.size())));
  } else {
    for (const Tensor& tensor : tensors) stack.push_back(optional_tensor(tensor));
  }
}

void run_below_autograd(const c10::OperatorHandle& op, Stack& stack) {
  at::AutoDispatchBelowAutograd below;
  op.callBoxed(stack);
}

Stack run_forward(const Op& op, const variable_list& tensors, const std::vector<IValue>& options) {
  Stack stack;
  push_tensors(stack, op, tensors);
  stack.insert(stack.end(), options.begin(), options.end());
  run_below_autograd(op.forward, stack);
  return stack;
}

// the leading tensors of what an op has left on the stack
variable_list leading(Stack& stack, size_t count) {
  variable_list result;
  result.reserve(count);
  for (size_t i = 0; i < count; ++i) result.push_back(std::move(stack[i]).toTensor());
  return result;
}

// ---- the node ------------------------------------------------------------------------------------------------------

// A call, besides the tensors that give the node its edges.
struct Call {
  const Op& op;
  const variable_list& tensors;  // undefined where absent
  const std::vector<IValue>& options;
  size_t visible;
};

// What backward needs besides tensors, as one tuple of numbers, strings and tuples of numbers (compiled autograd hashes
// it, which lists refuse): the op, the options, and sizes and dtype of outputs that may be without a gradient.
class Remembered {
 public:
  static IValue pack(const Call& call, const variable_list& outputs) {
    std::vector<IValue> elements;
    elements.reserve(1 + call.options.size() + 2 * outputs.size());
    elements.push_back(reinterpret_cast<int64_t>(&call.op));
    for (const IValue& option : call.options) elements.push_back(option.isIntList() ? tuple_of(option.toIntVector()) : option);
    for (int64_t i = 0; call.op.differentiable_outputs > 1 && i < call.op.differentiable_outputs; ++i) {
      elements.push_back(tuple_of(outputs[i].sizes()));
      elements.push_back(int64_t(outputs[i].scalar_type()));
    }
    return c10::ivalue::Tuple::create(std::move(elements));
  }

  explicit Remembered(const IValue& packed) : elements_(packed.toTupleRef().elements()) {}

  const Op& op() const { return *reinterpret_cast<const Op*>(elements_[0].toInt()); }

  void push_options(Stack& stack) const {
    for (size_t i = 1; i <= op().options; ++i) stack.push_back(elements_[i].isTuple() ? integers(elements_[i]) : elements_[i]);
  }

  // in the place of gradients that are missing: expanded, they cost no memory
  void fill(variable_list& grads, const at::TensorOptions& like) const {
    const size_t first = 1 + op().options;
    for (size_t i = 0; first + 2 * i < elements_.size(); ++i) {
      if (grads[i].defined()) continue;
      const auto dtype = at::ScalarType(elements_[first + 2 * i + 1].toInt());
      grads[i] = at::zeros({}, like.dtype(dtype)).expand(integers(elements_[first + 2 * i]).vec());
    }
  }

 private:
  template <class Integers>
  static IValue tuple_of(const Integers& integers) {
    return c10::ivalue::Tuple::create(std::vector<IValue>(integers.begin(), integers.end()));
  }

  static c10::List<int64_t> integers(const IValue& packed) {
    c10::List<int64_t> list;
    for (const IValue& item : packed.toTupleRef().elements()) list.push_back(item.toInt());
    return list;
  }

  const c10::ivalue::TupleElements& elements_;
};

struct Fused : torch::autograd::Function<Fused> {
  static variable_list forward(AutogradContext* ctx, const Call& call, at::TensorList /* present: for their edges */) {
    const Op& op = call.op;
    Stack stack = run_forward(op, call.tensors, call.options);
    variable_list to_save = call.tensors, outputs = leading(stack, call.visible);
    for (int64_t i : op.saved) to_save.push_back(size_t(i) < outputs.size() ? outputs[i] : stack[i].toTensor());
    ctx->save_for_backward(std::move(to_save));
    ctx->set_materialize_grads(false);
    if (outputs.size() > size_t(op.differentiable_outputs))
      ctx->mark_non_differentiable(variable_list(outputs.begin() + op.differentiable_outputs, outputs.end()));
    ctx->saved_data["call"] = Remembered::pack(call, outputs);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Remembered call(ctx->saved_data["call"]);
    const Op& op = call.op();
    const variable_list saved = ctx->get_saved_variables();
    const size_t count = saved.size() - op.saved.size();

    // the call and the tensors that are there came in: of these, what is asked for
    std::vector<bool> needed(count);
    size_t edge = 0;
    for (size_t i = 0; i < count; ++i) needed[i] = saved[i].defined() && ctx->needs_input_grad(edge++);

    grads.resize(op.differentiable_outputs);
    variable_list result(count);
    if (std::any_of(grads.begin(), grads.end(), [](const Tensor& grad) { return grad.defined(); })) {
      call.fill(grads, saved[0].options());
      result = c10::GradMode::is_enabled() ? differentiable(call, grads, saved, needed) : by_kernel(call, grads, saved, needed);
    }
    variable_list of_arguments(1);  // the call
    for (size_t i = 0; i < count; ++i)
      if (saved[i].defined()) of_arguments.push_back(std::move(result[i]));
    return of_arguments;
  }

  static variable_list by_kernel(const Remembered& call, const variable_list& grads, const variable_list& saved,
                                 const std::vector<bool>& needed) {
    const Op& op = call.op();
    const at::ArrayRef<Tensor> tensors(saved.data(), needed.size());
    Stack stack(grads.begin(), grads.end());
    push_tensors(stack, op, tensors);
    stack.insert(stack.end(), saved.begin() + needed.size(), saved.end());
    call.push_options(stack);
    if (op.takes_needed) {
      int64_t mask = 0;
      for (size_t bit = 0; bit < op.differentiable.size(); ++bit) mask |= int64_t(needed[op.differentiable[bit]]) << bit;
      stack.emplace_back(mask);
    }
    run_below_autograd(*op.backward, stack);
    variable_list result(needed.size());
    if (op.tensor_list) {
      const auto found = stack[0].toTensorList();
      for (size_t i = 0; i < needed.size(); ++i)
        if (needed[i]) result[i] = found[i];
      return result;
    }
    for (size_t n = 0; n < op.differentiable.size(); ++n)
      if (needed[op.differentiable[n]]) result[op.differentiable[n]] = std::move(stack[n]).toTensor();
    return result;
  }

  static variable_list differentiable(const Remembered& call, const variable_list& grads, const variable_list& saved,
                                      const std::vector<bool>& needed) {
    Stack options;
    call.push_options(options);
    py::gil_scoped_acquire gil;
    py::tuple flags(needed.size());
    for (size_t i = 0; i < needed.size(); ++i) flags[i] = py::bool_(needed[i]);
    const variable_list inputs(saved.begin(), saved.begin() + needed.size());
    const py::object found = py::handle(call.op().python).attr("differentiable_gradients")(to_tuple(grads), to_tuple(inputs),
                                                                                     to_tuple(options), flags);
    variable_list result(needed.size());
    size_t i = 0;
    for (py::handle item : found) {
      if (!item.is_none()) result[i] = THPVariable_Unpack(item.ptr());
      ++i;
    }
    return result;
  }
};

// ---- the call ------------------------------------------------------------------------------------------------------

// The call, given Python's (tensors, options, visible), without the Python interpreter's lock.
variable_list call_op(const Op& op, const variable_list& tensors, const std::vector<IValue>& options, size_t visible) {
  if (op.backward && c10::GradMode::is_enabled()) {
    variable_list present;
    bool requires_grad = false;
    for (const Tensor& tensor : tensors) {
      if (!tensor.defined()) continue;
      present.push_back(tensor);
      requires_grad |= tensor.requires_grad();
    }
    if (requires_grad) return Fused::apply(Call{op, tensors, options, visible}, at::TensorList(present));
  }
  Stack stack = run_forward(op, tensors, options);
  return leading(stack, visible);
}

bool has_kernel(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kHalf: return true;
    default: return !at::isFloatingType(dtype);  // the state of a generator
  }
}

// None where the reference has to serve.
PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const Op& op = *static_cast<const Op*>(PyCapsule_GetPointer(self, nullptr));
  TORCH_CHECK_TYPE(count == 3, "expected tensors, options and how many outputs to return");
  const auto tensors_of = py::reinterpret_steal<py::object>(PySequence_Fast(arguments[0], "expected a sequence of tensors"));
  const auto options_of = py::reinterpret_steal<py::object>(PySequence_Fast(arguments[1], "expected a sequence of options"));
  if (!tensors_of || !options_of) throw python_error();

  variable_list tensors(PySequence_Fast_GET_SIZE(tensors_of.ptr()));
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(tensors_of.ptr(), Py_ssize_t(i));
    if (item == Py_None) continue;
    if (!THPVariable_CheckExact(item)) Py_RETURN_NONE;  // a subclass
    tensors[i] = THPVariable_Unpack(item);
    if (!has_kernel(tensors[i].scalar_type())) Py_RETURN_NONE;
  }
  std::vector<IValue> options(PySequence_Fast_GET_SIZE(options_of.ptr()));
  for (size_t i = 0; i < options.size(); ++i) options[i] = to_ivalue(PySequence_Fast_GET_ITEM(options_of.ptr(), Py_ssize_t(i)));
  const size_t visible = PyLong_AsSize_t(arguments[2]);

  variable_list outputs;
  {
    py::gil_scoped_release no_gil;
    outputs = call_op(op, tensors, options, visible);
  }
  if (visible == 1) return THPVariable_Wrap(std::move(outputs[0]));
  return to_tuple(outputs).release().ptr();
  END_HANDLE_TH_ERRORS
}

PyMethodDef call_method = {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL,
                           "call(tensors, options, visible)"};

// A FusedOp's call. The FusedOp must live as long as the process.
py::object bind(py::object fused_op) {
  const auto name = fused_op.attr("name").cast<std::string>();
  const auto numbers = [&](const char* attribute) {
    std::vector<int64_t> result;
    for (py::handle item : fused_op.attr(attribute)) result.push_back(item.cast<int64_t>());
    return result;
  };
  const auto differentiable_outputs = fused_op.attr("differentiable_outputs").cast<int64_t>();
  c10::optional<c10::OperatorHandle> backward;
  if (differentiable_outputs) backward = find(name + "_backward");
  const bool tensor_list = fused_op.attr("tensor_list").cast<bool>();
  const auto forward = find(name);
  const size_t tensors = tensor_list ? 1 : fused_op.attr("tensors").cast<size_t>();
  Op* op = new Op{forward,
                  backward,
                  numbers("differentiable"),
                  numbers("saved"),
                  differentiable_outputs,
                  forward.schema().arguments().size() - tensors,
                  tensor_list,
                  fused_op.attr("takes_needed").cast<bool>(),
                  fused_op.inc_ref().ptr()};
  const auto self = py::capsule(op);
  return py::reinterpret_steal<py::object>(PyCFunction_New(&call_method, self.ptr()));
}

}  // namespace
}  // namespace unigen

PYBIND11_MODULE(_autograd, m) {
  m.def("bind", unigen::bind);
  m.def("build_info", [] { return std::string("C++, torch " TORCH_VERSION); });
}
