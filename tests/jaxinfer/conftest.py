"""Small random Llamas as Hugging Face folders, engines on them that are made once, and a byte-level tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import golden_weights
import jax
import numpy as np
import pytest
import tokenizers
from tiny_llama import GREEDY, PROMPTS, SAMPLED, TINY, Ask, TinyModel, tensor_shapes, tokens_of
from tokenizers import decoders, models, pre_tokenizers

import jaxinfer
from convert.readers.base import TokenizerAssets
from jaxinfer.text import Tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """tiny_model(key=value, ...): a folder with these keys of config.json changed, written once a session."""
    known: dict[str, TinyModel] = {}

    def make(**changes: Any) -> TinyModel:
        key = json.dumps(changes, sort_keys=True)
        if key not in known:
            config = TINY | changes
            tensors = golden_weights.make_tensors(tensor_shapes(config), seed=4)
            folder = golden_weights.write_folder(tmp_path_factory.mktemp("tiny"), config, tensors)
            known[key] = TinyModel(folder, config, tensors)
        return known[key]

    return make


@pytest.fixture(scope="session")
def tiny(tiny_model: Callable[..., TinyModel]) -> TinyModel:
    return tiny_model()


@pytest.fixture(scope="session")
def tiny_decoder(tiny: TinyModel) -> jaxinfer.Decoder:
    """The tiny model as a module."""
    return jaxinfer.load_model(tiny.folder)


@pytest.fixture(scope="session")
def make_engine(tiny: TinyModel) -> Callable[..., jaxinfer.Engine]:
    """make_engine(tp=, pp=, model=, tokenizer=, **keys of EngineConfig): an engine on the tiny model, made once a session."""
    known: dict[Any, jaxinfer.Engine] = {}

    def make(
        *, tp: int = 1, pp: int = 1, model: TinyModel = tiny, tokenizer: Tokenizer | None = None, **keys: Any
    ) -> jaxinfer.Engine:
        sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
        values = {"inference_max_tokens": 64, "micro_batch_size": 4, "engine": sizes} | keys
        key = (model.folder, json.dumps(values, sort_keys=True), tokenizer)
        if key not in known:
            known[key] = jaxinfer.init_inference(model.folder, values, tokenizer=tokenizer)
        return known[key]

    return make


@pytest.fixture(scope="session")
def logits_of(tiny_decoder: jaxinfer.Decoder) -> Ask:
    """The module's logits [n, V] of n tokens."""
    run = jax.jit(lambda ids, n: tiny_decoder(ids, lengths=n))

    def ask(ids: list[int]) -> np.ndarray:
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(run(padded, np.array([len(ids)], np.int32)))[0, : len(ids)]

    return ask


@pytest.fixture(scope="session")
def engine(make_engine) -> jaxinfer.Engine:
    return make_engine()


@pytest.fixture(scope="session")
def greedy(engine) -> list[list[int]]:
    """Each prompt alone."""
    return tokens_of([engine.generate(prompt, GREEDY) for prompt in PROMPTS])


@pytest.fixture(scope="session")
def sampled(engine) -> list[list[int]]:
    """Each prompt alone, with its own parameters."""
    return tokens_of([engine.generate(prompt, params) for prompt, params in zip(PROMPTS, SAMPLED, strict=True)])


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """97 tokens: <eos> and the printable ASCII characters, one token each."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [c for c in letters if 33 <= ord(c) < 127]
    vocab = {"<eos>": 0, "Ġ": 1} | {c: i for i, c in enumerate(printable, 2)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer.from_assets(TokenizerAssets(tokenizer_json=backend.to_str(), config={"eos_token": "<eos>"}))


_compiled: list[str] = []


def _listen(event: str, duration: float, **details: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(str(details.get("fun_name")))


jax.monitoring.register_event_duration_secs_listener(_listen)


@pytest.fixture
def compiled() -> list[str]:
    """Names of the programs that were compiled since the test began."""
    _compiled.clear()
    return _compiled
