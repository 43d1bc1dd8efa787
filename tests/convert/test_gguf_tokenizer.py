"""Tokenizers from GGUF metadata: the real one against committed ids, SentencePiece against its own algorithm, errors."""

import itertools
import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from convert.errors import UnsupportedFormatError
from convert.readers import open_checkpoint
from convert.readers.gguf_tokenizer import BYTE, CONTROL, NORMAL, PRE_TOKENIZERS, UNKNOWN, USER_DEFINED, assets_from_metadata

GOLDEN = Path(__file__).parents[1] / "data" / "smollm2_tokens.json"


def test_smollm2_ids(smollm2_gguf):
    assets = open_checkpoint(smollm2_gguf).assets
    tokenizer = Tokenizer.from_str(assets.tokenizer_json)
    cases = json.loads(GOLDEN.read_text())["cases"]
    assert len(cases) > 40
    for case in cases:
        ids = tokenizer.encode(case["text"]).ids
        assert ids == case["ids"], case["text"]
        assert tokenizer.decode(ids, skip_special_tokens=False) == case["text"]
    assert assets.config["eos_token"] == "<|im_end|>" and not assets.config["add_bos_token"]
    assert "im_start" in assets.config["chat_template"]
    assert assets.generation_config == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


# of a small hand-made vocabulary, best first
PIECES = [
    "▁t",
    "he",
    "▁the",
    "in",
    "ing",
    "▁a",
    "th",
    "at",
    "▁at",
    "▁th",
    "▁▁",
    "hat",
    "that",
    "▁that",
    "aa",
    "aaa",
    "aaaa",
    "1",
]
PIECES += ["▁1"]
LETTERS = [*"thieanging▁"]


def sentence_piece(**more):
    letters = list(dict.fromkeys(LETTERS))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "<user>", *PIECES, *letters]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER_DEFINED, *[NORMAL] * (len(PIECES) + len(letters))]
    scores = [0.0] * 260 + [-float(i) for i in range(len(PIECES))] + [-100.0 - i for i in range(len(letters))]
    own = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    own |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **more}
    return {f"tokenizer.ggml.{key}": value for key, value in own.items()}


def merge_by_score(text, metadata):
    """SentencePiece's algorithm: join the neighbours that make the best piece, leftmost first; bytes for what is unknown."""
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    split = [[s] if s in scores else [f"<0x{b:02X}>" for b in s.encode()] for s in symbols]
    return [tokens.index(piece) for pieces in split for piece in pieces]


def test_sentence_piece_merges_by_score():
    metadata = sentence_piece()
    tokenizer = Tokenizer.from_str(assets_from_metadata(metadata).tokenizer_json)
    chooser = random.Random(0)
    texts = ["", " ", "the that  thing at 11", "  aaaaaaa", "é🙂 z", "that"]
    texts += ["".join(chooser.choices("thieang  a1zé", k=chooser.randint(1, 40))) for _ in range(200)]
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert ids == [1, *merge_by_score(text, metadata)], text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a<user>the</s>").tokens == ["<s>", "▁a", "<user>", "▁the", "</s>"]
    assert tokenizer.decode(tokenizer.encode("a</s>").ids) == "a"  # control tokens are special


def test_sentence_piece_options():
    assets = assets_from_metadata(sentence_piece(add_space_prefix=False, add_bos_token=False, add_eos_token=True))
    tokenizer = Tokenizer.from_str(assets.tokenizer_json)
    assert tokenizer.encode("that the").tokens == ["that", "▁the", "</s>"]
    assert tokenizer.decode(tokenizer.encode(" the").ids) == " the"
    assert assets.config["add_eos_token"] is True and assets.config["bos_token"] == "<s>"
    with pytest.raises(UnsupportedFormatError, match="normalises text"):
        assets_from_metadata(sentence_piece(remove_extra_whitespaces=True))
    with pytest.raises(UnsupportedFormatError, match="no valid bos_token_id"):
        assets_from_metadata(sentence_piece(bos_token_id=100000))


def byte_level(pre, merges=("a b", "Ġ Ġ", "1 2", "12 3"), **more):
    alphabet = [*"abcABC123'sé\u010a!\u0120", "Ã", "©"]
    tokens = list(dict.fromkeys([*alphabet, "ab", "ĠĠ", "12", "123", "c!", "<eos>", "<eot>"]))
    types = [CONTROL if t.startswith("<") else NORMAL for t in tokens]
    own = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": list(merges)}
    own |= {"bos_token_id": tokens.index("<eos>"), "eos_token_id": tokens.index("<eos>"), **more}
    return {f"tokenizer.ggml.{key}": value for key, value in own.items()}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_round_trips(pre):
    assets = assets_from_metadata(byte_level(pre))
    tokenizer = Tokenizer.from_str(assets.tokenizer_json)
    text = "ab  AB 123 1 's é\n\n c!"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text
    assert assets.config["add_bos_token"] is PRE_TOKENIZERS[pre].add_bos


def test_pre_tokenizers_differ_where_they_should():
    def tokens(pre, text):
        assets = assets_from_metadata(byte_level(pre, add_bos_token=False))
        return Tokenizer.from_str(assets.tokenizer_json).encode(text).tokens

    assert tokens("gpt-2", "123") == tokens("llama-bpe", "123") == ["123"]
    assert tokens("smollm", "123") == tokens("qwen2", "123") == ["1", "2", "3"]
    assert tokens("gpt-2", "  1") == ["Ġ", "Ġ", "1"]  # the last space belongs to the number
    assert tokens("smollm", "  1") == ["ĠĠ", "1"]
    assert tokens("llama-bpe", "ac!") == ["a", "c", "!"]
    assert tokens("qwen2", "e\u0301".replace("e", "a") + "b") != tokens("gpt-2", "a\u0301b")  # NFC


def test_generation_ids_and_template():
    metadata = byte_level("smollm", eot_token_id=3) | {"tokenizer.chat_template": "{{ messages }}"}
    assets = assets_from_metadata(metadata)
    eos = metadata["tokenizer.ggml.eos_token_id"]
    assert assets.generation_config == {"bos_token_id": eos, "eos_token_id": [eos, 3]}
    assert assets.config["chat_template"] == "{{ messages }}"


def test_what_is_not_known_is_refused():
    with pytest.raises(UnsupportedFormatError, match="pre-tokenizer 'novel' is not one of default"):
        assets_from_metadata(byte_level("novel"))
    with pytest.raises(UnsupportedFormatError, match="model 'rwkv'"):
        assets_from_metadata({"tokenizer.ggml.model": "rwkv"})
    with pytest.raises(UnsupportedFormatError, match="no tokens or no merges"):
        assets_from_metadata({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"]})
    assert assets_from_metadata({}).tokenizer_json is None
