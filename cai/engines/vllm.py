"""The engine `vllm`: vLLM on this machine's GPUs, or its CPU build.

Each of `data_parallel` workers (`cai.engines.vllm_worker`) is a process with vLLM in it, started on first use with the
interpreter that the profile names, so that vLLM can have its own versions of torch and transformers, and so that all of
a device's memory is free again afterwards. Conversations become ids here, with `cai.models.chat`, as in the engine
`local`, and results come back as they finish. Options are read as next-token log-probabilities: for log-probabilities
of prompts vLLM would recompute what it has cached. Requests that begin alike go to the same worker, in order.

vLLM serves an adapter on top of its base if it supports all of the adapter's features; otherwise, and if adapters are
stacked, the adapter is merged into a copy first. Left out: several machines, models that do not generate.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

from cai.contracts.engine import Choice, Completion, Question, Request
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.models.chat import Chat
from cai.models.loading import load_causal_lm, load_tokenizer, pick_device, pick_dtype
from cai.models.reference import ADAPTER, base_of, fetch, read_json_object, read_model_json
from cai.storage.rows import Failure
from cai.text.errors import BadInput, CaiError, StageFailed, TooLong

WORKER = Path(__file__).with_name("vllm_worker.py")
Line = dict[str, Any]
Results: TypeAlias = "queue.SimpleQueue[tuple[Worker, Line | None]]"
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes as the highest rank of an adapter."""
_SHORTEST_LIMIT = 2048
"""Tokens of a sequence that vLLM always takes: starting it again costs more than their keys and values."""
_REMOVED_VARIABLES = (
    "PYTHONPATH", "PYTHONHOME",
    "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_",
)  # fmt: skip
"""Prefixes of environment variables that lead to our packages, or would make vLLM one of the training processes."""
_GRACE_SECONDS = 20.0
"""How long a process may take to end by itself before it is killed."""


class VllmEngine:
    """One model in `vllm: {data_parallel: …}` processes. With `dummy_weights` no weights are read until `reload`.

    Unless the profile says it, the workers take sequences of as many tokens as the requests need, rounded up: a model's
    own limit may ask for more keys and values than memory holds. Longer requests start the workers again, which those
    with dummy weights cannot be: `longest` says in advance how long requests are.
    """

    def __init__(self, model: Model, profile: Profile, *, dummy_weights: bool = False, longest: int = 0) -> None:
        self.model, self.profile, self.dummy_weights = model, profile, dummy_weights
        self._merged, self._started = contextlib.ExitStack(), contextlib.ExitStack()
        self._max_tokens = profile.vllm.max_model_len
        if longest:
            self._make_room(longest)
        self._n_sent = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop_workers()
        self._merged.close()
        self.__dict__.pop("_folders", None)

    def _stop_workers(self) -> None:
        self._started.close()
        for name in ("_workers", "_results"):
            self.__dict__.pop(name, None)

    def _make_room(self, n_tokens: int) -> None:
        """Makes sure that the workers, which start on first use, take sequences of `n_tokens`."""
        if self.profile.vllm.max_model_len is not None or n_tokens <= (self._max_tokens or 0):
            return
        assert not (self.dummy_weights and "_workers" in self.__dict__), "their weights would be lost"
        self._stop_workers()
        rounded = max(_SHORTEST_LIMIT, 1 << (n_tokens - 1).bit_length())
        self._max_tokens = min(rounded, self.chat.context_length or rounded)

    @functools.cached_property
    def chat(self) -> Chat:
        """The model's tokenisation. Raises BadInput where the model has no chat template."""
        return Chat.load(self.model)

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        """A completion or a failure for each request, as they finish. Raises StageFailed where vLLM fails."""
        chat = self.chat
        lines: list[Line] = []
        fitting: list[Request] = []
        for request in requests:
            sampling = request.sampling
            try:
                prompt = chat.prompt_ids(request.messages)
                self._check_length(prompt, sampling.max_new_tokens)
                if 0 < sampling.temperature < 0.01:  # vLLM would raise it to 0.01
                    raise BadInput(f"vLLM samples at temperature 0 or from 0.01 on, found {sampling.temperature}")
            except BadInput as error:
                yield Failure.of_error(request.id, error)
                continue
            stop = [*chat.stop, *sampling.stop]
            settings: Line = {
                "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature,
                "top_p": sampling.top_p, "top_k": sampling.top_k,
                "logprobs": 0,  # of the sampled token alone
                "ignore_eos": True, "stop_token_ids": sorted(chat.end_ids),
                "logit_bias": {token: -float("inf") for token in self._banned_ids},
                "stop": stop, "detokenize": bool(stop),
            }  # fmt: skip
            if sampling.temperature:
                settings["seed"] = request.seed
            lines.append({"prompt": prompt, "sampling": settings})
            fitting.append(request)
        for index, answer in self._answers(lines):
            request, prompt = fitting[index], lines[index]["prompt"]
            if answer.get("finish_reason") not in {"stop", "length"}:
                yield Failure(request.id, _refusal(answer))
                continue
            ids = answer["token_ids"]
            text = chat.text(ids, stop=(*chat.stop, *request.sampling.stop))
            log_probs = [log_prob for _, log_prob in answer["log_probs"]]
            yield Completion(request.id, text.text, ids, log_probs, answer["finish_reason"], prompt, text.reasoning)

    def choose(self, questions: Sequence[Question]) -> Iterator[Choice | Failure]:
        """The options' log-probabilities, or a failure, for each question. Raises StageFailed where vLLM fails."""
        lines: list[Line] = []
        fitting: list[Question] = []
        max_options = max((len(question.options) for question in questions), default=0)
        for question in questions:
            try:
                prompt, options = self.chat.question(question.messages, question.options)
                self._check_length(prompt, 1)
            except BadInput as error:
                yield Failure.of_error(question.id, error)
                continue
            # The same number for all questions: vLLM would pad with token 0, which may be an option.
            token_ids = options + options[:1] * (max_options - len(options))
            sampling = {"max_tokens": 1, "temperature": 0, "logprob_token_ids": token_ids, "detokenize": False}
            lines.append({"prompt": prompt, "sampling": sampling})
            fitting.append(question)
        for index, answer in self._answers(lines):
            question = fitting[index]
            if answer.get("finish_reason") not in {"stop", "length"}:
                yield Failure(question.id, _refusal(answer))
                continue
            # The first log-probability is that of the sampled token.
            scores = [log_prob for _, log_prob in answer["log_probs"][1 : 1 + len(question.options)]]
            yield Choice(question.id, tuple(scores), sum(map(math.exp, scores)))

    def _check_length(self, prompt: Sequence[int], n_new: int) -> None:
        """Raises BadInput for a prompt that does not fit the model's context with `n_new` more tokens."""
        limits = [limit for limit in (self.chat.context_length, self.profile.vllm.max_model_len) if limit is not None]
        if limits and len(prompt) + n_new > min(limits):
            lengths = f"the prompt has {len(prompt)} tokens and {n_new} more are wanted"
            raise TooLong(f"{lengths}, but {self.model.name!r} takes {min(limits)} in all")

    @functools.cached_property
    def _banned_ids(self) -> list[int]:
        """The pad token, unless it ends turns or is outside of the model's vocabulary."""
        config = read_model_json(self.model, "config.json")
        vocab_size = (config.get("text_config") or config)["vocab_size"]
        pad = self.chat.pad_id
        return [] if pad in self.chat.end_ids or pad >= vocab_size else [pad]

    def _answers(self, lines: Sequence[Line]) -> Iterator[tuple[int, Line]]:
        """(index, answer) of every line, as they come."""
        self._make_room(max((len(line["prompt"]) + line["sampling"]["max_tokens"] for line in lines), default=0))
        order = sorted(range(len(lines)), key=lambda index: lines[index]["prompt"])
        pending: dict[str, int] = {}
        for number, worker in enumerate(self._workers if lines else []):
            share = order[number * len(order) // len(self._workers) : (number + 1) * len(order) // len(self._workers)]
            # Ids are new for every caller: an earlier one may have left answers unread.
            index_by_id = {f"{self._n_sent + index}": index for index in share}
            pending |= index_by_id
            worker.send([{"id": id, **lines[index]} for id, index in index_by_id.items()])
        self._n_sent += len(lines)
        yield from self._receive(pending)

    def reload(self) -> None:
        """Reads the weights in the folder again and forgets old keys and values. Raises StageFailed if vLLM fails."""
        pending = {f"{self._n_sent + number}": number for number in range(len(self._workers))}
        self._n_sent += len(pending)
        for id, worker in zip(pending, self._workers, strict=True):
            worker.send([{"id": id, "reload": True}])
        for _ in self._receive(pending):
            pass

    def _receive(self, pending: dict[str, int]) -> Iterator[tuple[int, Line]]:
        """(index, answer) for each of `pending`, an index by its id, as they come."""
        while pending:
            worker, answer = self._results.get()
            if answer is None or "error" in answer:
                raise worker.failure(answer, "in the middle of its work")
            if (index := pending.pop(answer["id"], None)) is not None:
                yield index, answer

    @functools.cached_property
    def _results(self) -> Results:
        return queue.SimpleQueue()

    @functools.cached_property
    def _workers(self) -> list[Worker]:
        """The processes, once they have loaded the model."""
        python, first_line = self.profile.vllm.python or Path(sys.executable), self._first_line()
        workers = [
            self._started.enter_context(Worker(python, environment, first_line, self._results))
            for environment in _environments(self.profile)
        ]
        for _ in workers:
            worker, answer = self._results.get()
            if answer is None or "error" in answer:
                raise worker.failure(answer, "before its model was loaded")
            if self.profile.device != "auto" and answer["ready"] != self.profile.device:
                runs_on = f"the vLLM of {worker.python} runs on {answer['ready']}"
                raise BadInput(f"the profile says `device: {self.profile.device}`, but {runs_on}")
        return workers

    def _first_line(self) -> Line:
        """The first line that a worker is sent: vLLM's arguments, and an adapter."""
        options = self.profile.vllm
        folder, adapter = self._folders
        arguments: Line = {
            "model": str(folder),
            "dtype": self._dtype,
            "load_format": "dummy" if self.dummy_weights else "safetensors",
            "trust_remote_code": False,
            "generation_config": "vllm",  # sampling settings come from the request alone
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "tensor_parallel_size": options.tensor_parallel,
            "max_model_len": self._max_tokens,
        }
        if self.profile.uses_gpu:
            arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
        else:
            arguments["kv_cache_memory_bytes"] = options.cpu_cache_gib << 30
        if adapter is not None:
            rank = int(read_json_object(adapter / ADAPTER)["r"])
            arguments |= {"enable_lora": True, "max_lora_rank": next(limit for limit in _LORA_RANKS if limit >= rank)}
        return {"arguments": arguments | options.extra, "adapter": adapter and str(adapter)}

    @property
    def _dtype(self) -> str:
        """The profile's precision on vLLM's device, which need not be torch's here."""
        if self.profile.dtype != "auto":
            return self.profile.dtype
        return "bfloat16" if self.profile.uses_gpu else str(pick_dtype("auto", pick_device("cpu"))).split(".")[1]

    @functools.cached_property
    def _folders(self) -> tuple[Path, Path | None]:
        """(folder of a full model, folder of the adapter on top of it or None)."""
        folder, base = fetch(self.model), base_of(self.model)
        if base is None:
            return folder, None
        if base_of(base) is None and _is_supported(read_json_object(folder / ADAPTER)):
            return fetch(base), folder
        merged = Path(self._merged.enter_context(tempfile.TemporaryDirectory(prefix="cai-merged-")))
        load_causal_lm(self.model, self._dtype).save_pretrained(merged)
        load_tokenizer(self.model).save_pretrained(merged)
        return merged, None


class Worker:
    """One process. Its answers go to `results`; None follows when it has ended."""

    def __init__(self, python: Path, environment: Mapping[str, str], first_line: Line, results: Results) -> None:
        self.python = python
        handle, name = tempfile.mkstemp(prefix="cai-vllm-", suffix=".log")
        self.log = Path(name)
        self._has_failed = False
        try:
            pipe, command = subprocess.PIPE, [str(python), str(WORKER)]
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=handle, env=environment, start_new_session=True
            )
        except OSError as error:
            self.log.unlink()
            raise BadInput(f"vLLM's interpreter {python} does not start: {error.strerror}") from None
        finally:
            os.close(handle)
        threading.Thread(target=self._read, args=(results,), daemon=True).start()
        self.send([first_line])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the process and all that it started. The log is kept if it has failed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if not self._has_failed:
            self.log.unlink(missing_ok=True)

    def send(self, lines: Sequence[Line]) -> None:
        """Sends lines. If the process has ended, `results` says so."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.writelines(json.dumps(line).encode() + b"\n" for line in lines)
            self._process.stdin.flush()

    def failure(self, answer: Line | None, when: str) -> CaiError:
        """The error that tells the user about `answer`, or about the end of the process where it is None."""
        self._has_failed = True
        if answer is None:
            code = self._process.wait()
            status = f"signal {-code}" if code < 0 else f"exit code {code}"
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last_line = f"; its last words: {lines[-1].strip()[:300]}" if lines else ""
            return StageFailed(f"vLLM ended with {status} {when}{last_line}; see {self.log}")
        if "No module named 'vllm'" in answer["error"]:
            return BadInput(
                f"{self.python} has no vLLM: give the interpreter of an environment that has it as `--vllm-python`, or "
                f"as `vllm: {{python: …}}` in the profile"
            )
        return StageFailed(f"vLLM failed {when}: {answer['error']}; see {self.log}")

    def _read(self, results: Results) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                results.put((self, json.loads(line)))
            except ValueError:
                break  # the process was killed in the middle of a line
        results.put((self, None))


def _refusal(answer: Line) -> str:
    if "refused" in answer:
        return f"vLLM refused it: {answer['refused']}"
    return f"vLLM ended it as {answer['finish_reason']}"


def _environments(profile: Profile) -> list[dict[str, str]]:
    """The environment of each worker: nothing that leads to our packages or to the network, and GPUs of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_REMOVED_VARIABLES)}
    common = inherited | {
        "PYTHONSAFEPATH": "1",  # else `import vllm` would import this file, which is in the worker's folder
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked process would keep the worker's pipes open
    }
    options = profile.vllm
    if not profile.uses_gpu:  # vLLM's scheduling in a second process takes a third of a small machine's time
        return [common | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}] * options.data_parallel
    local_rank, n_ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if options.data_parallel == n_ranks == 1:
        return [common]
    # Of several training processes, each has a worker on the GPU that it trains on (tested on CPUs alone).
    size, n_gpus = options.tensor_parallel, options.tensor_parallel * options.data_parallel
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [f"{n}" for n in range(local_rank + n_gpus)]
    devices = devices[local_rank:]
    if len(devices) < n_gpus:
        raise BadInput(f"the profile wants {n_gpus} GPUs for vLLM, but CUDA_VISIBLE_DEVICES names {visible}")
    return [common | {"CUDA_VISIBLE_DEVICES": ",".join(devices[n : n + size])} for n in range(0, n_gpus, size)]


def _is_supported(config: Mapping[str, Any]) -> bool:
    """Whether an adapter is nothing but two low-rank factors per matrix, of matrices that vLLM adapts."""
    unsupported = ("modules_to_save", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication",
            "target_parameters", "use_qalora", "trainable_token_indices")  # fmt: skip
    targets = config.get("target_modules")
    return (
        config.get("peft_type") == "LORA"
        and config.get("bias", "none") == "none"
        and config.get("init_lora_weights", True) is True
        and not any(config.get(name) for name in unsupported)
        and isinstance(targets, list)
        and not {"embed_tokens", "lm_head"} & set(targets)
        and config["r"] <= _LORA_RANKS[-1]
    )
