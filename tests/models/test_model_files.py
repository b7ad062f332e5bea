"""What a model's files say before it is loaded: its role, and whether they are whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import Tiny

from cai.contracts.model import Model
from cai.models.loading import load_causal_lm
from cai.models.model_files import check_files, check_model, check_role, resolve_for
from cai.models.reference import resolve, trained_models
from cai.storage import run_folder
from cai.text.errors import BadInput

CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Model:
    """A whole model that may be broken."""
    shutil.copytree(tiny("llama").path, tmp_path / "model")
    return resolve("model", folder=tmp_path)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path, n_bytes: int) -> None:
    file.write_bytes(file.read_bytes()[:n_bytes])


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokenizer": (
        lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        r"'model' has no tokenizer in .*/model, expected tokenizer\.json$",
    ),
    "vocabulary": (lambda folder: (folder / "tokenizer.json").unlink(), "and no vocabulary beside it"),
    "half a tokenizer": (lambda folder: cut(folder / "tokenizer.json", 500), r"tokenizer\.json: not JSON"),
    "half the weights": (
        lambda folder: cut(folder / "model.safetensors", 30_000),
        r"model\.safetensors is not whole: found 30,000 bytes, expected \d+,\d+, as its header says; copy or download",
    ),
    "half a header": (lambda folder: cut(folder / "model.safetensors", 100), "ends within its header"),
    "no header": (lambda folder: cut(folder / "model.safetensors", 4), "is no safetensors file"),
    "a pointer": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is no safetensors file",
    ),
    "another name": (
        lambda folder: (folder / "model.safetensors").rename(folder / "weights.safetensors"),
        r"has no model\.safetensors and no model\.safetensors\.index\.json",
    ),
    "half a config": (lambda folder: cut(folder / "config.json", 60), r"config\.json: not JSON"),
    "a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        r"config\.json: expected an object, found list",
    ),
    "no type": (lambda folder: (folder / "config.json").write_text("{}"), "has no `model_type`"),
    "a new type": (
        lambda folder: edit_json(folder / "config.json", model_type="llama17"),
        "not know the type 'llama17'",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BREAKS.values(), ids=BREAKS)
def test_a_broken_model_is_refused_by_its_files_alone(model: Model, damage, message) -> None:
    check_files(model)
    damage(Path(model.path))
    with pytest.raises(BadInput, match=message):
        check_model(model, "language", runs=Path("runs"))


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox", "thinking", "lora"])
def test_whole_models_and_adapters_are_let_through(family: str, tiny: Tiny) -> None:
    check_model(tiny(family), "language", runs=Path("runs"))


def test_every_shard_that_the_index_names_is_looked_at(model: Model) -> None:
    folder = Path(model.path)
    load_causal_lm(model).save_pretrained(folder / "split", max_shard_size="60KB")
    (folder / "model.safetensors").unlink()
    for file in (folder / "split").glob("model*"):
        file.rename(folder / file.name)
    check_files(model)
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    cut(last, last.stat().st_size - 1)
    with pytest.raises(BadInput, match=rf"{last.name} is not whole"):
        check_files(model)
    first.unlink()
    with pytest.raises(BadInput, match=rf"{first.name} is missing"):
        check_files(model)


def test_an_adapter_is_looked_at_with_its_base(tiny: Tiny, tmp_path: Path) -> None:
    tiny("lora")
    for name in ("llama", "lora"):
        shutil.copytree(tiny(name).path, tmp_path / name)
    adapter = resolve("lora", folder=tmp_path)
    cut(tmp_path / "llama" / "model.safetensors", 30_000)
    with pytest.raises(BadInput, match=r"llama/model\.safetensors is not whole"):
        check_files(adapter)
    cut(tmp_path / "lora" / "adapter_model.safetensors", 500)
    with pytest.raises(BadInput, match=r"adapter_model\.safetensors ends within its header"):
        check_files(adapter)


def test_adapters_of_each_other_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    for name, base in (("first", "second"), ("second", "first")):
        shutil.copytree(tiny("lora").path, tmp_path / name)
        edit_json(tmp_path / name / "adapter_config.json", base_model_name_or_path=f"../{base}")
    with pytest.raises(BadInput, match="'first' is an adapter of more than 16 others, or of itself"):
        check_files(resolve("first", folder=tmp_path))


@pytest.mark.parametrize(
    ("config", "language", "score"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, None, "a language model, which writes, expected a sequence classif"),
        ({"architectures": ["GPT2LMHeadModel"]}, None, "a language model, which writes, expected a sequence classif"),
        (CLASSIFIER, "a sequence classifier, which gives a score, expected a language model, which writes", None),
        (CLASSIFIER | {"id2label": {"0": "a", "1": "b"}}, "a sequence classifier", "tells 2 labels apart, expected a"),
        ({"architectures": ["BertModel"]}, "is a BertModel, expected a language", "is a BertModel, expected a seq"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "has an encoder", "a language"),
        ({"architectures": []}, None, None),
    ],
)  # fmt: skip
def test_a_role_is_read_from_the_config(model: Model, config, language: str | None, score: str | None) -> None:
    edit_json(Path(model.path) / "config.json", **config)
    for role, message in (("language", language), ("score", score)):
        if message is None:
            check_role(model, role)  # type: ignore[arg-type]
        else:
            with pytest.raises(BadInput, match=message):
                check_role(model, role)  # type: ignore[arg-type]


def test_an_adapters_role_is_its_task(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("llama").path, tmp_path / "llama")
    shutil.copytree(tiny("lora").path, tmp_path / "lora")
    adapter = resolve("lora", folder=tmp_path)
    check_role(adapter, "language")
    edit_json(tmp_path / "lora" / "adapter_config.json", task_type="SEQ_CLS")
    check_role(adapter, "score")
    with pytest.raises(BadInput, match="'lora' is a sequence classifier, which gives a score, expected a language"):
        check_role(adapter, "language")


@pytest.fixture
def runs(model: Model, tmp_path: Path) -> Path:
    """A folder with the run `quickstart`, whose stages `policy` and `reward` trained models and `votes` none."""
    run = tmp_path / "runs" / "quickstart"
    for stage in ("policy", "reward", "votes"):
        (run / f"{stage}-0").mkdir(parents=True)
        run_folder.set_latest(run, stage, run / f"{stage}-0")
    for stage in ("policy", "reward"):
        shutil.copytree(model.path, run / f"{stage}-0" / "model")
    edit_json(run / "reward-0" / "model" / "config.json", **CLASSIFIER)
    return tmp_path / "runs"


def test_run_and_stage_name_what_the_stage_trained_last(runs: Path, tmp_path: Path) -> None:
    assert trained_models(runs) == ["quickstart/policy", "quickstart/reward"]
    policy = resolve_for("language", "quickstart/policy", folder=tmp_path / "elsewhere", runs=runs)
    assert (policy.name, policy.path) == ("quickstart/policy", str(runs / "quickstart" / "policy-0" / "model"))
    assert resolve(f"{runs}/quickstart/policy", folder=tmp_path, runs=tmp_path / "no-runs").path == policy.path
    assert resolve("quickstart/policy", folder=tmp_path, runs=tmp_path / "no-runs").path == "quickstart/policy"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "quickstart/polcy",
            r"no stage 'polcy' of the run .* expected one of: policy, reward; did you mean 'policy'\?",
        ),
        ("quickstart/votes", r"no stage 'votes' of the run .* has trained a model, expected one of: policy, reward"),
        ("quickstrat/policy", r"nor in the Hugging Face cache: .*; did you mean 'quickstart/policy'\?"),
        ("quickstart/reward", "is a sequence classifier, which gives a score, expected a language model"),
        ("runs/quickstart", "is a run, expected a model that one of its stages trained: runs/quickstart/policy, "),
        ("micr", r"did you mean 'micro'\?"),
        ("m" * 5000, "cannot be looked for: File name too long"),
    ],
)
def test_a_name_close_to_run_and_stage_is_refused_with_the_right_one(runs: Path, name: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        resolve_for("language", name, folder=runs.parent, runs=runs)
