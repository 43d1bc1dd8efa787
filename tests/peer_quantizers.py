"""Small random Llamas, quantised by other systems' own tools: runs with the Python of scripts/quantizers_env.sh, which has no jax.

    python tests/peer_quantizers.py FOLDER NAME ...

Writes FOLDER/NAME, the checkpoint as the tool saves it, with prompt.npy and logits.npy beside it: those of the tool's own dequantised
weights in float32. Prints a line of JSON for each: {"name": ..., "error": null or why it could not be made}.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

VOCAB = 256
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
PROMPT = np.random.default_rng(0).integers(0, VOCAB, (1, 24))
CALIBRATION = np.random.default_rng(1).integers(0, VOCAB, (16, 64))


def fresh(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).eval()


def plain_folder(folder: Path) -> Path:
    """The fresh model beside `folder`, with a tokenizer of as many words: tools want a folder that they could download."""
    plain = folder.with_name(f"{folder.name}-plain")
    fresh().save_pretrained(plain)
    add_tokenizer(plain, VOCAB)
    return plain


def add_tokenizer(folder: Path, vocab: int) -> None:
    words = tokenizers.Tokenizer(WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(folder)


def save_logits(folder: Path, model: Any) -> None:
    with torch.no_grad():
        prompt = PROMPT % model.config.vocab_size
        logits = model.float()(torch.tensor(prompt)).logits
    np.save(folder / "prompt.npy", prompt)
    np.save(folder / "logits.npy", logits.float().numpy())


def compressed_logits(folder: Path) -> None:
    """Of weights that the package itself has decompressed; inputs are left as they are."""
    from compressed_tensors.quantization import disable_quantization
    from transformers import CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CompressedTensorsConfig(run_compressed=False), dtype=torch.float32
    )
    model.apply(disable_quantization)
    save_logits(folder, model)


def llm_compressor(recipe: Callable[[], Any], *, calibrated: bool = False) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from datasets import Dataset
        from llmcompressor import oneshot

        rows = {"input_ids": CALIBRATION.tolist(), "attention_mask": np.ones_like(CALIBRATION).tolist()}
        more: dict[str, Any] = {}
        if calibrated:
            more = {"dataset": Dataset.from_dict(rows), "num_calibration_samples": len(CALIBRATION), "max_seq_length": 64}
        plain = plain_folder(folder)
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        oneshot(model=model, recipe=recipe(), processor=AutoTokenizer.from_pretrained(plain), **more)
        model.save_pretrained(folder, save_compressed=True)
        compressed_logits(folder)

    return make


def rounding(scheme: str) -> Callable[[], Any]:
    def recipe() -> Any:
        from llmcompressor.modifiers.quantization import QuantizationModifier

        return QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])

    return recipe


def static_int8() -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import QuantizationModifier

    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel"),
        input_activations=QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="tensor", dynamic=False),
    )
    return QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])


def gptq_act_order() -> Any:
    from llmcompressor.modifiers.quantization import GPTQModifier

    return GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"], actorder="static")


def awq() -> Any:
    from llmcompressor.modifiers.awq import AWQModifier

    return AWQModifier(targets=["Linear"], scheme="W4A16_ASYM", ignore=["lm_head"])


def bitsandbytes(bits: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from transformers import BitsAndBytesConfig

        plain = plain_folder(folder)
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        config = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
        model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32)
        model.save_pretrained(folder)
        save_logits(folder, model.dequantize(dtype=torch.float32))

    return make


def import_gptqmodel() -> Any:
    # its pools want two workers of the CPU, and it gives itself half as many as there are cores
    os.cpu_count = lambda: 4  # type: ignore[assignment]
    import gptqmodel

    return gptqmodel


def gptq_logits(folder: Path) -> None:
    """Of weights that GPTQModel itself dequantises; its own matmuls are in float16."""
    gptqmodel = import_gptqmodel()
    settings = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "quantization_config"}
    if not (folder / "tokenizer.json").is_file():
        add_tokenizer(folder, settings["vocab_size"])
    loaded = gptqmodel.GPTQModel.load(str(folder), device="cpu", backend=gptqmodel.BACKEND.TORCH, dtype=torch.float16).model
    stored = load_file(folder / "model.safetensors")
    target = LlamaForCausalLM(LlamaConfig(**settings)).float().eval()
    with torch.no_grad():
        for name, module in target.named_modules():
            packed = loaded.get_submodule(name)
            if hasattr(packed, "dequantize_weight"):  # in the dtype of its scales, [inputs, outputs]
                packed.scales = packed.scales.float()
                module.weight.copy_(packed.dequantize_weight().T)
            elif isinstance(getattr(module, "weight", None), torch.nn.Parameter):
                module.weight.copy_(stored[f"{name}.weight"])  # which it has made float16 too
    save_logits(folder, target)


def gptq_model(**settings: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        gptqmodel = import_gptqmodel()
        config = gptqmodel.QuantizeConfig(bits=4, group_size=32, **settings)
        model = gptqmodel.GPTQModel.load(str(plain_folder(folder)), config, device="cpu", backend=gptqmodel.BACKEND.TORCH)
        rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in CALIBRATION]
        model.quantize(rows, batch_size=1)
        model.save(str(folder))
        gptq_logits(folder)

    return make


def mixtral(folder: Path) -> None:
    """Saved by transformers 5 as it holds its modules: experts in one tensor."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)).eval()
    model.save_pretrained(folder)
    save_logits(folder, model)


RECIPES: dict[str, Callable[[Path], None]] = {
    "llmcompressor-w4a16": llm_compressor(rounding("W4A16")),
    "llmcompressor-w4a16-asym": llm_compressor(rounding("W4A16_ASYM")),
    "llmcompressor-w8a16": llm_compressor(rounding("W8A16")),
    "llmcompressor-w8a8": llm_compressor(rounding("W8A8"), calibrated=True),
    "llmcompressor-w8a8-static": llm_compressor(static_int8, calibrated=True),
    "llmcompressor-fp8-dynamic": llm_compressor(rounding("FP8_DYNAMIC")),
    "llmcompressor-fp8-static": llm_compressor(rounding("FP8"), calibrated=True),
    "llmcompressor-fp8-block": llm_compressor(rounding("FP8_BLOCK")),
    "llmcompressor-gptq-act-order": llm_compressor(gptq_act_order, calibrated=True),
    "llmcompressor-awq": llm_compressor(awq, calibrated=True),
    "bitsandbytes-nf4": bitsandbytes(4),
    "bitsandbytes-int8": bitsandbytes(8),
    "gptqmodel": gptq_model(sym=True),
    "gptqmodel-act-order": gptq_model(desc_act=True, sym=False),
    "transformers-mixtral": mixtral,
}


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:] or list(RECIPES)
    for name in names:
        error = None
        try:
            RECIPES[name](out / name)
        except BaseException as e:
            traceback.print_exc()
            error = f"{type(e).__name__}: {e}"[:300]
        print(json.dumps({"name": name, "error": error}), flush=True)


if __name__ == "__main__":
    main()
