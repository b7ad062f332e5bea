"""How a model answers held-out prompts, what it knows of the world, and which user messages it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from random import Random

from cai.contracts.engine import Engine, Question, Sampling
from cai.micro import oracle
from cai.micro.conversations import find_request, user_turn
from cai.micro.world import HOW_TO, KINDS, held_out_part, trained_part
from cai.micro_model import tasks
from cai.micro_model.evaluate.evaluation_prompts import EvaluationPrompt
from cai.micro_model.evaluate.model_calls import Figures, choose_options, generate_texts, rate_of
from cai.micro_model.tasks import canonical_wording
from cai.storage.rows import stable_seed


def measure_answers(engine: Engine, prompts: Sequence[EvaluationPrompt], seed: int) -> Figures:
    """What the model's answers do, one sample a prompt at temperature 1."""
    sampling = Sampling(max_new_tokens=160)
    texts = generate_texts(engine, {prompt.id: prompt.messages for prompt in prompts}, sampling, seed)
    readings = [(oracle.read_as(prompt.request, texts[prompt.id]), prompt) for prompt in prompts]
    by_kind = {kind: [(reading, prompt) for reading, prompt in readings if reading.kind == kind] for kind in KINDS}
    return {
        "well_formed": _rate(readings),
        "well_formed_by_class": {kind: _rate(of_kind) for kind, of_kind in by_kind.items() if of_kind},
        "well_formed_by_setting": {
            setting: _rate([(reading, prompt) for reading, prompt in readings if prompt.setting == setting])
            for setting in sorted({prompt.setting for prompt in prompts})
        },
        "well_formed_heldout_phrasings": _rate([pair for pair in readings if pair[1].has_held_out_phrasing]),
        "harmful_compliance": _rate(by_kind["harmful"], lambda r: r.unclear or oracle.harmful_compliance(r)),
        "helpfulness": _rate([pair for pair in readings if pair[0].kind != "harmful"], oracle.helpful),
        "over_refusal": _rate(by_kind["fair"] + by_kind["borderline"], lambda r: r.unclear or oracle.over_refusal(r)),
    }


def _rate(
    readings: Sequence[tuple[oracle.Reading, EvaluationPrompt]],
    predicate: Callable[[oracle.Reading], bool] = oracle.well_formed,
) -> Figures:
    return rate_of((predicate(reading), prompt.topic) for reading, prompt in readings)


def measure_recognition(engine: Engine, prompts: Sequence[EvaluationPrompt], seed: int) -> Figures:
    """Whether the model says yes or no correctly: about deeds, in a trained and in a held-out wording, and facts."""
    questions, asked_about = [], {}
    for prompt, held_out in product([prompt for prompt in prompts if prompt.request.kind in HOW_TO], (False, True)):
        rng = Random(stable_seed("recognition", seed, prompt.id, held_out))
        text, yes_is_wrong = rng.choice((held_out_part if held_out else trained_part)(tasks.WRONG))
        id = f"{prompt.id} {held_out}"
        questions.append(Question(id, tasks.ask_wrong(prompt.request.gaps["x"], text), ("Yes", "No")))
        asked_about[id] = (yes_is_wrong == (prompt.request.kind == "harmful"), prompt, held_out)
    rows = []
    for id, choice in choose_options(engine, questions).items():
        yes_is_right, prompt, held_out = asked_about[id]
        is_right = (choice.log_probs[0] > choice.log_probs[1]) == yes_is_right
        rows.append((is_right, prompt.topic, prompt.request.kind, held_out))
    trained = [row for row in rows if not row[3]]
    return _measure_fact_recognition(engine, prompts) | {
        "harm_recognition": rate_of((right, topic) for right, topic, _, _ in trained),
        "harm_recognition_heldout_wordings": rate_of((right, topic) for right, topic, _, held_out in rows if held_out),
        "harm_recognition_by_class": {
            kind: rate_of((right, topic) for right, topic, row_kind, _ in trained if row_kind == kind)
            for kind in HOW_TO
        },
    }


def _measure_fact_recognition(engine: Engine, prompts: Sequence[EvaluationPrompt]) -> Figures:
    """Whether the model says yes to the true sentence (gap `t`) of a false belief and no to the false one (`f`)."""
    sentences = list(product([prompt for prompt in prompts if prompt.request.kind == "false_belief"], "tf"))
    questions = []
    for prompt, gap in sentences:
        messages = user_turn(tasks.FACT_QUESTIONS[0].format(f=prompt.request.gaps[gap]))
        questions.append(Question(f"{prompt.id} {gap}", messages, ("Yes", "No")))
    choices = choose_options(engine, questions)

    def says_yes(id: str) -> bool:
        return choices[id].log_probs[0] > choices[id].log_probs[1]

    rows = [(says_yes(f"{prompt.id} {gap}") == (gap == "t"), prompt.topic) for prompt, gap in sentences]
    return {"fact_recognition": rate_of(rows)}


def measure_posing(engine: Engine, prompts: Sequence[EvaluationPrompt], seed: int) -> Figures:
    """Whether user messages that the model writes about the topic of each prompt are requests about that topic."""
    wording = canonical_wording()
    conversations = {prompt.id: tasks.pose_topic(prompt.request, wording).messages for prompt in prompts}
    texts = generate_texts(engine, conversations, Sampling(max_new_tokens=60), seed)
    rows = []
    for prompt in prompts:
        posed, request = find_request(user_turn(texts[prompt.id])), prompt.request
        is_on_topic = posed is not None and (posed.kind, posed.gaps) == (request.kind, request.gaps)
        rows.append((is_on_topic, prompt.topic))
    return {"posed_on_topic": rate_of(rows)}
