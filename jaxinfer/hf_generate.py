"""generate() and a forward pass as scripts for Hugging Face and DeepSpeed call them: arrays of token ids in, arrays out.

`engine.generate(input_ids, attention_mask=..., max_new_tokens=20, do_sample=False)` is this. Every keyword means what it means in
transformers, or is refused; none is ignored.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxinfer.errors import PromptError, SamplingParamsError
from jaxinfer.sampling_params import MAX_SAMPLES, SamplingParams
from jaxinfer.values import check_keys

TOP_K = 50  # what transformers takes with do_sample=True where nothing else is said

# Keywords that are accepted at one value, because it changes nothing here, with what to do instead of others.
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), "there is no beam search; use best_of of SamplingParams"),
    "num_beam_groups": ((1,), "there is no beam search"),
    "early_stopping": ((False,), "it is about beam search; leave it out"),
    "length_penalty": ((1.0,), "it is about beam search; leave it out"),
    "use_cache": ((True,), "there is always a cache; leave it out"),
    "synced_gpus": ((False,), "one program runs on all devices; leave it out"),
    "return_dict_in_generate": (
        (False,),
        "use engine.generate(prompts, SamplingParams(...)), whose results have what is known",
    ),
    "output_scores": ((False,), "use logprobs of SamplingParams"),
    "output_logits": ((False,), "use logprobs of SamplingParams"),
    "output_attentions": ((False,), "attention is not kept; leave it out"),
    "output_hidden_states": ((False,), "hidden states are not kept; leave it out"),
}
# Knobs of drawing, with the values at which they do nothing: 1 or 0 where transformers has 1 or 0 for "off".
DRAWING: dict[str, tuple[Any, ...]] = {"temperature": (1.0,), "top_k": (0, TOP_K), "top_p": (1.0,), "min_p": (0.0,)}
ALWAYS = ("repetition_penalty", "no_repeat_ngram_size")  # as SamplingParams names them
KEYWORDS = (
    *(
        "max_new_tokens",
        "max_length",
        "min_new_tokens",
        "do_sample",
        *DRAWING,
        *ALWAYS,
        "bad_words_ids",
        "num_return_sequences",
    ),
    *("eos_token_id", "pad_token_id", "generation_config", "seed", *FIXED),
)


class Engine(Protocol):
    """What is needed of jaxinfer.Engine."""

    eos_ids: tuple[int, ...]

    def generate(self, prompts, params) -> Any: ...


def generate(engine: Engine, input_ids: Any, attention_mask: Any = None, **keywords: Any) -> Any:
    """The ids of prompts and what was generated for them, [B * num_return_sequences, T + longest], as transformers' generate gives them.

    input_ids: [B, T], a list, or an array of numpy, jax or torch. attention_mask: [B, T], 0 where a row is padded, on either side; without
    one, tokens that are pad_token_id are padding, if that is given and ends no text. Rows that end early are filled with pad_token_id (an
    end token by default). seed: row i is drawn with the seed of sample i of SamplingParams. The rest as in transformers; the checkpoint's
    generation_config.json is not read but for its end tokens, and a length has to be given.

    Returns an int64 numpy array, or a tensor of input_ids' own kind if it has new_tensor. Raises PromptError and SamplingParamsError.
    """
    values = _settings(keywords)
    prompts, width = _prompts(input_ids, _mask(input_ids, attention_mask, values, engine.eos_ids))
    params, copies = _params(values, width), _whole(values.get("num_return_sequences", 1), "num_return_sequences")
    if copies > 1 and not params.temperature:
        raise SamplingParamsError(
            f"num_return_sequences is {copies} without do_sample=True, where all would be the same; set that"
        )
    if copies > MAX_SAMPLES:
        raise SamplingParamsError(f"num_return_sequences is {copies}; give at most {MAX_SAMPLES}")
    # the samples of a prompt are one request, so that it is read once
    each = [dataclasses.replace(params.sample(i * copies), n=copies) for i in range(len(prompts))]
    results = [r for first in engine.generate(prompts, each) for r in (first, *first.alternatives)]
    fill = values.get("pad_token_id")
    fill = (_ends(values) or engine.eos_ids or (0,))[0] if fill is None else fill
    longest = max(len(result.token_ids) for result in results)
    given = np.repeat(np.asarray(_listed(input_ids), np.int64), copies, axis=0)
    new = np.full((len(results), longest), fill, np.int64)
    for row, result in zip(new, results, strict=True):
        row[: len(result.token_ids)] = result.token_ids
    whole = np.concatenate([given, new], axis=1)
    return input_ids.new_tensor(whole.tolist()) if hasattr(input_ids, "new_tensor") else whole


def _settings(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that say something, those of a generation_config under them; None says nothing. Raises SamplingParamsError."""
    values = {name: value for name, value in keywords.items() if value is not None}
    if (config := values.pop("generation_config", None)) is not None:
        if not hasattr(config, "to_diff_dict"):
            raise SamplingParamsError(f"generation_config is {config!r}; give a transformers.GenerationConfig, or its keys")
        inner = {
            k: v
            for k, v in config.to_diff_dict().items()
            if v is not None and k not in ("transformers_version", "bos_token_id")
        }
        values = {name: value for name, value in inner.items() if not name.startswith("_")} | values
    check_keys(values, KEYWORDS, "generate", error=SamplingParamsError)
    for name, (same, advice) in FIXED.items():
        if name in values and not any(values[name] == value and type(values[name]) is type(value) for value in same):
            raise SamplingParamsError(f"{name} is {values[name]!r}, and only {same[0]!r} means the same here: {advice}")
    return values


def _params(values: Mapping[str, Any], width: int) -> SamplingParams:
    draw = values.get("do_sample", False)
    if not isinstance(draw, bool):
        raise SamplingParamsError(f"do_sample is {draw!r}; give True or False")
    if not draw and (useless := [n for n, off in DRAWING.items() if values.get(n, off[0]) not in off]):
        raise SamplingParamsError(
            f"{useless[0]} is {values[useless[0]]!r} without do_sample=True, so the most likely token is taken; set that, or leave it out"
        )
    knobs: dict[str, Any] = {}
    if draw:
        knobs = {"temperature": 1.0, "top_k": TOP_K} | {name: values[name] for name in DRAWING if name in values}
    if draw and not knobs["temperature"]:
        raise SamplingParamsError("temperature is 0 with do_sample=True; give a positive number, or do_sample=False")
    if ("max_new_tokens" in values) == ("max_length" in values):
        raise SamplingParamsError("give max_new_tokens, or max_length for prompt and new tokens together, and one of them only")
    name = "max_new_tokens" if "max_new_tokens" in values else "max_length"
    new = _whole(values[name], name) - (width if name == "max_length" else 0)
    if new < 1:
        raise SamplingParamsError(f"max_length is {values['max_length']} and the prompts have {width} tokens; raise it")
    names = {"min_new_tokens": "min_tokens", "bad_words_ids": "bad_words", "seed": "seed"} | {name: name for name in ALWAYS}
    rest: dict[str, Any] = {ours: values[theirs] for theirs, ours in names.items() if theirs in values}
    ends = _ends(values)
    stops: dict[str, Any] = {"ignore_eos": True, "stop_token_ids": ends} if ends else {}
    return SamplingParams(max_tokens=new, **knobs, **rest, **stops)


def _ends(values: Mapping[str, Any]) -> tuple[int, ...]:
    ends = values.get("eos_token_id", ())
    return (ends,) if isinstance(ends, int) else tuple(_listed(ends))


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SamplingParamsError(f"{name} is {value!r}; give a whole number of at least 1")
    return value


def _listed(array: Any) -> Any:
    """An array of any library as lists."""
    return array.tolist() if hasattr(array, "tolist") else array


def _rows(array: Any, name: str) -> np.ndarray:
    """An array [B, T] of whole numbers, or of any for a mask. Raises PromptError."""
    try:
        rows = np.asarray(_listed(array))
    except ValueError:  # rows of unequal lengths
        rows = np.empty(0)
    if rows.ndim != 2 or not rows.size or rows.dtype.kind not in ("iu" if name == "input_ids" else "iubf"):
        raise PromptError(f"{name} must be whole numbers [B, T], rows padded to one length; got {rows.dtype}{list(rows.shape)}")
    return rows


def _mask(input_ids: Any, mask: Any, values: Mapping[str, Any], ends: Sequence[int]) -> np.ndarray:
    """Which tokens are prompt: bool [B, T]."""
    ids = _rows(input_ids, "input_ids")
    if mask is None:
        pad = values.get("pad_token_id")
        return np.ones(ids.shape, bool) if pad is None or pad in (_ends(values) or ends) else ids != pad
    rows = _rows(mask, "attention_mask")
    if rows.shape != ids.shape or not np.isin(rows, (0, 1)).all():
        raise PromptError(f"attention_mask must be 0 and 1 in the shape {list(ids.shape)} of input_ids, got {list(rows.shape)}")
    return rows.astype(bool)


def _prompts(input_ids: Any, real: np.ndarray) -> tuple[list[list[int]], int]:
    """Each row without its padding, and the width that the rows have with it."""
    ids = _rows(input_ids, "input_ids")
    prompts = []
    for i, (row, keep) in enumerate(zip(ids, real, strict=True)):
        places = np.flatnonzero(keep)
        if not places.size or places[-1] - places[0] + 1 != places.size:
            what = "is all padding" if not places.size else "is padded between its tokens"
            raise PromptError(f"row {i} of input_ids {what}; pad on the left or on the right")
        prompts.append(row[keep].tolist())
    return prompts, ids.shape[1]


@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """What a forward pass gives: logits float32 [B, T, V], 0 at padding; out[0] is out.logits, as in transformers."""

    logits: np.ndarray

    def __getitem__(self, index: int) -> np.ndarray:
        return (self.logits,)[index]


def forward(run: Callable[[list[list[int]]], np.ndarray], input_ids: Any, attention_mask: Any = None) -> ModelOutput:
    """The logits of whole rows [B, T], padded on either side. run: B prompts -> their logits [at least B, at least T, V].

    Raises PromptError.
    """
    real = _mask(input_ids, attention_mask, {}, ())
    prompts, width = _prompts(input_ids, real)
    found = run(prompts)
    logits = np.zeros((len(prompts), width, found.shape[-1]), np.float32)
    for i, prompt in enumerate(prompts):
        logits[i, real[i]] = found[i, : len(prompt)]
    return ModelOutput(logits)
