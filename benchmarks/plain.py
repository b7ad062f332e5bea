"""Constitutional AI as one assembles it from transformers and TRL: the plain side of the benchmarks.

    python benchmarks/plain.py                      the recipe quickstart
    python benchmarks/plain.py my-recipe.yaml       one with the same stages

The method is that of recipes/quickstart.yaml, in its order and with its numbers; read the two side by side. It is meant
to be as fast as plain calls of the two libraries are: bfloat16 where the hardware computes in it, rows sorted by length
and padded on the left, the batches that are fastest on a CPU (`WRITE`, `JUDGE`; other benchmarks try more), the last
position's logits alone where one answer is read, TRL's trainers as they come but without gradient checkpointing.

Other than there: labels are hard, for TRL's trainers know no others; text of users and models is not kept from speaking
to the judge; nothing is kept on the disk but the models, so nothing can be resumed. Only `micro` is asked here, in the
words that it was trained on. The last line is one JSON object: the seconds of each stage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from cai.micro.conversations import prompts
from cai.models.reference import MICRO

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
WRITE = 64
"""Rows that are written at once."""
JUDGE = 16
"""Questions that are read at once."""
Message = Mapping[str, Any]
Settings = Mapping[str, Any]


class Lm(NamedTuple):
    """A language model and its tokenizer."""

    model: Any
    tokenizer: Any


class Text(NamedTuple):
    """What a model wrote: ids up to and including the end of the turn, and the text without it."""

    ids: list[int]
    text: str
    whole: bool
    """Whether the turn came to its end."""


@dataclass(frozen=True)
class Response:
    """A response to a conversation."""

    prompt: Sequence[Message]
    tags: Sequence[str]
    text: str
    whole: bool


class Pair(NamedTuple):
    """Two responses to one conversation."""

    prompt: Sequence[Message]
    tags: Sequence[str]
    a: str
    b: str


# What a model does: it writes, and it chooses.


def load(folder: str | Path, dtype: torch.dtype | None = None) -> Lm:
    """The model in a folder, on the GPU where there is one, in bfloat16 where that is faster."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        fast = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
        dtype = torch.bfloat16 if fast else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return Lm(model, AutoTokenizer.from_pretrained(folder))


@torch.inference_mode()
def generate(
    lm: Lm,
    rows: Sequence[Sequence[int]],
    batch: int,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    n: int = 1,
) -> list[list[int]]:
    """`n` continuations of each row, one row's together; ids up to and including the end of the turn.

    Temperature 0 takes the likeliest token; `n` is 1 then.
    """
    how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0, "num_return_sequences": n}
    if temperature == 0:
        how = {"do_sample": False}
    end = lm.model.generation_config.eos_token_id
    found: list[list[int]] = [[] for _ in range(n * len(rows))]
    for part in batches(rows, max(1, batch // n)):
        inputs = padded(lm, [rows[index] for index in part])
        written = lm.model.generate(
            **inputs, **how, max_new_tokens=max_new_tokens, pad_token_id=lm.tokenizer.pad_token_id
        )
        for place, ids in enumerate(written[:, inputs["input_ids"].shape[1] :].tolist()):
            length = ids.index(end) + 1 if end in ids else len(ids)
            found[part[place // n] * n + place % n] = ids[:length]
    return found


@torch.inference_mode()
def log_odds(lm: Lm, rows: Sequence[Sequence[int]], options: Sequence[int], batch: int) -> list[float]:
    """How much likelier the first of two options is than the second as the next token of each row, in nats."""
    found = [0.0] * len(rows)
    for part in batches(rows, batch):
        inputs = padded(lm, [rows[index] for index in part])
        logits = lm.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, list(options)].float()
        for index, (one, other) in zip(part, logits.tolist(), strict=True):
            found[index] = one - other
    return found


def batches(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Indices of rows that are about equally long."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for first in range(0, len(order), size):
        yield order[first : first + size]


def padded(lm: Lm, rows: Sequence[Sequence[int]]) -> Any:
    """Ids and mask, padded on the left, where the model is."""
    return lm.tokenizer.pad({"input_ids": list(rows)}, padding_side="left", return_tensors="pt").to(lm.model.device)


def rendered(lm: Lm, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Each conversation as ids, up to where the assistant speaks."""
    return [
        lm.tokenizer.apply_chat_template(list(each), add_generation_prompt=True, return_dict=False)
        for each in conversations
    ]


def write(
    lm: Lm, conversations: Sequence[Sequence[Message]], settings: Settings, *, n: int = 1, batch: int = WRITE
) -> list[Text]:
    """`n` replies to each conversation, one conversation's together."""
    ids = generate(lm, rendered(lm, conversations), batch, n=n, **settings)
    texts = lm.tokenizer.batch_decode(ids, skip_special_tokens=True)
    end = lm.tokenizer.eos_token_id
    return [Text(each, text.strip(), each[-1] == end) for each, text in zip(ids, texts, strict=True)]


# What it is asked, in the words that micro knows.


def conversation(messages: Sequence[Message]) -> str:
    """The turns so far."""
    return "Conversation:\n" + "".join(f"{each['role']}: {each['content']}\n" for each in messages)


def asks_critique(prompt: Sequence[Message], response: str, request: str) -> list[Message]:
    """What about the response falls short?"""
    text = f"{conversation(prompt)}Response:\n{response}\nRequest:\n{request}"
    return [{"role": "user", "content": text}]


def asks_revision(prompt: Sequence[Message], response: str, critique: str, request: str) -> list[Message]:
    """The response again, in the light of the critique."""
    text = f"{conversation(prompt)}Response:\n{response}\nCritique:\n{critique}\nRequest:\n{request}"
    return [{"role": "user", "content": text}]


def asks_comparison(prompt: Sequence[Message], first: str, second: str, request: str) -> list[Message]:
    """Which response is better, A or B?"""
    text = f"{conversation(prompt)}Response A:\n{first}\nResponse B:\n{second}\n{request}"
    return [{"role": "user", "content": text}]


# The stages of the recipe.


def applicable(principles: Sequence[Mapping[str, Any]], tags: Sequence[str]) -> list[Mapping[str, Any]]:
    """The principles that are for a prompt with these tags."""
    return [each for each in principles if not each.get("applies_to") or set(each["applies_to"]) & set(tags)]


def sample(
    lm: Lm, requests: Sequence[Mapping[str, Any]], settings: Settings, *, n: int = 1, batch: int = WRITE
) -> list[Response]:
    """`n` responses to each prompt."""
    texts = write(lm, [prompt["messages"] for prompt in requests], settings, n=n, batch=batch)
    of = [prompt for prompt in requests for _ in range(n)]
    return [
        Response(prompt["messages"], prompt["tags"], each.text, each.whole)
        for prompt, each in zip(of, texts, strict=True)
    ]


def revise(
    lm: Lm,
    responses: Sequence[Response],
    principles: Sequence[Mapping[str, Any]],
    settings: Settings,
    *,
    rounds: int,
    batch: int = WRITE,
) -> list[Response]:
    """Each response criticised and rewritten as often as there are rounds, each by another principle."""
    rng = random.Random(0)
    drawn = [rng.sample(fit := applicable(principles, each.tags), min(rounds, len(fit))) for each in responses]
    for number in range(rounds):
        by = [each[number % len(each)] for each in drawn]
        critiques = write(
            lm,
            [asks_critique(each.prompt, each.text, one["critique"]) for each, one in zip(responses, by, strict=True)],
            settings,
            batch=batch,
        )
        revisions = write(
            lm,
            [
                asks_revision(each.prompt, each.text, critique.text, one["revise"])
                for each, critique, one in zip(responses, critiques, by, strict=True)
            ],
            settings,
            batch=batch,
        )
        responses = [
            replace(each, text=new.text, whole=new.whole) if new.text else each
            for each, new in zip(responses, revisions, strict=True)
        ]
    return list(responses)


def disjoint_pairs(responses: Sequence[Response]) -> list[Pair]:
    """Each whole response in at most one pair with another one to the same prompt."""
    by_prompt: dict[str, dict[str, Response]] = {}
    for each in responses:
        if each.whole and each.text:
            by_prompt.setdefault(json.dumps(each.prompt), {}).setdefault(each.text, each)
    pairs = []
    rng = random.Random(0)
    for different in by_prompt.values():
        texts = list(different.values())
        rng.shuffle(texts)
        pairs += [
            Pair(a.prompt, list(dict.fromkeys([*a.tags, *b.tags])), a.text, b.text)
            for a, b in zip(texts[::2], texts[1::2], strict=False)
        ]
    return pairs


def judge(lm: Lm, pairs: Sequence[Pair], principles: Sequence[Mapping[str, Any]], *, batch: int = JUDGE) -> list[float]:
    """The weighted sum over principles of the log-odds that *a* is better, each the mean of both orders."""
    questions, weights, of = [], [], []
    for number, pair in enumerate(pairs):
        for principle in applicable(principles, pair.tags):
            for first, second, sign in ((pair.a, pair.b, 1), (pair.b, pair.a, -1)):
                questions.append(asks_comparison(pair.prompt, first, second, principle["compare"]))
                weights.append(sign * principle.get("weight", 1.0) / 2)
                of.append(number)
    options = [lm.tokenizer.encode(option, add_special_tokens=False)[0] for option in "AB"]
    sums = [0.0] * len(pairs)
    for number, weight, odds in zip(of, weights, log_odds(lm, rendered(lm, questions), options, batch), strict=True):
        sums[number] += weight * odds
    return sums


def prefer(pairs: Sequence[Pair], odds: Sequence[float]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows as TRL's trainers take them: those to learn from, and those of prompts that are held out."""
    learned: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for pair, towards_a in zip(pairs, odds, strict=True):
        chosen, rejected = (pair.a, pair.b) if towards_a > 0 else (pair.b, pair.a)
        row = {
            "prompt": list(pair.prompt),
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        (held_out if "held_out" in pair.tags else learned).append(row)
    return learned, held_out


def settings_of(stage: Settings) -> dict[str, Any]:
    """How a stage of the recipe samples."""
    known = {"max_new_tokens": 256, "temperature": 1.0, "top_p": 1.0}
    return {name: stage.get(name, default) for name, default in known.items()}


def arguments(stage: Settings, folder: Path) -> dict[str, Any]:
    """What TRL's config classes are given: what the recipe says, and to be quiet. All else is as it comes."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": stage["batch_size"],
        "max_length": stage["max_length"], "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(), "seed": 0, **stage["train"],
    }  # fmt: skip


def supervised(start: Path, responses: Sequence[Response], stage: Settings, folder: Path) -> Path:
    """Fine-tunes on whole responses; returns where the model is."""
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": list(each.prompt), "completion": [{"role": "assistant", "content": each.text}]}
        for each in responses
        if each.whole and each.text
    ]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        args=SFTConfig(**arguments(stage, folder)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    trainer.train()
    trainer.save_model(str(folder))
    return folder


def reward(
    start: Path, learned: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]], stage: Settings, to: Path
) -> float:
    """Trains a reward model; returns how often it puts the chosen response of held-out pairs first."""
    from trl import RewardConfig, RewardTrainer

    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, dtype=torch.float32),
        args=RewardConfig(**arguments(stage, to)),
        train_dataset=datasets.Dataset.from_list(list(learned)),
        eval_dataset=datasets.Dataset.from_list(list(held_out)),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    trainer.train()
    accuracy: float = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(str(to))
    return accuracy


def policy(start: Path, learned: Sequence[Mapping[str, Any]], stage: Settings, folder: Path) -> Path:
    """Trains a policy by DPO; returns where it is."""
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        args=DPOConfig(**arguments(stage, folder)),
        train_dataset=datasets.Dataset.from_list(list(learned)),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    trainer.train()
    trainer.save_model(str(folder))
    return folder


def compare(
    answers: Mapping[str, Sequence[Response]],
    judge_lm: Lm,
    principles: Sequence[Mapping[str, Any]],
    *,
    batch: int = JUDGE,
) -> dict[str, float]:
    """How often each checkpoint's answers win against each other one's; equal texts are half a win."""
    wins = {}
    for one, other in itertools.combinations(answers, 2):
        both = [Pair(a.prompt, a.tags, a.text, b.text) for a, b in zip(answers[other], answers[one], strict=True)]
        different = [pair for pair in both if pair.a != pair.b]
        odds = judge(judge_lm, different, principles, batch=batch)
        won = sum(each > 0 for each in odds) + (len(both) - len(different)) / 2
        wins[f"{other} against {one}"] = won / len(both)
    return wins


# The recipe.


class Recipe(NamedTuple):
    """The parts of a recipe file, as YAML has them."""

    stages: dict[str, Settings]
    prompts: dict[str, list[dict[str, Any]]]
    principles: list[Mapping[str, Any]]


def read(path: Path = RECIPE) -> Recipe:
    """A recipe with the stages of quickstart, the prompts of its sets and its principles."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    sets = {}
    for name, wanted in recipe["prompts"].items():
        tags = ["held_out"] if wanted.get("hold_out") else []
        found = prompts(wanted["split"], tuple(wanted.get("tags", ())), wanted["limit"])
        sets[name] = [{"messages": each["messages"], "tags": [*each["tags"], *tags]} for each in found]
    document = yaml.safe_load((path.parent / recipe["constitution"]).read_text(encoding="utf-8"))
    return Recipe({stage["id"]: stage for stage in recipe["stages"]}, sets, document["principles"])


def asked(recipe: Recipe, stage: str) -> list[dict[str, Any]]:
    """The prompts of a stage, each once."""
    found = [prompt for name in recipe.stages[stage]["prompts"] for prompt in recipe.prompts[name]]
    return list({json.dumps(prompt["messages"]): prompt for prompt in found}.values())


def quiet() -> None:
    """No progress bars and no warnings of the libraries."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore")


def run(recipe: Recipe, folder: Path) -> dict[str, float]:
    """All of it; the seconds of each stage."""
    quiet()
    stages, principles = recipe.stages, recipe.principles
    seconds: dict[str, float] = {}

    @contextmanager
    def clock(stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[stage] = round(time.perf_counter() - began, 2)
        print(f"{stage:12} {seconds[stage]:7.1f} s", flush=True)

    torch.manual_seed(0)
    with clock("responses"):
        base = load(MICRO)
        responses = sample(base, asked(recipe, "responses"), settings_of(stages["responses"]))
    with clock("revisions"):
        stage = stages["revisions"]
        harmful = [each for each in responses if set(stage["only"]) & set(each.tags)]
        others = [each for each in responses if not set(stage["only"]) & set(each.tags)]
        revised = revise(base, harmful, principles, settings_of(stage), rounds=stage["rounds"])
        changed = [new for old, new in zip(harmful, revised, strict=True) if new.text != old.text]
    with clock("sl-cai"):
        sl_cai = supervised(MICRO, [*changed, *others], stages["sl-cai"], folder / "sl-cai")
    with clock("candidates"):
        tuned = load(sl_cai)
        stage = stages["candidates"]
        candidates = sample(tuned, asked(recipe, "candidates"), settings_of(stage), n=stage["n"])
    with clock("votes"):
        pairs = disjoint_pairs([*candidates, *responses])
        odds = judge(base, pairs, principles)
    with clock("preferences"):
        learned, held_out = prefer(pairs, odds)
    with clock("reward"):
        accuracy = reward(sl_cai, learned, held_out, stages["reward"], folder / "reward")
    with clock("policy"):
        better = policy(sl_cai, learned, stages["policy"], folder / "policy")
    with clock("comparison"):
        answers = {}
        for name, lm in {"base": base, "sl-cai": tuned, "policy": load(better)}.items():
            torch.manual_seed(0)
            answers[name] = sample(lm, asked(recipe, "comparison"), settings_of(stages["comparison"]))
        wins = compare(answers, base, principles)
    print(f"{len(pairs):,} pairs; reward model right on {accuracy:.0%} of held-out ones")
    for who, share in wins.items():
        print(f"{who}: wins {share:.0%}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=RECIPE)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        seconds = run(read(given.recipe), Path(name))
    print(json.dumps({"bench": "plain", "seconds": seconds, "sum": round(sum(seconds.values()), 2)}))


if __name__ == "__main__":
    main()
