"""Tokenizers, chat templates, streaming and stop strings, on tokenizers small enough to be built here."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxinfer.errors import ChatTemplateError, NoChatTemplateError, NoTokenizerError, TextError
from jaxinfer.text import StopMatcher, StreamDecoder, Tokenizer

CORPUS = [
    "The capital of France is Paris. The capital of Spain is Madrid.",
    "def add(a, b):\n    return a + b  # 1 2 3\n",
    "größer, naïve, 東京は日本の首都です, ¿qué tal?",
]
# Characters that vocabularies split: emoji with joiners and skin tones, flags, combining marks, wide scripts, spaces.
ATOMS = [
    "a",
    "B",
    " ",
    "  ",
    "\n",
    "é",
    "e\u0301",
    "東",
    "👩‍👩‍👧",
    "👍🏽",
    "🇫🇷",
    "\u200d",
    "\ufffd",
    "▁",
    "Ġ",
    "€",
    "\u00a0",
    "capital",
    "0",
]
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_end|>"]


@dataclasses.dataclass(frozen=True)
class Assets:
    tokenizer_json: str | None
    config: dict = dataclasses.field(default_factory=dict)
    generation_config: dict = dataclasses.field(default_factory=dict)
    folder: Path | None = None


def byte_level() -> tokenizers.Tokenizer:
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    tok.add_tokens(["<tool>", "你好"])
    return tok


def sentencepiece(decoder: decoders.Decoder, scheme: str = "first") -> tokenizers.Tokenizer:
    """BPE over words that begin with ▁, with byte tokens for all else, as Llama's vocabulary is."""
    learner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += [p for p in sorted(learned["vocab"], key=learned["vocab"].get) if p not in pieces]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tok = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "normalizer":
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tok.decoder = decoder
    tok.add_special_tokens(SPECIALS)
    return tok


def word_piece() -> tokenizers.Tokenizer:
    tok = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece()
    tok.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIALS, show_progress=False))
    return tok


def word_ends() -> tokenizers.Tokenizer:
    tok = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIALS, end_of_word_suffix="</w>", show_progress=False)
    tok.train_from_iterator(CORPUS, trainer)
    return tok


def without_decoder() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(json.loads(word_piece().to_str()) | {"decoder": None}))


def decoded_as_speech() -> tokenizers.Tokenizer:
    tok = word_piece()
    tok.decoder = decoders.CTC()
    return tok


def llama_decoder(*last):
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])


BUILDERS = {
    "byte_level": byte_level,
    "llama_strip": lambda: sentencepiece(llama_decoder(decoders.Strip(" ", 1, 0)), "normalizer"),
    "gemma_no_strip": lambda: sentencepiece(llama_decoder(), "never"),
    "metaspace": lambda: sentencepiece(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "replace_after_fuse": lambda: sentencepiece(
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")])
    ),
    "word_piece": word_piece,
    "no_decoder": without_decoder,
    "word_ends": word_ends,
    "unknown_to_us": decoded_as_speech,
    "strip_the_end": lambda: sentencepiece(llama_decoder(decoders.Strip(" ", 0, 1)), "never"),
    "pattern_across_tokens": lambda: sentencepiece(llama_decoder(decoders.Replace("a c", "X"))),
}


@pytest.fixture(scope="module", params=BUILDERS)
def any_tokenizer(request) -> tuple[str, Tokenizer]:
    return request.param, make(BUILDERS[request.param]())


@pytest.fixture(scope="module")
def bpe() -> tokenizers.Tokenizer:
    return byte_level()


def make(tok: tokenizers.Tokenizer, **config) -> Tokenizer:
    return Tokenizer.from_assets(Assets(tok.to_str(), config))


def random_text(rng: random.Random) -> str:
    wide = [chr(c) for c in (rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x110000))]
    return "".join(rng.choice(ATOMS + wide) for _ in range(rng.randrange(1, 12)))


def pushes(rng: random.Random, items):
    """The same items, cut at random places."""
    at = 0
    while at < len(items):
        step = rng.choice((1, 1, 1, 2, 3, 7))
        yield items[at : at + step]
        at += step


# ---- encoding and decoding


@pytest.mark.parametrize("builder", ["byte_level", "llama_strip", "gemma_no_strip", "metaspace"])
def test_text_survives_the_round_trip(builder):
    tokenizer, rng = make(BUILDERS[builder]()), random.Random(0)
    for _ in range(200):
        text = "x" + random_text(rng).replace("▁", "")  # SentencePiece cannot tell ▁ from a space
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_truncation_and_padding_of_the_file_are_ignored(bpe):
    cut = tokenizers.Tokenizer.from_str(bpe.to_str())
    cut.enable_truncation(4)
    cut.enable_padding(length=300)
    text = CORPUS[0] * 3
    assert make(cut).encode(text) == bpe.encode(text).ids


def test_vocab_size_covers_the_largest_id(bpe):
    assert make(bpe).vocab_size == bpe.token_to_id("你好") + 1


@pytest.mark.parametrize(
    ("flags", "first", "last"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, ["<s>"], []),
        ({"add_bos_token": True, "add_eos_token": True}, ["<s>"], ["</s>"]),
        ({"add_bos_token": False, "add_eos_token": True}, [], ["</s>"]),
    ],
)
@pytest.mark.parametrize("form", [str, lambda text: {"content": text, "lstrip": False}])
def test_flags_of_the_config_add_first_and_last_tokens(bpe, flags, first, last, form):
    tokenizer = make(bpe, bos_token=form("<s>"), eos_token=form("</s>"), **flags)
    plain = tokenizer.encode("Hi", add_special=False)
    assert tokenizer.encode("Hi") == [bpe.token_to_id(t) for t in first] + plain + [bpe.token_to_id(t) for t in last]
    assert plain == bpe.encode("Hi").ids


def post_processed(tok: tokenizers.Tokenizer, single: str, names: list[str]) -> tokenizers.Tokenizer:
    tok = tokenizers.Tokenizer.from_str(tok.to_str())
    tok.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(n, tok.token_to_id(n)) for n in names])
    return tok


def test_post_processor_decides_unless_the_config_states_flags(bpe):
    with_bos = post_processed(bpe, "<s> $A", ["<s>"])
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    plain = bpe.encode("Hi").ids
    assert make(with_bos, **names).encode("Hi") == [1, *plain]
    assert make(with_bos, **names, add_bos_token=True).encode("Hi") == [1, *plain], "added twice"
    assert make(with_bos, **names, add_bos_token=False).encode("Hi") == plain
    other = post_processed(bpe, "<|im_end|> $A", ["<|im_end|>"])
    assert make(other, **names, add_bos_token=False).encode("Hi") == [3, *plain], "tokens of another kind must stay"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 3}, {}, (3,)),
        ({"eos_token_id": [3, 7]}, {"eos_token": "</s>"}, (3, 7, 2)),
        ({}, {"eos_token": {"content": "</s>"}}, (2,)),
        ({"eos_token_id": None}, {"eos_token": None}, ()),
        ({"eos_token_id": 2}, {"eos_token": "</s>"}, (2,)),
    ],
)
def test_eos_ids_are_united(bpe, generation, config, expected):
    assert Tokenizer.from_assets(Assets(bpe.to_str(), config, generation)).eos_ids == expected


def test_eos_token_outside_the_vocabulary_is_refused(bpe):
    with pytest.raises(TextError, match="'<nowhere>' is not in the vocabulary"):
        make(bpe, eos_token="<nowhere>")


def test_special_tokens_are_skipped_or_shown(bpe):
    tokenizer = make(bpe)
    ids = [1, *tokenizer.encode("Hi"), 3]
    assert tokenizer.decode(ids) == "Hi"
    assert tokenizer.decode(ids, skip_special=False) == "<s>Hi<|im_end|>"


def test_tokens_named_by_the_config_only_become_special(bpe):
    assert make(bpe).decode(bpe.encode("a<tool>b").ids) == "a<tool>b"
    tokenizer = make(bpe, additional_special_tokens=["<tool>", "<not in vocabulary>"])
    assert tokenizer.decode(tokenizer.encode("a<tool>b")) == "ab"


def test_ids_beyond_the_vocabulary_are_no_text_and_negative_ones_are_refused(bpe):
    tokenizer = make(bpe)
    assert tokenizer.decode([*tokenizer.encode("Hi"), 10**6]) == "Hi"
    with pytest.raises(TextError, match="-5 is negative"):
        tokenizer.decode([1, -5])


@pytest.mark.parametrize("text", [None, 3, ["Hi"], b"Hi"])
def test_only_text_is_encoded(bpe, text):
    with pytest.raises(TextError, match="must be a str"):
        make(bpe).encode(text)


def test_half_a_surrogate_pair_is_refused(bpe):
    with pytest.raises(TextError, match="not valid Unicode"):
        make(bpe).encode("a\ud800")


def test_checkpoint_without_or_with_broken_tokenizer(tmp_path):
    with pytest.raises(NoTokenizerError, match="has no tokenizer"):
        Tokenizer.from_assets(Assets(None))
    with pytest.raises(NoTokenizerError, match=r"tokenizer.json cannot be read"):
        Tokenizer.from_assets(Assets("{}"))


def test_folder_without_tokenizer_json_goes_through_transformers(bpe, tmp_path):
    pytest.importorskip("transformers")
    bpe.model.save(str(tmp_path))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_assets(Assets(None, config, folder=tmp_path))
    assert tokenizer.encode("The capital") == bpe.encode("The capital").ids
    assert tokenizer.eos_ids == (2,)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "merges.txt").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    with pytest.raises(NoTokenizerError, match="transformers cannot build"):
        Tokenizer.from_assets(Assets(None, folder=tmp_path))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(NoTokenizerError, match="the checkpoint has no tokenizer"):
        Tokenizer.from_assets(Assets(None, folder=tmp_path))


def test_tokenizer_that_only_python_runs(tmp_path):
    pytest.importorskip("transformers")
    config = {"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_assets(Assets(None, config, folder=tmp_path))
    ids = tokenizer.encode("naïve 👍🏽")
    assert ids[-1] == tokenizer.eos_ids[0]
    stream = StreamDecoder(tokenizer)
    assert "".join([stream.push([i]) for i in ids] + [stream.flush()]) == tokenizer.decode(ids) == "naïve 👍🏽"


# ---- streaming


def streamed(tokenizer: Tokenizer, parts, skip_special: bool = True) -> list[str]:
    stream = StreamDecoder(tokenizer, skip_special=skip_special)
    return [*(stream.push(part) for part in parts), stream.flush()]


def test_stream_equals_decode_of_all_on_texts(any_tokenizer):
    _, tokenizer = any_tokenizer
    rng = random.Random(1)
    for _ in range(150):
        ids = tokenizer.encode(random_text(rng))
        assert "".join(streamed(tokenizer, pushes(rng, ids))) == tokenizer.decode(ids)


@pytest.mark.parametrize("skip_special", [True, False])
def test_stream_equals_decode_of_all_on_random_ids(any_tokenizer, skip_special):
    """Ids as an untrained model gives them: broken UTF-8, special tokens in the middle of a character, unknown ids."""
    _, tokenizer = any_tokenizer
    rng = random.Random(2)
    for _ in range(150):
        ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randrange(1, 25))]
        if rng.random() < 0.5:  # mostly byte tokens
            ids = [i if rng.random() < 0.1 else rng.randrange(3, min(259, tokenizer.vocab_size)) for i in ids]
        got = "".join(streamed(tokenizer, pushes(rng, ids), skip_special))
        assert got == tokenizer.decode(ids, skip_special), ids


def test_stream_never_gives_a_broken_character(any_tokenizer):
    _, tokenizer = any_tokenizer
    rng = random.Random(3)
    for _ in range(100):
        ids = tokenizer.encode(random_text(rng).replace("\ufffd", ""))
        given = streamed(tokenizer, ([i] for i in ids))
        assert "\ufffd" not in "".join(given)


@pytest.mark.parametrize("builder", ["byte_level", "llama_strip", "metaspace", "word_piece", "no_decoder", "word_ends"])
def test_stream_does_not_wait(builder):
    tokenizer = make(BUILDERS[builder]())
    ids = tokenizer.encode("The capital of France is Paris")
    given = streamed(tokenizer, ([i] for i in ids))
    assert all(given[:-1]) and not given[-1]


def test_a_character_is_given_with_its_last_byte(bpe):
    tokenizer = make(bpe)
    ids = [bpe.token_to_id(c) for c in ("ð", "Ł", "ĳ", "į")]  # the four bytes of 👍 in the byte-level alphabet
    *parts, rest = streamed(tokenizer, ([i] for i in ids))
    assert parts[:3] == ["", "", ""] and rest == ""
    assert parts[3] == tokenizer.decode(ids) != ""
    assert streamed(tokenizer, ([i] for i in ids[:3])) == ["", "", "", "\ufffd"]


def test_byte_tokens_are_given_when_their_run_ends():
    tokenizer = make(BUILDERS["llama_strip"]())
    tok = BUILDERS["llama_strip"]()
    euro = [tok.token_to_id(t) for t in ("<0xE2>", "<0x82>", "<0xAC>")]
    after = tok.token_to_id("▁")
    assert streamed(tokenizer, [[after], *([i] for i in euro), [after]]) == ["", "", "", "", "€ ", ""]


@pytest.mark.parametrize("builder", BUILDERS)
def test_cost_per_token_does_not_grow_with_the_text(builder, monkeypatch):
    tokenizer = make(BUILDERS[builder]())
    lengths = []
    decode = tokenizer._backend.decode
    monkeypatch.setattr(tokenizer._backend, "decode", lambda ids, skip: lengths.append(len(ids)) or decode(ids, skip))
    ids = tokenizer.encode("The capital of France ") * 50
    streamed(tokenizer, ([i] for i in ids))
    assert sum(lengths) <= 4 * len(ids)


def test_flush_begins_a_new_text():
    tokenizer = make(BUILDERS["llama_strip"]())
    stream, ids = StreamDecoder(tokenizer), tokenizer.encode("The end")
    first = stream.push(ids) + stream.flush()
    assert stream.push(ids) + stream.flush() == first == "The end"


# ---- stop strings


def naive_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read character by character until a stop is complete; the longest of those that end there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def test_stops_equal_the_naive_search_however_the_text_is_cut():
    rng = random.Random(4)
    for _ in range(3000):
        letters = rng.choice(("ab", "abc", "a\n"))
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(0, 20)))
        stops = ["".join(rng.choice(letters) for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(0, 4))]
        matcher = StopMatcher(stops)
        out = "".join(matcher.push(part)[0] for part in pushes(rng, text)) + matcher.flush()
        assert (out, matcher.hit) == naive_stop(text, stops), (text, stops)


def test_stop_holds_back_no_more_than_a_possible_start():
    matcher = StopMatcher(["\n\nUser:", "END"])
    assert matcher.push("Hello\n") == ("Hello", None)
    assert matcher.push("world EN") == ("\nworld ", None)
    assert matcher.push("ough") == ("ENough", None)
    assert matcher.push(".\n\nUs") == (".", None)
    assert matcher.push("er: more") == ("", "\n\nUser:")
    assert matcher.push("ignored") == ("", "\n\nUser:")
    assert matcher.flush() == ""


def test_one_stop_may_be_a_plain_string_and_none_holds_nothing():
    assert StopMatcher("stop").push("a stop b") == ("a ", "stop")
    assert StopMatcher(()).push("any s") == ("any s", None)


@pytest.mark.parametrize("stops", ["", ["a", ""], [None], [3]])
def test_empty_stops_are_refused(stops):
    with pytest.raises(TextError, match="a stop must be a string of one character or more"):
        StopMatcher(stops)


# ---- chat templates

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 < 2 & 'é'?"}]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_chat_text_and_ids(bpe):
    tokenizer = make(bpe, chat_template=CHATML, bos_token="<s>", add_bos_token=True)
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 < 2 & 'é'?<|im_end|>\n"
    assert tokenizer.chat_text(MESSAGES, add_generation_prompt=False) == text
    assert tokenizer.chat_text(MESSAGES) == text + "<|im_start|>assistant\n"
    ids = tokenizer.chat_prompt(MESSAGES)
    assert ids == bpe.encode(text + "<|im_start|>assistant\n").ids, "no second <s>"
    assert ids.count(bpe.token_to_id("<|im_end|>")) == 2


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}", "<s></s>False"),
        (
            "{%- for m in messages %}\n  {% if loop.index == 2 %}\n{% break %}\n  {% endif %}\n{{ m.role }}\n{% endfor %}",
            "system\n",
        ),
        ("{{ tools | tojson }}", '[{"name": "a<b>é&\'"}]'),
        ("{{ tools | tojson(indent=1) }}", '[\n {\n  "name": "a<b>é&\'"\n }\n]'),
        ("{% generation %}{{ messages[1].role }}{% endgeneration %}!", "user!"),
        ("{% set n = namespace(x=1) %}{% generation %}{% set n.x = 2 %}{% endgeneration %}{{ n.x }}", "2"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ documents is none }}", "True"),
        ("{{ messages[0].content.split()[0] }}", "Be"),
    ],
)
def test_what_templates_may_use(bpe, template, expected):
    tokenizer = make(bpe, chat_template=template, bos_token="<s>", eos_token={"content": "</s>"})
    assert tokenizer.chat_text(MESSAGES, tools=[{"name": "a<b>é&'"}]) == expected


def test_named_templates(bpe):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = make(bpe, chat_template=named)
    assert tokenizer.chat_text(MESSAGES) == "plain"
    assert tokenizer.chat_text(MESSAGES, tools=[]) == "tools"
    assert make(bpe, chat_template=named[:1]).chat_text(MESSAGES, tools=[]) == "plain"
    with pytest.raises(NoChatTemplateError, match=r"only templates named \['tool_use'\]"):
        make(bpe, chat_template=named[1:]).chat_text(MESSAGES)


def test_checkpoint_without_template(bpe):
    with pytest.raises(NoChatTemplateError, match="no chat template"):
        make(bpe).chat_prompt(MESSAGES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "does not compile"),
        ("{{ messages[0].name.first }}", "no attribute 'name'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% set _ = messages.append(1) %}", "is unsafe"),
        ("{{ messages[0].update({'role': 'root'}) }}", "is unsafe"),
        ("{% for i in range(10000000) %}{% endfor %}", "Range too big"),
    ],
)
def test_template_that_fails_or_tries_to_escape(bpe, template, message):
    with pytest.raises(ChatTemplateError, match=message):
        make(bpe, chat_template=template).chat_prompt(MESSAGES)


@pytest.mark.parametrize("messages", ["Hi", {"role": "user", "content": "Hi"}, [], ["Hi"], [{"content": "Hi"}], [{"role": 1}]])
def test_messages_of_the_wrong_form(bpe, messages):
    with pytest.raises(ChatTemplateError, match="must be a"):
        make(bpe, chat_template=CHATML).chat_prompt(messages)


def test_tools_of_the_wrong_form(bpe):
    with pytest.raises(ChatTemplateError, match="tool 0 must be the JSON schema"):
        make(bpe, chat_template=CHATML).chat_prompt(MESSAGES, tools=[print])
