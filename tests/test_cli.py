"""The command line: what it prints, its JSON, its exit codes, its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fxlora.cli import main

SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "dtype": "bfloat16",
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    return str(tmp_path)


def test_plan_prints_a_table_and_the_totals(config: str, capsys: Any) -> None:
    assert main(["plan", config, "-r", "4", "-t", "q_proj,v_proj"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM: 4 of 16 linear sites adapted at 4 calls" in out
    assert "trainable params: 1,024 ||" in out


def test_plan_json_is_json_and_agrees(config: str, capsys: Any) -> None:
    assert main(["plan", f"{config}/config.json", "-t", "all-linear", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["adapted"] == sum(s["verdict"] == "adapted" for s in out["sites"]) == 14
    assert all(s["reason"] for s in out["sites"])
    assert "input_ids.size(1)" in out["trace"]["sizes"].values()


def test_explain_says_which_rule_decided(config: str, capsys: Any) -> None:
    name = "model.layers.1.mlp.gate_proj"
    assert main(["plan", config, "-t", "q_proj", "--layers", "0", "--explain", name]) == 0
    assert "none of its 1 entries is the name or a dotted suffix" in capsys.readouterr().out
    assert main(["plan", config, "-t", "q_proj", "--explain", "model.layers.1.mlp.gate_prj"]) == 2
    assert "The nearest: 'model.layers.1.mlp.gate_proj'" in capsys.readouterr().err


FUSED = {**SMALL, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0}


@pytest.fixture
def fused(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(FUSED), encoding="utf-8")
    return str(tmp_path)


def test_a_plan_says_what_names_of_parts_would_cost(fused: str, capsys: Any) -> None:
    assert main(["plan", fused, "-r", "4", "-t", "q_proj,o_proj"]) == 0
    out = capsys.readouterr().out
    assert "'q_proj' is a part of 'model.layers.0.self_attn.qkv_proj' (rows 0:32)" in out
    assert "note: with peft: target qkv_proj: +1,024 parameters" in out
    assert "split: one adapter for each slice" in out


def test_reach_adapts_a_part(fused: str, capsys: Any, tmp_path: Path) -> None:
    assert main(["plan", fused, "-r", "4", "-t", "q_proj", "--reach", "slices", "--json"]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    adapted = [s["name"] for s in sites if s["verdict"] == "adapted"]
    assert adapted == [f"model.layers.{i}.self_attn.qkv_proj.q" for i in (0, 1)]
    picture = tmp_path / "lora.dot"
    argv = ["draw", fused, "-t", "q_proj", "--reach", "slices", "-o", str(picture)]
    assert main(argv) == 0
    assert "A · q" in picture.read_text(encoding="utf-8")
    assert main(["plan", fused, "-t", "q_proj", "--reach", "slice"]) == 2
    assert "Did you mean 'slices'?" in capsys.readouterr().err


def test_cover_prints_the_table_and_is_json(config: str, capsys: Any) -> None:
    assert main(["plan", config, "-t", "q_proj", "--layers", "0", "--cover"]) == 0
    assert "self_attn.q_proj" in capsys.readouterr().out.split("trainable params")[1]
    assert main(["plan", config, "-t", "q_proj", "--cover", "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["coverage"]["share_of_parameters"] < 1


def test_choose_names_the_smallest_targets(config: str, capsys: Any) -> None:
    assert main(["plan", config, "--choose", "attention"]) == 0
    assert "['k_proj', 'o_proj', 'q_proj', 'v_proj']" in capsys.readouterr().out
    assert main(["plan", config, "--choose", "atention"]) == 2
    assert "Did you mean 'attention'?" in capsys.readouterr().err


def test_memory_of_one_and_of_a_sweep(config: str, capsys: Any) -> None:
    argv = ["memory", config, "-t", "q_proj", "--batch", "3", "--length", "20", "--json"]
    assert main(argv) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["inputs"][0] == "input_ids [3, 20]"
    assert one["optimizer"] == 8 * one["trains"] > 0
    assert main([*argv[:-2], "40", "--json"]) == 0
    (longer,) = json.loads(capsys.readouterr().out)
    assert longer["saved"] > 1.9 * one["saved"]
    assert main(["memory", config, "--sweep"]) == 0
    out = capsys.readouterr().out
    for label in ("attention r=8", "all-linear, layers 1-1 r=8", "everything (no LoRA)"):
        assert label in out
    assert main(["memory", config, "-t", "q_proj", "--dtype", "bf16"]) == 2
    assert main(["memory", config, "-t", "q_proj", "--batch", "0"]) == 2


def test_layers_and_exclusions_reach_the_plan(config: str, capsys: Any) -> None:
    argv = ["plan", config, "-t", "q_proj,k_proj", "--layers", "0-1", "--exclude-modules", "0.self_attn.k_proj", "--json"]  # fmt: skip
    assert main(argv) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    adapted = [s["name"].removeprefix("model.layers.") for s in sites if s["verdict"] == "adapted"]
    assert adapted == ["0.self_attn.q_proj", "1.self_attn.q_proj", "1.self_attn.k_proj"]


def test_compare_is_zero_when_equal_and_one_when_not(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert main(["compare", "tiny:sequential", "-r", "4", "-t", "0,2"]) == 0
    assert "are equal" in capsys.readouterr().out
    from fxlora import build

    draw = build.initialise
    monkeypatch.setattr(build, "initialise", lambda how, *rest: draw("gaussian", *rest))
    assert main(["compare", "tiny:sequential", "-r", "4", "-t", "0,2", "--json"]) == 1
    assert "drawn differently" in json.loads(capsys.readouterr().out)["differences"][0]


@pytest.mark.parametrize("suffix", ["svg", "dot", "html"])
def test_draw_leaves_the_picture(config: str, tmp_path: Path, suffix: str, capsys: Any) -> None:
    target = tmp_path / f"lora.{suffix}"
    assert main(["draw", config, "-t", "all-linear", "-o", str(target)]) == 0
    assert "q_proj" in target.read_text(encoding="utf-8")
    assert str(target) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["plan", "lama", "-t", "x"], 2, "Did you mean 'llama'?"),
        (["plan", "no/such.json", "-t", "x"], 2, "no such file"),
        (["plan", "tiny:sequentail", "-t", "x"], 2, "Did you mean 'sequential'?"),
        (["plan", "tiny:not_a_model", "-t", "x"], 2, "gave a int, not a torch.nn.Module"),
        (["plan", "nowhere_at_all:x", "-t", "x"], 2, "cannot import 'nowhere_at_all'"),
        (["plan", "tiny:sequential", "-t", "O"], 2, "selected none of the 2 linear sites"),
        (["plan", "tiny:sequential", "-t", "0", "-r", "0"], 2, "r=0: a rank is at least 1"),
        (["plan", "tiny:sequential", "-t", "0", "--layers", "a-b"], 2, "write 0,1,8-11"),
        (["plan", "tiny:sequential", "-t", "0", "--layers", "0,4-2"], 2, "'4-2' holds no index; write 2-4"),
        (["plan", "tiny:sequential", "-t", "(", "--regex"], 2, "not a regular expression"),
        (["plan", "tiny:sequential", "-r", "2", "--regex"], 2, "there is no -t"),
        (["plan", "tiny:sequential", "-t", " ,"], 2, "-t ' ,' names nothing; name something, or leave"),
        (["plan", "tiny:sequential", "-t", "0", "--modules-to-save", ""], 2, "--modules-to-save '' names nothing"),
        (["plan", "tiny:sequential", "-t", "0", "--reach", ""], 2, "--reach '' names nothing"),
        (["lint", "tiny:sequential", "-t", "0", "--select", ""], 2, "--select '' names nothing"),
        (["lint", "tiny:sequential", "-t", "0", "--ignore", "ALL"], 2, "no rule is left to run: select=['DEFAULT'], ignore=['ALL']. Select some"),
        (["draw", "tiny:sequential", "-t", "0", "-o", "x.gif"], 2, "x.gif"),
        (["draw", "tiny:sequential", "-t", "0", "--depth", "-1"], 2, "depth=-1"),
        (["draw", "tiny:sequential", "-t", "0", "--focus", "nosuch", "-o", "x.dot"], 2, "fxlora: focus='nosuch'"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_with_the_fix(
    argv: list[str], code: int, message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert main(argv) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("fxlora: ")
    assert len(err.strip().splitlines()) == 1


def test_a_saved_adapter_config_can_be_asked_about(
    config: str, tmp_path: Path, capsys: Any
) -> None:
    from peft import LoraConfig

    folder = tmp_path / "adapter"
    LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(folder)
    assert main(["plan", config, "--config", str(folder / "adapter_config.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapted"] == 2


def test_a_folder_without_a_config_is_said_so(tmp_path: Path, capsys: Any) -> None:
    assert main(["plan", str(tmp_path), "-t", "x"]) == 2
    assert "without a config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8")
    assert main(["plan", str(tmp_path), "-t", "x"]) == 2
    assert "no 'model_type'" in capsys.readouterr().err


def test_help_teaches_in_every_command() -> None:
    for argv in ([], ["plan"], ["draw"], ["compare"], ["lint"]):
        done = subprocess.run(
            [sys.executable, "-m", "fxlora", *argv, "--help"],
            capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"},
        )  # fmt: skip
        assert "config.json" in done.stdout
        assert "--help" in done.stdout


def test_plan_says_what_reaches_an_output(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert main(["plan", "tiny:sequential", "-t", "0,2", "--effects"]) == 0
    assert "2 of 2 adapters live" in capsys.readouterr().out
    assert main(["plan", "tiny:sequential", "-t", "0,2", "--effects", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["effects"]
    assert [(e["site"], e["verdict"]) for e in found] == [("0", "live"), ("2", "live")]


BUILDERS = """
def raises():
    raise RuntimeError("the weights are not here")
def nested():
    from torch import nn
    return nn.Linear("four", 4)
"""


@pytest.mark.parametrize("command", ["plan", "draw", "compare", "lint"])
@pytest.mark.parametrize(
    ("builder", "message"),
    [
        ("raises", "'own_builders:raises' raised RuntimeError (own_builders.py:3): the weights"),
        ("nested", "'own_builders:nested' raised TypeError ("),
    ],
)
def test_a_builder_that_raises_is_the_user_s_error(
    command: str, builder: str, message: str, tmp_path: Path, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "own_builders.py").write_text(BUILDERS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_builders", raising=False)
    assert main([command, f"own_builders:{builder}", "-t", "0"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fxlora: {message}")
    assert "Traceback" not in err


def test_a_module_that_fails_to_import_is_the_user_s_error(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_broken.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "own_broken:model", "-t", "0"]) == 2
    assert "raised ZeroDivisionError (own_broken.py:1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["-t", "q_proj"], "-t: the file says all of it. Leave it out"),
        (["-r", "8"], "-r: "),
        (["--dropout", "0"], "--dropout: "),
        (["--bias", "none"], "--bias: "),
        (["--dora", "--rslora", "-a", "4"], "-a, --rslora, --dora: the file says all of it. Leave them"),
    ],
)  # fmt: skip
def test_a_config_file_beside_an_option_it_says_is_refused(
    flags: list[str], named: str, config: str, tmp_path: Path, capsys: Any
) -> None:
    from peft import LoraConfig

    LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path / "a")
    file = str(tmp_path / "a" / "adapter_config.json")
    assert main(["plan", config, "--config", file, *flags]) == 2
    assert f"--config {file} and {named}" in capsys.readouterr().err


def test_without_options_the_defaults_are_peft_s(config: str, capsys: Any) -> None:
    assert main(["plan", config, "-t", "q_proj", "--json"]) == 0
    (first, *_) = [s for s in json.loads(capsys.readouterr().out)["sites"] if s["r"]]
    assert (first["r"], first["lora_alpha"], first["scaling"]) == (8, 8, 1.0)


def test_draw_takes_the_options_of_a_drawing(tmp_path: Path, capsys: Any) -> None:
    base = ["draw", "gpt2", "-t", "c_attn", "-o", str(tmp_path / "x.dot")]
    assert main(base) == 0
    both = (tmp_path / "x.dot").read_text(encoding="utf-8")
    assert main([*base, "--columns", "after", "--focus", "transformer.h.3.attn"]) == 0
    one = (tmp_path / "x.dot").read_text(encoding="utf-8")
    assert "cluster_b_panel" in both
    assert "cluster_b_panel" not in one
    assert "transformer_h_0" not in one
    for wrong in (["--columns", "after,before"], ["--theme", "pink"], ["--detail", "no"]):
        assert main([*base, *wrong]) == 2
        assert wrong[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "--choose", "all-linear", "--config", "nosuch.json", "-r", "-5", "-t", "x"],
         "--choose and -t, -r, --config: it looks for the targets itself. Leave them out"),
        (["plan", "--choose", "all-linear", "--effects"], "--choose and --effects: "),
        (["plan", "-t", "0", "--explain", "0", "--cover"], "--explain and --cover: "),
        (["memory", "--sweep", "--dropout", "0.1"], "--sweep without -t and --dropout: "),
        (["memory", "--sweep", "--reach", "uses"], "--sweep without -t and --reach: "),
        (["lint", "-t", "0", "--list-rules"], "--list-rules and MODEL, -t: "),
        (["lint", "-t", "0", "--explain-rule", "FXL201"], "--explain-rule and MODEL, -t: "),
    ],
)  # fmt: skip
def test_an_option_that_would_not_be_used_is_refused(
    argv: list[str], message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert main([argv[0], "tiny:sequential", *argv[1:]]) == 2
    assert f"fxlora: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "lint"])
def test_reach_is_no_option_where_nothing_reads_it(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "tiny:sequential", "-t", "0", "--reach", "uses"])
    assert stop.value.code == 2
    assert "--reach" in capsys.readouterr().err


def test_a_sweep_takes_the_rank_without_targets(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert main(["memory", "tiny:sequential", "-r", "2", "--sweep"]) == 0
    out = capsys.readouterr().out
    assert "all-linear r=2 " in out
    assert "yours" not in out
    assert main(["memory", "tiny:sequential", "-r", "-2", "--sweep"]) == 2
    capsys.readouterr()
    argv = ["memory", "tiny:sequential", "--target-parameters", "0.weight", "--sweep", "--json"]
    assert main([*argv, "-r", "2"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["label"] == "yours: 0.weight r=2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "its content is of type list, and a peft adapter_config.json is an object"),
        ("5", "its content is of type int"),
        ('{"r": 8, "peft_type": "LOHA", "target_modules": ["0"]}', "peft_type is 'LOHA'; fxlora reads LORA"),
    ],
)  # fmt: skip
def test_a_config_file_that_holds_no_lora_configuration_is_refused(
    content: str, message: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    file = tmp_path / "some.json"
    file.write_text(content, encoding="utf-8")
    assert main(["plan", "tiny:sequential", "--config", str(file)]) == 2
    assert f"fxlora: --config {file}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["lint", "draw"])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file/x.dot", "Not a directory: there is no folder"),
        ("nowhere/x.dot", "No such file or directory: there is no folder"),
        ("folder.dot", "Is a directory"),
        ("x" * 300 + ".dot", "File name too long"),
    ],
)
def test_an_output_that_cannot_be_written_is_the_command_line_s_error(
    command: str, output: str, message: str, tmp_path: Path, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(Path(__file__).parent)
    (tmp_path / "file").write_text("notes")
    (tmp_path / "folder.dot").mkdir()
    assert main([command, "tiny:sequential", "-t", "0", "-o", str(tmp_path / output)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fxlora: -o {str(tmp_path / output)!r} cannot be written: {message}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.dot"]


def test_an_empty_output_is_no_file(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert main(["lint", "tiny:sequential", "-t", "0", "-o", ""]) == 2
    assert "-o '' cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["lint", "draw"])
def test_an_output_through_a_link_writes_its_file(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    there = tmp_path / "there"
    there.mkdir()
    for name, old in (("old.dot", "old"), ("new.dot", None)):
        if old is not None:
            (there / name).write_text(old)
        link = tmp_path / name
        link.symlink_to(Path("there", name))
        assert main([command, "tiny:sequential", "-r", "2", "-t", "0", "-o", str(link)]) == 0
        assert link.is_symlink()
        assert (there / name).read_text(encoding="utf-8") not in ("", "old")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("command", ["lint", "draw"])
def test_a_pipe_is_written_into_and_stays(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    pipe = tmp_path / "pipe.dot"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # so that opening it to write does not wait
    try:
        assert main([command, "tiny:sequential", "-r", "2", "-t", "0", "-o", str(pipe)]) == 0
        assert os.read(reader, 10)
    finally:
        os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.skipif(not os.path.exists("/proc/self/fd/1"), reason="no /proc here")
def test_what_the_system_s_files_stand_for_is_added_to(tmp_path: Path) -> None:
    # Not /dev/stdout, which is a link that code gone wrong could replace for the whole machine.
    standard_out = "/proc/self/fd/1"
    log = tmp_path / "log"
    log.write_text("before\n")
    argv = [sys.executable, "-m", "fxlora", "lint", "tiny:sequential", "-r", "2", "-t", "0", "-o", standard_out]  # fmt: skip
    with log.open("a") as out:
        subprocess.run(argv, cwd=Path(__file__).parent, stdout=out, check=True)
    first, *rest = log.read_text(encoding="utf-8").splitlines()
    assert (first, bool(rest)) == ("before", True)
    done = subprocess.run(argv, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)  # fmt: skip
    assert "no findings" in done.stdout
