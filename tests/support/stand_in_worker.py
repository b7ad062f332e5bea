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

print("ready, says something that is no answer", file=sys.stderr, flush=True)
json.loads(sys.stdin.readline())
if FAULT == "never starts":
    sys.exit("the last words of vLLM")
if FAULT == "has an error":
    print(json.dumps({"error": "ValueError: no such architecture"}), flush=True)
    sys.exit(1)
if FAULT == "has no vllm":
    print(json.dumps({"error": "ModuleNotFoundError: No module named 'vllm'"}), flush=True)
    sys.exit(1)
print(json.dumps({"ready": "cuda" if FAULT == "on a GPU" else "cpu"}), flush=True)
n_reloads = 0
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    if "reload" in request:
        n_reloads += 1
        print(json.dumps({"id": request["id"], "reloaded": True}), flush=True)
        continue
    if FAULT == "dies" and number == 2:
        os.kill(os.getpid(), 9)
    if FAULT == "half a line" and number == 2:
        print('{"id": "2", "token_', end="", flush=True)
        os.kill(os.getpid(), 9)
    if FAULT == "refuses" and number == 0:
        print(json.dumps({"id": request["id"], "refused": "it is too odd"}), flush=True)
        continue
    if FAULT == "aborts" and number == 0:
        print(json.dumps({"id": request["id"], "token_ids": [], "finish_reason": "abort", "log_probs": []}), flush=True)
        continue
    if FAULT == "answers twice":
        print(json.dumps({"id": "another's", "token_ids": [], "finish_reason": "stop", "log_probs": []}), flush=True)
    options = request["sampling"].get("logprob_token_ids")
    sampled = request["prompt"][:1] if options else request["prompt"][: request["sampling"]["max_tokens"]]
    pairs = [[token, math.log(0.25) - n_reloads] for token in [*sampled, *(options or [])]]
    answer = {"id": request["id"], "token_ids": sampled, "finish_reason": "length", "log_probs": pairs}
    print(json.dumps(answer), flush=True)
if FAULT == "stays":
    time.sleep(60)
