"""Writes the page and the pictures of labels.py from its results.

Sentences that depend on a measurement are generated from it: if zero is inside the interval of a difference, the page
says "not distinguishable".
"""

from __future__ import annotations

import contextlib
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cai.report.pictures import COLOURS, MUTED, draw_reliability, saved_figure, style_axes
from cai.storage.files import replacing
from cai.text.progress import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = Mapping[str, Any]

METRICS = {
    "harmful_compliance": "complies with harm",
    "helpfulness": "helps",
    "over_refusal": "refuses too much",
    "well_formed": "well formed",
    "gold": "gold score",
}
OTHER_STUDIES = "\n<!-- Below: by other benchmarks. -->\n"
"""Marks the part of the page that other studies write."""
WAYS = ("one order", "probability", "log-odds")
SLIGHT = 0.1
"""Nats below which the page calls a position bias negligible: 0.1 moves an even vote to 52.5 %."""
BIASES = {"none": "none", "same": "the same in both orders", "anew": "drawn anew in each order"}


def write_page(results: Results, page: Path) -> None:
    """Writes the page, and its pictures and results to the folder of the same name beside it."""
    results = rounded(results)  # so that the stored results make the same page again
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    draw_reliability(results, folder / "calibration.svg")
    for name, draw in FIGURES.items():
        draw(results, folder / f"{name}.svg")
    with replacing(folder / "results.json") as file:
        file.write(json.dumps(results, ensure_ascii=False).encode() + b"\n")
    _, mark, other_studies = (page.read_text(encoding="utf-8") if page.exists() else "").partition(OTHER_STUDIES)
    with replacing(page) as file:
        file.write("\n".join([*lines(results, folder.name), ""]).encode() + (mark + other_studies).encode())


def rounded(value: Any) -> Any:
    """The value with all numbers rounded to six significant digits."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# Numbers as text.


def percent(rate: Results | None) -> str:
    """`95.7 [94.1, 96.9]`."""
    if rate is None or rate["value"] is None:
        return "–"
    low, high = (100 * end for end in rate["interval"])
    return f"{100 * rate['value']:.1f} [{low:.1f}, {high:.1f}]"


def number(rate: Results, digits: int = 2) -> str:
    """`-1.24 [-1.31, -1.17]`."""
    low, high = rate["interval"]
    return f"{rate['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def with_verdict(difference: Results, unit: str = "points") -> str:
    """`+1.2 points [0.3, 2.0]`, with `not distinguishable` if zero is inside."""
    text = signed(difference, unit)
    return text if is_distinguishable(difference) else f"{text}, not distinguishable"


def signed(difference: Results, unit: str = "points") -> str:
    """`+1.2 points [0.3, 2.0]`."""
    low, high = difference["interval"]
    scale, digits = (100, 1) if unit == "points" else (1, 3 if unit == "Brier" else 2)
    value = f"{scale * difference['value']:+.{digits}f}{' points' if unit == 'points' else ''}"
    return f"{value} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def is_distinguishable(difference: Results) -> bool:
    """Whether zero is outside the interval."""
    return bool(difference["verdict"] != "not distinguishable")


def prose(text: str) -> str:
    """A wrapped paragraph."""
    return textwrap.fill(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (headers, ["---"] * len(headers), *rows)]


def reproduces(difference: Results, expected: str, unit: str = "points") -> str:
    """The difference, and whether it is as a paper reports: `expected` is "a higher" or "b higher"."""
    if not is_distinguishable(difference):
        verdict = "not distinguishable, so it does **not reproduce**"
    elif difference["verdict"] == expected:
        verdict = "reproduces"
    else:
        verdict = "does **not reproduce**: it is the other way round"
    return f"{signed(difference, unit)}: {verdict}"


# The page.


def lines(results: Results, folder: str) -> Iterator[str]:
    """The page in Markdown."""
    sizes = results["sizes"]
    tested, learned = sum(sizes["pairs"]), sizes["pairs_learned"]
    yield "# Findings: what labels do to reward models and policies"
    yield ""
    if results.get("quick"):
        yield "**Made with `--quick`: does it work at all, and no result.**"
        yield ""
    yield prose(
        f"""Measured in {sizes["seeds"]} seeds on the embedded `micro` model, in whose world it is known which response
        is better ([micro.md](micro.md)). **The model is an instrument and no evidence about large models**: its judge
        was trained on the very distinctions that the constitution names. What does or does not reproduce here says how
        the *machinery* behaves with such a judge."""
    )
    yield ""
    yield prose(
        f"""Made by `studies/labels.py`; all numbers are in [results.json]({folder}/results.json). Each seed samples
        {sizes["responses"]} responses of the base model to {sizes["learned"]} training prompts and to
        {sizes["heldout"]} held-out prompts of tier 1 (split `test`); all principles vote once on disjoint pairs of
        these, in both orders. This gives {min(learned)} to {max(learned)} training pairs a seed and {tested:,} held-out
        pairs in all. Of the held-out pairs the oracle scores {sum(sizes["ties"]):,} equally and cannot read
        {sum(sizes["unclear"])}; accuracy is measured on the other {results["accuracy"]["n"]:,}. Labels are sums of
        weighted log-odds at temperature 1, as in the quickstart, unless stated otherwise."""
    )
    yield ""
    yield prose(
        """Brackets are 95 % intervals. Each covers two intervals: one over rows clustered by topic, and one from
        Student's t over the seeds (for calibration errors, resampled topics alone). A difference is taken over the same
        pairs or prompts and is *not distinguishable* where its interval contains zero. Nothing is corrected for the
        number of comparisons: of twenty comparisons without a difference, about one would look like a difference."""
    )
    yield ""
    yield from _judge(results, folder)
    for section_number, (title, name, part) in enumerate(
        (
            ("Soft, hard or clamped labels", "labels", _labels),
            ("One principle, several, or all", "principles", _principles),
            ("One order or both, and what is averaged", "orders", _orders),
            ("Wrong labels against the number of pairs", "noise", _noise),
            ("Principles that abstain, pairs that are dropped", "abstention", _abstention),
        ),
        1,
    ):
        yield f"## {section_number}. {title}"
        yield ""
        yield from part(results)
        yield ""
        yield f"![{title}]({folder}/{name}.svg)"
        yield ""
    yield from _papers(results)
    yield from _made(results)


def _judge(results: Results, folder: str) -> Iterator[str]:
    yield "## The judge on tier 1"
    yield ""
    yield from table(
        ["labels of all principles in both orders", "%"],
        [
            ["agree with the oracle", percent(results["accuracy"])],
            ["expected calibration error", percent(results["ece"])],
            ["… after temperature, fitted on other topics", percent(results["ece_after_temperature"])],
            ["turn with the order, were one order asked", percent(results["flip_rate"])],
            ["votes of single principles that turn", percent(results["flip_rate_of_votes"])],
            ["… of those that are decided (60 % or more)", percent(results["flip_rate_of_decided_votes"])],
            ["prefer the longer response", percent(results["prefers_longer"])],
            ["the longer response is better", percent(results["longer_is_better"])],
        ],
    )
    yield ""
    yield prose(
        f"""The temperature that fits best is {results["temperature"]:.2f}. Single votes turn with the order mostly
        where they are nearly even. The judge's bias for the response shown first is
        {signed(results["position_bias"], "nats")} nats, the mean over votes."""
    )
    yield ""
    yield f"![Confidence against how often it was right]({folder}/calibration.svg)"
    yield ""


def _labels(results: Results) -> Iterator[str]:
    part = results["labels"]
    yield prose(
        """*Soft* is the probability at temperature 1; *soft, mean* divides by the sum of weights, `prefer`'s default,
        which leaves labels nearly even; *clamped* keeps soft labels within 40 and 60 %. The policy is trained by DPO
        from the base model, without SL-CAI."""
    )
    yield ""
    yield from table(
        ["labels", "reward model right, %", "… less soft"],
        [
            [
                name,
                percent(rate),
                with_verdict(part["reward_less_soft"][name]) if name in part["reward_less_soft"] else "",
            ]
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
            [name, *(with_verdict(own[metric], "score" if metric == "gold" else "points") for metric in METRICS)]
            for name, own in part["policy_less_soft"].items()
        ],
    )
    yield ""
    yield prose(
        """All labels share one learning rate, which was chosen for soft labels and may favour them. Nearly even labels
        ask for small margins: policies of clamped or mean labels, which stay nearer to the base model, might need
        another learning rate, beta or number of steps."""
    )


def _principles(results: Results) -> Iterator[str]:
    part = results["principles"]
    yield prose(
        """For each pair, k of the principles that apply are sampled, from the same votes; a single principle still
        counts by its weight. Two principles apply to harmful requests, eight to others."""
    )
    yield ""
    yield from table(
        ["principles", "labels right, %", "all less these", "confidence, %", "reward model right, %", "all less these"],
        [
            [
                k, percent(own["accuracy"]), "" if k == "all" else with_verdict(own["all_less_these"]),
                percent(own["confidence"]), percent(own.get("reward")),
                "" if k == "all" or "reward" not in own else with_verdict(own["reward_all_less_these"]),
            ]
            for k, own in part.items()
        ],
    )  # fmt: skip
    yield ""
    yield prose(
        """Where the sampled principles do not separate a pair, the label is a coin flip; its confidence shows whether
        the label says so."""
    )


def _orders(results: Results) -> Iterator[str]:
    part = results["orders"]
    yield prose(
        """A position bias for the response shown first is added to the judge's log-odds, with mean 2 and standard
        deviation 1 nats, sampled by hash of pair and principle. In one case it is the same in both orders, which the
        mean of log-odds cancels exactly; in the other it is drawn anew in each order, which nothing cancels. *One
        order* shows *a* first; which response is *a* was decided at random. For a single principle the mean of
        probabilities and the mean of log-odds are always on the same side, since σ(x) + σ(y) > 1 where x + y > 0. They
        differ in strength, and so in the sum over several principles and in the confidence of the label."""
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
            [
                BIASES[bias],
                name.replace(" - ", " less "),
                with_verdict(of_pair["accuracy"]),
                with_verdict(of_pair["brier"], "Brier"),
            ]
            for bias, own in part.items()
            for name, of_pair in own["differences"].items()
        ],
    )
    yield ""
    yield prose(best_way(part["same"]["differences"], part["anew"]["differences"]))


def best_way(same: Results, anew: Results) -> str:
    """Whether the mean of log-odds is distinguishably best: `same` and `anew` are the differences by bias."""
    over_one, over_p = (same[f"log-odds - {way}"] for way in ("one order", "probability"))
    under_uneven_bias = anew["log-odds - probability"]
    sentences = {
        "a higher": "The mean of log-odds is best by a distinguishable margin.",
        "b higher": "**The mean of log-odds is not best**: probabilities are right more often.",
        "not distinguishable": "**The mean of log-odds is not best by a distinguishable margin.**",
    }
    return (
        "Labels right under a bias that is the same in both orders, log-odds less one order: "
        f"{with_verdict(over_one['accuracy'])}; log-odds less probabilities: {with_verdict(over_p['accuracy'])}. "
        f"{sentences[over_p['accuracy']['verdict']]} This mean is made for that case. Where the bias is "
        f"drawn anew in each order, log-odds less probabilities: {with_verdict(under_uneven_bias['accuracy'])}. "
        f"{sentences[under_uneven_bias['accuracy']['verdict']]}"
    )


def _noise(results: Results) -> Iterator[str]:
    part = results["noise"]
    yield prose(
        """Soft labels; a share of the training pairs has its label flipped. Training takes one epoch, so that fewer
        pairs are fewer steps too."""
    )
    yield ""
    yield from table(
        ["pairs", "labels flipped, %", "reward model right, %", "less all pairs, none flipped"],
        [
            [
                f"{np.mean(own['examples']):.0f}", f"{100 * float(flipped):.0f}", percent(own),
                "" if (share, flipped) == ("1", "0") else with_verdict(own["less_clean"]),
            ]
            for share, rows in part.items()
            for flipped, own in rows.items()
        ],
    )  # fmt: skip
    yield ""
    yield "Noise against fewer pairs: all pairs with some labels flipped, less fewer pairs with correct labels."
    yield ""
    yield from table(
        ["labels flipped, %", "less", "reward model right"],
        [
            [f"{100 * row['flipped']:.0f}", f"{100 * row['share']:.0f} % of the pairs", with_verdict(row)]
            for row in results["noise_for_pairs"]
        ],
    )


def _abstention(results: Results) -> Iterator[str]:
    part = results["abstention"]
    yield prose(
        """A principle whose vote is nearer to even than `abstain_below` does not count; a pair without any principle
        that counts gets no label."""
    )
    yield ""
    yield from table(
        ["abstain_below, nats", "pairs labelled, %", "labels right, %", "less without abstention, same pairs"],
        [
            [
                nats,
                percent(own["coverage"]),
                percent(own["accuracy"]),
                "" if nats == "0" else with_verdict(own["less_without"]),
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
            [threshold, percent(own["coverage"]), percent(own["accuracy"]), percent(own["accuracy_of_dropped"])]
            for threshold, own in part["min_confidence"].items()
        ],
    )


def _papers(results: Results) -> Iterator[str]:
    labels, principles, orders = results["labels"], results["principles"], results["orders"]
    hard, clamped = (
        (labels["reward_less_soft"][name], labels["policy_less_soft"][name]["gold"]) for name in ("hard", "clamped")
    )
    of_one = principles["1"]
    same = orders["same"]["differences"]
    yield "## Which findings of the papers reproduce"
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
                f"{reproduces(of_one['all_less_these'], 'a higher')}; reward model: "
                f"{reproduces(of_one['reward_all_less_these'], 'a higher')}",
            ],
            [
                "Judges have a position bias, small ones most (Lee et al. 2023)",
                f"{signed(results['position_bias'], 'nats')} nats for what is shown first, "
                f"{percent(results['flip_rate'])} % of labels turn with the order; small as it is, this judge was "
                + (
                    "trained on balanced positions and has next to none: does **not reproduce**"
                    if max(map(abs, results["position_bias"]["interval"])) < SLIGHT
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
        """Averaging log-odds instead of probabilities is this project's choice and no finding of the papers; question 3
        measures it."""
    )
    yield ""


def _made(results: Results) -> Iterator[str]:
    sizes, hardware, versions = results["sizes"], results["hardware"], results["versions"]
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("python", "torch", "transformers", "trl") if name in versions
    )
    train = results["train"]
    yield "## How it was made"
    yield ""
    yield "    OMP_NUM_THREADS=1 python studies/labels.py"
    yield "    python studies/labels.py --page docs/findings.md"
    yield ""
    reward, dpo = train["reward"], train["dpo"]
    yield prose(
        f"""{sizes["seeds"]} seeds; the trainings took {duration(results["cpu_seconds"])} of processor time (sampling
        and judging not counted) on {hardware["cpu"]} ({hardware["cores"]} cores, {hardware["threads"]} threads);
        {packages}. Reward models: one epoch, batches of {reward["batch_size"]}, learning rate
        {reward["train"]["learning_rate"]:g}; DPO: one epoch, batches of {dpo["batch_size"]}, learning rate
        {dpo["train"]["learning_rate"]:g}, beta {dpo["train"]["beta"]:g}; both rates chosen on split `validation` for
        soft labels. The trainings of one seed share all random numbers, so that they differ by their labels alone.
        Responses at temperature 1, top_p 0.95."""
    )


# The figures.


@contextlib.contextmanager
def canvas(path: Path, panels: int = 1, size: tuple[float, float] = (7.6, 4.2), **options: Any) -> Iterator[list[Axes]]:
    """Panels side by side in the style of the other pictures, with one legend; saved when the block ends."""
    with saved_figure(path, *size) as figure:
        panel_axes: list[Axes] = list(figure.subplots(1, panels, squeeze=False, **options).flat)
        yield panel_axes
        for axes in panel_axes:
            style_axes(axes)
        handles, names = panel_axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=min(5, len(names)), frameon=False)


def whiskers(
    axes: Axes, places: Sequence[float], rates: Sequence[Results], colour: str, name: str, *, across: bool = False,
    scale: float = 100, line: bool = False,
) -> None:  # fmt: skip
    """A dot and an interval for each rate, vertical or with `across` horizontal."""
    values = [scale * rate["value"] for rate in rates]
    intervals = [[scale * end for end in rate["interval"]] for rate in rates]
    spread = axes.hlines if across else axes.vlines
    spread(places, [low for low, _ in intervals], [high for _, high in intervals], color=colour, lw=2, alpha=0.45)
    x, y = (values, places) if across else (places, values)
    axes.plot(x, y, "o-" if line else "o", color=colour, ms=6, mec="white", mew=0.8, lw=1.2, label=name, clip_on=False)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Names the rows of the y axis, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def draw_labels(results: Results, path: Path) -> None:
    """Draws reward model and policy by kind of label."""
    part = results["labels"]
    rows = ["reward", *(metric for metric in METRICS if metric != "gold")]
    with canvas(path, 2, (9, 4.6), width_ratios=[2.4, 1]) as (left, right):
        for index, name in enumerate(part["policy"]):
            own = part["policy"][name] | ({"reward": part["reward"][name]} if name in part["reward"] else {})
            places = [row + (index - 2) * 0.14 for row, metric in enumerate(rows) if metric in own]
            whiskers(left, places, [own[row] for row in rows if row in own], COLOURS[index], name, across=True)
            whiskers(right, [(index - 2) * 0.14], [own["gold"]], COLOURS[index], name, across=True, scale=1)
        _rows(left, ["reward model right", *(METRICS[row] for row in rows[1:])])
        right.set_yticks([])
        right.set_ylim(0.5, -0.5)
        left.set_xlim(0, 100)
        left.set_xlabel("%", color=MUTED)
        right.set_xlabel("gold score", color=MUTED)


def draw_principles(results: Results, path: Path) -> None:
    """Draws labels, their confidence and the reward model by the number of principles."""
    part = results["principles"]
    with canvas(path) as (axes,):
        for index, (key, name) in enumerate(
            {"accuracy": "labels right", "confidence": "their confidence", "reward": "reward model right"}.items(), 1
        ):
            measured = [(at, own[key]) for at, own in enumerate(part.values()) if key in own]
            places, rates = zip(*measured, strict=True)
            whiskers(axes, [at + (index - 2) * 0.06 for at in places], rates, COLOURS[index], name, line=True)
        axes.set_xticks(range(len(part)), list(part))
        axes.set_xlabel("principles asked about a pair", color=MUTED)
        axes.set_ylabel("%", color=MUTED)


def draw_orders(results: Results, path: Path) -> None:
    """Draws accuracy and Brier score by what is averaged, without and with a position bias."""
    part = results["orders"]
    with canvas(path, 2, (9, 3.8), sharey=True) as (left, right):
        for index, way in enumerate(WAYS):
            places = [row + (index - 1) * 0.18 for row in range(len(part))]
            colour = COLOURS[(0, 2, 1)[index]]
            whiskers(left, places, [own[way]["accuracy"] for own in part.values()], colour, way, across=True)
            whiskers(right, places, [own[way]["brier"] for own in part.values()], colour, way, across=True, scale=1)
        _rows(left, ["no bias", "bias, the same\nin both orders", "bias, drawn anew\nin each order"])
        left.set_xlabel("labels right, %", color=MUTED)
        right.set_xlabel("Brier score, lower is better", color=MUTED)


def draw_noise(results: Results, path: Path) -> None:
    """Draws the reward model by number of pairs and share of flipped labels."""
    part = results["noise"]
    counts = [float(np.mean(next(iter(rows.values()))["examples"])) for rows in part.values()]
    with canvas(path) as (axes,):
        for index, flipped in enumerate(next(iter(part.values()))):
            places = [count * 1.02 ** (index - 1) for count in counts]
            name = f"{100 * float(flipped):.0f} % turned round"
            whiskers(axes, places, [rows[flipped] for rows in part.values()], COLOURS[index + 1], name, line=True)
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:.0f}" for count in counts])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("pairs to learn from", color=MUTED)
        axes.set_ylabel("reward model right, %", color=MUTED)


def draw_abstention(results: Results, path: Path) -> None:
    """Draws accuracy against coverage, with the threshold beside each point."""
    with canvas(path) as (axes,):
        for index, (rule, name) in enumerate(
            {"abstain_below": "principles abstain", "min_confidence": "pairs are dropped"}.items(), 1
        ):
            own = results["abstention"][rule]
            places = [100 * point["coverage"]["value"] for point in own.values()]
            whiskers(axes, places, [point["accuracy"] for point in own.values()], COLOURS[index], name, line=True)
            last_named = 100.0
            for threshold, place, point in zip(own, places, own.values(), strict=True):
                if last_named - place < 1.5:
                    continue  # the names would overlap
                last_named = place
                at = (place, 100 * point["accuracy"]["value"])
                shift, side = ((-7, -11), "right") if index == 1 else ((7, 5), "left")
                axes.annotate(
                    threshold, at, shift, textcoords="offset points", ha=side, fontsize=8, color=COLOURS[index]
                )
        axes.set_xlim(right=101)
        axes.set_xlabel("pairs with a label, %", color=MUTED)
        axes.set_ylabel("labels right, %", color=MUTED)


FIGURES = {
    "labels": draw_labels,
    "principles": draw_principles,
    "orders": draw_orders,
    "noise": draw_noise,
    "abstention": draw_abstention,
}
