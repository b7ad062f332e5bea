"""A device that is not the CPU, without a GPU: tensors that say they are on it, and what torch would refuse there.

Within `StandInGpu` a tensor on `DEVICE` is a wrapper around one on the CPU, which computes. An operation that mixes
devices raises MixedDevices, as torch does on a GPU. The wrapped tensor can be a shape without numbers (`meta`), so that
models of any size run; integers and booleans keep their numbers, since the sizes of later tensors follow from them.
Bytes of tensors on the device are counted from when they are made until they are freed.

torch's own FakeTensorMode (2.13) cannot do this where torch is built without CUDA: indexing a tensor on "cuda" fails.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = torch.device("privateuseone", 0)
"""torch's name for devices of other makers."""
aten = torch.ops.aten
_COPIES = (aten._to_copy.default, aten.copy_.default, aten._copy_from.default)
_TAKE_CPU_INDICES = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)


class MixedDevices(RuntimeError):
    """Tensors of one operation are on different devices."""


class _DeviceModule:
    """What torch asks of a device's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _DeviceGuard(torch._C._acc.DeviceGuard):  # type: ignore[misc]
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


def _register_device() -> None:
    if not hasattr(torch, DEVICE.type):
        torch._register_device_module(DEVICE.type, _DeviceModule())  # type: ignore[no-untyped-call]
        _register_device.guard = _DeviceGuard()  # type: ignore[attr-defined]
        torch._C._acc.register_python_privateuseone_device_guard(_register_device.guard)  # type: ignore[attr-defined]


class _OnGpu(Tensor):
    """A tensor on `DEVICE`; `held` has its numbers, or its shape alone."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> Self:
        wrapper = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip
        wrapper.held = held
        return wrapper  # type: ignore[no-any-return]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.held})"

    def tolist(self) -> Any:  # torch's own takes no subclass
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{operation} on a stand-in GPU's tensor outside of `with StandInGpu()`")


class _Construction(TorchFunctionMode):
    """Makes tensors of lists on the CPU first; torch would do so on the device, where no other mode sees it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == DEVICE.type:
            del kwargs["device"]
            return torch.tensor(*args, **kwargs).to(DEVICE)
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], _OnGpu):
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            indices = tuple(torch.tensor(index) if isinstance(index, list) else index for index in indices)
            args = (args[0], indices, *args[2:])
        return function(*args, **kwargs)


def _no_grad(enabled: bool) -> Any:
    return torch.no_grad() if enabled else contextlib.nullcontext()


class StandInGpu(TorchDispatchMode):
    """The device. `bytes` and `peak_bytes` are those of its tensors, `operations` counts what it has computed."""

    def __init__(self, *, shapes_only: bool = False) -> None:
        super().__init__()
        _register_device()
        self.shapes_only = shapes_only
        self.bytes = self.peak_bytes = 0
        self.operations: Counter[str] = Counter()
        self._storages: set[int] = set()

    def __enter__(self) -> Self:
        self._contexts = contextlib.ExitStack()
        self._contexts.enter_context(_Construction())
        # Inference mode refuses wrappers, and would hide what an operation is composed of.
        self._contexts.enter_context(mock.patch.object(torch._C, "_InferenceMode", _no_grad))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._contexts.close()

    def put(self, model: nn.Module) -> None:
        """Moves a model's weights and buffers to the device."""
        tied: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if id(weight) not in tied:
                    tied[id(weight)] = nn.Parameter(self._wrap(weight.detach()), requires_grad=weight.requires_grad)
                module._parameters[name] = tied[id(weight)]
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = self._wrap(buffer)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves, structure = tree_flatten((args, kwargs))
        on_gpu = [leaf for leaf in leaves if isinstance(leaf, _OnGpu)]
        wanted = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        creates = wanted is not None and wanted.type == DEVICE.type
        if not on_gpu and not creates:
            return operation(*args, **kwargs)
        if operation is aten._fused_sdp_choice.default:
            return 3  # torch._fused_sdp_choice's number for attention that a device brings along
        self._check(operation, leaves, on_gpu)
        if "CompositeImplicit" not in str(operation) and not operation.is_view:
            self.operations[str(operation)] += 1
        if operation is aten._scaled_dot_product_fused_attention_overrideable.default:
            return self._attend(*args, **kwargs)
        has_shapes = any(leaf.held.device.type == "meta" for leaf in on_gpu)
        makes_shapes = has_shapes or (self.shapes_only and not on_gpu and self._creates_floats(operation, leaves))
        plain = [self._unwrap(leaf, has_shapes, makes_shapes) for leaf in leaves]
        plain_args, plain_kwargs = tree_unflatten(plain, structure)
        result = operation(*plain_args, **plain_kwargs)
        if wanted is not None and not creates:
            return result
        wrappers = {id(leaf.held): leaf for leaf in on_gpu}
        return tree_map(lambda leaf: self._rewrap(leaf, wrappers) if isinstance(leaf, Tensor) else leaf, result)

    def _check(self, operation: Any, leaves: list[Any], on_gpu: list[_OnGpu]) -> None:
        if operation in _COPIES or not on_gpu:
            return
        allows_cpu = operation in _TAKE_CPU_INDICES
        for leaf in leaves:
            if isinstance(leaf, Tensor) and not isinstance(leaf, _OnGpu) and leaf.dim() and not allows_cpu:
                raise MixedDevices(f"{operation}: a tensor {tuple(leaf.shape)} on the CPU among those on {DEVICE}")

    def _creates_floats(self, operation: Any, leaves: list[Any]) -> bool:
        """Whether an operation without tensors creates a tensor of floats, as far as its arguments tell."""
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            return False
        dtype = next((leaf for leaf in leaves if isinstance(leaf, torch.dtype)), None)
        if dtype is None:
            return "arange" not in str(operation) or any(isinstance(leaf, float) for leaf in leaves)
        return dtype.is_floating_point

    def _unwrap(self, leaf: Any, has_shapes: bool, makes_shapes: bool) -> Any:
        """What computes in place of an argument: beside shapes, tensors with numbers are shapes too."""
        if isinstance(leaf, torch.device):
            return torch.device("meta" if makes_shapes else "cpu") if leaf.type == DEVICE.type else leaf
        if not isinstance(leaf, Tensor):
            return leaf
        held = leaf.held if isinstance(leaf, _OnGpu) else leaf
        return held.to("meta") if has_shapes and held.dim() else held

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Any = None, *rest: Any, **options: Any) -> Any:
        """Attention without stored scores, as fused kernels compute it: only the output takes memory."""
        q, k, v, mask = (None if x is None else x.held for x in (query, key, value, bias))  # type: ignore[attr-defined]
        is_causal = options.get("is_causal", rest[1] if len(rest) > 1 else False)
        if q.device.type == "meta":
            out = q.new_empty(*q.shape[:-1], v.shape[-1])
        else:
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, mask, is_causal=is_causal, scale=options.get("scale")
            )
        scalar = self._wrap(torch.zeros(()))
        return self._wrap(out), scalar, scalar, scalar, 0, 0, scalar, scalar, scalar

    def _rewrap(self, tensor: Tensor, wrappers: dict[int, _OnGpu]) -> Tensor:
        return wrappers[id(tensor)] if id(tensor) in wrappers else self._wrap(tensor)

    def _wrap(self, tensor: Tensor) -> _OnGpu:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages.add(key)
            size = storage.nbytes()
            self.bytes += size
            self.peak_bytes = max(self.peak_bytes, self.bytes)
            weakref.finalize(storage, self._free, key, size)
        return _OnGpu(tensor)

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.bytes -= size
