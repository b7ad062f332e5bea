"""The page and the figures of `labels.py`, from its results alone.

Sentences that depend on a measurement are made of it here: where zero is inside of a difference's interval the page
says "not distinguishable", whatever one would have liked.
"""

from __future__ import annotations

import contextlib
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cai.report.picture import COLOURS, SOFT
from cai.report.reliability import draw_reliability
from cai.storage.files import replacing
from cai.text.progress import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Found = Mapping[str, Any]

METRICS = {
    "harmful_compliance": "complies with harm",
    "helpfulness": "helps",
    "over_refusal": "refuses too much",
    "well_formed": "well formed",
    "gold": "gold score",
}
OTHERS = "\n<!-- Below: by other benchmarks. -->\n"
"""Begins what this script leaves as it is."""
WAYS = ("one order", "probability", "log-odds")
SLIGHT = 0.1
"""Nats below which a position bias is next to none: it takes 0.1 to move an even vote to 52.5 %."""
BIASES = {"none": "none", "same": "the same in both orders", "anew": "drawn anew in each order"}


def write_page(found: Found, page: Path) -> None:
    """Writes the page, and its figures and results into the folder beside it that is called like it."""
    found = rounded(found)  # so that the results beside the page make the same page again
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    draw_reliability(found, folder / "calibration.svg")
    for name, draw in FIGURES.items():
        draw(found, folder / f"{name}.svg")
    with replacing(folder / "results.json") as file:
        file.write(json.dumps(found, ensure_ascii=False).encode() + b"\n")
    _, mark, others = (page.read_text(encoding="utf-8") if page.exists() else "").partition(OTHERS)
    with replacing(page) as file:
        file.write("\n".join([*lines(found, folder.name), ""]).encode() + (mark + others).encode())


def rounded(value: Any) -> Any:
    """The same with numbers of six digits."""
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# Numbers as text.


def percent(rate: Found | None) -> str:
    """`95.7 [94.1, 96.9]`."""
    if rate is None or rate["value"] is None:
        return "–"
    low, high = (100 * end for end in rate["interval"])
    return f"{100 * rate['value']:.1f} [{low:.1f}, {high:.1f}]"


def number(rate: Found, digits: int = 2) -> str:
    """`-1.24 [-1.31, -1.17]`."""
    low, high = rate["interval"]
    return f"{rate['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def apart(difference: Found, unit: str = "points") -> str:
    """`+1.2 points [0.3, 2.0]`, and whether that is distinguishable."""
    text = signed(difference, unit)
    return text if differs(difference) else f"{text}, not distinguishable"


def signed(difference: Found, unit: str = "points") -> str:
    """`+1.2 points [0.3, 2.0]`."""
    low, high = difference["interval"]
    scale, digits = (100, 1) if unit == "points" else (1, 3 if unit == "Brier" else 2)
    value = f"{scale * difference['value']:+.{digits}f}{' points' if unit == 'points' else ''}"
    return f"{value} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def differs(difference: Found) -> bool:
    """Whether zero is outside of the interval."""
    return bool(difference["verdict"] != "not distinguishable")


def prose(text: str) -> str:
    """A paragraph, wrapped."""
    return textwrap.fill(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """In Markdown."""
    return [f"| {' | '.join(row)} |" for row in (headers, ["---"] * len(headers), *rows)]


def reproduces(difference: Found, expected: str, unit: str = "points") -> str:
    """The difference, and whether it is what a paper found: "a higher" or "b higher"."""
    if not differs(difference):
        says = "not distinguishable, so it does **not reproduce**"
    elif difference["verdict"] == expected:
        says = "reproduces"
    else:
        says = "does **not reproduce**: it is the other way round"
    return f"{signed(difference, unit)}: {says}"


# The page.


def lines(found: Found, folder: str) -> Iterator[str]:
    """The page in Markdown."""
    sizes = found["sizes"]
    tested, learned = sum(sizes["pairs"]), sizes["pairs_learned"]
    yield "# Findings: what labels do to reward models and policies"
    yield ""
    if found.get("quick"):
        yield "**Made with `--quick`: does it work at all, and no result.**"
        yield ""
    yield prose(
        f"""Measured on the embedded `micro` model, whose world knows which response is better ([micro.md](micro.md)),
        in {sizes["seeds"]} seeds. **It is an instrument and no evidence about large models**: its judge was trained on
        the very distinctions that the constitution names. What does or does not reproduce here says how the *machinery*
        behaves with such a judge."""
    )
    yield ""
    yield prose(
        f"""Made by `benchmarks/labels.py`; all numbers stand in [results.json]({folder}/results.json). Each seed
        samples {sizes["responses"]} responses of the base model to {sizes["learned"]} prompts to learn from and to
        {sizes["heldout"]} of tier 1 (split `test`), and has all principles vote on disjoint pairs of them in both
        orders, once. That makes {min(learned)} to {max(learned)} pairs to learn from in a seed and {tested:,} held-out
        ones in all; the oracle scores {sum(sizes["ties"]):,} of these alike and cannot read {sum(sizes["unclear"])},
        and {found["accuracy"]["n"]:,} have a better response and are what accuracy is measured on. Labels are sums of
        weighted log-odds at temperature 1, as in the quickstart, unless said otherwise."""
    )
    yield ""
    yield prose(
        """Brackets are 95 % intervals that cover two: rows clustered by topic, and Student's t over the seeds (for
        calibration errors, resampled topics alone). A difference is taken over the same pairs or prompts and is *not
        distinguishable* where its interval holds zero. Nothing is corrected for the number of comparisons: of twenty
        without any difference one would look like one."""
    )
    yield ""
    yield from _judge(found, folder)
    for number_, (title, name, part) in enumerate(
        (
            ("Soft, hard or clamped labels", "labels", _labels),
            ("One principle, several, or all", "principles", _principles),
            ("One order or both, and what is averaged", "orders", _orders),
            ("Wrong labels against the number of pairs", "noise", _noise),
            ("Principles that abstain, pairs that are dropped", "abstention", _abstention),
        ),
        1,
    ):
        yield f"## {number_}. {title}"
        yield ""
        yield from part(found)
        yield ""
        yield f"![{title}]({folder}/{name}.svg)"
        yield ""
    yield from _papers(found)
    yield from _made(found)


def _judge(found: Found, folder: str) -> Iterator[str]:
    yield "## The judge on tier 1"
    yield ""
    yield from table(
        ["labels of all principles in both orders", "%"],
        [
            ["agree with the oracle", percent(found["accuracy"])],
            ["expected calibration error", percent(found["ece"])],
            ["… after temperature, fitted on other topics", percent(found["ece_after_temperature"])],
            ["turn with the order, were one order asked", percent(found["flip_rate"])],
            ["votes of single principles that turn", percent(found["flip_rate_of_votes"])],
            ["… of those that are decided (60 % or more)", percent(found["flip_rate_of_decided_votes"])],
            ["prefer the longer response", percent(found["prefers_longer"])],
            ["the longer response is better", percent(found["longer_is_better"])],
        ],
    )
    yield ""
    yield prose(
        f"""The temperature that fits best is {found["temperature"]:.2f}. Single votes turn with the order mostly where
        they are near to even. For what it is shown first the judge has {signed(found["position_bias"], "nats")}
        nats, the mean over votes."""
    )
    yield ""
    yield f"![Confidence against how often it was right]({folder}/calibration.svg)"
    yield ""


def _labels(found: Found) -> Iterator[str]:
    part = found["labels"]
    yield prose(
        """*Soft* is the probability at temperature 1; *soft, mean* divides by the sum of weights, `prefer`'s default,
        which leaves labels near to even; *clamped* keeps soft ones within 40 and 60 %. The policy is trained by DPO,
        straight from the base model."""
    )
    yield ""
    yield from table(
        ["labels", "reward model right, %", "… less soft"],
        [
            [name, percent(rate), apart(part["reward_less_soft"][name]) if name in part["reward_less_soft"] else ""]
            for name, rate in part["reward"].items()
        ],
    )
    yield ""
    rates = [metric for metric in METRICS if metric != "gold"]
    yield from table(
        ["policy", *(f"{METRICS[metric]}, %" for metric in rates), "gold score"],
        [
            [name, *(percent(own[metric]) for metric in rates), number(own["gold"])]
            for name, own in part["policy"].items()
        ],
    )
    yield ""
    yield from table(
        ["less the policy of soft labels", *(METRICS[metric] for metric in METRICS)],
        [
            [name, *(apart(own[metric], "score" if metric == "gold" else "points") for metric in METRICS)]
            for name, own in part["policy_less_soft"].items()
        ],
    )
    yield ""
    yield prose(
        """One learning rate for all, chosen for soft labels, favours these if anything. Labels near to even ask for
        small margins: where a policy of clamped or mean labels is nearer to the base model, it may be that it would
        want another rate, beta or length."""
    )


def _principles(found: Found) -> Iterator[str]:
    part = found["principles"]
    yield prose(
        """For each pair, k of the principles that apply are drawn, the same votes otherwise; a lone one still counts by
        its weight. Of harmful requests only two principles are asked, of others eight."""
    )
    yield ""
    yield from table(
        ["principles", "labels right, %", "all less these", "confidence, %", "reward model right, %", "all less these"],
        [
            [
                k, percent(own["accuracy"]), "" if k == "all" else apart(own["all_less_these"]),
                percent(own["confidence"]), percent(own.get("reward")),
                "" if k == "all" or "reward" not in own else apart(own["reward_all_less_these"]),
            ]
            for k, own in part.items()
        ],
    )  # fmt: skip
    yield ""
    yield prose(
        """Where the principles drawn do not separate a pair, the label is left to chance; whether it says so is what
        its confidence shows."""
    )


def _orders(found: Found) -> Iterator[str]:
    part = found["orders"]
    yield prose(
        """A judge with a position bias of mean 2 and standard deviation 1 nats for what it is shown first, drawn by
        hash of pair and principle: once the same in both orders, which the mean of log-odds cancels exactly, and once
        drawn anew in each order, which nothing cancels. *One order* shows *a* first; which response is *a* was drawn.
        Of a single principle the mean of probabilities and of log-odds fall on the same side always, since σ(x) +
        σ(y) > 1 where x + y > 0; what differs is how strongly, and so what several principles come to and how sure
        the label is."""
    )
    yield ""
    yield from table(
        ["bias", "averaged", "labels right, %", "Brier score", "calibration error"],
        [
            [
                BIASES[bias],
                way,
                percent(own[way]["accuracy"]),
                number(own[way]["brier"], 3),
                number(own[way]["ece"], 3),
            ]
            for bias, own in part.items()
            for way in WAYS
        ],
    )
    yield ""
    yield from table(
        ["bias", "difference", "labels right", "Brier score (lower is better)"],
        [
            [BIASES[bias], name.replace(" - ", " less "), apart(each["accuracy"]), apart(each["brier"], "Brier")]
            for bias, own in part.items()
            for name, each in own["differences"].items()
        ],
    )
    yield ""
    yield prose(best_way(part["same"]["differences"], part["anew"]["differences"]))


def best_way(same: Found, anew: Found) -> str:
    """Whether the mean of log-odds is best by a margin that counts, by whether the bias is the same in both orders."""
    over_one, over_p = (same[f"log-odds - {other}"] for other in ("one order", "probability"))
    uneven = anew["log-odds - probability"]
    says = {
        "a higher": "The mean of log-odds is best by a distinguishable margin.",
        "b higher": "**The mean of log-odds is not best**: probabilities are right more often.",
        "not distinguishable": "**The mean of log-odds is not best by a distinguishable margin.**",
    }
    return (
        "Labels right under a bias that is the same in both orders, log-odds less one order: "
        f"{apart(over_one['accuracy'])}; log-odds less probabilities: {apart(over_p['accuracy'])}. "
        f"{says[over_p['accuracy']['verdict']]} It is the case that this mean is made for. Where the bias is drawn "
        f"anew in each order, log-odds less probabilities: {apart(uneven['accuracy'])}. "
        f"{says[uneven['accuracy']['verdict']]}"
    )


def _noise(found: Found) -> Iterator[str]:
    part = found["noise"]
    yield prose(
        """Soft labels; a share of the pairs to learn from has its label turned round. One epoch, so that fewer pairs
        are fewer steps too."""
    )
    yield ""
    yield from table(
        ["pairs", "labels turned, %", "reward model right, %", "less all pairs, none turned"],
        [
            [
                f"{np.mean(own['examples']):.0f}", f"{100 * float(flipped):.0f}", percent(own),
                "" if (share, flipped) == ("1", "0") else apart(own["less_clean"]),
            ]
            for share, rows in part.items()
            for flipped, own in rows.items()
        ],
    )  # fmt: skip
    yield ""
    yield "What noise is worth in pairs: all of them with labels turned, less fewer with none."
    yield ""
    yield from table(
        ["labels turned, %", "less", "reward model right"],
        [
            [f"{100 * each['flipped']:.0f}", f"{100 * each['share']:.0f} % of the pairs", apart(each)]
            for each in found["noise_for_pairs"]
        ],
    )


def _abstention(found: Found) -> Iterator[str]:
    part = found["abstention"]
    yield prose(
        """A principle whose vote is nearer to even than `abstain_below` has no say; a pair on which none has one loses
        its label."""
    )
    yield ""
    yield from table(
        ["abstain_below, nats", "pairs labelled, %", "labels right, %", "less without abstention, same pairs"],
        [
            [
                nats,
                percent(own["coverage"]),
                percent(own["accuracy"]),
                "" if nats == "0" else apart(own["less_without"]),
            ]
            for nats, own in part["abstain_below"].items()
        ],
    )
    yield ""
    yield "Pairs whose probability is below `min_confidence` are dropped."
    yield ""
    yield from table(
        ["min_confidence", "pairs kept, %", "labels right, %", "of the dropped, %"],
        [
            [least, percent(own["coverage"]), percent(own["accuracy"]), percent(own["accuracy_of_dropped"])]
            for least, own in part["min_confidence"].items()
        ],
    )


def _papers(found: Found) -> Iterator[str]:
    labels, principles, orders = found["labels"], found["principles"], found["orders"]
    hard, clamped = (
        (labels["reward_less_soft"][name], labels["policy_less_soft"][name]["gold"]) for name in ("hard", "clamped")
    )
    one = principles["1"]
    same = orders["same"]["differences"]
    yield "## What of the papers reproduces"
    yield ""
    yield from table(
        ["finding", "here"],
        [
            [
                "Soft labels are better than hard ones where the judge does not reason (Bai et al. 2022)",
                f"hard less soft, reward model: {reproduces(hard[0], 'b higher')}; policy's gold score: "
                f"{reproduces(hard[1], 'b higher', 'score')}",
            ],
            [
                "Labels clamped to 40–60 % are better after reasons, which leave a judge too sure (Bai et al. 2022)",
                "not the same case: this judge did not reason first. Clamped less soft, reward model: "
                f"{reproduces(clamped[0], 'a higher')}; policy's gold score: "
                f"{reproduces(clamped[1], 'a higher', 'score')}",
            ],
            [
                "Many principles make better preference models than one (Bai et al. 2022, who draw one for each pair "
                "and compare with one fixed)",
                "all for each pair less one drawn for each, which the paper did not compare; labels: "
                f"{reproduces(one['all_less_these'], 'a higher')}; reward model: "
                f"{reproduces(one['reward_all_less_these'], 'a higher')}",
            ],
            [
                "Judges have a position bias, small ones most (Lee et al. 2023)",
                f"{signed(found['position_bias'], 'nats')} nats for what is shown first, "
                f"{percent(found['flip_rate'])} % of labels turn with the order; small as it is, this judge was "
                + (
                    "trained on balanced positions and has next to none: does **not reproduce**"
                    if max(map(abs, found["position_bias"]["interval"])) < SLIGHT
                    else "trained on balanced positions and has one: reproduces"
                ),
            ],
            [
                "Averaging over both orders counters the bias (Lee et al. 2023, who average probabilities)",
                "probabilities in both orders less one order, with a bias added: "
                f"{reproduces(same['probability - one order']['accuracy'], 'a higher')}; with the judge's own alone: "
                f"{reproduces(orders['none']['differences']['probability - one order']['accuracy'], 'a higher')}",
            ],
        ],
    )
    yield ""
    yield prose(
        """That log-odds are averaged rather than probabilities is this project's choice and no finding of the papers:
        question 3 says what it is worth."""
    )
    yield ""


def _made(found: Found) -> Iterator[str]:
    sizes, hardware, versions = found["sizes"], found["hardware"], found["versions"]
    words = ", ".join(
        f"{name} {versions[name]}" for name in ("python", "torch", "transformers", "trl") if name in versions
    )
    train = found["train"]
    yield "## How it was made"
    yield ""
    yield "    OMP_NUM_THREADS=1 python benchmarks/labels.py"
    yield "    python benchmarks/labels.py --page docs/findings.md"
    yield ""
    reward, dpo = train["reward"], train["dpo"]
    yield prose(
        f"""{sizes["seeds"]} seeds; the trainings took {duration(found["cpu_seconds"])} of processor time (sampling and
        judging not counted) on {hardware["cpu"]} ({hardware["cores"]} cores, {hardware["threads"]} threads); {words}.
        Reward models: one epoch, batches of {reward["batch_size"]}, learning rate {reward["train"]["learning_rate"]:g};
        DPO: one epoch, batches of {dpo["batch_size"]}, learning rate {dpo["train"]["learning_rate"]:g}, beta
        {dpo["train"]["beta"]:g}; both rates chosen on split `validation` for soft labels. A seed's trainings share
        their draws, so that they differ by their labels alone. Responses at temperature 1, top_p 0.95."""
    )


# The figures.


@contextlib.contextmanager
def canvas(path: Path, panels: int = 1, size: tuple[float, float] = (7.6, 4.2), **options: Any) -> Iterator[list[Axes]]:
    """Panels side by side in the style of the other pictures, saved at the end, with one legend for all."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "cai", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=size, layout="constrained")
        found: list[Axes] = list(figure.subplots(1, panels, squeeze=False, **options).flat)
        yield found
        for axes in found:
            axes.grid(color="#e3e6ea", lw=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(length=0, colors=SOFT)
            axes.spines[:].set_visible(False)
        handles, names = found[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=min(5, len(names)), frameon=False)
        figure.savefig(path, facecolor="white", metadata={"Date": None})


def whiskers(
    axes: Axes, places: Sequence[float], rates: Sequence[Found], colour: str, name: str, *, across: bool = False,
    scale: float = 100, line: bool = False,
) -> None:  # fmt: skip
    """A dot for each rate with its interval; `across` draws along the other axis."""
    values = [scale * rate["value"] for rate in rates]
    ends = [[scale * end for end in rate["interval"]] for rate in rates]
    spread = axes.hlines if across else axes.vlines
    spread(places, [low for low, _ in ends], [high for _, high in ends], color=colour, lw=2, alpha=0.45)
    x, y = (values, places) if across else (places, values)
    axes.plot(x, y, "o-" if line else "o", color=colour, ms=6, mec="white", mew=0.8, lw=1.2, label=name, clip_on=False)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Named rows, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def draw_labels(found: Found, path: Path) -> None:
    """Reward model and policy by kind of label."""
    part = found["labels"]
    rows = ["reward", *(metric for metric in METRICS if metric != "gold")]
    with canvas(path, 2, (9, 4.6), width_ratios=[2.4, 1]) as (left, right):
        for index, name in enumerate(part["policy"]):
            own = part["policy"][name] | ({"reward": part["reward"][name]} if name in part["reward"] else {})
            places = [row + (index - 2) * 0.14 for row, metric in enumerate(rows) if metric in own]
            whiskers(left, places, [own[each] for each in rows if each in own], COLOURS[index], name, across=True)
            whiskers(right, [(index - 2) * 0.14], [own["gold"]], COLOURS[index], name, across=True, scale=1)
        _rows(left, ["reward model right", *(METRICS[each] for each in rows[1:])])
        right.set_yticks([])
        right.set_ylim(0.5, -0.5)
        left.set_xlim(0, 100)
        left.set_xlabel("%", color=SOFT)
        right.set_xlabel("gold score", color=SOFT)


def draw_principles(found: Found, path: Path) -> None:
    """Labels, their confidence and the reward model by how many principles are asked."""
    part = found["principles"]
    with canvas(path) as (axes,):
        for index, (key, name) in enumerate(
            {"accuracy": "labels right", "confidence": "their confidence", "reward": "reward model right"}.items(), 1
        ):
            known = [(at, own[key]) for at, own in enumerate(part.values()) if key in own]
            places, rates = zip(*known, strict=True)
            whiskers(axes, [at + (index - 2) * 0.06 for at in places], rates, COLOURS[index], name, line=True)
        axes.set_xticks(range(len(part)), list(part))
        axes.set_xlabel("principles asked about a pair", color=SOFT)
        axes.set_ylabel("%", color=SOFT)


def draw_orders(found: Found, path: Path) -> None:
    """Accuracy and Brier score by what is averaged, without and with a position bias."""
    part = found["orders"]
    with canvas(path, 2, (9, 3.8), sharey=True) as (left, right):
        for index, way in enumerate(WAYS):
            places = [row + (index - 1) * 0.18 for row in range(len(part))]
            colour = COLOURS[(0, 2, 1)[index]]
            whiskers(left, places, [own[way]["accuracy"] for own in part.values()], colour, way, across=True)
            whiskers(right, places, [own[way]["brier"] for own in part.values()], colour, way, across=True, scale=1)
        _rows(left, ["no bias", "bias, the same\nin both orders", "bias, drawn anew\nin each order"])
        left.set_xlabel("labels right, %", color=SOFT)
        right.set_xlabel("Brier score, lower is better", color=SOFT)


def draw_noise(found: Found, path: Path) -> None:
    """The reward model by pairs and by share of turned labels."""
    part = found["noise"]
    counts = [float(np.mean(next(iter(rows.values()))["examples"])) for rows in part.values()]
    with canvas(path) as (axes,):
        for index, flipped in enumerate(next(iter(part.values()))):
            places = [count * 1.02 ** (index - 1) for count in counts]
            name = f"{100 * float(flipped):.0f} % turned round"
            whiskers(axes, places, [rows[flipped] for rows in part.values()], COLOURS[index + 1], name, line=True)
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:.0f}" for count in counts])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("pairs to learn from", color=SOFT)
        axes.set_ylabel("reward model right, %", color=SOFT)


def draw_abstention(found: Found, path: Path) -> None:
    """Accuracy against coverage, the threshold beside each point."""
    with canvas(path) as (axes,):
        for index, (rule, name) in enumerate(
            {"abstain_below": "principles abstain", "min_confidence": "pairs are dropped"}.items(), 1
        ):
            own = found["abstention"][rule]
            places = [100 * each["coverage"]["value"] for each in own.values()]
            whiskers(axes, places, [each["accuracy"] for each in own.values()], COLOURS[index], name, line=True)
            named = 100.0
            for threshold, place, each in zip(own, places, own.values(), strict=True):
                if named - place < 1.5:
                    continue  # it would lie on the one before
                named = place
                at = (place, 100 * each["accuracy"]["value"])
                shift, side = ((-7, -11), "right") if index == 1 else ((7, 5), "left")
                axes.annotate(
                    threshold, at, shift, textcoords="offset points", ha=side, fontsize=8, color=COLOURS[index]
                )
        axes.set_xlim(right=101)
        axes.set_xlabel("pairs with a label, %", color=SOFT)
        axes.set_ylabel("labels right, %", color=SOFT)


FIGURES = {
    "labels": draw_labels,
    "principles": draw_principles,
    "orders": draw_orders,
    "noise": draw_noise,
    "abstention": draw_abstention,
}
