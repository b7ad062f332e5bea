"""Speaks the protocol of `cai/engines/vllm_worker.py` without vLLM, and wrongly where $STAND_IN says so.

Started like the worker: arguments on the first line, a request on every other one. Completions repeat the prompt's
first ids, and every option has a log-probability of ln(1/4), less 1 for each time that weights were read again.
"""

import json
import math
import os
import sys
import time

WRONGLY = os.environ.get("STAND_IN", "")

print("ready, says something that is no answer", file=sys.stderr, flush=True)
start = json.loads(sys.stdin.readline())
if WRONGLY == "never starts":
    sys.exit("the last words of vLLM")
if WRONGLY == "has an error":
    print(json.dumps({"error": "ValueError: no such architecture"}), flush=True)
    sys.exit(1)
if WRONGLY == "has no vllm":
    print(json.dumps({"error": "ModuleNotFoundError: No module named 'vllm'"}), flush=True)
    sys.exit(1)
print(json.dumps({"ready": "cuda" if WRONGLY == "on a GPU" else "cpu"}), flush=True)
reloaded = 0
for number, line in enumerate(sys.stdin):
    asked = json.loads(line)
    if "reload" in asked:
        reloaded += 1
        print(json.dumps({"id": asked["id"], "reloaded": True}), flush=True)
        continue
    if WRONGLY == "dies" and number == 2:
        os.kill(os.getpid(), 9)
    if WRONGLY == "half a line" and number == 2:
        print('{"id": "2", "token_', end="", flush=True)
        os.kill(os.getpid(), 9)
    if WRONGLY == "refuses" and number == 0:
        print(json.dumps({"id": asked["id"], "refused": "it is too odd"}), flush=True)
        continue
    if WRONGLY == "aborts" and number == 0:
        print(json.dumps({"id": asked["id"], "token_ids": [], "finish_reason": "abort", "log_probs": []}), flush=True)
        continue
    if WRONGLY == "answers twice":
        print(json.dumps({"id": "another's", "token_ids": [], "finish_reason": "stop", "log_probs": []}), flush=True)
    options = asked["sampling"].get("logprob_token_ids")
    drawn = asked["prompt"][:1] if options else asked["prompt"][: asked["sampling"]["max_tokens"]]
    pairs = [[token, math.log(0.25) - reloaded] for token in [*drawn, *(options or [])]]
    answer = {"id": asked["id"], "token_ids": drawn, "finish_reason": "length", "log_probs": pairs}
    print(json.dumps(answer), flush=True)
if WRONGLY == "stays":
    time.sleep(60)
