"""Measures the speed, memory and reward of PPO: the stage `ppo` against TRL 1.12.0's PPOTrainer.

    python benchmarks/ppo.py --peer-python ENVIRONMENT/bin/python              five seeds of both sides
    python benchmarks/ppo.py --peer-python ENVIRONMENT/bin/python --quick      does it work at all
    python benchmarks/ppo.py                                                   our side alone

TRL's last version with PPO needs an environment of its own:

    python -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0

Both sides have the same models (support/ppo_models.py: a policy of 52 million parameters and a reward model as large,
float32 weights), prompts and numbers of `Sizes` and `METHOD`. Neither side normalises rewards, penalises a missing end
of turn, decays weights or the learning rate, or clips gradients, which TRL's trainer cannot do. TRL's value model is a
separate model. As in TRL's examples it starts from the reward model, and therefore predicts rewards well from the first
update on; with `--plain-value policy` it starts from the policy, like our value head. On TRL's side models that are not
trained are in bfloat16 and training is autocast to it, which was the fastest setting tried. Each run is a process of
its own; the sides take turns, seed by seed.

Episodes a second are those of all updates of a run but the first; the best run of a side counts. Memory is the peak
resident memory above that after the imports; the least of a side's runs counts. The final reward of a run is the mean
score of the responses of its last third of updates; the difference of the sides' means over seeds has a 95 % interval
(Welch 1947). The last line is one JSON object.

Each side's script gets the path of a JSON file (see `write_spec`) and a seed. Its last line is one JSON object:
`seconds` of each update, `rewards` and `kl` of each update's responses (means of the scores and of the summed
log-ratios to the reference), `peak` in bytes, `versions`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from benchmarks.support import measurement, ppo_models
from cai.micro.conversations import prompts
from cai.models.chat import Chat
from cai.models.reference import resolve

SUPPORT = Path(__file__).parent / "support"
SCRIPTS = {"ours": SUPPORT / "ppo_ours.py", "plain": SUPPORT / "ppo_trl.py"}
METHOD = {
    "learning_rate": 1e-5, "temperature": 1.0, "kl": 0.05, "kl_estimator": "k1", "gamma": 1.0, "lam": 0.95, "clip": 0.2,
    "clip_value": 0.2, "value_weight": 0.1,
}  # fmt: skip
MAX_PROMPT = 32
"""Tokens of the longest prompt."""
Figures = dict[str, Any]


class Sizes(NamedTuple):
    """Sizes of the models and of the training."""

    width: int = 512
    layers: int = 6
    vocabulary: int = 32_000
    batch: int = 32
    """Responses an update."""
    new_tokens: int = 48
    updates: int = 12
    epochs: int = 2
    minibatches: int = 2


QUICK = Sizes(width=64, layers=2, vocabulary=4096, batch=8, new_tokens=12, updates=3)


def write_spec(sizes: Sizes, folder: Path, arguments: argparse.Namespace) -> Path:
    """Writes the models and a file with their paths, prompts and settings, for both sides; returns the file."""
    shape = ppo_models.config(sizes.width, sizes.layers, sizes.vocabulary)
    parameters = {
        "policy": ppo_models.policy(shape, folder / "policy"),
        "reward": ppo_models.reward_model(shape, folder / "reward"),
    }
    chat = Chat.load(resolve(str(folder / "policy"), folder=folder))
    encoded = [(prompt["messages"], chat.prompt_ids(prompt["messages"])) for prompt in prompts("train")]
    spec = {
        "policy": str(folder / "policy"), "reward": str(folder / "reward"), "parameters": parameters,
        "prompts": [{"messages": messages, "ids": ids} for messages, ids in encoded if len(ids) <= MAX_PROMPT],
        "cpu_seconds": arguments.cpu_seconds, "plain": plain_settings(arguments), **METHOD, **sizes._asdict(),
    }  # fmt: skip
    path = folder / "spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


def plain_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings of TRL's side alone."""
    return {"autocast": arguments.plain_autocast, "frozen": arguments.plain_frozen, "value": arguments.plain_value}


def run_side(python: str, script: Path, spec: Path, seed: int) -> Figures:
    """One run of one side."""
    command = [python, str(script), str(spec), str(seed)]
    environment = os.environ | {"PYTHONPATH": str(measurement.ROOT)}  # the peer's environment has no `benchmarks`
    completed = subprocess.run(command, text=True, capture_output=True, env=environment)
    if completed.returncode:
        sys.exit(completed.stderr[-3000:])
    figures: Figures = json.loads(completed.stdout.splitlines()[-1])
    return figures


def summary(runs: Sequence[Figures], sizes: Sizes) -> Figures:
    """Figures of a side over its runs."""
    n_last = max(1, sizes.updates // 3)
    peaks = [run["peak"] for run in runs if run["peak"] is not None]
    return {
        "episodes_per_s": max(sizes.batch * (sizes.updates - 1) / sum(run["seconds"][1:]) for run in runs),
        "peak_mb": min(peaks) / 1e6 if peaks else None,
        "first_reward": float(np.mean([run["rewards"][0] for run in runs])),
        "final_rewards": [float(np.mean(run["rewards"][-n_last:])) for run in runs],
        "final_kl": [float(np.mean(run["kl"][-n_last:])) for run in runs],
        "runs": list(runs),
    }


def reward_difference(ours: Sequence[float], plain: Sequence[float]) -> Figures | None:
    """Mean final reward of ours minus that of plain, with its interval; None for fewer than two seeds."""
    if min(len(ours), len(plain)) < 2:
        return None
    interval = scipy.stats.ttest_ind(ours, plain, equal_var=False).confidence_interval(0.95)
    return {"mean": float(np.mean(ours) - np.mean(plain)), "interval": [float(interval.low), float(interval.high)]}


def measure(sizes: Sizes, arguments: argparse.Namespace) -> dict[str, Figures]:
    """Figures of each side in `arguments.sides`."""
    pythons = {"ours": sys.executable, "plain": arguments.peer_python}
    runs: dict[str, list[Figures]] = {side: [] for side in arguments.sides}
    with tempfile.TemporaryDirectory() as name:
        spec = write_spec(sizes, Path(name), arguments)
        for seed in range(arguments.seeds):
            for side in arguments.sides:
                figures = run_side(pythons[side], SCRIPTS[side], spec, seed)
                runs[side].append(figures)
                print(f"{side:6} seed {seed}: {report(summary([figures], sizes))}", file=sys.stderr, flush=True)
    return {side: summary(of_side, sizes) for side, of_side in runs.items()}


def report(figures: Figures) -> str:
    """A side's figures in one line."""
    memory = "" if figures["peak_mb"] is None else f", {figures['peak_mb']:,.0f} MB"
    reward, kl = (float(np.mean(figures[name])) for name in ("final_rewards", "final_kl"))
    return (
        f"{figures['episodes_per_s']:.2f} episodes/s{memory}, reward {figures['first_reward']:.2f} to {reward:.2f}, "
        f"KL {kl:.1f} nats"
    )


def main() -> None:
    parser = measurement.argument_parser(__doc__)
    parser.add_argument("--peer-python", metavar="PYTHON", help="interpreter of an environment with TRL 1.12.0")
    parser.add_argument(
        "--sides", nargs="+", choices=list(SCRIPTS), help="default: ours, and plain if there is --peer-python"
    )
    parser.add_argument("--seeds", type=int, help="runs of each side; 5, 1 with --quick")
    parser.add_argument("--plain-autocast", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--plain-frozen", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument(
        "--plain-value", choices=["policy", "reward"], default="reward", help="model that TRL's value model starts from"
    )
    for name, default in Sizes()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{default}, {getattr(QUICK, name)} if quick")
    arguments = parser.parse_args()
    measurement.clock_of(parser, arguments)
    arguments.seeds = arguments.seeds or (1 if arguments.quick else 5)
    chosen = {name: getattr(arguments, name) for name in Sizes._fields if getattr(arguments, name) is not None}
    sizes = (QUICK if arguments.quick else Sizes())._replace(**chosen)
    arguments.sides = arguments.sides or (list(SCRIPTS) if arguments.peer_python else ["ours"])
    if "plain" in arguments.sides and not (arguments.peer_python and Path(arguments.peer_python).is_file()):
        expected = "expected the interpreter of an environment with TRL"
        parser.error(f"--peer-python: found {arguments.peer_python}, {expected}")
    sides = measure(sizes, arguments)
    for side, of_side in sides.items():
        print(f"{side:6} {report(of_side)}")
    print(json.dumps(last_line(sides, sizes, arguments)))


def last_line(sides: dict[str, Figures], sizes: Sizes, arguments: argparse.Namespace) -> Figures:
    """The object of the last line."""
    has_both = len(sides) == len(SCRIPTS)
    speed = {side: of_side["episodes_per_s"] for side, of_side in sides.items()}
    memory = [float(sides[side]["peak_mb"] or "nan") for side in SCRIPTS] if has_both else []
    rewards = [sides[side]["final_rewards"] for side in SCRIPTS] if has_both else [[], []]
    return measurement.result(
        "ppo", speed.get("ours"), speed.get("plain"), "episodes/s", sizes._asdict(), ("torch", "transformers", "trl"),
        memory_ratio=round(memory[0] / memory[1], 3) if has_both else None,
        reward_difference=reward_difference(*rewards),
        sides=sides,
        method=METHOD,
        seeds=arguments.seeds, clock=measurement.Clock(arguments.cpu_seconds).name,
        plain_settings=plain_settings(arguments),
    )  # fmt: skip


if __name__ == "__main__":
    main()
