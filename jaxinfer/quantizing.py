"""From a checkpoint and a text to a quantised checkpoint: `jaxinfer quantize` as a function, and what the quantisation costs."""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.errors import DestinationExistsError, UnsupportedFormatError
from convert.export import FORMS, experts_apart, export_checkpoint
from convert.native import save_native
from convert.readers import DESCRIPTION, open_checkpoint
from convert.readers.base import LazyTensor
from convert.rules import StackedTensor, TransformedTensor, parts_of
from jaxinfer.config import QuantizationConfig
from jaxinfer.errors import QuantizationError
from jaxinfer.loading import Source, load_model, open_source
from jaxinfer.models.decoder import Decoder, parameters
from jaxinfer.quantization.calibration import calibration_tokens
from jaxinfer.quantization.grids import check_searchable
from jaxinfer.quantization.methods import LayerReport, Method
from jaxinfer.quantization.policy import Kept, attending, kept, matched
from jaxinfer.quantization.quantizer import Quantizer, key
from jaxinfer.quantization.sensitivity import FORMS as CHOICES
from jaxinfer.quantization.sensitivity import Choice, allocate, allocate_to_loss, sensitivities
from jaxinfer.text import Tokenizer
from jaxinfer.values import DTYPES

Progress = Callable[[int, int, str], None]
NATIVE = "native"
FORMATS = (NATIVE, *FORMS)
SENSITIVITY_SEQUENCES = 8  # of the calibration, at most, that costs are measured on
HELD_OUT = 8  # runs of the calibration text that only `verify` reads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """text: of any kind that the model is for. sequences: runs of `length` tokens that are read of it, spread evenly."""

    text: str
    sequences: int = 32
    length: int = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on a text: perplexities, mean KL divergence of the reference to the model in nats a token, and the share of tokens whose
    most likely successor is the same. tokens: that were scored."""

    tokens: int
    reference_perplexity: float
    perplexity: float
    kl: float
    same_top1: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """What was written. source: as it was understood. tensors: by module path, as they are kept. layers: errors by matrix, see
    LayerReport; empty without a text. choices: with a budget, the form of each matrix that had none, with its bytes and cost.
    comparison: with the float32 model on text that the method has not seen, where it was asked for."""

    source: Source
    tensors: Mapping[str, LazyTensor]
    layers: Sequence[LayerReport]
    choices: Mapping[str, Choice] = dataclasses.field(default_factory=dict)
    comparison: Comparison | None = None


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    quantization: QuantizationConfig,
    method: Method | None = None,
    calibration: Calibration | None = None,
    budget: int | None = None,
    loss: float | None = None,
    forms: Sequence[str] = CHOICES,
    form: str = NATIVE,
    overwrite: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Quantise a checkpoint by a method without training and write it.

    src: as for `load_model`. dst: a folder, or a file for the form gguf; it appears when it is complete. quantization: formats, rules
    and skips. method: rtn by default. budget: bytes of all weights; matrices without a rule then get those of `forms` that cost least
    within it, measured on the text, see `sensitivity`. loss: instead of it, by how much perplexity may grow, such as 0.01, as those costs
    estimate it; of what has a rule nothing is counted. form: native, or of another system (gptq, compressed-tensors, gguf), whose
    embedding and head stay as they are. overwrite: a native checkpoint at dst is replaced. verify: keep a part of the calibration text
    back, read dst again and compare it with the float32 model there. progress(done, total, name): layers, then bytes written.

    An interrupted run leaves a folder .NAME.quantize-* beside dst, from which the same call goes on; it is removed at the end.
    Raises QuantizationError, ConfigError and the classes of ConversionError before a weight is read, as far as they can be known then.
    """
    method = method or Method()
    dst = Path(dst).expanduser().absolute()
    if form not in FORMATS:
        raise UnsupportedFormatError(f"format {form!r} is not written; choose one of {', '.join(FORMATS)}")
    _check_destination(dst, form, overwrite)
    if form != NATIVE and quantization.attention_bits == 8:
        raise UnsupportedFormatError(
            f"{form} cannot say that attention multiplies integers; leave attention_bits, or write native"
        )
    if not quantization.enabled:
        raise QuantizationError("the quantisation is not enabled, so that there is nothing to do; use jaxinfer convert")
    for choice in forms:
        if choice not in DTYPES:
            QuantizationConfig.parse(choice)
    opened = open_source(src, progress)
    if opened.config.moe is not None and (budget is not None or loss is not None or method.static_inputs):
        what = "inputs get no static scale" if method.static_inputs else "bits are not chosen"
        raise QuantizationError(f"{opened.path} has experts, whose {what}; give bits, and leave static_inputs out")
    how = _kept(opened, quantization, form)
    if budget is not None and loss is not None:
        raise QuantizationError("bits are chosen by a budget or by a loss; leave one of them")
    if loss is not None and not 0 < loss < math.inf:
        raise QuantizationError(f"the loss is {loss}; give by how much perplexity may grow, such as 0.01")
    chosen = budget is not None or loss is not None
    rounded = any(value.spec and value.spec.activation for path, value in how.items() if path.startswith("blocks."))
    if method.static_inputs and not rounded:
        raise QuantizationError(
            "static scales are for inputs that are rounded, and none is; give activation_bits 8, or leave static_inputs"
        )
    if calibration is None and (verify or chosen or method.reads_text):
        what = "verify" if verify else "a choice of bits" if chosen else f"the method {method.name}"
        what = what if verify or chosen or method.name != "rtn" else "a static scale of inputs"
        raise QuantizationError(f"{what} needs a calibration text; give one")
    tokens, held_out = (None, None) if calibration is None else _tokens(opened, calibration, verify)
    choices: dict[str, Choice] = {}
    if chosen:
        assert tokens is not None
        choices = _choose(opened, quantization, how, tokens, budget, loss, forms, progress)
        rules = {**(quantization.rules or {}), **{path: choice.form for path, choice in choices.items()}}
        how = _kept(opened, dataclasses.replace(quantization, rules=rules), form)
    _check_matrices(opened, how, method)
    settings = {
        "source": str(opened.path),
        "changed": _changed(opened.path),
        "config": opened.config.to_dict(),
        "kept": {path: dataclasses.asdict(value) for path, value in how.items()},
        "method": dataclasses.asdict(method),
    }
    work = dst.parent / f".{dst.name}.quantize-{key(settings, tokens)}"
    quantizer = Quantizer(opened.tensors, opened.config, how, method, tokens=tokens, work=work)
    layers = quantizer.run(progress)
    results = quantizer.results()
    if form == NATIVE:
        config = attending(opened.config, quantization).to_dict()
        save_native(dst, config=config, tensors=results, assets=opened.assets, progress=progress, overwrite=overwrite)
    else:
        by_name: dict[str, LazyTensor] = {}
        for path, tensor in results.items():
            stack = opened.tensors[path]
            by_name |= parts_of(tensor, stack.names) if isinstance(stack, StackedTensor) else {tensor.name: tensor}
        source = open_checkpoint(opened.path)
        by_name = experts_apart(by_name, source.config.get("model_type"))
        export_checkpoint(dst, form, source, tensors=by_name, progress=progress)
    comparison = None
    if held_out is not None:
        comparison = compare(load_model(src, dtype="float32"), load_model(dst), held_out)
    shutil.rmtree(work)
    return Quantized(source=opened, tensors=results, layers=layers, choices=choices, comparison=comparison)


def _choose(
    opened: Source,
    quantization: QuantizationConfig,
    how: Mapping[str, Kept],
    tokens: np.ndarray,
    budget: int | None,
    loss: float | None,
    forms: Sequence[str],
    progress: Progress | None,
) -> dict[str, Choice]:
    """A form for every matrix that no rule names, so that all weights take at most `budget` bytes, or cost at most `loss`."""
    info = parameters(opened.config)
    matrices = [path for path, p in info.items() if len(p.axes) > 1 and p.axes[0] is not None]
    free = [path for path in matrices if path not in matched(matrices, quantization)]
    found = sensitivities(opened.tensors, opened.config, tokens[:SENSITIVITY_SEQUENCES], forms=forms, progress=progress)
    costs = {path: found[path] for path in free}
    if loss is not None:
        return allocate_to_loss(costs, loss)
    assert budget is not None
    fixed = sum(how[path].of(tensor).nbytes for path, tensor in opened.tensors.items() if path not in free)
    return allocate(costs, budget - fixed)


def _check_destination(dst: Path, form: str, overwrite: bool) -> None:
    """Refuse now what writing would refuse at the end."""
    if not os.path.lexists(dst) or (dst.is_dir() and not any(dst.iterdir())):
        return
    if form != NATIVE or not overwrite or not (dst / DESCRIPTION).is_file():
        raise DestinationExistsError(
            f"{dst} exists; choose another place, or pass overwrite=True to replace a native checkpoint"
        )


def _kept(opened: Source, quantization: QuantizationConfig, form: str) -> dict[str, Kept]:
    """How every tensor is kept, as far as the form holds it."""
    head_dim = opened.config.attention.head_dim
    how = kept(parameters(opened.config), dtype=None, quantization=quantization, head_dim=head_dim)
    if form != NATIVE:
        if opened.format == NATIVE:
            raise UnsupportedFormatError(f"{opened.path} is a native checkpoint; quantise the one that it was converted from")
        if moved := next((t for t in opened.tensors.values() if isinstance(t, TransformedTensor)), None):
            raise UnsupportedFormatError(
                f"{moved.name} is stored in another layout than the model's; this family is not exported"
            )
        how = {path: _exported(path, value, form) for path, value in how.items()}
    return how


def _check_matrices(opened: Source, how: Mapping[str, Kept], method: Method) -> None:
    """Raise QuantizationError, before a layer is read, for a group that does not divide and a format that the method does not have."""
    for path, value in how.items():
        value.of(opened.tensors[path])
        if value.spec and "gptq" in method.parts and path.startswith("blocks."):
            check_searchable(value.spec, path)


def _exported(path: str, value: Kept, form: str) -> Kept:
    """Other systems read float16 scales; outside of the layers only GGUF has packed tensors, as they are stored."""
    if not path.startswith("blocks."):
        return dataclasses.replace(value, spec=None, dtype=None, stored=form == "gguf")
    if value.spec is None:
        return value
    if form == "gguf" and not value.spec.group:
        raise UnsupportedFormatError(f"{path}: gguf has groups of 32 and no scale per channel; give a group size")
    if not value.spec.symmetric and form != "gguf":
        raise UnsupportedFormatError(f"{path}: {form} has no minimum per group; leave symmetric, or write gguf")
    return dataclasses.replace(value, spec=dataclasses.replace(value.spec, scale_dtype="float16"))


def _tokens(opened: Source, c: Calibration, verify: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Tokens of calibration and those that are held out for `verify`."""
    if c.length > opened.config.max_positions:
        raise QuantizationError(
            f"sequences of {c.length} tokens; the model was made for {opened.config.max_positions}: give shorter ones"
        )
    ids = Tokenizer.from_assets(opened.assets).encode(c.text, add_special=False)
    if not verify:
        return calibration_tokens(ids, sequences=c.sequences, length=c.length, vocab=opened.config.vocab), None
    kept_back = HELD_OUT * c.length
    if len(ids) < c.sequences * c.length + kept_back:
        raise QuantizationError(
            f"the calibration text has {len(ids)} tokens; {c.sequences} sequences of {c.length} and the {kept_back} that verify keeps "
            f"back need {c.sequences * c.length + kept_back}: give a longer text, or fewer or shorter sequences"
        )
    tokens = calibration_tokens(ids[:-kept_back], sequences=c.sequences, length=c.length, vocab=opened.config.vocab)
    return tokens, np.asarray(ids[-kept_back:], np.int32).reshape(HELD_OUT, c.length)


def _changed(path: Path) -> list[Any]:
    """Sizes and times of the source's files: work of another state of them is not gone on with."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [[str(file.name), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def compare(reference: Decoder, model: Decoder, windows: np.ndarray, progress: Progress | None = None) -> Comparison:
    """Two models on windows int32 [n, T] of tokens, the first of each unscored."""
    first, second = logits_of(reference), logits_of(model)
    sums = np.zeros(4)
    for n, window in enumerate(windows):
        if progress:
            progress(n, len(windows), "windows")
        ids = jnp.asarray(window[None])
        sums += np.asarray(compared(first(ids), second(ids), ids[0, 1:]), np.float64)
    return comparison(sums, windows.size - len(windows))


def comparison(sums: np.ndarray, tokens: int) -> Comparison:
    """Of the sums of `compared` over so many tokens."""
    nll, own, kl, same = sums / tokens
    return Comparison(tokens=tokens, reference_perplexity=math.exp(nll), perplexity=math.exp(own), kl=kl, same_top1=same)


def logits_of(model: Decoder) -> Callable[[jax.Array], jax.Array]:
    """ids int32 [1, T] -> logits float32 [T - 1, V] of what follows each, compiled; the weights are an argument."""
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids)[0, :-1])
    return lambda ids: run(state, ids)


@jax.jit
def compared(reference, logits, targets):
    """Of logits [T, V] and the tokens [T] that followed, float32 [4], sums over these: negative log-likelihoods of both, KL divergence of
    the reference to the model, agreements of the most likely token."""
    p, q = jax.nn.log_softmax(reference), jax.nn.log_softmax(logits)
    nll = lambda a: -jnp.take_along_axis(a, targets[:, None], 1).sum()
    return nll(p), nll(q), jnp.sum(jnp.exp(p) * (p - q)), jnp.sum(jnp.argmax(p, -1) == jnp.argmax(q, -1))
