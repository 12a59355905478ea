"""Adapters stand beside quantized linears as peft puts them there, where a library is installed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from torch import nn

import fxlora
from fxlora.errors import AdapterError, UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the libraries, which warn of kernels a CPU lacks
]


def four_bit(dtype: torch.dtype) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 64).to(dtype)
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
    layer.bias = nn.Parameter(plain.bias.data)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(64, 8).to(dtype)).to("cpu")


def eight_bit(dtype: torch.dtype) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 64)
    layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = nn.Parameter(plain.bias.data)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(64, 8)).to("cpu")


def weight_only(dtype: torch.dtype) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    quantization.quantize_(
        model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name == "0"
    )
    return model


CASES = [
    pytest.param(four_bit, torch.float32, id="4bit"),
    pytest.param(four_bit, torch.bfloat16, id="4bit-bf16"),
    pytest.param(eight_bit, torch.float32, id="8bit"),
    pytest.param(weight_only, torch.float32, id="torchao"),
]


@pytest.mark.parametrize(("build", "dtype"), CASES)
def test_an_adapter_beside_a_quantized_linear_is_peft_s_bit_for_bit(
    build: Callable[[torch.dtype], nn.Module], dtype: torch.dtype
) -> None:
    model = build(dtype)
    config = LoraConfig(target_modules=["0", "2"], r=4, lora_dropout=0.1)
    result = fxlora.compare(model, config, (torch.randn(3, 64, dtype=dtype),))
    assert result.equal, result.differences
    assert result.certificate.equal
    assert {p.name for p in result.plan.adapted} == {"0", "2"}
    assert len(result.gradients) == 4
    assert all(d.equal for d in (*result.outputs, *result.gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_loaded_in_4_bits_casts_the_branch_as_peft_s_own_class_does(
    dtype: torch.dtype,
) -> None:
    model = four_bit(dtype)
    model.is_loaded_in_4bit = True
    config = LoraConfig(target_modules=["0"], r=4)
    result = fxlora.compare(model, config, (torch.randn(3, 64, dtype=dtype),))
    assert all(d.equal for d in (*result.outputs, *result.gradients)), result.differences
    assert len(result.gradients) == 2


@pytest.mark.parametrize(("build", "dtype"), CASES)
def test_what_needs_the_weight_itself_is_refused(
    build: Callable[[torch.dtype], nn.Module], dtype: torch.dtype
) -> None:
    traced = fxlora.trace(build(dtype), (torch.randn(3, 64, dtype=dtype),))
    for extra in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(UnsupportedError, match="is a quantized"):
            fxlora.plan(traced, LoraConfig(target_modules=["0"], **extra))
    with pytest.raises(AdapterError, match="is a quantized"):
        fxlora.merge(fxlora.rewrite(traced, LoraConfig(target_modules=["0"])))
