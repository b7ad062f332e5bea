"""Constitutional AI as one assembles it from transformers and TRL: the plain side of the benchmarks.

    python benchmarks/plain.py                      the recipe quickstart
    python benchmarks/plain.py my-recipe.yaml       one with the same stages

Measures how long each stage takes. The method is that of recipes/quickstart.yaml, in its order and with its numbers, so
that the two can be read side by side. It is as fast as plain calls of the two libraries can be: bfloat16 if the
hardware computes in it, rows sorted by length and padded on the left, batch sizes that are fastest on a CPU (`WRITE`,
`JUDGE`; other benchmarks try more), logits of the last position only if one token is wanted, and TRL's trainers with
their defaults except for gradient checkpointing, which is off.

What it leaves out: labels are hard, because TRL's trainers have no others; texts of users and models are not escaped;
nothing but the models is stored, so nothing can be resumed. The only model is `micro`, which is asked in the words of
its training. The last line is one JSON object with the seconds of each stage.
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
"""Batch size of generation."""
JUDGE = 16
"""Batch size of the judge's questions."""
Message = Mapping[str, Any]
Settings = Mapping[str, Any]


class Lm(NamedTuple):
    model: Any
    tokenizer: Any


class Text(NamedTuple):
    """A generated response: ids up to and including the end of the turn, and the text without it."""

    ids: list[int]
    text: str
    is_finished: bool
    """Whether it has an end of turn."""


@dataclass(frozen=True)
class Response:
    prompt: Sequence[Message]
    tags: Sequence[str]
    text: str
    is_finished: bool


class Pair(NamedTuple):
    """Two responses to one conversation."""

    prompt: Sequence[Message]
    tags: Sequence[str]
    a: str
    b: str


# Generation and log-odds.


def load(folder: str | Path, dtype: torch.dtype | None = None) -> Lm:
    """The model in a folder, on the GPU if there is one, in bfloat16 if that is fast."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        has_fast_bfloat16 = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
        dtype = torch.bfloat16 if has_fast_bfloat16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return Lm(model, AutoTokenizer.from_pretrained(folder))


@torch.inference_mode()
def generate(
    lm: Lm, rows: Sequence[Sequence[int]], batch: int, *, max_new_tokens: int, temperature: float, top_p: float,
    n: int = 1,
) -> list[list[int]]:  # fmt: skip
    """`n` continuations of each row, in order; ids up to and including the end of the turn.

    Temperature 0 is greedy; `n` must then be 1.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0, "num_return_sequences": n}
    if temperature == 0:
        sampling = {"do_sample": False}
    end = lm.model.generation_config.eos_token_id
    continuations: list[list[int]] = [[] for _ in range(n * len(rows))]
    for part in batches(rows, max(1, batch // n)):
        inputs = padded(lm, [rows[index] for index in part])
        sequences = lm.model.generate(
            **inputs, **sampling, max_new_tokens=max_new_tokens, pad_token_id=lm.tokenizer.pad_token_id
        )
        for place, ids in enumerate(sequences[:, inputs["input_ids"].shape[1] :].tolist()):
            length = ids.index(end) + 1 if end in ids else len(ids)
            continuations[part[place // n] * n + place % n] = ids[:length]
    return continuations


@torch.inference_mode()
def log_odds(lm: Lm, rows: Sequence[Sequence[int]], options: Sequence[int], batch: int) -> list[float]:
    """Log-odds (nats) of the first of two options against the second as the next token of each row."""
    odds = [0.0] * len(rows)
    for part in batches(rows, batch):
        inputs = padded(lm, [rows[index] for index in part])
        logits = lm.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, list(options)].float()
        for index, (first, second) in zip(part, logits.tolist(), strict=True):
            odds[index] = first - second
    return odds


def batches(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Batches of row indices, by row length."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for first in range(0, len(order), size):
        yield order[first : first + size]


def padded(lm: Lm, rows: Sequence[Sequence[int]]) -> Any:
    """Ids and mask, padded on the left, on the model's device."""
    return lm.tokenizer.pad({"input_ids": list(rows)}, padding_side="left", return_tensors="pt").to(lm.model.device)


def rendered(lm: Lm, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Each conversation as ids, with a generation prompt."""
    return [
        lm.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        for messages in conversations
    ]


def generate_texts(
    lm: Lm, conversations: Sequence[Sequence[Message]], settings: Settings, *, n: int = 1, batch: int = WRITE
) -> list[Text]:
    """`n` responses to each conversation, in order."""
    ids = generate(lm, rendered(lm, conversations), batch, n=n, **settings)
    texts = lm.tokenizer.batch_decode(ids, skip_special_tokens=True)
    end = lm.tokenizer.eos_token_id
    return [Text(own_ids, text.strip(), own_ids[-1] == end) for own_ids, text in zip(ids, texts, strict=True)]


# Requests in the words that micro was trained on.


def conversation(messages: Sequence[Message]) -> str:
    """The conversation as text."""
    return "Conversation:\n" + "".join(f"{message['role']}: {message['content']}\n" for message in messages)


def ask_critique(prompt: Sequence[Message], response: str, request: str) -> list[Message]:
    """Messages that ask for a critique."""
    text = f"{conversation(prompt)}Response:\n{response}\nRequest:\n{request}"
    return [{"role": "user", "content": text}]


def ask_revision(prompt: Sequence[Message], response: str, critique: str, request: str) -> list[Message]:
    """Messages that ask for a revision after a critique."""
    text = f"{conversation(prompt)}Response:\n{response}\nCritique:\n{critique}\nRequest:\n{request}"
    return [{"role": "user", "content": text}]


def ask_comparison(prompt: Sequence[Message], first: str, second: str, request: str) -> list[Message]:
    """Messages that ask which response is better, A or B."""
    text = f"{conversation(prompt)}Response A:\n{first}\nResponse B:\n{second}\n{request}"
    return [{"role": "user", "content": text}]


# The stages of the recipe.


def applicable(principles: Sequence[Mapping[str, Any]], tags: Sequence[str]) -> list[Mapping[str, Any]]:
    """The principles that apply to a prompt with these tags."""
    return [p for p in principles if not p.get("applies_to") or set(p["applies_to"]) & set(tags)]


def sample(
    lm: Lm, requests: Sequence[Mapping[str, Any]], settings: Settings, *, n: int = 1, batch: int = WRITE
) -> list[Response]:
    """`n` responses to each prompt."""
    texts = generate_texts(lm, [prompt["messages"] for prompt in requests], settings, n=n, batch=batch)
    prompt_of_text = [prompt for prompt in requests for _ in range(n)]
    return [
        Response(prompt["messages"], prompt["tags"], text.text, text.is_finished)
        for prompt, text in zip(prompt_of_text, texts, strict=True)
    ]


def revise(
    lm: Lm, responses: Sequence[Response], principles: Sequence[Mapping[str, Any]], settings: Settings, *, rounds: int,
    batch: int = WRITE,
) -> list[Response]:  # fmt: skip
    """Each response criticised and revised once a round, by a different principle in each round if there are enough."""
    rng = random.Random(0)
    sampled = [
        rng.sample(candidates := applicable(principles, response.tags), min(rounds, len(candidates)))
        for response in responses
    ]
    for number in range(rounds):
        by = [of_response[number % len(of_response)] for of_response in sampled]
        requests = [
            ask_critique(response.prompt, response.text, principle["critique"])
            for response, principle in zip(responses, by, strict=True)
        ]
        critiques = generate_texts(lm, requests, settings, batch=batch)
        requests = [
            ask_revision(response.prompt, response.text, critique.text, principle["revise"])
            for response, critique, principle in zip(responses, critiques, by, strict=True)
        ]
        revisions = generate_texts(lm, requests, settings, batch=batch)
        responses = [
            replace(response, text=revision.text, is_finished=revision.is_finished) if revision.text else response
            for response, revision in zip(responses, revisions, strict=True)
        ]
    return list(responses)


def disjoint_pairs(responses: Sequence[Response]) -> list[Pair]:
    """Pairs of finished responses to one prompt; each response is in one pair at most."""
    by_prompt: dict[str, dict[str, Response]] = {}
    for response in responses:
        if response.is_finished and response.text:
            by_prompt.setdefault(json.dumps(response.prompt), {}).setdefault(response.text, response)
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
    """Log-odds that *a* is better: means of both orders, weighted and summed over principles."""
    questions, weights, pair_numbers = [], [], []
    for number, pair in enumerate(pairs):
        for principle in applicable(principles, pair.tags):
            for first, second, sign in ((pair.a, pair.b, 1), (pair.b, pair.a, -1)):
                questions.append(ask_comparison(pair.prompt, first, second, principle["compare"]))
                weights.append(sign * principle.get("weight", 1.0) / 2)
                pair_numbers.append(number)
    options = [lm.tokenizer.encode(option, add_special_tokens=False)[0] for option in "AB"]
    sums = [0.0] * len(pairs)
    odds = log_odds(lm, rendered(lm, questions), options, batch)
    for number, weight, question_odds in zip(pair_numbers, weights, odds, strict=True):
        sums[number] += weight * question_odds
    return sums


def prefer(pairs: Sequence[Pair], odds: Sequence[float]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows for TRL's trainers: those to learn from, and those of held-out prompts."""
    learned: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for pair, odds_of_a in zip(pairs, odds, strict=True):
        chosen, rejected = (pair.a, pair.b) if odds_of_a > 0 else (pair.b, pair.a)
        row = {
            "prompt": list(pair.prompt),
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        (held_out if "held_out" in pair.tags else learned).append(row)
    return learned, held_out


def settings_of(stage: Settings) -> dict[str, Any]:
    """Sampling settings of a stage of the recipe."""
    defaults = {"max_new_tokens": 256, "temperature": 1.0, "top_p": 1.0}
    return {name: stage.get(name, default) for name, default in defaults.items()}


def training_arguments(stage: Settings, folder: Path) -> dict[str, Any]:
    """Arguments of TRL's config classes: the recipe's, and no output. Everything else has its default."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": stage["batch_size"],
        "max_length": stage["max_length"], "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(), "seed": 0, **stage["train"],
    }  # fmt: skip


def train(trainer: Any, folder: Path) -> Path:
    """Trains and saves the model to the folder, which it returns."""
    trainer.train()
    trainer.save_model(str(folder))
    return folder


def train_sft(start: Path, responses: Sequence[Response], stage: Settings, folder: Path) -> Path:
    """Fine-tunes on finished responses; returns the folder of the model."""
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": list(response.prompt), "completion": [{"role": "assistant", "content": response.text}]}
        for response in responses
        if response.is_finished and response.text
    ]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        args=SFTConfig(**training_arguments(stage, folder)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    return train(trainer, folder)


def train_reward(
    start: Path, learned: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]], stage: Settings,
    folder: Path,
) -> float:  # fmt: skip
    """Trains a reward model; returns its accuracy on held-out pairs."""
    from trl import RewardConfig, RewardTrainer

    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, dtype=torch.float32),
        args=RewardConfig(**training_arguments(stage, folder)),
        train_dataset=datasets.Dataset.from_list(list(learned)),
        eval_dataset=datasets.Dataset.from_list(list(held_out)),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    train(trainer, folder)
    accuracy: float = trainer.evaluate()["eval_accuracy"]
    return accuracy


def train_dpo(start: Path, learned: Sequence[Mapping[str, Any]], stage: Settings, folder: Path) -> Path:
    """Trains a policy by DPO; returns its folder."""
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        args=DPOConfig(**training_arguments(stage, folder)),
        train_dataset=datasets.Dataset.from_list(list(learned)),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    return train(trainer, folder)


def compare(
    answers: Mapping[str, Sequence[Response]], judge_lm: Lm, principles: Sequence[Mapping[str, Any]], *,
    batch: int = JUDGE,
) -> dict[str, float]:  # fmt: skip
    """Win rate of each checkpoint against each earlier one; equal texts are half a win."""
    win_rates = {}
    for earlier, later in itertools.combinations(answers, 2):
        pairs = [Pair(a.prompt, a.tags, a.text, b.text) for a, b in zip(answers[later], answers[earlier], strict=True)]
        different = [pair for pair in pairs if pair.a != pair.b]
        odds = judge(judge_lm, different, principles, batch=batch)
        wins = sum(pair_odds > 0 for pair_odds in odds) + (len(pairs) - len(different)) / 2
        win_rates[f"{later} against {earlier}"] = wins / len(pairs)
    return win_rates


# The recipe.


class Recipe(NamedTuple):
    """The parts of a recipe file, parsed as YAML."""

    stages: dict[str, Settings]
    prompts: dict[str, list[dict[str, Any]]]
    principles: list[Mapping[str, Any]]


def read_recipe(path: Path = RECIPE) -> Recipe:
    """A recipe with the stages of quickstart, the prompts of its sets and its principles."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    sets = {}
    for name, settings in recipe["prompts"].items():
        tags = ["held_out"] if settings.get("hold_out") else []
        rows = prompts(settings["split"], tuple(settings.get("tags", ())), settings["limit"])
        sets[name] = [{"messages": row["messages"], "tags": [*row["tags"], *tags]} for row in rows]
    document = yaml.safe_load((path.parent / recipe["constitution"]).read_text(encoding="utf-8"))
    return Recipe({stage["id"]: stage for stage in recipe["stages"]}, sets, document["principles"])


def prompts_of(recipe: Recipe, stage: str) -> list[dict[str, Any]]:
    """The prompts of a stage without duplicates."""
    in_sets = [prompt for name in recipe.stages[stage]["prompts"] for prompt in recipe.prompts[name]]
    return list({json.dumps(prompt["messages"]): prompt for prompt in in_sets}.values())


def silence_libraries() -> None:
    """Switches off the libraries' progress bars and warnings."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore")


def run(recipe: Recipe, folder: Path) -> dict[str, float]:
    """Runs the recipe; seconds of each stage."""
    silence_libraries()
    stages, principles = recipe.stages, recipe.principles
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[stage] = round(time.perf_counter() - start, 2)
        print(f"{stage:12} {seconds[stage]:7.1f} s", flush=True)

    torch.manual_seed(0)
    with timed("responses"):
        base = load(MICRO)
        responses = sample(base, prompts_of(recipe, "responses"), settings_of(stages["responses"]))
    with timed("revisions"):
        stage = stages["revisions"]
        to_revise = [response for response in responses if set(stage["only"]) & set(response.tags)]
        unrevised = [response for response in responses if not set(stage["only"]) & set(response.tags)]
        revised = revise(base, to_revise, principles, settings_of(stage), rounds=stage["rounds"])
        changed = [new for old, new in zip(to_revise, revised, strict=True) if new.text != old.text]
    with timed("sl-cai"):
        sl_cai = train_sft(MICRO, [*changed, *unrevised], stages["sl-cai"], folder / "sl-cai")
    with timed("candidates"):
        tuned = load(sl_cai)
        stage = stages["candidates"]
        candidates = sample(tuned, prompts_of(recipe, "candidates"), settings_of(stage), n=stage["n"])
    with timed("votes"):
        pairs = disjoint_pairs([*candidates, *responses])
        odds = judge(base, pairs, principles)
    with timed("preferences"):
        learned, held_out = prefer(pairs, odds)
    with timed("reward"):
        accuracy = train_reward(sl_cai, learned, held_out, stages["reward"], folder / "reward")
    with timed("policy"):
        policy = train_dpo(sl_cai, learned, stages["policy"], folder / "policy")
    with timed("comparison"):
        answers = {}
        for name, lm in {"base": base, "sl-cai": tuned, "policy": load(policy)}.items():
            torch.manual_seed(0)
            answers[name] = sample(lm, prompts_of(recipe, "comparison"), settings_of(stages["comparison"]))
        win_rates = compare(answers, base, principles)
    print(f"{len(pairs):,} pairs; reward model right on {accuracy:.0%} of held-out ones")
    for checkpoints, win_rate in win_rates.items():
        print(f"{checkpoints}: wins {win_rate:.0%}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=RECIPE)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        seconds = run(read_recipe(arguments.recipe), Path(name))
    print(json.dumps({"bench": "plain", "seconds": seconds, "sum": round(sum(seconds.values()), 2)}))


if __name__ == "__main__":
    main()
