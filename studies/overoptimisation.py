"""Measures how gold and proxy reward change with the KL when the proxy is optimised (over-optimisation).

    python studies/overoptimisation.py --runs runs            on the run of `cai run cai-ppo`, which is reused
    python studies/overoptimisation.py --quick                does it work at all

Gao et al. 2023 (arXiv 2210.10760) on the embedded model. The proxy is a reward model trained by the preferences of the
model's own judge; the gold reward is the oracle's score. The proxy is optimised by best-of-n from SL-CAI, and by PPO
without a KL penalty. Best-of-n is estimated without bias for every n, over all subsets of n of one pool of responses a
prompt; its KL is taken as log n − (n − 1)/n, an upper bound. The points of PPO are its rollouts, which are sampled
before the policy learns from them. A response that the oracle cannot read has the score of the worst act. Rewards are
standardised by mean and standard deviation of SL-CAI's responses.

The last line is one JSON object; `ours` is the gold reward at the end of PPO, `plain` that of the best n.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support import measurement
from cai.contracts.engine import Completion, Request, Sampling
from cai.contracts.profile import load_profile
from cai.engines.local.local_engine import LocalEngine
from cai.run import pipeline, plan
from cai.run.plan import Planner
from cai.run.recipe import Recipe, load_recipe
from cai.run.recipe_names import prompt_sets_of
from cai.storage import run_folder
from cai.storage.rows import Prompt, stable_seed
from cai.text.progress import PlainDisplay
from studies.findings_page import OTHER_STUDIES
from studies.gold import gold as gold_rewards

HERE = Path(__file__).parent
OVERRIDES = (
    f"stages.policy.rewards=[{{model: reward}}, {{function: {HERE / 'gold.py'}:gold, weight: 0}}]",
    "stages.policy.train.kl_coef=0.0",
    "stages.policy.train.learning_rate=4.0e-5",
    "stages.policy.train.lr_scheduler_type=constant",
    "stages.policy.limits={kl: 1000, length: 100, unfinished: 1.0, repetition: 1.0}",
)
QUICK = (
    "prompts.red_team.limit=12", "prompts.helpful.limit=12", "prompts.borderline.limit=12", "prompts.heldout.limit=12",
    "stages.policy.rollout_size=64", "stages.candidates.n=2",
)  # fmt: skip
Figures = dict[str, Any]


def best_of(proxy: np.ndarray, gold: np.ndarray, n: int) -> tuple[float, float]:
    """Mean proxy and gold reward of the best of `n` by proxy, over all subsets. proxy, gold: (prompts, responses)."""
    size = proxy.shape[1]
    order = np.argsort(proxy, axis=1, kind="stable")
    # The response of rank r is the best of the subsets whose other members are among the r below it.
    weight = np.array([math.comb(rank, n - 1) for rank in range(size)], dtype=object) / math.comb(size, n)
    ranked = (np.take_along_axis(rewards, order, axis=1).mean(axis=0) for rewards in (proxy, gold))
    best_proxy, best_gold = (float(by_rank @ weight.astype(float)) for by_rank in ranked)
    return best_proxy, best_gold


def sample_pool(recipe: Recipe, run: Path, n_prompts: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Proxy and gold rewards, each (prompts, responses), of `n` responses of SL-CAI to each of `n_prompts` prompts."""
    from cai.models.reward_model import RewardModel

    profile = load_profile("cpu")
    planner = Planner(recipe, run)
    finished = {name: stage for name, path in run_folder.latest(run).items() if (stage := run_folder.finished(path))}
    names = prompt_sets_of(recipe.stages["policy"])
    prompts: list[Prompt] = [prompt for name in names for prompt in planner.fingerprints.prompts(name)]
    prompts = sorted(prompts, key=lambda prompt: stable_seed("pool", prompt["id"]))[:n_prompts]
    sampling = Sampling(80, 1.0)
    requests = [
        Request(f"{index}/{k}", prompt["messages"], stable_seed(prompt["id"], k), sampling)
        for index, prompt in enumerate(prompts)
        for k in range(n)
    ]
    with LocalEngine(planner.fingerprints.model("sl-cai", finished), profile) as engine:
        completions = {c.id: c for c in engine.generate(requests) if isinstance(c, Completion)}
    ordered = [completions[request.id] for request in requests]
    model = RewardModel.load(planner.fingerprints.model("reward", finished), profile)
    proxy = np.array(model.scores([completion.prompt_ids + completion.token_ids for completion in ordered]))
    gold = np.array(
        gold_rewards([list(request.messages) for request in requests], [completion.text for completion in ordered])
    )
    return proxy.reshape(-1, n), gold.reshape(-1, n)


def measure(arguments: argparse.Namespace, folder: Path) -> Figures:
    """Both curves, and what the page says about them."""
    sizes = (f"stages.policy.rollouts={arguments.rollouts}", *(QUICK if arguments.quick else ()))
    recipe = load_recipe(HERE.parent / "recipes" / "cai-ppo.yaml", [*OVERRIDES, *sizes])
    run = folder / recipe.name
    pipeline.run_recipe(recipe, load_profile("cpu"), run, plan.Options(until="policy"), PlainDisplay())
    lines = (run_folder.latest(run)["policy"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rollouts = [entry for line in lines if "reward/gold" in (entry := json.loads(line))]
    proxy, gold = sample_pool(recipe, run, arguments.prompts, arguments.responses)
    scale = {"proxy": (proxy.mean(), proxy.std()), "gold": (gold.mean(), gold.std())}

    def scaled(name: str, value: float) -> float:
        mean, deviation = scale[name]
        return float((value - mean) / deviation)

    points = []
    for n in [2**k for k in range(arguments.responses.bit_length()) if 2**k <= arguments.responses]:
        best_proxy, best_gold = best_of(proxy, gold, n)
        kl = math.log(n) - (n - 1) / n
        points.append({"n": n, "kl": kl, "proxy": scaled("proxy", best_proxy), "gold": scaled("gold", best_gold)})
    return {
        "best_of_n": points,
        "ppo": [
            {
                "kl": entry["kl"],
                "proxy": scaled("proxy", entry["reward/reward"]),
                "gold": scaled("gold", entry["reward/gold"]),
            }
            for entry in rollouts
        ],
        "seed": recipe.seed,
        "standard_error": 1 / math.sqrt(recipe.stages["policy"].rollout_size),  # type: ignore[attr-defined]
    }


def draw(figures: Figures, path: Path) -> None:
    """Draws reward over KL: a panel for best-of-n and one for PPO."""
    from cai.report.pictures import COLOURS, GRID, MUTED, saved_figure

    ways: Sequence[tuple[str, str]] = (("best_of_n", "Best of n"), ("ppo", "PPO, nothing paid for KL"))
    with saved_figure(path, 8.4, 3.4) as figure:
        for axes, (way, title) in zip(figure.subplots(1, 2, sharey=True), ways, strict=True):
            points = sorted(figures[way], key=lambda point: point["kl"])
            for name, colour in (("proxy", COLOURS[1]), ("gold", COLOURS[2])):
                axes.plot(
                    [point["kl"] for point in points], [point[name] for point in points], "o-", color=colour, ms=4,
                    lw=1.6, label={"proxy": "reward model (proxy)", "gold": "oracle (gold)"}[name],
                )  # fmt: skip
            axes.axhline(0, color=GRID, lw=0.8, zorder=0)
            axes.set_title(title, loc="left", fontsize=10, weight="bold")
            axes.set_xlabel("KL from SL-CAI, nats a response", fontsize=9, color=MUTED)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8.5, colors=MUTED)
        figure.axes[0].set_ylabel("reward, deviations of SL-CAI's", fontsize=9, color=MUTED)
        figure.axes[0].legend(frameon=False, fontsize=8.5)


def write_section(figures: Figures, arguments: argparse.Namespace) -> None:
    """Replaces the section of the page, and its picture beside the page."""
    folder = arguments.page.with_suffix("")
    draw(figures, folder / "overoptimisation.svg")
    best, last = (max(figures[way], key=lambda point: point["gold"]) for way in ("best_of_n", "ppo"))
    far, end = figures["best_of_n"][-1], figures["ppo"][-1]
    sizes = f"{arguments.prompts} prompts, {arguments.responses} responses each, every n estimated over all subsets"
    rollouts = arguments.rollouts
    section = f"""
## How far a reward model can be optimised

    python studies/overoptimisation.py --page {arguments.page}

One run, seed {figures["seed"]}. The proxy is the reward model of `cai run cai-ppo`, gold is the oracle; a response that
the oracle cannot read scores as the worst act. Both are in standard deviations of SL-CAI's responses, from their mean.

- Best of n: {sizes}.
- PPO: {rollouts} rollouts, no KL penalty, a constant learning rate: the policy is meant to over-optimise. A
  point has a standard error of about {figures["standard_error"]:.2f}.

| | KL, nats a response | proxy | gold |
| --- | --- | --- | --- |
| best of n where gold is highest, n = {best["n"]} | {best["kl"]:.2f} | {best["proxy"]:+.2f} | {best["gold"]:+.2f} |
| best of {far["n"]} | {far["kl"]:.2f} | {far["proxy"]:+.2f} | {far["gold"]:+.2f} |
| PPO where gold is highest | {last["kl"]:.2f} | {last["proxy"]:+.2f} | {last["gold"]:+.2f} |
| PPO at its end | {end["kl"]:.2f} | {end["proxy"]:+.2f} | {end["gold"]:+.2f} |

![Proxy and gold reward over KL](findings/overoptimisation.svg)
"""
    page, _, _ = arguments.page.read_text(encoding="utf-8").partition(OTHER_STUDIES)
    arguments.page.write_text(page + OTHER_STUDIES + section, encoding="utf-8")


def main() -> None:
    parser = measurement.argument_parser(__doc__, quick="few prompts, two rollouts: does it work at all", clock=False)
    parser.add_argument("--runs", type=Path, help="folder that has the run of cai-ppo; default: a new one")
    parser.add_argument("--rollouts", type=int, help="rollouts of PPO; 16, 2 if quick")
    parser.add_argument("--prompts", type=int, help="prompts for best-of-n; 128, 8 if quick")
    parser.add_argument("--responses", type=int, help="responses to each prompt; 64, 4 if quick")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page of findings in which the section is replaced")
    arguments = parser.parse_args()
    for name, full, quick in (("rollouts", 16, 2), ("prompts", 128, 8), ("responses", 64, 4)):
        setattr(arguments, name, getattr(arguments, name) or (quick if arguments.quick else full))
    with tempfile.TemporaryDirectory() as name:
        figures = measure(arguments, arguments.runs or Path(name))
    if arguments.page is not None:
        write_section(figures, arguments)
    for way in ("best_of_n", "ppo"):
        for point in figures[way]:
            print(f"{way:9} KL {point['kl']:5.2f}  proxy {point['proxy']:+.2f}  gold {point['gold']:+.2f}")
    best = max(point["gold"] for point in figures["best_of_n"])
    sizes = {"rollouts": arguments.rollouts, "prompts": arguments.prompts, "responses": arguments.responses}
    print(
        json.dumps(
            measurement.result(
                "overoptimisation", figures["ppo"][-1]["gold"], best, "deviations", sizes, ("torch", "trl"), **figures
            )
        )
    )


if __name__ == "__main__":
    main()
