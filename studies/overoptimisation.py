"""How far a reward can be optimised before it stops being what is wanted: gold against proxy over KL.

    python benchmarks/overoptimisation.py --runs runs            on the run of `cai run cai-ppo`, which is reused
    python benchmarks/overoptimisation.py --quick                does it work at all

Gao et al. 2023 (arXiv 2210.10760) on the embedded model, whose oracle is the gold reward: a reward model that its own
judge's preferences trained is optimised by best-of-n from SL-CAI, and by PPO with nothing paid for the KL. Best-of-n
for every n is estimated from one pool of responses a prompt, over all subsets of n, without bias; its KL is taken as
log n − (n − 1)/n, which is what it is at most. PPO's points are its rollouts: responses of the policy as it was before
it learned from them. A response that the oracle cannot read has the score of the worst act. Rewards are in standard
deviations of SL-CAI's responses, from their mean.

The last line is one JSON object; `ours` is the gold reward where PPO ends, `plain` that of the best n.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _measure
import gold as gold_model
import numpy as np
from findings_page import OTHERS

from cai.contracts.engine import Completion, Request, Sampling
from cai.contracts.profile import load_profile
from cai.engines.local.local_engine import LocalEngine
from cai.run import pipeline
from cai.run.plan import Planner
from cai.run.recipe import Recipe, load_recipe, prompt_sets_of
from cai.storage import run_folder
from cai.storage.rows import Prompt, stable_seed
from cai.text.progress import PlainDisplay

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
    # The one of rank r is the best of a subset where the others are among the r below it.
    weight = np.array([math.comb(rank, n - 1) for rank in range(size)], dtype=object) / math.comb(size, n)
    ranked = (np.take_along_axis(each, order, axis=1).mean(axis=0) for each in (proxy, gold))
    first, second = (float(each @ weight.astype(float)) for each in ranked)
    return first, second


def pool(recipe: Recipe, run: Path, n_prompts: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards by reward model and oracle of `n` responses to each of some prompts: (prompts, responses) each."""
    from cai.models.reward_model import RewardModel

    profile = load_profile("cpu")
    planner = Planner(recipe, run)
    done = {name: found for name, path in run_folder.latest(run).items() if (found := run_folder.finished(path))}
    names = prompt_sets_of(recipe.stages["policy"])
    prompts: list[Prompt] = [prompt for name in names for prompt in planner.prompts(name)]
    prompts = sorted(prompts, key=lambda prompt: stable_seed("pool", prompt["id"]))[:n_prompts]
    sampling = Sampling(80, 1.0)
    requests = [
        Request(f"{index}/{k}", prompt["messages"], stable_seed(prompt["id"], k), sampling)
        for index, prompt in enumerate(prompts)
        for k in range(n)
    ]
    with LocalEngine(planner.model("sl-cai", done), profile) as engine:
        drawn = {each.id: each for each in engine.generate(requests) if isinstance(each, Completion)}
    model = RewardModel.load(planner.model("reward", done), profile)
    proxy = np.array(model.scores([drawn[each.id].prompt_ids + drawn[each.id].token_ids for each in requests]))
    gold = np.array(
        gold_model.gold([list(each.messages) for each in requests], [drawn[each.id].text for each in requests])
    )
    return proxy.reshape(-1, n), gold.reshape(-1, n)


def measured(given: argparse.Namespace, folder: Path) -> Figures:
    """Both curves."""
    sizes = (f"stages.policy.rollouts={given.rollouts}", *(QUICK if given.quick else ()))
    recipe = load_recipe(HERE.parent / "recipes" / "cai-ppo.yaml", [*OVERRIDES, *sizes])
    run = folder / recipe.name
    pipeline.run_recipe(recipe, load_profile("cpu"), run, pipeline.Options(until="policy"), PlainDisplay())
    lines = (run_folder.latest(run)["policy"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rollouts = [entry for line in lines if "reward/gold" in (entry := json.loads(line))]
    proxy, gold = pool(recipe, run, given.prompts, given.responses)
    scale = {"proxy": (proxy.mean(), proxy.std()), "gold": (gold.mean(), gold.std())}

    def scaled(name: str, value: float) -> float:
        mean, deviation = scale[name]
        return float((value - mean) / deviation)

    points = []
    for n in [2**k for k in range(given.responses.bit_length()) if 2**k <= given.responses]:
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


def draw(found: Figures, path: Path) -> None:
    """Two panels: reward over KL, by each way."""
    import matplotlib
    from matplotlib.figure import Figure

    from cai.report.picture import COLOURS, SOFT

    ways: Sequence[tuple[str, str]] = (("best_of_n", "Best of n"), ("ppo", "PPO, nothing paid for KL"))
    with matplotlib.rc_context({"svg.hashsalt": "cai", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        for axes, (way, title) in zip(figure.subplots(1, 2, sharey=True), ways, strict=True):
            points = sorted(found[way], key=lambda point: point["kl"])
            for name, colour in (("proxy", COLOURS[1]), ("gold", COLOURS[2])):
                axes.plot(
                    [point["kl"] for point in points], [point[name] for point in points], "o-", color=colour, ms=4,
                    lw=1.6, label={"proxy": "reward model (proxy)", "gold": "oracle (gold)"}[name],
                )  # fmt: skip
            axes.axhline(0, color="#e3e6ea", lw=0.8, zorder=0)
            axes.set_title(title, loc="left", fontsize=10, weight="bold")
            axes.set_xlabel("KL from SL-CAI, nats a response", fontsize=9, color=SOFT)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8.5, colors=SOFT)
        figure.axes[0].set_ylabel("reward, deviations of SL-CAI's", fontsize=9, color=SOFT)
        figure.axes[0].legend(frameon=False, fontsize=8.5)
        options: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 160}
        figure.savefig(path, facecolor="white", **options)


def write(found: Figures, given: argparse.Namespace) -> None:
    """Puts the section, and its picture beside the page, in place of what stood there before."""
    folder = given.page.with_suffix("")
    draw(found, folder / "overoptimisation.svg")
    best, last = (max(found[way], key=lambda point: point["gold"]) for way in ("best_of_n", "ppo"))
    far, end = found["best_of_n"][-1], found["ppo"][-1]
    sizes = f"{given.prompts} prompts, {given.responses} responses each, every n estimated over all subsets"
    section = f"""
## How far a reward model can be optimised

    python benchmarks/overoptimisation.py --page {given.page}

One run, seed {found["seed"]}. The reward model of `cai run cai-ppo` is the proxy, the oracle is gold; a response that
it cannot read scores as the worst act. Both are in standard deviations of SL-CAI's own responses, from their mean.

- Best of n: {sizes}.
- PPO: {given.rollouts} rollouts, nothing paid for the KL, a constant learning rate: a policy that is meant to go too
  far. A point has a standard error of about {found["standard_error"]:.2f}.

| | KL, nats a response | proxy | gold |
| --- | --- | --- | --- |
| best of n where gold is highest, n = {best["n"]} | {best["kl"]:.2f} | {best["proxy"]:+.2f} | {best["gold"]:+.2f} |
| best of {far["n"]} | {far["kl"]:.2f} | {far["proxy"]:+.2f} | {far["gold"]:+.2f} |
| PPO where gold is highest | {last["kl"]:.2f} | {last["proxy"]:+.2f} | {last["gold"]:+.2f} |
| PPO at its end | {end["kl"]:.2f} | {end["proxy"]:+.2f} | {end["gold"]:+.2f} |

![Proxy and gold reward over KL](findings/overoptimisation.svg)
"""
    page, _, _ = given.page.read_text(encoding="utf-8").partition(OTHERS)
    given.page.write_text(page + OTHERS + section, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few prompts, two rollouts: does it work at all")
    parser.add_argument("--runs", type=Path, help="folder that the run of cai-ppo lies in; absent = a new one")
    parser.add_argument("--rollouts", type=int, help="of PPO; 16, 2 if quick")
    parser.add_argument("--prompts", type=int, help="for best-of-n; 128, 8 if quick")
    parser.add_argument("--responses", type=int, help="to each of them; 64, 4 if quick")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page of findings that gets the section about it")
    given = parser.parse_args()
    for name, full, quick in (("rollouts", 16, 2), ("prompts", 128, 8), ("responses", 64, 4)):
        setattr(given, name, getattr(given, name) or (quick if given.quick else full))
    with tempfile.TemporaryDirectory() as name:
        found = measured(given, given.runs or Path(name))
    if given.page is not None:
        write(found, given)
    for way in ("best_of_n", "ppo"):
        for point in found[way]:
            print(f"{way:9} KL {point['kl']:5.2f}  proxy {point['proxy']:+.2f}  gold {point['gold']:+.2f}")
    best = max(point["gold"] for point in found["best_of_n"])
    sizes = {"rollouts": given.rollouts, "prompts": given.prompts, "responses": given.responses}
    print(
        json.dumps(
            _measure.result(
                "overoptimisation", found["ppo"][-1]["gold"], best, "deviations", sizes, ("torch", "trl"), **found
            )
        )
    )


if __name__ == "__main__":
    main()
