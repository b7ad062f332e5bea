"""What a model takes in memory, from its config alone: its parameters, and the keys and values of a token.

A fake model has shapes and no memory (torch's FakeTensorMode), so that the sizes of any architecture are those of its
own code, also of a model that is not on this machine or too large for it. `LiveBytes` counts what computing takes.

Left out: what an allocator loses between tensors, and files.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import logging
import sys
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import cai
from cai.attention.cpu_tuning import tokens_per_pass
from cai.attention.patched_attention import TRIAL_ERRORS
from cai.attention.token_budget import MIN_TOKENS
from cai.contracts.machine import free_memory
from cai.models.autocast_weights import weights_converted_by_autocast
from cai.storage.files import user_cache
from cai.storage.rows import stable_id
from cai.text.errors import BadInput, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from cai.contracts.profile import Profile

Head = Literal["language", "score"]
"""What a model ends in: the vocabulary, or one score."""
NF4_BYTES = 4.127 / 8
"""Bytes of a weight in NF4 with quantised scales (Dettmers et al. 2023, arXiv 2305.14314)."""
REVISION = 3
"""Raised when what is measured here, or in `cai.training.activations`, changes: cached sizes are then not used."""
HELD_BACK = 0.1
"""Share of memory that is left to what is not counted: gaps between tensors above all."""


def read_config(config: Mapping[str, Any], name: str) -> PreTrainedConfig:
    """transformers' config of a `config.json`. Raises BadInput for a type that this transformers does not know."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = dict(config)
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise BadInput(
            f"model {name!r}: found the type {model_type!r} in its config.json, which this version of transformers "
            f"does not know"
        )
    return CONFIG_MAPPING[model_type].from_dict(fields)


def meta_model(config: PreTrainedConfig, head: Head, dtype: torch.dtype) -> PreTrainedModel:
    """A model with shapes alone, on torch's meta device, in training mode."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = copy.deepcopy(config)  # a model writes its precision and attention into its config
    with torch.device("meta"):
        if head == "language":
            return AutoModelForCausalLM.from_config(config, dtype=dtype).train()  # type: ignore[no-any-return]
        config.num_labels = 1
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype).train()  # type: ignore[no-any-return]


@contextlib.contextmanager
def fake_tensors(model: nn.Module) -> Iterator[None]:
    """Within the block all tensors are fake, those of the model in place of what it had on the meta device.

    A fake tensor says that it is on a CPU, so that autocast and attention choose what they choose there.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # describes every operation that has no fake kernel
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack() as stack:
        stack.callback(logger.setLevel, level)
        fakes: dict[int, Tensor] = {}  # by the identity of the tensor replaced: tied weights stay tied
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in fakes:
                        fakes[id(parameter)] = nn.Parameter(_fake_like(parameter), parameter.requires_grad)
                    module._parameters[name] = fakes[id(parameter)]  # type: ignore[assignment]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = fakes.setdefault(id(buffer), _fake_like(buffer))
        yield


def _fake_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


class WeightCounts(NamedTuple):
    """Weights of a model, tied ones once."""

    all: int
    embeddings: int
    head: int
    """Of a language-model head that is not tied to the embeddings."""
    converted: int
    """Those that autocast converts to its precision."""


def count_weights(config: PreTrainedConfig, head: Head) -> WeightCounts:
    """How many weights a model has, and how many of them have a part of their own in what training holds."""

    def count() -> list[int]:
        model = meta_model(config, head, torch.float32)
        embeddings = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
        output = model.get_output_embeddings()
        is_tied = output is None or id(output.weight) in embeddings
        n_converted = sum(weight.numel() for weight in weights_converted_by_autocast(model))
        return [n_parameters(model), sum(embeddings.values()), 0 if is_tied else output.weight.numel(), n_converted]

    return WeightCounts(*cached_sizes(("weights", config.to_json_string(), head), 4, count))


def model_bytes(config: PreTrainedConfig, head: Head, dtype: torch.dtype) -> int:
    """Bytes of a model's weights in that precision."""
    return count_weights(config, head).all * dtype.itemsize


def reference_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of a frozen copy of a model in training, stored as autocast converts it (`cai.models.autocast_weights`)."""
    counts = count_weights(config, "language")
    return counts.converted * dtype.itemsize + (counts.all - counts.converted) * 4


def nf4_bytes(config: PreTrainedConfig, head: Head, dtype: torch.dtype) -> int:
    """Bytes of a model's weights with matrices quantised to NF4 (`cai.models.quantised`) and the others in `dtype`."""
    counts = count_weights(config, head)
    n_dense = counts.embeddings + counts.head
    return n_dense * dtype.itemsize + int((counts.all - n_dense) * NF4_BYTES)


def kv_bytes_of(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values in that precision."""

    def measure(shallow: PreTrainedConfig, dtype: torch.dtype) -> CountedBytes:
        model = meta_model(shallow, "language", dtype).eval()
        with fake_tensors(model):
            n_bytes = kv_bytes_per_token(model)
        return CountedBytes(n_bytes, n_bytes)

    def measure_all() -> list[int]:
        return [of_all_layers(config, "language", lambda shallow: in_half_where_needed(measure, shallow, dtype))]

    (n_bytes,) = cached_sizes(("keys and values", config.to_json_string(), str(dtype)), 1, measure_all)
    return n_bytes


def in_half_where_needed(
    measure: Callable[[PreTrainedConfig, torch.dtype], CountedBytes], config: PreTrainedConfig, dtype: torch.dtype
) -> CountedBytes:
    """What `measure` gives in that precision; of a mixture of experts in float32, twice what it gives in bfloat16.

    Fake products of experts (`_grouped_mm`) exist in bfloat16 alone (torch 2.13).
    """
    try:
        return measure(config, dtype)
    except RuntimeError:
        if dtype != torch.float32:
            raise
        kept, peak = measure(config, torch.bfloat16)
        return CountedBytes(2 * kept, 2 * peak)


def kv_tokens(profile: Profile, kv_bytes: int, free: int, on_cpu: bool) -> int:
    """Tokens whose keys and values, `kv_bytes` each, an engine holds where `free` bytes are left for them.

    On a CPU a quarter of what is free, since the operating system promises more than there is and then kills.
    """
    share = free // 4 if on_cpu else int(free * (1 - HELD_BACK))
    return max(MIN_TOKENS, min(profile.token_budget, share // max(1, kv_bytes)))


def free_for_cache(model: PreTrainedModel, profile: Profile) -> int:
    """Bytes that are free for the KV cache of a loaded model, after what a forward pass takes on a GPU."""
    device = model.device
    if device.type == "cpu":
        return free_memory() // profile.processes_here
    if device.type != "cuda":  # a device that does not tell refuses memory, and the engine goes on with less
        return sys.maxsize
    free = (
        int(torch.cuda.mem_get_info(device)[0])
        + torch.cuda.memory_reserved(device)
        - torch.cuda.memory_allocated(device)
    )
    n_tokens = tokens_per_pass(profile.token_budget, device)
    try:
        return free - pass_bytes_of(model.config, model.dtype, n_tokens)
    except TRIAL_ERRORS as error:
        reason = first_line(error)
        warnings.warn(
            f"what a forward pass takes could not be computed ({reason}); a quarter is left free", stacklevel=2
        )
        return free * 3 // 4


def pass_bytes_of(config: PreTrainedConfig, dtype: torch.dtype, n_tokens: int) -> int:
    """Bytes that a forward pass of the body over one row of `n_tokens` holds at once, beside weights and KV cache.

    Extrapolated from short rows, since layers that scan their tokens one by one take minutes for long ones.
    """
    n_short, n_long = 64, 128

    def measure(shallow: PreTrainedConfig, dtype: torch.dtype, n: int) -> CountedBytes:
        model = meta_model(shallow, "language", dtype).eval()
        with fake_tensors(model), torch.no_grad(), LiveBytes(model) as live:
            model.base_model(input_ids=torch.zeros((1, n), dtype=torch.long), use_cache=False)
        return CountedBytes(0, live.peak)

    def measure_both() -> list[int]:
        def of_length(n: int) -> int:
            measured = functools.partial(measure, n=n)
            return of_all_layers(config, "language", lambda shallow: in_half_where_needed(measured, shallow, dtype))

        return [of_length(n_short), of_length(n_long)]

    of_short, of_long = cached_sizes(("pass", config.to_json_string(), str(dtype)), 2, measure_both)
    return of_short + max(0, of_long - of_short) * (n_tokens - n_short) // (n_long - n_short)


class CountedBytes(NamedTuple):
    """Bytes that computing with a model holds."""

    kept: int
    """What grows with its layers, as activations that are kept do."""
    peak: int
    """The most that is alive at once."""


def of_all_layers(config: PreTrainedConfig, head: Head, measure: Callable[[PreTrainedConfig], CountedBytes]) -> int:
    """The peak of a model, from models of a few of its layers where they repeat; counting all of them takes seconds.

    What is kept grows linearly with layers of one kind, and what comes on top of it stays.
    """
    kinds = _kinds_of_layers(meta_model(config, head, torch.bfloat16), config)
    n_layers = len(kinds)
    periods = (n for n in range(1, n_layers // 4 + 1) if all(kinds[i] == kinds[i % n] for i in range(n_layers)))
    period = next(periods, None)
    if period is None:
        return measure(config).peak
    few, more = (measure(_with_layers(config, n * period)) for n in (2, 3))
    return more.peak + round((more.kept - few.kept) * (n_layers - 3 * period) / period)


def _kinds_of_layers(model: PreTrainedModel, config: PreTrainedConfig) -> list[object]:
    """What tells the layers of a model apart: shapes of their weights, and what lists in the config say of each."""
    n_layers = getattr(config, "num_hidden_layers", 0)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not stacks:
        return []
    lists = _lists_by_layer(config)
    return [
        ([tuple(p.shape) for p in layer.parameters()], [values[index] for values in lists.values()])
        for index, layer in enumerate(stacks[0])
    ]


def _with_layers(config: PreTrainedConfig, n: int) -> PreTrainedConfig:
    """The config of the model's first `n` layers."""
    shallow = copy.deepcopy(config)
    for name, values in _lists_by_layer(config).items():
        setattr(shallow, name, values[:n])
    shallow.num_hidden_layers = n
    return shallow


def _lists_by_layer(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """The config's lists with a value for each layer."""
    n_layers = getattr(config, "num_hidden_layers", 0)
    return {name: v for name, v in vars(config).items() if isinstance(v, list) and len(v) == n_layers > 1}


def cached_sizes(key: Sequence[object], n: int, compute: Callable[[], list[int]]) -> list[int]:
    """The `n` numbers that `compute` returns, from the user's cache folder where all that they depend on is the same.

    A trial with fake tensors takes seconds, and is asked for again by every plan and every run.
    """
    folder = user_cache("footprints")
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft")]
    file = folder / stable_id(*map(str, key), *versions, cai.__version__, REVISION)
    with contextlib.suppress(OSError, ValueError):
        sizes = [int(number) for number in file.read_text(encoding="utf-8").split()]
        if len(sizes) == n:
            return sizes
    sizes = compute()
    with contextlib.suppress(OSError):  # a home that cannot be written to costs time alone
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
        partial.write_text(" ".join(map(str, sizes)), encoding="utf-8")
        partial.replace(file)
    return sizes


def n_parameters(model: nn.Module, *, trained: bool | None = None) -> int:
    """Parameters of a model, each once; those that are trained, or those that are not, where `trained` says so."""
    return sum(p.numel() for p in model.parameters() if trained is None or p.requires_grad == trained)


@torch.no_grad()
def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes by which the model's own KV cache grows with each token of a row, in the model's precision.

    Measured on two short rows, since layers differ in heads, widths and kinds: a layer whose state does not grow, as in
    linear attention, adds nothing, and one with a window longer than these rows counts in full. A model that cannot
    keep a cache, which engines do not sample from, has none.
    """
    n_short, n_long = 4, 8
    try:
        growth = _cache_bytes(model, n_long) - _cache_bytes(model, n_short)
    except TRIAL_ERRORS as error:
        unbounded = "its KV cache is bounded by tokens alone"
        warnings.warn(f"{type(model).__name__} keeps no cache ({first_line(error)}): {unbounded}", stacklevel=2)
        return 0
    return int(max(0, growth) // (n_long - n_short))


def _cache_bytes(model: PreTrainedModel, n_tokens: int) -> int:
    ids = torch.ones((1, n_tokens), dtype=torch.long, device=model.device)
    cache = getattr(model.base_model(input_ids=ids, use_cache=True), "past_key_values", None)
    if cache is None:  # the model keeps a state in place of keys and values
        return 0
    tensors: dict[int, Tensor] = {}
    for layer in getattr(cache, "layers", [cache]):
        tree_map_only(Tensor, lambda tensor: tensors.setdefault(id(tensor), tensor), list(vars(layer).values()))
    return sum(tensor.nbytes for tensor in tensors.values())


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are made while it is on, and that are still alive.

    Tensors may be fake; those that share storage count once. `peak` is the largest sum since it was last set.
    """

    def __init__(self, *ignored: nn.Module) -> None:
        """Parameters and buffers of the `ignored` modules do not count, nor do views of them."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_bytes = self.peak = 0
        held = (tensor for module in ignored for tensor in (*module.parameters(), *module.buffers()))
        self._storages = weakref.WeakSet(tensor.untyped_storage() for tensor in held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, output)
        return output

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._storages:
            return
        self._storages.add(storage)
        self.n_bytes += storage.nbytes()
        self.peak = max(self.peak, self.n_bytes)
        weakref.finalize(storage, self._subtract, storage.nbytes())

    def _subtract(self, n_bytes: int) -> None:
        self.n_bytes -= n_bytes
