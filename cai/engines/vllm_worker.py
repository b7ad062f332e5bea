"""vLLM in a process of its own: JSON lines on stdin, answers as JSON lines on stdout.

The parent, `cai.engines.vllm`, starts it with the interpreter of vLLM's environment, which may have other versions of
torch and transformers than ours: only the standard library and vLLM are imported here. The first line has the arguments
of vLLM's engine and an adapter; its answer says that the model is loaded, and on which device. Every other line is one
request: an id, token ids, and the fields of vLLM's `SamplingParams`. It is answered when it is finished, in any order.
A line with an id and `reload` says that the weights in the model's folder have changed: it is answered when all earlier
requests are finished, and later ones are computed with the new weights alone.

What vLLM itself prints goes to stderr. When stdin ends, the parent has ended, and the whole process group is killed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import IO, Any

Line = dict[str, Any]


def main() -> int:
    """Serves until stdin ends. An error of vLLM is its last answer."""
    # What vLLM prints, and the processes that it starts, must not reach these pipes.
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    lines: queue.SimpleQueue[Line] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(incoming, lines), daemon=True).start()
    try:
        _serve(lines, outgoing)
    except Exception as error:
        traceback.print_exc()
        _write(outgoing, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})
    return 1


def _read(incoming: IO[bytes], lines: queue.SimpleQueue[Line]) -> None:
    for line in incoming:
        lines.put(json.loads(line))
    os.killpg(0, signal.SIGKILL)  # the parent made this process the leader of a group


def _write(outgoing: IO[str], line: Line) -> None:
    outgoing.write(json.dumps(line) + "\n")
    outgoing.flush()


def _serve(lines: queue.SimpleQueue[Line], outgoing: IO[str]) -> None:
    first_line = lines.get()
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.exceptions import VLLMError
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind

    argument_names = [field.name for field in dataclasses.fields(EngineArgs)]
    for name in first_line["arguments"]:
        if name not in argument_names:
            similar = difflib.get_close_matches(name, argument_names, n=1)
            raise ValueError(f"EngineArgs has no {name!r}" + (f"; did you mean {similar[0]!r}?" if similar else ""))
    engine = LLMEngine.from_engine_args(EngineArgs(**first_line["arguments"]))
    adapter = LoRARequest("adapter", 1, first_line["adapter"]) if first_line["adapter"] else None
    _write(outgoing, {"ready": current_platform.device_type})
    while True:
        while not lines.empty() or not engine.has_unfinished_requests():
            line = lines.get()
            if "reload" in line:
                while engine.has_unfinished_requests():
                    _step(engine, outgoing)
                _reload(engine)
                _write(outgoing, {"id": line["id"], "reloaded": True})
                continue
            sampling = line["sampling"]
            bias = {int(token): value for token, value in sampling.pop("logit_bias", {}).items()}
            try:
                params = SamplingParams(
                    **sampling, logit_bias=bias or None, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY
                )
                engine.add_request(line["id"], {"prompt_token_ids": line["prompt"]}, params, lora_request=adapter)
            except (ValueError, VLLMError) as error:
                _write(outgoing, {"id": line["id"], "refused": " ".join(str(error).split())})
        _step(engine, outgoing)


def _step(engine: Any, outgoing: IO[str]) -> None:
    """Computes one more token of each request, and answers those that are finished."""
    for result in engine.step():
        output = result.outputs[0]
        flat = output.logprobs  # None if it was aborted
        answer = {
            "id": result.request_id,
            "token_ids": list(output.token_ids),
            "finish_reason": output.finish_reason,
            "log_probs": [] if flat is None else list(zip(flat.token_ids, flat.logprobs, strict=True)),
        }
        _write(outgoing, answer)


def _reload(engine: Any) -> None:
    """Reads the weights again, into the same tensors, and forgets the keys and values of the old ones."""
    engine.collective_rpc("update_config", args=({"load_config": {"load_format": "safetensors"}},))
    engine.collective_rpc("reload_weights")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        engine.apply_model(_pack_head)
    if not engine.reset_prefix_cache():
        raise RuntimeError("the prefix cache could not be emptied after new weights were read")


def _pack_head(model: Any) -> None:
    """Renews the packed weight of a head that is tied to the embeddings, which `reload_weights` does not on CPUs."""
    # It repacks the layers whose weights it finds in the file, and a tied head has none there.
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


if __name__ == "__main__":
    sys.exit(main())
