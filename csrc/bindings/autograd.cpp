// The module `unigen_fast._autograd`: what _Fused of unigen_fast/_fused.py does, without Python. One autograd node for
// every op: it runs the op below autograd, saves what backward needs, and runs the backward op. `create_graph=True` goes
// back to Python, where the reference is differentiated.
//
// A Python node costs about as much as the whole backward pass of a small loss, and the way through the dispatcher up to a
// third of both passes: CPU kernels are called directly where nobody listens there. PyTorch's stable ABI has no autograd, so
// this module alone is tied to the torch it was built with; with any other one Python's node takes its place.
#include "direct.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/version.h>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

namespace unigen {
namespace {

using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

struct Callable {
  c10::OperatorHandle handle;
  direct::Function function;
};

// A FusedOp. Never freed: nodes refer to it.
struct Op {
  Callable forward;
  c10::optional<Callable> backward;
  std::vector<int64_t> differentiable, saved;  // of the tensors; of the outputs
  std::vector<std::vector<int64_t>> reaches;   // of each output the tensors it has a gradient for; empty: all of them
  int64_t differentiable_outputs;
  size_t gradients;  // how many the forward op makes: its last outputs
  size_t options;    // how many
  bool tensor_list, takes_needed;
  PyObject* python;
};

Callable find(const std::string& name) {
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(("unigen_fast::" + name).c_str(), "");
  const direct::Function function = direct::find(name.c_str());
  TORCH_CHECK(function, "unigen_fast: no op ", name);
  return {handle, function};
}

// ---- from Python and back ------------------------------------------------------------------------------------------

IValue to_ivalue(PyObject* object) {
  if (object == Py_None) return {};
  if (PyBool_Check(object)) return object == Py_True;
  if (PyFloat_Check(object)) return PyFloat_AS_DOUBLE(object);
  if (PyLong_Check(object)) return int64_t(py::handle(object).cast<int64_t>());
  if (PyList_Check(object)) return py::handle(object).cast<std::vector<double>>();
  TORCH_CHECK_TYPE(PyUnicode_Check(object), "unigen_fast: an option of type ", Py_TYPE(object)->tp_name);
  return py::handle(object).cast<std::string>();
}

py::object to_python(const IValue& value) {
  if (value.isNone()) return py::none();
  if (value.isBool()) return py::bool_(value.toBool());
  if (value.isDouble()) return py::float_(value.toDouble());
  if (value.isInt()) return py::int_(value.toInt());
  if (value.isDoubleList()) return py::cast(value.toDoubleVector());
  return py::str(value.toStringRef());
}

py::object to_python(const Tensor& tensor) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)); }

template <class Items>
py::tuple to_tuple(const Items& items) {
  py::tuple tuple(items.size());
  for (size_t i = 0; i < items.size(); ++i) tuple[i] = to_python(items[i]);
  return tuple;
}

// ---- running an op -------------------------------------------------------------------------------------------------

// Runs an op below autograd and returns all its results. `tensors` in the order of its schema, which has `listed` of them,
// from `first` on, as one list.
variable_list run(const Callable& op, const variable_list& tensors, size_t first, size_t listed,
                  const std::vector<IValue>& options) {
  at::AutoDispatchBelowAutograd below;
  if (direct::possible(tensors)) return op.function({tensors, listed, options});
  Stack stack;
  stack.reserve(tensors.size() + options.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (listed && i == first) {
      stack.emplace_back(c10::List<Tensor>(at::TensorList(tensors.data() + first, listed)));
      i += listed - 1;
    } else {
      stack.push_back(tensors[i].defined() ? IValue(tensors[i]) : IValue());
    }
  }
  stack.insert(stack.end(), options.begin(), options.end());
  op.handle.callBoxed(stack);
  variable_list results;
  for (IValue& value : stack) {
    if (!value.isTensorList()) {
      results.push_back(std::move(value).toTensor());
    } else {
      for (const Tensor& tensor : value.toTensorVector()) results.push_back(tensor);
    }
  }
  return results;
}

variable_list run_forward(const Op& op, const variable_list& tensors, const std::vector<IValue>& options) {
  return run(op.forward, tensors, 0, op.tensor_list ? tensors.size() : 0, options);
}

// ---- the node ------------------------------------------------------------------------------------------------------

struct Output {
  std::vector<int64_t> sizes;
  at::ScalarType dtype;
};

// A call, besides its tensors.
struct Call {
  const Op* op;
  std::vector<IValue> options;
  bool packed;                  // the owner of hooks may hold the tensors that are saved
  std::vector<Output> outputs;  // where one of several may be without a gradient

  static IValue as_tuple(const IValue& list) {
    const auto numbers = list.toDoubleVector();
    return c10::ivalue::Tuple::create(std::vector<IValue>(numbers.begin(), numbers.end()));
  }
  static IValue as_list(const IValue& tuple) {
    std::vector<double> numbers;
    for (const IValue& number : tuple.toTupleRef().elements()) numbers.push_back(number.toDouble());
    return numbers;
  }

  // In one flat tuple, which compiled autograd can hash (lists it refuses).
  IValue pack() const {
    std::vector<IValue> elements{reinterpret_cast<int64_t>(op), packed};
    for (const IValue& option : options) elements.push_back(option.isDoubleList() ? as_tuple(option) : option);
    for (const Output& output : outputs) {
      elements.push_back(c10::ivalue::Tuple::create(std::vector<IValue>(output.sizes.begin(), output.sizes.end())));
      elements.push_back(int64_t(output.dtype));
    }
    return c10::ivalue::Tuple::create(std::move(elements));
  }

  static Call unpack(const IValue& packed) {
    const auto& elements = packed.toTupleRef().elements();
    Call call{reinterpret_cast<const Op*>(elements[0].toInt()), {}, elements[1].toBool(), {}};
    const auto after_options = elements.begin() + 2 + call.op->options;
    for (auto option = elements.begin() + 2; option != after_options; ++option)
      call.options.push_back(option->isTuple() ? as_list(*option) : *option);
    for (auto element = after_options; element != elements.end(); element += 2) {
      Output output{{}, at::ScalarType(element[1].toInt())};
      for (const IValue& size : element->toTupleRef().elements()) output.sizes.push_back(size.toInt());
      call.outputs.push_back(std::move(output));
    }
    return call;
  }
};

// The formula of the node; a Function so that compiled autograd can call it.
struct Fused : torch::autograd::Function<Fused> {
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto wanted = [ctx](size_t edge) { return ctx->needs_input_grad(edge); };
    return gradients(Call::unpack(ctx->saved_data["call"]), ctx->get_saved_variables(), std::move(grads), wanted);
  }

  // One for each tensor that is there; `saved`: the tensors, then the saved outputs, then the gradients made before.
  template <class Wanted>
  static variable_list gradients(const Call& call, variable_list&& saved, variable_list&& grads, const Wanted& wanted) {
    const Op& op = *call.op;
    const size_t count = saved.size() - op.saved.size() - op.gradients;
    variable_list made(std::make_move_iterator(saved.end() - op.gradients), std::make_move_iterator(saved.end()));
    saved.resize(saved.size() - op.gradients);
    std::vector<bool> needed(count);
    size_t edge = 0;
    for (size_t i = 0; i < count; ++i) needed[i] = saved[i].defined() && wanted(edge++);

    variable_list result(count);
    if (std::any_of(grads.begin(), grads.end(), [](const Tensor& grad) { return grad.defined(); })) {
      if (!op.reaches.empty()) {  // a tensor that no output with a gradient reaches gets none
        std::vector<bool> reached(count);
        for (size_t i = 0; i < op.reaches.size(); ++i)
          for (int64_t place : op.reaches[i]) reached[place] = reached[place] || grads[i].defined();
        for (size_t i = 0; i < count; ++i) needed[i] = needed[i] && reached[i];
      }
      if (!c10::GradMode::is_enabled() && suffice(call, grads, needed)) {
        at::AutoDispatchBelowAutograd below;
        for (size_t bit = 0; bit < op.differentiable.size(); ++bit) {
          const int64_t i = op.differentiable[bit];
          if (needed[i]) result[i] = scaled(std::move(made[bit]), grads[0], call.packed);
        }
      } else {
        for (size_t i = 0; i < call.outputs.size(); ++i) {
          if (grads[i].defined()) continue;  // else zeros: expanded, they cost no memory
          grads[i] = at::zeros({}, saved[0].options().dtype(call.outputs[i].dtype)).expand(call.outputs[i].sizes);
        }
        result = c10::GradMode::is_enabled() ? differentiable(call, grads, saved, needed) : by_kernel(call, grads, saved, needed);
      }
    }
    if (edge < count) {
      size_t present = 0;
      for (size_t i = 0; i < count; ++i)
        if (saved[i].defined()) result[present++] = std::move(result[i]);
      result.resize(edge);
    }
    return result;
  }

  // Whether the gradients made in the forward pass are those that are asked for: of the first output alone.
  static bool suffice(const Call& call, const variable_list& grads, const std::vector<bool>& needed) {
    if (!call.op->gradients || std::any_of(grads.begin() + 1, grads.end(), [](const Tensor& grad) { return grad.defined(); }))
      return false;
    const int64_t made = call.options.back().toInt();
    for (size_t bit = 0; bit < call.op->differentiable.size(); ++bit)
      if (needed[call.op->differentiable[bit]] && !(made >> bit & 1)) return false;
    return made != 0;
  }

  // gradient · factor, 0 for a factor of 0; in the memory of the former where nobody else has it, and as it is for a factor
  // of 1.
  static Tensor scaled(Tensor&& gradient, const Tensor& factor, bool packed) {
    const bool owned = !packed && !torch::autograd::get_current_graph_task_keep_graph() && direct::plain(gradient) &&
                       direct::plain(factor);
    const auto product = [&] { return owned ? gradient.mul_(factor) : gradient.mul(factor); };
    if (!factor.is_cpu() || !direct::plain(factor))  // one would wait for the number
      return at::where(factor.eq(0), at::zeros({}, gradient.options()), product());
    const bool wide = factor.scalar_type() == at::kDouble;
    const double number = wide ? *factor.const_data_ptr<double>() : *factor.const_data_ptr<float>();
    if (number == 0) return at::zeros_like(gradient);
    return owned && number == 1 ? std::move(gradient) : product();
  }

  static variable_list by_kernel(const Call& call, const variable_list& grads, const variable_list& saved,
                                 const std::vector<bool>& needed) {
    const Op& op = *call.op;
    variable_list tensors = grads;
    tensors.insert(tensors.end(), saved.begin(), saved.end());
    const size_t listed = op.tensor_list ? needed.size() : 0;
    std::vector<IValue> options = call.options;
    if (op.takes_needed) {
      int64_t mask = 0;
      for (size_t bit = 0; bit < op.differentiable.size(); ++bit) mask |= int64_t(needed[op.differentiable[bit]]) << bit;
      options.emplace_back(mask);
    }
    variable_list found = run(*op.backward, tensors, grads.size(), listed, options);
    variable_list result(needed.size());
    for (size_t n = 0; n < found.size(); ++n) {
      const size_t i = op.tensor_list ? n : op.differentiable[n];
      if (needed[i]) result[i] = std::move(found[n]);
    }
    return result;
  }

  static variable_list differentiable(const Call& call, const variable_list& grads, const variable_list& saved,
                                      const std::vector<bool>& needed) {
    py::gil_scoped_acquire gil;
    py::tuple flags(needed.size());
    for (size_t i = 0; i < needed.size(); ++i) flags[i] = py::bool_(needed[i]);
    const variable_list inputs(saved.begin(), saved.begin() + needed.size());
    const py::object found = py::handle(call.op->python).attr("differentiable_gradients")(to_tuple(grads), to_tuple(inputs),
                                                                                    to_tuple(call.options), flags);
    variable_list result(needed.size());
    size_t i = 0;
    for (py::handle item : found) {
      if (!item.is_none()) result[i] = THPVariable_Unpack(item.ptr());
      ++i;
    }
    return result;
  }
};

// The node of a call. Function::apply would make one too, but its general ways (what is in place, what is a view, the
// node's demangled name in each backward pass) cost a small loss a tenth of its time.
struct Node final : torch::autograd::CppNode<Fused> {
  Call call;

  // for profiles, anomalies and graphs drawn of a loss
  std::string name() const override { return call.op->backward->handle.schema().name(); }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto wanted = [this](size_t edge) { return task_should_compute_output(edge); };
    return Fused::gradients(call, ctx_.get_saved_variables(), std::move(grads), wanted);
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    const_cast<AutogradContext&>(ctx_).saved_data["call"] = call.pack();
    CppNode::compiled_args(args);
  }
};

// Later versions count a node's references in the node itself.
template <class AnyNode>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, AnyNode>) {
    return c10::make_intrusive<AnyNode>();
  } else {
    return std::shared_ptr<AnyNode>(new AnyNode, [](AnyNode* node) { deleteNode(node); });
  }
}

variable_list record(const Op& op, variable_list&& tensors, std::vector<IValue>&& options, size_t visible) {
  auto node = make_node<Node>();
  torch::autograd::edge_list edges;
  edges.reserve(tensors.size());
  for (const Tensor& tensor : tensors)
    if (tensor.defined()) edges.push_back(torch::autograd::impl::gradient_edge(tensor));
  node->is_variable_input_.resize(edges.size(), true);
  node->set_next_edges(std::move(edges));
  node->set_ctx_grad_fn(node);

  variable_list outputs = run_forward(op, tensors, options);
  for (int64_t i : op.saved) tensors.push_back(outputs[i]);
  tensors.insert(tensors.end(), outputs.end() - op.gradients, outputs.end());
  outputs.resize(visible);
  node->call = {&op, std::move(options), op.gradients && at::SavedTensorDefaultHooks::get_hooks().has_value(), {}};
  for (int64_t i = 0; i < op.differentiable_outputs; ++i) {
    const auto wants = [&](int64_t place) { return tensors[place].defined() && tensors[place].requires_grad(); };
    if (op.reaches.empty() || std::any_of(op.reaches[i].begin(), op.reaches[i].end(), wants)) {
      torch::autograd::set_history(outputs[i], node);
    } else {  // it keeps its place in the node
      node->add_input_metadata(outputs[i]);
    }
    if (op.differentiable_outputs > 1) node->call.outputs.push_back({outputs[i].sizes().vec(), outputs[i].scalar_type()});
  }
  node->ctx_.set_materialize_grads(false);
  node->ctx_.save_for_backward(std::move(tensors));
  node->save_variables_to_ctx();
  return outputs;
}

// ---- the call ------------------------------------------------------------------------------------------------------

// The call, given Python's (tensors, options, visible), without the Python interpreter's lock.
variable_list call_op(const Op& op, variable_list&& tensors, std::vector<IValue>&& options, size_t visible) {
  const auto requires_grad = [](const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); };
  if (op.backward && c10::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(), requires_grad))
    return record(op, std::move(tensors), std::move(options), visible);
  variable_list outputs = run_forward(op, tensors, options);
  outputs.resize(visible);
  return outputs;
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

// Whether `torch.func` is at work, or a tensor carries a tangent.
bool transformed(const variable_list& tensors) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet transforms({DispatchKey::FuncTorchDynamicLayerFrontMode,
                                            DispatchKey::FuncTorchDynamicLayerBackMode});
  if (c10::impl::tls_local_dispatch_key_set().included_.has_any(transforms)) return true;
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& tensor) { return tensor.defined() && tensor._fw_grad(0).defined(); });
}

bool cuda_is_served = false;  // whether kernels are loaded for CUDA tensors

// None where the reference has to serve, where an option is a tensor, or where kernels are not loaded yet.
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
    if (!has_kernel(tensors[i].scalar_type()) || !(tensors[i].is_cpu() || (tensors[i].is_cuda() && cuda_is_served)))
      Py_RETURN_NONE;
  }
  std::vector<IValue> options(PySequence_Fast_GET_SIZE(options_of.ptr()));
  for (size_t i = 0; i < options.size(); ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(options_of.ptr(), Py_ssize_t(i));
    if (THPVariable_Check(item)) Py_RETURN_NONE;
    options[i] = to_ivalue(item);
  }
  if (transformed(tensors)) Py_RETURN_NONE;
  const size_t visible = PyLong_AsSize_t(arguments[2]);

  variable_list outputs;
  {
    py::gil_scoped_release no_gil;
    outputs = call_op(op, std::move(tensors), std::move(options), visible);
  }
  if (visible == 1) return THPVariable_Wrap(std::move(outputs[0]));
  return to_tuple(outputs).release().ptr();
  END_HANDLE_TH_ERRORS
}

PyMethodDef call_method = {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL,
                           "call(tensors, options, visible)"};

// ---- the bare op ---------------------------------------------------------------------------------------------------

bool requires_grad(const IValue& argument) {
  if (argument.isTensor()) return argument.toTensor().requires_grad();
  if (!argument.isTensorList()) return false;
  const auto list = argument.toTensorList();
  return std::any_of(list.begin(), list.end(), [](const Tensor& tensor) { return tensor.requires_grad(); });
}

// The dispatcher's autograd key of the bare op, as a compiled graph calls it in every step: below autograd where there is
// nothing to record. Python, which has the formulas, would take twice as long as the op itself to find that out.
void bare(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  if (c10::GradMode::is_enabled() && std::any_of(arguments.begin(), arguments.end(), requires_grad)) {
    // the formula stands under every autograd key but those of `pass_below`
    const auto other = c10::DispatchKey::AutogradOther;
    return op.redispatchBoxed((keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, other)).add(other), stack);
  }
  at::AutoDispatchBelowAutograd below;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

void pass_below(const std::string& name, const char* overload) {
  static auto& registered = *new std::vector<c10::RegistrationHandleRAII>;  // for as long as the process lives
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(("unigen_fast::" + name).c_str(), overload);
  for (const auto key : {c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA})
    registered.push_back(c10::Dispatcher::singleton().registerImpl(op.operator_name(), key,
                                                                   c10::KernelFunction::makeFromBoxedFunction<&bare>(),
                                                                   std::nullopt, nullptr, "unigen_fast"));
}

// A FusedOp's call. The FusedOp must live as long as the process.
py::object bind(py::object fused_op) {
  const auto name = fused_op.attr("name").cast<std::string>();
  const auto numbers = [&](const char* attribute) {
    std::vector<int64_t> result;
    for (py::handle item : fused_op.attr(attribute)) result.push_back(item.cast<int64_t>());
    return result;
  };
  const auto differentiable_outputs = fused_op.attr("differentiable_outputs").cast<int64_t>();
  c10::optional<Callable> backward;
  if (differentiable_outputs) backward = find(name + "_backward");
  const bool tensor_list = fused_op.attr("tensor_list").cast<bool>();
  const auto forward = find(name);
  const auto overloads = py::len(fused_op.attr("numbers")) ? std::vector<const char*>{"", "numbers"} : std::vector<const char*>{""};
  for (const char* overload : overloads) {
    pass_below(name, overload);
    if (backward) pass_below(name + "_backward", overload);
  }
  const size_t tensors = tensor_list ? 1 : fused_op.attr("tensors").cast<size_t>();
  Op* op = new Op{forward,
                  backward,
                  numbers("differentiable"),
                  numbers("saved"),
                  fused_op.attr("reaches").cast<std::vector<std::vector<int64_t>>>(),
                  differentiable_outputs,
                  fused_op.attr("gradients").cast<size_t>(),
                  forward.handle.schema().arguments().size() - tensors,
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
  m.def("call_directly", [](intptr_t kernels) {
    unigen::direct::kernels = reinterpret_cast<const unigen::cpu::ChosenKernels*>(kernels);
  });
  m.def("serve_cuda", [] { unigen::cuda_is_served = true; });
  m.def("sources", [] { return UNIGEN_SOURCES; });
  m.def("build_info", [] { return std::string("C++, torch " TORCH_VERSION); });
}
