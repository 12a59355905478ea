"""Adapter directories: refused whole when they do not fit, hot-swapped when they do, never unpickled."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import ZOO

import fxlora
from fxlora.cli import main
from fxlora.errors import AdapterError, CheckpointError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


def adapted(**settings: Any) -> torch.fx.GraphModule:
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "target_modules": ["0", "2"], **settings})
    lora = fxlora.rewrite(fxlora.trace(network()), config)
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if ".lora_" in name:
                p.copy_(torch.randn_like(p))
    return lora


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return fxlora.save_adapter(adapted(), tmp_path / "adapter")


def rewritten(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def values(graph: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in graph.state_dict().items()}


# ---- writing -----------------------------------------------------------------------------------


def test_the_folder_holds_two_files_and_nothing_half_written(saved: Path) -> None:
    names = sorted(p.name for p in saved.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_failing_write_leaves_the_old_files_whole(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def fail(self: Path, content: bytes) -> int:
        with self.open("wb") as f:
            f.write(content[: len(content) // 2])
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="full"):
        fxlora.save_adapter(adapted(), saved)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_failing_write_of_the_second_file_leaves_both_old_files(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    write = Path.write_bytes

    def fail(self: Path, content: bytes) -> int:
        if "config" in self.name:
            raise OSError("the disk is full")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="full"):
        fxlora.save_adapter(adapted(r=2), saved)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_configuration_json_has_no_form_for_is_refused_before_a_file_is_replaced(
    saved: Path, tmp_path: Path
) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    new = adapted(r=2, base_model_name_or_path=Path("models", "x"))
    message = r"^base_model_name_or_path=.*nothing was written.*or str\(\) of it: 'models/x'$"
    with pytest.raises(CheckpointError, match=message):
        fxlora.save_adapter(new, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    fxlora.load_adapter(fxlora.trace(network()), saved)
    with pytest.raises(CheckpointError, match="nothing was written"):
        fxlora.save_adapter(new, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "fxlora_config.json", "adapter_model.safetensors"]
)
def test_a_folder_in_a_file_s_place_is_named_before_a_file_is_replaced(
    saved: Path, name: str
) -> None:
    (saved / name).unlink(missing_ok=True)
    (saved / name).mkdir()
    before = {p.name: p.read_bytes() for p in saved.iterdir() if p.is_file()}
    with pytest.raises(CheckpointError, match=rf"{name} is a folder.*nothing was written. Give"):
        fxlora.save_adapter(adapted(r=2), saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir() if p.is_file()} == before
    assert (saved / name).is_dir()


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fxlora.save_adapter(adapted(target_modules={"0", "2"}), tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_adapter_by_another_name_has_a_folder_of_its_own(tmp_path: Path) -> None:
    both = fxlora.adapters.add(adapted(), LoraConfig(target_modules=["2"]), "other")
    folder = fxlora.save_adapter(both, tmp_path, "other")
    assert folder == tmp_path / "other"
    loaded = fxlora.load_adapter(fxlora.trace(network()), tmp_path, "other")
    assert fxlora.adapters.active(loaded) == ("other",)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no adapter 'defaut'.*Did you mean 'default'"):
        fxlora.save_adapter(adapted(), tmp_path, "defaut")
    with pytest.raises(AdapterError, match="no adapter 'default'"):
        fxlora.save_adapter(fxlora.trace(network()), tmp_path)
    meta = fxlora.rewrite(fxlora.trace(network().to("meta")), LoraConfig(target_modules=["0"]))
    with pytest.raises(CheckpointError, match="has no values to save"):
        fxlora.save_adapter(meta, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- hot-swapping ------------------------------------------------------------------------------


def test_loading_into_the_adapter_a_graph_has_copies_values_only(saved: Path) -> None:
    torch.manual_seed(7)
    lora = fxlora.rewrite(fxlora.trace(network()), LoraConfig(r=4, target_modules=["0", "2"]))
    parameters, nodes = dict(lora.named_parameters()), list(lora.graph.nodes)
    x = torch.randn(3, 10)
    before = lora(x)
    assert fxlora.load_adapter(lora, saved) is lora
    assert all(p is parameters[n] for n, p in lora.named_parameters())
    assert list(lora.graph.nodes) == nodes
    assert all(p.requires_grad for n, p in lora.named_parameters() if ".lora_" in n)
    assert not torch.equal(lora(x), before)
    assert torch.equal(lora(x), adapted()(x))


def test_a_loaded_adapter_is_frozen_unless_told_otherwise(saved: Path) -> None:
    traced = fxlora.trace(network())
    assert not any(p.requires_grad for p in fxlora.load_adapter(traced, saved).parameters())
    trains = fxlora.load_adapter(traced, saved, trainable=True)
    assert {n for n, p in trains.named_parameters() if p.requires_grad} == {
        n for n, _ in trains.named_parameters() if ".lora_" in n
    }


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"r": 8}, "rank of 0 is 4 on disk and 8 in the graph"),
        ({"lora_alpha": 16}, "scaling of 0 is 2.0 on disk and 4.0 in the graph"),
        ({"target_modules": ["0"]}, "rank of 2 is 4 on disk and not there in the graph"),
        ({"use_dora": True}, "variant of 0 is plain LoRA on disk and dora in the graph"),
    ],
)
def test_another_adapter_s_values_are_not_poured_into_a_graph(
    saved: Path, other: dict[str, Any], message: str
) -> None:
    lora = adapted(**other)
    before = values(lora)
    with pytest.raises(CheckpointError, match=message):
        fxlora.load_adapter(lora, saved)
    assert all(torch.equal(v, before[k]) for k, v in lora.state_dict().items())


# ---- a mismatch refuses the whole ----------------------------------------------------------------


def _drop(t: dict[str, torch.Tensor]) -> None:
    del t["base_model.model.2.lora_B.weight"]


def _rename(t: dict[str, torch.Tensor]) -> None:
    t["base_model.model.2.lora_b.weight"] = t.pop("base_model.model.2.lora_B.weight")


def _reshape(t: dict[str, torch.Tensor]) -> None:
    t["base_model.model.0.lora_A.weight"] = torch.zeros(4, 11)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop, ["missing", "2.lora_B.weight"]),
        (_rename, ["missing", "unexpected", "Did you mean", "2.lora_b.weight"]),
        (_reshape, ["misshapen", "(4, 11) on disk, (4, 10) in the graph"]),
    ],
)
def test_a_mismatch_refuses_the_whole_and_says_what(
    saved: Path, change: Any, words: list[str]
) -> None:
    rewritten(saved, change)
    lora = adapted()
    with torch.no_grad():
        for p in lora.parameters():
            p.mul_(2)
    before = values(lora)
    with pytest.raises(CheckpointError) as caught:
        fxlora.load_adapter(lora, saved)
    assert all(w in str(caught.value) for w in words), str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in lora.state_dict().items())
    with pytest.warns(UserWarning, match="loaded in part"):
        fxlora.load_adapter(lora, saved, strict=False)
    assert any(not torch.equal(v, before[k]) for k, v in lora.state_dict().items())


def test_a_config_that_does_not_fit_the_model_is_named(saved: Path) -> None:
    wide = fxlora.trace(nn.Sequential(nn.Linear(10, 20)))
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        fxlora.load_adapter(wide, saved)
    settings = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["q"]}))
    with pytest.raises(CheckpointError, match="does not fit the model: target_modules="):
        fxlora.load_adapter(fxlora.trace(network()), saved)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_is_never_opened(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (saved / "adapter_model.safetensors").unlink()
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="is a pickle"):
        fxlora.load_adapter(fxlora.trace(network()), saved)
    (saved / "adapter_model.bin").rename(saved / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        fxlora.load_adapter(fxlora.trace(network()), saved)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "peft_type is 'list'"),
        ('{"peft_type": "IA3"}', "peft_type is 'IA3'"),
        ('{"peft_type": "LORA", "use_magic": true}', "has no field 'use_magic'"),
        ('{"peft_type": "LORA", "r": 0, "target_modules": ["0"]}', "r=0"),
    ],
)
def test_a_config_that_is_none_is_refused(saved: Path, content: str, message: str) -> None:
    (saved / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        fxlora.load_adapter(fxlora.trace(network()), saved)


def test_a_missing_directory_names_the_adapters_that_are_there(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapters in its folders \['adapter'\]"):
        fxlora.load_adapter(fxlora.trace(network()), saved.parent)


def test_weights_are_not_loaded_into_a_graph_without_weights(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="meta device"):
        fxlora.load_adapter(fxlora.trace(network().to("meta")), saved)


# ---- base tensors, old names -----------------------------------------------------------------------


def test_biases_of_a_file_go_into_the_graph_and_never_into_the_model(tmp_path: Path) -> None:
    lora = adapted(bias="all")
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if name.endswith("bias"):
                p.data = p + 1  # not in place: the model's own storage
    fxlora.save_adapter(lora, tmp_path)
    model = network()
    before = values(model)
    loaded = fxlora.load_adapter(fxlora.trace(model), tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(loaded(torch.ones(2, 10)), lora(torch.ones(2, 10)))


def expert_by_expert(folder: Path) -> None:
    """Writes an adapter as peft wrote it for transformers 4, expert by expert."""
    torch.manual_seed(0)
    entry = ZOO["qwen3_moe"].build().config
    hidden, inner = entry.hidden_size, entry.moe_intermediate_size
    tensors = {}
    for layer in range(entry.num_hidden_layers):
        for expert in range(entry.num_experts):
            for name, (o, i) in {
                "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
            }.items():  # fmt: skip
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(2, i)
                tensors[f"{key}.lora_B.weight"] = torch.randn(o, 2)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "r": 2, "task_type": "CAUSAL_LM", "inference_mode": True,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_saved_for_transformers_4_s_experts_loads_as_in_peft(tmp_path: Path) -> None:
    entry = ZOO["qwen3_moe"]
    expert_by_expert(tmp_path / "v4")
    inputs = entry.inputs(2, 8)
    model = entry.build().eval()
    lora = fxlora.load_adapter(fxlora.trace(model, (), inputs), tmp_path / "v4").eval()
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "v4").eval()
    with torch.no_grad():
        ours, peft, base = (m(**inputs).logits for m in (lora, theirs, model))
    assert torch.equal(ours, peft)
    assert not torch.allclose(ours, base)


# ---- fxlora check ----------------------------------------------------------------------------------


def test_check_says_what_lands_where(
    saved: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert main(["check", str(saved), "--base", "tiny:sequential"]) == 0
    out = capsys.readouterr().out
    assert "base_model.model.0.lora_A.weight -> 0.lora_A.default.weight" in out
    assert "4 tensors fit, on 2 modules" in out


def test_check_is_one_and_names_the_nearest_when_it_does_not_fit(
    saved: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewritten(saved, _rename)
    monkeypatch.chdir(Path(__file__).parent)
    assert main(["check", str(saved), "--base", "tiny:sequential", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["counts"] == {"fits": 3, "unexpected": 1, "missing": 1}
    notes = {r["status"]: r["note"] for r in found["rows"]}
    assert "Did you mean" in notes["unexpected"]
    assert main(["check", str(saved / "nowhere"), "--base", "tiny:sequential"]) == 2


@pytest.mark.parametrize("below", ["", "inside", "inside/deeper"])
def test_a_file_in_the_folder_s_place_is_named_and_left_alone(tmp_path: Path, below: str) -> None:
    taken = tmp_path / "adapter"
    taken.write_text("notes")
    with pytest.raises(CheckpointError, match=r"adapter is a file, .* Give another folder"):
        fxlora.save_adapter(adapted(), taken / below)
    assert taken.read_text() == "notes"
    assert list(tmp_path.iterdir()) == [taken]
