"""The engine `vllm`: vLLM on this machine's GPUs, or its CPU build.

Each of `data_parallel` workers (`cai.engines.vllm_worker`) is a process with vLLM in it, started on first use with the
interpreter that the profile names, so that vLLM may have the versions of torch and transformers that it asks for, and
so that every byte of a device's memory is free again afterwards. Conversations become ids here, with `cai.models.chat`,
as in the engine `local`, and results come back as they finish. Options are read as next-token log-probabilities: for
those of prompts vLLM recomputes what it has cached. Requests that begin alike go to the same worker, one behind the
other.

An adapter is served by vLLM on top of its base where vLLM has all that it does; otherwise, and where adapters are
stacked, it is merged into a copy first. Left out: several machines, models that are not generative.
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
from typing import Any, Self

from cai.contracts.engine import Choice, Completion, Question, Request
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.models.chat import Chat
from cai.models.loading import load_causal_lm, load_tokenizer, pick_device, pick_dtype
from cai.models.reference import ADAPTER, base_of, fetch, settings
from cai.storage.rows import Failure
from cai.text.errors import BadInput, CaiError, StageFailed

WORKER = Path(__file__).with_name("vllm_worker.py")
Line = dict[str, Any]
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM makes room for."""
_NOT_PASSED_ON = (
    "PYTHONPATH", "PYTHONHOME",
    "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_",
)  # fmt: skip
"""Begin names of what leads to our packages, or would make vLLM one of the processes that train together."""
_GRACE = 20.0
"""Seconds in which a process that was told to end has ended."""


class VllmEngine:
    """One model, in as many processes as the profile's `vllm: {data_parallel: …}` says.

    `empty` starts vLLM with weights that mean nothing, until `reload` reads those in the model's folder.
    """

    def __init__(self, model: Model, profile: Profile, *, empty: bool = False) -> None:
        self.model = model
        self.profile = profile
        self.empty = empty
        self._resources = contextlib.ExitStack()
        self._asked = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()
        for name in ("_workers", "_results"):
            self.__dict__.pop(name, None)

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
                self._check(prompt, sampling.max_new_tokens)
                if 0 < sampling.temperature < 0.01:  # it would be raised to that, with a word in the log
                    raise BadInput(f"vLLM draws at temperature 0 or from 0.01 on, found {sampling.temperature}")
            except BadInput as error:
                yield Failure(request.id, str(error))
                continue
            stop = [*chat.stop, *sampling.stop]
            wanted: Line = {
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "logprobs": 0,  # of the drawn token alone
                "ignore_eos": True,  # the chat knows what ends a turn
                "stop_token_ids": sorted(chat.end_ids),
                "logit_bias": {token: -float("inf") for token in self._banned},
                "stop": stop,
                "detokenize": bool(stop),
            }
            if sampling.temperature:
                wanted["seed"] = request.seed
            lines.append({"prompt": prompt, "sampling": wanted})
            fitting.append(request)
        for number, answer in self._answers(lines):
            request, prompt = fitting[number], lines[number]["prompt"]
            if answer.get("finish_reason") not in {"stop", "length"}:
                yield Failure(request.id, _refusal(answer))
                continue
            ids = answer["token_ids"]
            said = chat.text(ids, stop=(*chat.stop, *request.sampling.stop))
            log_probs = [log_prob for _, log_prob in answer["log_probs"]]
            yield Completion(request.id, said.text, ids, log_probs, answer["finish_reason"], prompt, said.reasoning)

    def choose(self, questions: Sequence[Question]) -> Iterator[Choice | Failure]:
        """The options' log-probabilities, or a failure, for each question. Raises StageFailed where vLLM fails."""
        lines: list[Line] = []
        fitting: list[Question] = []
        most = max((len(question.options) for question in questions), default=0)
        for question in questions:
            try:
                prompt, options = self.chat.question(question.messages, question.options)
                self._check(prompt, 1)
            except BadInput as error:
                yield Failure(question.id, str(error))
                continue
            # Equally many for all: where vLLM pads, it pads with token 0, which may be an option.
            wanted = options + options[:1] * (most - len(options))
            sampling = {"max_tokens": 1, "temperature": 0, "logprob_token_ids": wanted, "detokenize": False}
            lines.append({"prompt": prompt, "sampling": sampling})
            fitting.append(question)
        for number, answer in self._answers(lines):
            question = fitting[number]
            if answer.get("finish_reason") not in {"stop", "length"}:
                yield Failure(question.id, _refusal(answer))
                continue
            scores = [log_prob for _, log_prob in answer["log_probs"][1 : 1 + len(question.options)]]  # [0] was drawn
            yield Choice(question.id, tuple(scores), sum(map(math.exp, scores)))

    def _check(self, prompt: Sequence[int], room: int) -> None:
        limits = [limit for limit in (self.chat.context_length, self.profile.vllm.max_model_len) if limit is not None]
        if limits and len(prompt) + room > min(limits):
            raise BadInput(
                f"the prompt has {len(prompt)} tokens and {room} more are wanted, but {self.model.name!r} takes "
                f"{min(limits)} in all"
            )

    @functools.cached_property
    def _banned(self) -> list[int]:
        """The pad token, unless it ends turns or lies outside what the model can draw."""
        config = settings(self.model, "config.json")
        rows = (config.get("text_config") or config)["vocab_size"]
        pad = self.chat.pad_id
        return [] if pad in self.chat.end_ids or pad >= rows else [pad]

    def _answers(self, lines: Sequence[Line]) -> Iterator[tuple[int, Line]]:
        """(index, answer) of every line, as they come."""
        order = sorted(range(len(lines)), key=lambda n: lines[n]["prompt"])
        owed: dict[str, int] = {}
        for index, worker in enumerate(self._workers if lines else []):
            share = order[index * len(order) // len(self._workers) : (index + 1) * len(order) // len(self._workers)]
            ids = [f"{self._asked + n}" for n in share]  # what an earlier caller left unread has other ids
            owed |= dict(zip(ids, share, strict=True))
            worker.send([{"id": one, **lines[n]} for one, n in zip(ids, share, strict=True)])
        self._asked += len(lines)
        yield from self._results_of(owed)

    def reload(self) -> None:
        """Reads the weights in the model's folder anew; what others have computed is forgotten.

        Raises StageFailed where vLLM fails.
        """
        owed = {f"{self._asked + n}": n for n in range(len(self._workers))}
        self._asked += len(owed)
        for id, worker in zip(owed, self._workers, strict=True):
            worker.send([{"id": id, "reload": True}])
        for _ in self._results_of(owed):
            pass

    def _results_of(self, owed: dict[str, int]) -> Iterator[tuple[int, Line]]:
        """(number, answer) of everything that is owed, by id, as it comes."""
        while owed:
            worker, answer = self._results.get()
            if answer is None or "error" in answer:
                raise worker.failure(answer, "in the middle of its work")
            if (number := owed.pop(answer["id"], None)) is not None:
                yield number, answer

    @functools.cached_property
    def _results(self) -> queue.SimpleQueue[tuple[Worker, Line | None]]:
        return queue.SimpleQueue()

    @functools.cached_property
    def _workers(self) -> list[Worker]:
        """The processes, loaded."""
        python, start = self.profile.vllm.python or Path(sys.executable), self._start()
        workers = [
            self._resources.enter_context(Worker(python, environment, start, self._results))
            for environment in _environments(self.profile)
        ]
        for _ in workers:
            worker, answer = self._results.get()
            if answer is None or "error" in answer:
                raise worker.failure(answer, "before its model was loaded")
            if self.profile.device != "auto" and answer["ready"] != self.profile.device:
                raise BadInput(
                    f"the profile says `device: {self.profile.device}`, but the vLLM of {worker.python} runs on "
                    f"{answer['ready']}"
                )
        return workers

    def _start(self) -> Line:
        """A worker's first line."""
        options = self.profile.vllm
        dtype = "bfloat16" if self.profile.uses_gpu else str(pick_dtype("auto", pick_device("cpu"))).split(".")[1]
        folder, adapter = self._served()
        arguments: Line = {
            "model": str(folder),
            "dtype": dtype if self.profile.dtype == "auto" else self.profile.dtype,
            "load_format": "dummy" if self.empty else "safetensors",
            "trust_remote_code": False,
            "generation_config": "vllm",  # sampling is what the request says
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "tensor_parallel_size": options.tensor_parallel,
            "max_model_len": options.max_model_len,
        }
        if self.profile.uses_gpu:
            arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
        else:
            arguments["kv_cache_memory_bytes"] = options.cpu_cache_gib << 30
        if adapter is not None:
            rank = int(_adapter_config(adapter)["r"])
            arguments |= {"enable_lora": True, "max_lora_rank": next(room for room in _RANKS if room >= rank)}
        return {"arguments": arguments | options.extra, "adapter": adapter and str(adapter)}

    def _served(self) -> tuple[Path, Path | None]:
        """(folder of a whole model, folder of the adapter on top of it or None)."""
        folder, base = fetch(self.model), base_of(self.model)
        if base is None:
            return folder, None
        if base_of(base) is None and _plain(_adapter_config(folder)):
            return fetch(base), folder
        merged = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="cai-merged-")))
        load_causal_lm(self.model, self.profile.dtype).save_pretrained(merged)
        load_tokenizer(self.model).save_pretrained(merged)
        return merged, None


class Worker:
    """One process. Its answers go to `results`, and None when it has ended."""

    def __init__(
        self,
        python: Path,
        environment: Mapping[str, str],
        start: Line,
        results: queue.SimpleQueue[tuple[Worker, Line | None]],
    ) -> None:
        self.python = python
        handle, name = tempfile.mkstemp(prefix="cai-vllm-", suffix=".log")
        self.log = Path(name)
        self._failed = False
        try:
            self._process = subprocess.Popen(
                [str(python), str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=handle,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self.log.unlink()
            raise BadInput(f"vLLM's interpreter {python} does not start: {error.strerror}") from None
        finally:
            os.close(handle)
        threading.Thread(target=self._read, args=(results,), daemon=True).start()
        self.send([start])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the process and all that it started. The log stays where something went wrong."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if not self._failed:
            self.log.unlink(missing_ok=True)

    def send(self, lines: Sequence[Line]) -> None:
        """Hands over lines. Where the process is gone, `results` says so."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.writelines(json.dumps(line).encode() + b"\n" for line in lines)
            self._process.stdin.flush()

    def failure(self, answer: Line | None, when: str) -> CaiError:
        """The error that `answer`, or the end of the process without one, means for the user."""
        self._failed = True
        if answer is None:
            code = self._process.wait()
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return StageFailed(f"vLLM ended with {ended} {when}{_last(said)}; see {self.log}")
        if "No module named 'vllm'" in answer["error"]:
            return BadInput(
                f"{self.python} has no vLLM: set `vllm: {{python: …}}` in the profile to the interpreter of an "
                f"environment that has it"
            )
        return StageFailed(f"vLLM failed {when}: {answer['error']}; see {self.log}")

    def _read(self, results: queue.SimpleQueue[tuple[Worker, Line | None]]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                results.put((self, json.loads(line)))
            except ValueError:
                break  # it was killed in the middle of a line
        results.put((self, None))


def _last(said: Sequence[str]) -> str:
    return f"; its last words: {said[-1].strip()[:300]}" if said else ""


def _refusal(answer: Line) -> str:
    return (
        f"vLLM refused it: {answer['refused']}"
        if "refused" in answer
        else f"vLLM ended it as {answer['finish_reason']}"
    )


def _environments(profile: Profile) -> list[dict[str, str]]:
    """Each worker's: nothing that leads to our packages or to the network, and GPUs of its own.

    Of several processes that train, each has a worker on the GPU that it trains on (tried on CPUs alone). Raises
    BadInput where there are too few GPUs.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_PASSED_ON)}
    common = kept | {
        "PYTHONSAFEPATH": "1",  # the worker's own folder has a `vllm.py`: this file
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked process would keep the worker's end of the channel open
    }
    options = profile.vllm
    if not profile.uses_gpu:  # a second process for scheduling takes a third of a small machine's time
        return [common | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}] * options.data_parallel
    here, ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if options.data_parallel == ranks == 1:
        return [common]
    size, wanted = options.tensor_parallel, options.tensor_parallel * options.data_parallel
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [f"{n}" for n in range(here + wanted)]
    devices = devices[here:]
    if len(devices) < wanted:
        raise BadInput(f"the profile wants {wanted} GPUs for vLLM, but CUDA_VISIBLE_DEVICES names {named}")
    return [common | {"CUDA_VISIBLE_DEVICES": ",".join(devices[n : n + size])} for n in range(0, wanted, size)]


def _adapter_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    return config


def _plain(config: Mapping[str, Any]) -> bool:
    """Whether an adapter has nothing but two low-rank factors a matrix, at places where vLLM takes them."""
    more = ("modules_to_save", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication",
            "target_parameters", "use_qalora", "trainable_token_indices")  # fmt: skip
    targets = config.get("target_modules")
    return (
        config.get("peft_type") == "LORA"
        and config.get("bias", "none") == "none"
        and config.get("init_lora_weights", True) is True
        and not any(config.get(name) for name in more)
        and isinstance(targets, list)
        and not {"embed_tokens", "lm_head"} & set(targets)
        and config["r"] <= _RANKS[-1]
    )
