"""Profiles: where and with how much a recipe runs, and nothing that changes what it computes.

A profile names the device, the precision, the size of one forward batch, the engine that models answer with and, for
several processes, a standard accelerate file or, on a CPU, `fork`. The recipe owns the global batch size; the
micro-batch here and the number of processes split it, and gradient accumulation follows. A profile is not part of a
stage's fingerprint: another engine computes the same and rounds otherwise.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from cai.contracts.model import SERVED
from cai.document import Document, Problems, check_kind, error_at, load_document, validate
from cai.document.json_schema import editor_schema
from cai.document.shipped import find_beside, find_file
from cai.text.errors import BadInput

DEFAULT = "cpu"


class Server(BaseModel):
    """An OpenAI-compatible server, and how patiently it is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field("http://127.0.0.1:8000/v1", description="Where its interface begins, most often up to `/v1`.")
    api_key_env: str = Field(
        "OPENAI_API_KEY",
        description="Environment variable with the key; the server is asked without one if it is unset.",
    )
    concurrency: int = Field(64, ge=1, le=1000, description="Requests under way at once.")
    timeout: float = Field(120, gt=0, le=86400, description="Seconds that one answer may take.")
    retries: int = Field(
        6, ge=0, le=20, description="Times a request is sent again; the waits double from 1 to 60 seconds."
    )
    names: dict[str, str] = Field(
        default_factory=dict, description="What the server calls a model, by its name in the recipe, where it differs."
    )

    def called(self, model: str) -> str:
        """What the server calls a model of the recipe."""
        return self.names.get(model, model.removeprefix(SERVED))

    @field_validator("url")
    @classmethod
    def _is_plain(cls, url: str) -> str:
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query:  # the profile is copied into every stage's folder
            raise ValueError(
                "found a user, a password or a query in the address, expected a key in `api_key_env` alone"
            )
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"found {url!r}, expected an address such as http://127.0.0.1:8000/v1")
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not (name.isidentifier() and name.isascii()):  # what was found is not said: it may be the key itself
            raise ValueError("found no name of an environment variable, expected one such as OPENAI_API_KEY")
        return name


class Vllm(BaseModel):
    """How the engine `vllm` is started."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    python: Path | None = Field(
        None, description="Interpreter of an environment with vLLM, relative to the profile; absent = this one."
    )
    tensor_parallel: int = Field(
        1, ge=1, description="GPUs that one copy of the model is split over; 1 for `ppo`, `rloo`."
    )
    data_parallel: int = Field(
        1, ge=1, description="Copies of the model, each with its share of requests; 1 for `ppo`, `rloo`."
    )
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of a GPU's memory that vLLM takes.")
    cpu_cache_gib: int = Field(4, ge=1, description="GiB for keys and values where vLLM runs on a CPU.")
    max_model_len: int | None = Field(None, ge=1, description="Longest sequence in tokens; absent = as requests need.")
    extra: dict[str, Any] = Field(default_factory=dict, description="More arguments of vLLM's `EngineArgs`, by name.")

    @field_validator("extra")
    @classmethod
    def _leaves_ours(cls, extra: dict[str, Any]) -> dict[str, Any]:
        ours = {"model", "tokenizer", "dtype", "load_format", "trust_remote_code", "tensor_parallel_size",
                "data_parallel_size", "gpu_memory_utilization", "max_model_len", "enable_lora", "max_lora_rank",
                "enable_prefix_caching", "logprobs_mode", "generation_config"}  # fmt: skip
        if taken := sorted(ours & set(extra)):
            raise ValueError(f"found {taken[0]!r}, which `cai` sets itself")
        return extra


class Sharding(NamedTuple):
    """How DeepSpeed splits what a training process holds over all of them."""

    stage: int = 0
    """Of ZeRO: 1 splits the optimizer's state, 2 gradients too, 3 weights too; 0 = no DeepSpeed."""
    offloads_optimizer: bool = False
    """Whether the optimizer's state is in the machine's memory instead of the GPU's."""
    offloads_weights: bool = False


class Profile(BaseModel):
    """One file in `configs/`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("cpu", description="What the profile is called in reports.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto = a GPU where there is one.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of forward passes; auto = bfloat16 where the device is faster with it."
    )
    processes: int = Field(1, ge=1, description="Processes of a training or feedback stage; on GPUs one for each.")
    accelerate: Path | None = Field(
        None,
        description="accelerate config file for several processes, relative to the profile or to the shipped ones; "
        "absent = none.",
    )
    fork: bool = Field(
        False,
        description="Fork the processes of all stages from one that has imported the libraries, instead of starting "
        "them: on one machine's CPU, whose cores they share; accelerate is not used.",
    )
    nodes: int = Field(
        1,
        ge=1,
        description="Machines that share the processes of a training stage evenly; all others run on the first.",
    )
    launcher: tuple[str, ...] = Field(
        (),
        description="Command that runs the command after it once on each node, with the node's number from 0 in "
        "CAI_NODE or SLURM_NODEID. Words that name files are relative to the profile or to the "
        "shipped ones.",
    )
    address: str | None = Field(
        None, description="What other nodes call the first, where `cai run` is started; absent = its host name."
    )
    micro_batch: int = Field(8, ge=1, description="Examples in one forward pass of one process in training.")
    engine: Literal["local", "vllm", "server"] = Field(
        "local", description="What models answer with; those called `served:NAME` are always asked at the server."
    )
    server: Server = Field(Server.model_validate({}), description="The server of `engine: server` and `served:`.")
    vllm: Vllm = Field(Vllm.model_validate({}), description="How `engine: vllm` is started.")
    token_budget: int = Field(
        16384, ge=256, description="Tokens whose keys and values an engine holds at once, new ones included."
    )
    items_in_flight: int = Field(
        256,
        ge=1,
        description="Most items of a feedback stage that a process hands to its engine, and then writes, at once, "
        "where the stage states no `journal_batch`; a kill loses them. Fewer where a model of more than 20 million "
        "parameters answers on a CPU: about a minute of work.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations instead of keeping them.")
    resume_point_minutes: float = Field(
        0.75,  # a kill should cost a minute at most: this, a step, and writing
        ge=0,
        description="Minutes of training after which a resume point is written even where the recipe's `save_steps` "
        "asks for none yet; more where writing one takes so long that it would take a twentieth of the time; 0 = after "
        "every logged step.",
    )
    offline: bool = Field(
        True, description="Use only models that are on this machine; false = may download, as `--online`."
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of a process; absent = as many as cores, or under `fork` its share of them.",
    )

    @property
    def processes_here(self) -> int:
        """Processes on one node."""
        return self.processes // self.nodes

    @property
    def inline(self) -> bool:
        """Whether stages run in the process of `cai run`: one process on a CPU, where starting another costs most."""
        return self.processes == 1 and self.accelerate is None and not self.uses_gpu and not self.fork

    def where(self, model: str) -> str:
        """Where a model of the recipe answers, in words."""
        if self.engine == "server" or model.startswith(SERVED):
            return f"at {self.server.url} as {self.server.called(model)!r}"
        return f"here, engine {self.engine}"

    @property
    def uses_gpu(self) -> bool:
        """Whether stages run on a GPU. Looked up without torch, so that the parent process stays small."""
        return self.device == "cuda" or (self.device == "auto" and _gpu_present())

    @property
    def sharding(self) -> Sharding:
        """What the accelerate file says about DeepSpeed."""
        return Sharding() if self.accelerate is None else _read_sharding(self.accelerate)

    def check_rollouts(self, stage: str) -> None:
        """Raises BadInput where a vLLM on several GPUs would sample from a policy in training."""
        for key in ("tensor_parallel", "data_parallel"):
            if self.engine == "vllm" and (n_gpus := getattr(self.vllm, key)) > 1:
                raise BadInput(
                    f"profile {self.name!r}: found `vllm: {{{key}: {n_gpus}}}`, but stage {stage!r} samples its "
                    f"responses with one vLLM beside each training process, on its GPU: expected 1, or another profile"
                )

    def check_quantised_base(self, stage: str, *, is_sampled: bool, on_this_machine: bool = True) -> None:
        """Raises BadInput where a stage's adapter cannot be trained over a base of 4 bits a weight.

        `is_sampled` tells whether the stage samples from the model in training.
        """
        wish = f"stage {stage!r}: found `lora: {{base: nf4}}`"
        if not self.uses_gpu:
            raise BadInput(f"{wish}, which needs a GPU, and profile {self.name!r} has none: leave `base` out")
        if self.sharding.stage == 3:
            instead = "use a profile without it, or leave `base` out"
            raise BadInput(f"{wish}, but ZeRO-3 of profile {self.name!r} cannot partition such weights: {instead}")
        if is_sampled and self.engine == "vllm":
            instead = "sample with `engine: local`, or leave `base` out"
            raise BadInput(f"{wish}, but vLLM of profile {self.name!r} does not take over such weights: {instead}")
        if on_this_machine and importlib.util.find_spec("bitsandbytes") is None:
            raise BadInput(f"{wish}, which needs the package bitsandbytes: install `constitutional-ai[qlora]`")

    def accumulation(self, batch_size: int) -> tuple[int, int]:
        """(micro-batch, accumulation steps) with `batch_size` = processes x micro-batch x steps.

        The micro-batch is lowered to the largest that divides. Raises BadInput where the processes do not.
        """
        share, rest = divmod(batch_size, self.processes)
        if rest or not share:
            raise BadInput(
                f"batch_size {batch_size} cannot be split over the {self.processes} processes of profile "
                f"{self.name!r}; choose a multiple of {self.processes}"
            )
        micro = divisors_up_to(self.micro_batch, share)[0]
        return micro, share // micro


def divisors_up_to(largest: int, share: int) -> list[int]:
    """The divisors of `share` that are no larger than `largest`, in falling order: the micro-batches that divide it."""
    return [size for size in range(min(largest, share), 0, -1) if share % size == 0]


@functools.cache
def _read_sharding(accelerate: Path) -> Sharding:
    settings = yaml.safe_load(accelerate.read_text(encoding="utf-8")).get("deepspeed_config") or {}
    if file := settings.get("deepspeed_config_file"):
        zero = json.loads((accelerate.parent / file).read_text(encoding="utf-8")).get("zero_optimization", {})
        devices = ((zero.get(name) or {}).get("device") for name in ("offload_optimizer", "offload_param"))
        return Sharding(int(zero.get("stage", 0)), *(device in {"cpu", "nvme"} for device in devices))
    devices = (settings.get(f"offload_{name}_device") for name in ("optimizer", "param"))
    return Sharding(int(settings.get("zero_stage", 0)), *(device in {"cpu", "nvme"} for device in devices))


def profile_schema() -> dict[str, Any]:
    """The JSON Schema of a profile, for editors; `configs/schema.json` is this."""
    return editor_schema(Profile.model_json_schema())


def load_profile(name: str | None = None) -> Profile:
    """The profile in a file, or the shipped one of that name. Raises BadInput, with the position, for a wrong one."""
    path = find_file(name or DEFAULT, "configs", "profile")
    document = load_document(path)
    check_kind(document, "profile")
    profile = validate(document, Profile)
    problems = Problems()
    with problems.collect():
        profile = _with_python(document, profile)
    with problems.collect():
        profile = _with_accelerate(document, profile)
    for keys, message in _contradictions(profile):
        problems.add(error_at(document, keys, message))
    problems.raise_if_any()
    name_if_absent = {} if "name" in document.value else {"name": path.stem}
    words = tuple(_launcher_word(word, path.parent) for word in profile.launcher)
    return profile.model_copy(update={"launcher": words, **name_if_absent})


def _with_python(document: Document, profile: Profile) -> Profile:
    """The profile with an absolute path of vLLM's interpreter."""
    if profile.vllm.python is None:
        return profile
    python = Path.cwd() / document.path.parent / profile.vllm.python  # not resolved: a venv's interpreter is a link
    if not python.is_file():
        raise error_at(document, ("vllm", "python"), f"no such file: {python}")
    return profile.model_copy(update={"vllm": profile.vllm.model_copy(update={"python": python})})


def _with_accelerate(document: Document, profile: Profile) -> Profile:
    """The profile with an absolute path of its accelerate file."""
    if profile.accelerate is None:
        return profile
    accelerate = find_beside(profile.accelerate, document.path.parent, "configs")
    if accelerate is None:
        path_beside = (document.path.parent / profile.accelerate).resolve()
        raise error_at(document, ("accelerate",), f"no such file: {path_beside}, and none that is shipped")
    return profile.model_copy(update={"accelerate": accelerate.resolve()})


def _contradictions(profile: Profile) -> Iterator[tuple[tuple[str, ...], str]]:
    """The key and the sentence for whatever in the profile does not fit together."""
    if profile.accelerate is None and profile.processes > 1 and not profile.fork:
        expected = "1, an `accelerate:` file that says how to start them, or `fork`"
        yield ("processes",), f"found {profile.processes}, expected {expected}"
    elsewhere = profile.device != "cpu" or profile.engine != "local" or profile.nodes > 1
    if profile.fork and (elsewhere or profile.accelerate is not None):
        yield ("fork",), "expected `device: cpu` and `engine: local`, without `nodes:` and `accelerate:`"
    if profile.processes % profile.nodes:
        yield ("nodes",), f"found {profile.nodes}, which cannot share {profile.processes} processes"
    elif (profile.nodes > 1) != bool(profile.launcher):
        keys = ("nodes",) if profile.nodes > 1 else ("launcher",)
        yield keys, "expected `nodes:` above 1 and a `launcher:` that reaches them, or neither"


def _launcher_word(word: str, home: Path) -> str:
    """A word of the launcher; a file's path where one in the profile's folder `home` has this name, or a shipped one
    where the word names a folder too, since a single word may be a command or a host."""
    file = find_beside(word, home, "configs") if "/" in word else home / word
    return str(file.resolve()) if file is not None and file.is_file() else word


@functools.cache
def _gpu_present() -> bool:
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
