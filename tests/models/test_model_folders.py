"""Which model a name means, what identifies it, and that a saved model is loaded as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import Tiny

from cai.contracts.model import Model
from cai.models.loading import load_causal_lm, load_sequence_classifier, load_tokenizer, pick_device, pick_dtype
from cai.models.reference import download, fetch, identity, resolve
from cai.models.saving import save_model
from cai.text.errors import BadInput

IDS = torch.tensor([[1, 5, 9, 40]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def adapted(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """`model` with an adapter whose update is not zero."""
    torch.manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))  # type: ignore[arg-type]
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return peft


def test_a_path_is_found_here_or_beside_the_recipe(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(tiny("llama").path)
    shutil.copytree(source, tmp_path / "recipes" / "mine")
    assert resolve("mine", folder=tmp_path / "recipes").path == str(tmp_path / "recipes" / "mine")
    monkeypatch.chdir(tmp_path)
    assert resolve("recipes/mine", folder=tmp_path / "elsewhere").path == str(tmp_path / "recipes" / "mine")
    assert resolve("org/name", folder=tmp_path) == Model("org/name", "org/name", "default")


def test_a_name_without_a_usable_model_is_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput, match=r"'\./missing': no such folder"):
        resolve("./missing", folder=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file, expected a folder"):
        resolve("file", folder=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"has no config\.json"):
        resolve("empty", folder=tmp_path)
    shutil.copytree(tiny("llama").path, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(BadInput, match="pickled weights only, which can run code"):
        resolve("pickled", folder=tmp_path)
    absent = "'none-such/model' is neither a folder here nor in the Hugging Face cache"
    with pytest.raises(BadInput, match=rf"{absent}: give the path of a folder, or download it with `--online`"):
        fetch(resolve("none-such/model", folder=tmp_path))
    with pytest.raises(BadInput, match=rf"{absent}, and could not be downloaded: .*HF_HUB_OFFLINE is set"):
        fetch(resolve("none-such/model", folder=tmp_path), offline=False)
    with pytest.raises(BadInput, match="neither a file nor a Jinja template"):
        resolve(tiny("llama").path, chat_template="missing.jinja", folder=tmp_path)


def test_a_hub_id_is_downloaded_with_the_base_of_an_adapter(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = shutil.copytree(tiny("lora").path, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    folders = {"org/adapter": adapter, "org/base": Path(tiny("llama").path)}
    downloads: list[tuple[str, bool]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        downloads.append((name, local_files_only))
        return str(folders[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    download(resolve("org/adapter", folder=tmp_path))
    assert downloads == [("org/adapter", False), ("org/base", False)]


def test_identity_follows_weights_tokenizer_and_template_and_nothing_else(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("llama").path, tmp_path / "a")
    shutil.copytree(tiny("llama").path, tmp_path / "b")
    a, b = (resolve(name, folder=tmp_path) for name in "ab")
    assert identity(a) == identity(b)
    (tmp_path / "b" / "README.md").write_text("notes")
    (tmp_path / "b" / "cai.json").write_text('{"stage": "x"}')
    assert identity(a) == identity(b)
    assert identity(resolve("a", chat_template="{{ messages }}", folder=tmp_path)) != identity(a)
    weights = tmp_path / "b" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert identity(a) != identity(b)
    assert identity(tiny("lora")) not in {identity(tiny("llama")), identity(a)}


def test_what_is_saved_is_what_is_loaded(tiny: Tiny, tmp_path: Path) -> None:
    start = tiny("qwen2", templates="micro")
    model = load_causal_lm(start)
    save_model(tmp_path / "out", model, load_tokenizer(start), start, {"stage": "sft", "recipe": "r"})
    saved = resolve("out", folder=tmp_path)
    assert saved.templates == "micro"
    torch.testing.assert_close(logits(load_causal_lm(saved)), logits(model))
    assert load_tokenizer(saved).chat_template == load_tokenizer(start).chat_template
    facts = json.loads((tmp_path / "out" / "cai.json").read_text())
    assert facts["stage"] == "sft"
    assert (tmp_path / "out" / facts["base"]).samefile(start.path)
    assert "started from" in (tmp_path / "out" / "README.md").read_text()
    assert not list((tmp_path / "out").glob("*.bin"))


def test_adapters_upon_adapters_are_loaded_merged_and_may_move_together(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("llama").path, tmp_path / "run" / "base")
    start = resolve("run/base", templates="micro", folder=tmp_path)
    expected = logits(load_causal_lm(start))
    for name, seed in (("first", 1), ("second", 2)):
        peft = adapted(load_causal_lm(start), seed)
        expected = logits(peft)
        save_model(tmp_path / "run" / name, peft, load_tokenizer(start), start, {})  # type: ignore[arg-type]
        start = resolve(f"run/{name}", folder=tmp_path)
        assert start.templates == "micro"
        assert not (tmp_path / "run" / name / "model.safetensors").exists()
        torch.testing.assert_close(logits(load_causal_lm(start)), expected, atol=1e-5, rtol=1e-4)
    before = identity(start)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = resolve("moved/second", folder=tmp_path)
    torch.testing.assert_close(logits(load_causal_lm(moved)), expected, atol=1e-5, rtol=1e-4)
    assert identity(moved) == before
    shutil.rmtree(tmp_path / "moved" / "base")
    with pytest.raises(BadInput, match="the base of the adapter"):
        load_causal_lm(moved)


def test_an_added_pad_token_grows_the_embeddings_the_same_way_at_every_load(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("pad_is_eos")
    first, second, tokenizer = load_causal_lm(model), load_causal_lm(model), load_tokenizer(model)
    rows = first.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    assert tokenizer.pad_token_id < rows
    assert rows % 8 == 0
    assert first.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    torch.testing.assert_close(logits(first), logits(second), rtol=0, atol=0)
    save_model(tmp_path / "out", first, tokenizer, model, {})
    reloaded = resolve("out", folder=tmp_path)
    assert load_tokenizer(reloaded).pad_token_id == tokenizer.pad_token_id
    torch.testing.assert_close(logits(load_causal_lm(reloaded)), logits(first), rtol=0, atol=0)


def test_a_reward_model_starts_from_any_model_and_is_loaded_with_its_head(tiny: Tiny, tmp_path: Path) -> None:
    for family in ("llama", "gpt_neox", "pad_is_eos", "lora"):
        start = tiny(family)
        torch.manual_seed(0)
        model = load_sequence_classifier(start)
        scores = logits(model)
        assert scores.shape == (1, 1)
        assert model.config.pad_token_id == load_tokenizer(start).pad_token_id
        save_model(tmp_path / family, model, load_tokenizer(start), start, {})
        reloaded = load_sequence_classifier(resolve(family, folder=tmp_path))
        torch.testing.assert_close(logits(reloaded), scores, rtol=0, atol=0)


def test_a_reward_adapter_carries_its_head(tiny: Tiny, tmp_path: Path) -> None:
    start = tiny("llama")
    config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    peft = get_peft_model(load_sequence_classifier(start), config)
    scores = logits(peft)
    save_model(tmp_path / "reward", peft, load_tokenizer(start), start, {})  # type: ignore[arg-type]
    torch.manual_seed(99)
    reloaded = load_sequence_classifier(resolve("reward", folder=tmp_path))
    torch.testing.assert_close(logits(reloaded), scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("load", "start"),
    [(load_causal_lm, "llama"), (load_causal_lm, "lora"), (load_sequence_classifier, "llama"),
     (load_sequence_classifier, "lora")],
)  # fmt: skip
def test_bfloat16_is_the_precision_of_weights_and_not_of_rotary_frequencies(
    load: Callable[..., torch.nn.Module], start: str, tiny: Tiny
) -> None:
    model, expected = load(tiny(start), dtype="bfloat16"), load(tiny(start))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    frequencies = dict(model.named_buffers())["model.rotary_emb.inv_freq"]
    torch.testing.assert_close(frequencies, dict(expected.named_buffers())["model.rotary_emb.inv_freq"])


def test_dtypes_and_devices_are_those_of_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert pick_dtype("float32", cpu) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert pick_dtype("auto", cpu) == torch.float32
    with pytest.raises(BadInput, match="expected auto, float32 or bfloat16"):
        pick_dtype("fp8", cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == cpu
    with pytest.raises(BadInput, match="torch finds no GPU"):
        pick_device("cuda")


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert pick_device("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("cuda") == torch.device("cuda", 1)
    assert current == [0, 1]
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BadInput, match=r"^found 2 GPUs here, expected one for each .* this is process 2 of them$"):
        pick_device("cuda")
