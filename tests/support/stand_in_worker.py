"""Speaks the protocol of `cai/engines/vllm_worker.py` without vLLM, with the fault that $STAND_IN names.

It is started like the worker: arguments on the first line, a request on every other one. Completions repeat the
prompt's first ids, and every option has a log-probability of ln(1/4), less 1 for each reload of the weights.
"""

import json
import math
import os
import sys
import time

FAULT = os.environ.get("STAND_IN", "")
ERRORS = {
    "has an error": "ValueError: no such architecture",
    "has no vllm": "ModuleNotFoundError: No module named 'vllm'",
}


def answer(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


print("ready, says something that is no answer", file=sys.stderr, flush=True)
json.loads(sys.stdin.readline())
if FAULT == "never starts":
    sys.exit("the last words of vLLM")
if FAULT in ERRORS:
    answer(error=ERRORS[FAULT])
    sys.exit(1)
answer(ready="cuda" if FAULT == "on a GPU" else "cpu")
n_reloads = 0
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    if "reload" in request:
        n_reloads += 1
        answer(id=request["id"], reloaded=True)
        continue
    if FAULT in {"dies", "half a line"} and number == 2:
        print('{"id": "2", "token_' if FAULT == "half a line" else "", end="", flush=True)
        os.kill(os.getpid(), 9)
    if FAULT == "refuses" and number == 0:
        answer(id=request["id"], refused="it is too odd")
        continue
    if FAULT == "aborts" and number == 0:
        answer(id=request["id"], token_ids=[], finish_reason="abort", log_probs=[])
        continue
    if FAULT == "answers twice":
        answer(id="another's", token_ids=[], finish_reason="stop", log_probs=[])
    options = request["sampling"].get("logprob_token_ids")
    sampled = request["prompt"][:1] if options else request["prompt"][: request["sampling"]["max_tokens"]]
    pairs = [[token, math.log(0.25) - n_reloads] for token in [*sampled, *(options or [])]]
    answer(id=request["id"], token_ids=sampled, finish_reason="length", log_probs=pairs)
if FAULT == "stays":
    time.sleep(60)
