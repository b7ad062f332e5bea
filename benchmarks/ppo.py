"""How fast a policy learns by PPO, and in how much memory: the stage `ppo` against TRL 1.12.0's PPOTrainer.

    python benchmarks/ppo.py --peer-python ENVIRONMENT/bin/python              five seeds of both sides
    python benchmarks/ppo.py --peer-python ENVIRONMENT/bin/python --quick      does it work at all
    python benchmarks/ppo.py                                                   ours alone

TRL's last version with PPO needs an environment of its own:

    python -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0

Equal are the models (`_ppo_models`: a policy of 52 million parameters and a reward model as large, float32 weights),
the prompts and all numbers of `Sizes` and `METHOD`. Neither side normalises rewards, penalises a missing end, decays
weights or the learning rate. TRL's own is that its value model is one of three more, which starts from the reward model
as in its examples and therefore knows from the first update what earns: `--plain-value policy` lets it start from the
policy, as a value head on the policy's trunk does. What is never trained is bfloat16 there, and training autocast to
it, which was the fastest of what was tried; gradients are not clipped, for it cannot. Each run is a process of its own;
the sides take turns, seed by seed.

Episodes a second are those of all updates after a run's first, the best run of each side. Memory is the most that was
resident above what the imports took, the least of each side's runs. A run's final reward is the mean of the reward
model's scores over the responses of its last third of updates; over seeds, the difference of means has a 95 % interval
(Welch 1947). The last line is one JSON object.

Each side's script is called with the path of a JSON file (see `inputs`) and a seed. It prints one JSON object last:
`seconds` of each update by `_measure.Clock`, `rewards` and `kl` of each update's responses (means of the scores and of
the summed log-ratios to the reference), `peak` in bytes, `versions`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _measure
import _ppo_models
import numpy as np
import scipy.stats

from cai.micro.conversations import prompts
from cai.models.chat import Chat
from cai.models.reference import resolve

HERE = Path(__file__).parent
SCRIPTS = {"ours": HERE / "_ppo_ours.py", "plain": HERE / "_trl_ppo_peer.py"}
METHOD = {
    "learning_rate": 1e-5, "temperature": 1.0, "kl": 0.05, "kl_estimator": "k1", "gamma": 1.0, "lam": 0.95, "clip": 0.2,
    "clip_value": 0.2, "value_weight": 0.1,
}  # fmt: skip
PROMPT = 32
"""Tokens of the longest prompt."""
Figures = dict[str, Any]


class Sizes(NamedTuple):
    """How much is learned."""

    width: int = 512
    layers: int = 6
    vocabulary: int = 32_000
    batch: int = 32
    """responses an update"""
    new_tokens: int = 48
    updates: int = 12
    epochs: int = 2
    minibatches: int = 2


QUICK = Sizes(width=64, layers=2, vocabulary=4096, batch=8, new_tokens=12, updates=3)


def inputs(sizes: Sizes, folder: Path, given: argparse.Namespace) -> Path:
    """Writes models, prompts and settings; returns the file that names them all, which both sides' scripts read."""
    shape = _ppo_models.config(sizes.width, sizes.layers, sizes.vocabulary)
    parameters = {
        "policy": _ppo_models.policy(shape, folder / "policy"),
        "reward": _ppo_models.reward_model(shape, folder / "reward"),
    }
    chat = Chat.load(resolve(str(folder / "policy"), folder=folder))
    asked = [(prompt["messages"], chat.prompt_ids(prompt["messages"])) for prompt in prompts("train")]
    spec = {
        "policy": str(folder / "policy"),
        "reward": str(folder / "reward"),
        "prompts": [{"messages": messages, "ids": ids} for messages, ids in asked if len(ids) <= PROMPT],
        "parameters": parameters,
        "cpu_seconds": given.cpu_seconds,
        "plain": {"autocast": given.plain_autocast, "frozen": given.plain_frozen, "value": given.plain_value},
        **METHOD,
        **sizes._asdict(),
    }
    path = folder / "spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


def run(python: str, script: Path, spec: Path, seed: int) -> Figures:
    """One run of one side."""
    command = [python, str(script), str(spec), str(seed)]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(runs: Sequence[Figures], sizes: Sizes) -> Figures:
    """One side's figures over its runs."""
    last = max(1, sizes.updates // 3)
    peaks = [one["peak"] for one in runs if one["peak"] is not None]
    return {
        "episodes_per_s": max(sizes.batch * (sizes.updates - 1) / sum(one["seconds"][1:]) for one in runs),
        "peak_mb": min(peaks) / 1e6 if peaks else None,
        "first_reward": float(np.mean([one["rewards"][0] for one in runs])),
        "final_rewards": [float(np.mean(one["rewards"][-last:])) for one in runs],
        "final_kl": [float(np.mean(one["kl"][-last:])) for one in runs],
        "runs": list(runs),
    }


def difference(ours: Sequence[float], plain: Sequence[float]) -> Figures | None:
    """Of mean final rewards, ours − plain, with its interval; None for fewer than two seeds."""
    if min(len(ours), len(plain)) < 2:
        return None
    interval = scipy.stats.ttest_ind(ours, plain, equal_var=False).confidence_interval(0.95)
    return {"mean": float(np.mean(ours) - np.mean(plain)), "interval": [float(interval.low), float(interval.high)]}


def measured(sizes: Sizes, given: argparse.Namespace) -> dict[str, Figures]:
    """Figures of each side that was asked for."""
    pythons = {"ours": sys.executable, "plain": given.peer_python}
    runs: dict[str, list[Figures]] = {side: [] for side in given.sides}
    with tempfile.TemporaryDirectory() as name:
        spec = inputs(sizes, Path(name), given)
        for seed in range(given.seeds):
            for side in given.sides:
                one = run(pythons[side], SCRIPTS[side], spec, seed)
                runs[side].append(one)
                print(f"{side:6} seed {seed}: {report(summary([one], sizes))}", file=sys.stderr, flush=True)
    return {side: summary(each, sizes) for side, each in runs.items()}


def report(found: Figures) -> str:
    """A side's figures in one line."""
    memory = "" if found["peak_mb"] is None else f", {found['peak_mb']:,.0f} MB"
    reward, kl = (float(np.mean(found[name])) for name in ("final_rewards", "final_kl"))
    return (
        f"{found['episodes_per_s']:.2f} episodes/s{memory}, reward {found['first_reward']:.2f} to {reward:.2f}, "
        f"KL {kl:.1f} nats"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", metavar="PYTHON", help="interpreter of an environment with TRL 1.12.0")
    parser.add_argument("--sides", nargs="+", choices=list(SCRIPTS), help="ours, and plain with --peer-python")
    parser.add_argument("--seeds", type=int, help="runs of each side; 5, 1 with --quick")
    parser.add_argument("--plain-autocast", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--plain-frozen", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--plain-value", choices=["policy", "reward"], default="reward", help="whose weights it has")
    for name, default in Sizes()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{default}, {getattr(QUICK, name)} if quick")
    _measure.add_options(parser)
    given = parser.parse_args()
    _measure.clock_of(parser, given)
    given.seeds = given.seeds or (1 if given.quick else 5)
    asked = {name: getattr(given, name) for name in Sizes._fields if getattr(given, name) is not None}
    sizes = (QUICK if given.quick else Sizes())._replace(**asked)
    given.sides = given.sides or (list(SCRIPTS) if given.peer_python else ["ours"])
    if "plain" in given.sides and not (given.peer_python and Path(given.peer_python).is_file()):
        parser.error(f"--peer-python: found {given.peer_python}, expected the interpreter of an environment with TRL")
    found = measured(sizes, given)
    for side, each in found.items():
        print(f"{side:6} {report(each)}")
    print(json.dumps(figures(found, sizes, given)))


def figures(found: dict[str, Figures], sizes: Sizes, given: argparse.Namespace) -> Figures:
    """The last line."""
    both = len(found) == len(SCRIPTS)
    speed = {side: each["episodes_per_s"] for side, each in found.items()}
    memory = [float(found[side]["peak_mb"] or "nan") for side in SCRIPTS] if both else []
    rewards = [found[side]["final_rewards"] for side in SCRIPTS] if both else [[], []]
    return _measure.result(
        "ppo", speed.get("ours"), speed.get("plain"), "episodes/s", sizes._asdict(), ("torch", "transformers", "trl"),
        memory_ratio=round(memory[0] / memory[1], 3) if both else None,
        reward_difference=difference(*rewards),
        sides=found,
        method=METHOD,
        seeds=given.seeds, clock=_measure.Clock(given.cpu_seconds).name,
        plain_settings={"autocast": given.plain_autocast, "frozen": given.plain_frozen, "value": given.plain_value},
    )  # fmt: skip


if __name__ == "__main__":
    main()
