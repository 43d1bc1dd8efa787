"""The tokenizer of a GGUF file, as the `tokenizers` library's JSON.

"gpt2" is a byte-level BPE with the merges of the file and the pre-tokenizer that it names; "llama" is a SentencePiece BPE,
whose merges are the pairs of pieces that make a piece, best score first. Meanings as in llama.cpp and transformers.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from convert.errors import UnsupportedFormatError
from convert.readers.base import TokenizerAssets

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPACE = "▁"

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """How text is cut before byte-level BPE.

    regex: the pattern, or None for GPT-2's own. digits: each digit alone, first of all. ignore_merges: a word that is a token
    is that token. add_bos: whether a beginning-of-sequence token is added where the metadata do not say. nfc: normalise to NFC.
    """

    regex: str | None = None
    digits: bool = False
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(digits=True)
_LLAMA3_REGEX = _CONTRACTION + _WORD + r"|\p{N}{1,3}" + _TAIL
_LLAMA3 = PreTokenizer(regex=_LLAMA3_REGEX, ignore_merges=True, add_bos=True)
_GPT4O = PreTokenizer(regex="|".join(c + _CONTRACTION + "?" for c in _CASED) + r"|\p{N}{1,3}" + _TAIL_SLASH)
PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "mpt": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": PreTokenizer(regex=_LLAMA3_REGEX),
    "smaug-bpe": PreTokenizer(regex=_LLAMA3_REGEX),
    "qwen2": PreTokenizer(regex=_CONTRACTION + _WORD + r"|\p{N}" + _TAIL, nfc=True),
    "tekken": PreTokenizer(regex="|".join(_CASED) + r"|\p{N}" + _TAIL_SLASH, ignore_merges=True, add_bos=True),
    "gpt-4o": _GPT4O,
    "llama4": dataclasses.replace(_GPT4O, add_bos=True),
}


def assets_from_metadata(metadata: Mapping[str, Any]) -> TokenizerAssets:
    """Tokenizer, special tokens, chat template and generation ids out of GGUF metadata; empty where the file has no tokenizer.

    Raises UnsupportedFormatError for a tokenizer model or pre-tokenizer that is not known.
    """
    own = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    model = own.get("model")
    if model in (None, "none", "no_vocab"):
        return TokenizerAssets()
    if model not in ("gpt2", "llama"):
        raise UnsupportedFormatError(f"the GGUF file's tokenizer is of model {model!r}; only 'gpt2' and 'llama' are known")
    tokens: list[str] = own.get("tokens") or []
    if not tokens or (model == "gpt2" and "merges" not in own):
        raise UnsupportedFormatError("the GGUF file's tokenizer has no tokens or no merges; convert it again")
    types = own.get("token_type") or [NORMAL] * len(tokens)
    pre = None
    if model == "gpt2":
        name = own.get("pre", "default")
        if name not in PRE_TOKENIZERS:
            raise UnsupportedFormatError(
                f"the GGUF file's pre-tokenizer {name!r} is not one of {', '.join(PRE_TOKENIZERS)}; use the Hugging Face folder"
            )
        pre = PRE_TOKENIZERS[name]
    config: dict[str, Any] = {"add_bos_token": own.get("add_bos_token", pre is None or pre.add_bos)}
    config["add_eos_token"] = own.get("add_eos_token", False)
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        token = own.get(f"{key}_token_id")
        if token is not None and 0 <= token < len(tokens):
            config[f"{name}_token"] = tokens[token]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    parts = _byte_level(tokens, own["merges"], pre) if pre else _sentence_piece(tokens, types, own, config)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types),
        **parts,
        "post_processor": _template(tokens, own, config),
    }
    return TokenizerAssets(
        tokenizer_json=json.dumps(document, ensure_ascii=False), config=config, generation_config=_generation_config(own)
    )


def _generation_config(own: Mapping[str, Any]) -> dict[str, Any]:
    """Ids that start and end a text; a chat model ends its turn with eot or eom rather than with eos."""
    ends = list(dict.fromkeys(own[k] for k in ("eos_token_id", "eot_token_id", "eom_token_id") if k in own))
    ids = {"bos_token_id": own.get("bos_token_id"), "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}
    ids["pad_token_id"] = own.get("padding_token_id")
    return {key: value for key, value in ids.items() if value is not None}


def _added_tokens(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens that are cut out of the text first of all. A piece with a SentencePiece space in it is left to its merges."""
    kept = ((i, t, k) for i, (t, k) in enumerate(zip(tokens, types, strict=True)) if k in (UNKNOWN, CONTROL, USER_DEFINED))
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for i, token, kind in kept
        if token and not (kind == USER_DEFINED and SPACE in token)
    ]


def _template(tokens: Sequence[str], own: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    ends = {}
    for key in ("bos", "eos"):
        if config[f"add_{key}_token"]:
            if f"{key}_token" not in config:
                raise UnsupportedFormatError(f"the GGUF file asks to add a {key} token but has no valid {key}_token_id")
            ends[key] = own[f"{key}_token_id"]
    if not ends:
        return None
    around = lambda name, kind: [
        *([{"SpecialToken": {"id": tokens[ends["bos"]], "type_id": kind}}] if "bos" in ends else []),
        {"Sequence": {"id": name, "type_id": kind}},
        *([{"SpecialToken": {"id": tokens[ends["eos"]], "type_id": kind}}] if "eos" in ends else []),
    ]
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in ends.values()},
    }


def _byte_level(tokens: Sequence[str], merges: Sequence[str], pre: PreTokenizer) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pre.regex is None}
    steps: list[dict[str, Any]] = [byte_level]
    if pre.regex is not None:
        steps.insert(0, {"type": "Split", "pattern": {"Regex": pre.regex}, "behavior": "Isolated", "invert": False})
    if pre.digits:
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    return {
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(tokens, _pairs(merges), ignore_merges=pre.ignore_merges),
    }


def _pairs(merges: Sequence[str]) -> Sequence[str | Sequence[str]]:
    """Merges "a b" as they are where the space is plain; making pairs of them takes longer than anything else here."""
    return merges if all(m.count(" ") == 1 for m in merges) else [m.split(" ", 1) for m in merges]


def _bpe(tokens: Sequence[str], merges: Sequence[str | Sequence[str]], **options) -> dict[str, Any]:
    base: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    base |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
    return {**base, **options, "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}


def _sentence_piece(
    tokens: Sequence[str], types: Sequence[int], own: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    if own.get("remove_extra_whitespaces") or own.get("precompiled_charsmap"):
        raise UnsupportedFormatError("the GGUF file's SentencePiece model normalises text; use the Hugging Face folder")
    prefix = own.get("add_space_prefix", True)
    scores = own.get("scores") or [-float(i) for i in range(len(tokens))]
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    decode: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    decode += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        decode.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decode},
        "model": _bpe(
            tokens,
            merges_from_scores(tokens, types, scores),
            unk_token=config.get("unk_token"),
            fuse_unk=True,
            byte_fallback=BYTE in types,
        ),
    }


def merges_from_scores(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, best score first: the merges that a SentencePiece BPE stands for.

    Of equal scores the pair with the longer left part comes first, then the order of the vocabulary. Control, unknown, byte and
    unused pieces never come out of text, so they take no part.
    """
    pieces = {t: (i, s) for i, (t, k, s) in enumerate(zip(tokens, types, scores, strict=True)) if k in (NORMAL, USER_DEFINED)}
    found = []
    for piece, (_, score) in pieces.items():
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = sorted(
            (p for p in splits if p[0] in pieces and p[1] in pieces), key=lambda p: (pieces[p[0]][0], pieces[p[1]][0])
        )
        found += [(-score, -len(left), -len(right), (left, right)) for left, right in pairs]
    found.sort(key=lambda f: f[:3])
    return [pair for *_, pair in found]
