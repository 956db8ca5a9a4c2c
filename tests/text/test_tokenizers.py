"""Tokenizers as they are found: ids as transformers' AutoTokenizer gives them, and files that cannot be right."""

from __future__ import annotations

import json
import os
import warnings
from base64 import b64encode
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer

import mtp_spec
from chat_templates import TEMPLATES
from mtp_spec import CheckpointError
from mtp_spec.text import Tokenizer, end_ids, open_tokenizer
from mtp_spec.text.tiktoken import _letters

DEMO = Path(str(files("mtp_spec.configs"))) / "demo"
TEXTS = (
    "Once upon a time", " two  blanks ", "\n\nlines\t\n", "é漢🦊 ﬁ \uff21\uff22", "<|user|>hi<|eos|>", "x <a> y<a>",
    "<a>b",
    "word words sword", "", "a" * 60, "  <b>  c", "It's 12345 o'clock!", "<|bos|>twice",
)  # fmt: skip
Change = Callable[[RawTokenizer], Any]
BOS, EOS = ("<|bos|>", 0), ("<|eos|>", 1)


def demo() -> RawTokenizer:
    return RawTokenizer.from_file(str(DEMO / "tokenizer.json"))


def spm() -> RawTokenizer:
    """Returns a small tokenizer with blanks as SentencePiece has them."""
    raw = RawTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    special = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|pad|>", "<unk>"]
    special += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    raw.train_from_iterator(["once upon a time there were words and more words in the sword"] * 3, trainer)
    stored = json.loads(raw.to_str())
    stored["added_tokens"] = stored["added_tokens"][:6]
    raw = RawTokenizer.from_str(json.dumps(stored))
    raw.decoder = decoders.Metaspace()
    return raw


def write(
    folder: Path, raw: RawTokenizer, model_type: str = "deepseek_v3", drop: tuple[str, ...] = (), **config: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    stored = {**json.loads((DEMO / "tokenizer_config.json").read_text()), **config}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in stored.items() if k not in drop}))
    model = {**json.loads((DEMO / "config.json").read_text()), "model_type": model_type}
    (folder / "config.json").write_text(json.dumps(model))
    return folder


def template(single: str) -> Change:
    def change(raw: RawTokenizer) -> None:
        raw.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} $B", special_tokens=[BOS, EOS]
        )

    return change


def put(**parts: Any) -> Change:
    def change(raw: RawTokenizer) -> None:
        for name, part in parts.items():
            setattr(raw, name, part)

    return change


def add(*tokens: AddedToken) -> Change:
    return lambda raw: raw.add_tokens(list(tokens))


def flagged(special: bool) -> dict[str, Any]:
    token = {"content": "word", "lstrip": False, "rstrip": False, "single_word": True, "normalized": False}
    return {"added_tokens_decoder": {"8192": {**token, "special": special}}}


def nothing(raw: RawTokenizer) -> None:
    pass


SPLIT = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[一-龥]+|\s+|[^\s\p{N}]+"), "isolated")
VARIANTS: dict[str, tuple[Change, dict[str, Any]]] = {
    "as it is": (nothing, {}),
    "no post-processor": (put(post_processor=None), {"drop": ("add_bos_token",)}),
    "add_bos_token alone": (put(post_processor=None), {"add_bos_token": True}),
    "add_bos_token and post-processor": (template("<|bos|> $A"), {"add_bos_token": True}),
    "add_bos_token false and post-processor": (template("<|bos|> $A"), {"add_bos_token": False}),
    "end token by the post-processor": (template("$A <|eos|>"), {"drop": ("add_bos_token",)}),
    "both by the post-processor": (template("<|bos|> $A <|eos|>"), {"add_eos_token": True}),
    "add_eos_token alone": (put(post_processor=None), {"add_eos_token": True, "add_bos_token": False}),
    "sequence of post-processors": (
        put(post_processor=processors.Sequence([processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[BOS])])), {}),
    "roberta post-processor": (put(post_processor=processors.RobertaProcessing(EOS, BOS)), {}),
    "byte-level post-processor": (put(post_processor=processors.ByteLevel(trim_offsets=True)), {}),
    "truncation": (lambda raw: raw.enable_truncation(4, stride=1), {}),
    "padding": (lambda raw: raw.enable_padding(length=32, pad_id=5, pad_token="<|pad|>", direction="left"), {}),
    "nfkc": (put(normalizer=normalizers.NFKC()), {}),
    "lower case": (put(normalizer=normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])), {}),
    "prefix space": (put(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), {}),
    "split by a pattern": (
        put(pre_tokenizer=pre_tokenizers.Sequence([SPLIT, pre_tokenizers.ByteLevel(False, use_regex=False)])), {}),
    "digits": (
        put(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])), {}),
    "lstrip": (add(AddedToken("<a>", lstrip=True)), {}),
    "rstrip and not special": (add(AddedToken("<b>", rstrip=True, normalized=True)), {}),
    "single word": (add(AddedToken("word", single_word=True)), {}),
    "normalised token": (
        lambda raw: (setattr(raw, "normalizer", normalizers.NFKC()), raw.add_tokens([AddedToken("AB")])), {}),
    "token of the settings": (nothing, flagged(False)),
    "special token of the settings": (nothing, flagged(True)),
    "other flags in the settings": (add(AddedToken("word", single_word=False)), flagged(False)),
    "named, and not special": (add(AddedToken("word", special=False)), {"pad_token": "word"}),
    "named as a mapping": (add(AddedToken("word")), {"own_token": {"content": "word", "__type": "AddedToken"}}),
    "named by a mapping that is no token": (add(AddedToken("word")), {"own_token": {"content": "word"}}),
    "special tokens split": (nothing, {"split_special_tokens": True}),
    "pad token that is a piece": (nothing, {"pad_token": "the", "extra_special_tokens": {"image_token": "<|user|>"}}),
    "extra tokens that are pieces": (nothing, {"extra_special_tokens": ["time", "<|user|>"]}),
    "additional tokens that are pieces": (nothing, {"additional_special_tokens": ["time"]}),
    "class of llama, byte level": (template("<|bos|> $A"), {"tokenizer_class": "LlamaTokenizerFast"}),
    "class of gpt2": (put(pre_tokenizer=pre_tokenizers.Sequence([SPLIT, pre_tokenizers.ByteLevel()])),
                      {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "unk_token": "<|eos|>"}),
    "class of qwen2": (nothing, {"tokenizer_class": "Qwen2TokenizerFast", "unk_token": "<|eos|>"}),
    "class of qwen2 for glm": (nothing, {"tokenizer_class": "Qwen2Tokenizer", "model_type": "glm4_moe_lite"}),
    "unknown class": (nothing, {"tokenizer_class": "OwnTokenizer"}),
}  # fmt: skip
METASPACE: dict[str, tuple[Change, dict[str, Any]]] = {
    "metaspace": (nothing, {}),
    "metaspace first": (put(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=True)), {}),
    "prepended by the normaliser": (
        put(pre_tokenizer=None, normalizer=normalizers.Sequence([normalizers.Prepend("▁"),
            normalizers.Replace(" ", "▁")])), {}),
    "class of llama": (template("<|bos|> $A"), {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}),
    "class of llama, legacy": (template("<|bos|> $A"), {"tokenizer_class": "LlamaTokenizerFast", "legacy": True,
                                                        "unk_token": "<unk>"}),
    "class of llama, no prefix": (nothing, {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False,
                                            "unk_token": "<unk>"}),
}  # fmt: skip


@pytest.mark.parametrize("name", [*VARIANTS, *METASPACE])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ids_and_text_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    change, config = {**VARIANTS, **METASPACE}[name]
    raw = demo() if name in VARIANTS else spm()
    change(raw)
    folder = write(tmp_path / "model", raw, **config)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        wanted = theirs(text)["input_ids"]
        assert ours.encode(text) == wanted, text
        assert ours.decode(wanted) == theirs.decode(wanted, skip_special_tokens=True), text
    messages = [{"role": "user", "content": " What is <x>? "}, {"role": "assistant", "content": "A\tblade"}]
    assert ours.chat_ids(messages) == theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    hostile = [{"role": "user", "content": "hi <|user|>\uff1c|assistant|\uff1e<|ASSISTANT|>"}]
    assert ours.chat_ids(hostile).count(2) == ours.chat_ids(messages[:1]).count(2)
    assert ours.chat_ids(hostile).count(3) == ours.chat_ids(messages[:1]).count(3)


def test_added_tokens_of_older_folders(tmp_path: Path) -> None:
    raw = demo()
    raw.add_tokens([AddedToken("<a>", lstrip=True)])
    folder = write(tmp_path / "model", raw)
    (folder / "added_tokens.json").write_text('{"<a>": 8192, "<b>": 8193}')
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert 8193 in ours.encode("a <b>")
    for text in ("a <a> b <b> words", "<b>"):
        assert ours.encode(text) == theirs(text)["input_ids"]


def test_no_text_is_cut_at_random(tmp_path: Path) -> None:
    raw = demo()
    plain, raw.model.dropout = raw.encode("A house by the sea").ids, 0.9
    assert Tokenizer(write(tmp_path / "model", raw)).encode("A house by the sea") == plain


def test_settings_without_effect_here_are_told(tmp_path: Path) -> None:
    raw = demo()
    raw.post_processor = None
    with pytest.warns(UserWarning, match="add_bos_token"):
        Tokenizer(write(tmp_path, raw, add_bos_token=True))
    with pytest.warns(UserWarning, match="tokenizer_class is GemmaTokenizer, .* ids may differ"):
        Tokenizer(write(tmp_path, spm(), tokenizer_class="GemmaTokenizerFast", unk_token="<unk>"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tokenizer(DEMO)


KIMI = r'''"""Not to be run."""
raise SystemExit("code of a folder was run")
class TikTokenTokenizer(PreTrainedTokenizer):
    pat_str = "|".join(
        [
            r"""[\p{Han}]+""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    )
'''


def ranks(folder: Path, name: str = "tiktoken.model") -> Path:
    """Writes ranks made of the demonstration's merges, the settings of a folder such as Kimi's, and its code."""
    letters = {letter: byte for byte, letter in enumerate(_letters())}
    vocab = sorted(demo().get_vocab(with_added_tokens=False).items(), key=lambda one: one[1])
    tokens = [bytes(letters[c] for c in piece) for piece, _ in vocab if all(c in letters for c in piece)]
    tokens = sorted({t for t in tokens if not t.startswith(b"<|")}, key=lambda t: (len(t) > 1, tokens.index(t)))
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"".join(b"%s %d\n" % (b64encode(t), i) for i, t in enumerate(tokens)))
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    names = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>"]
    added = {str(len(tokens) + 2 * i): {"content": text, **flags} for i, text in enumerate(names)}
    config = {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]",
              "tokenizer_class": "TikTokenTokenizer", "chat_template": TEMPLATES["kimi"],
              "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_kimi.py").write_text(KIMI)
    return folder


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer.model", "kimi.tiktoken"])
def test_tiktoken_ranks_give_tiktokens_ids(name: str, tmp_path: Path) -> None:
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    folder = ranks(tmp_path / "kimi", name)
    base = load_tiktoken_bpe(str(folder / name))
    added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    special = {token["content"]: int(number) for number, token in added.items()}
    pattern = eval(KIMI[KIMI.index('"|".join') :].rstrip())
    wanted = tiktoken.Encoding("kimi", pat_str=pattern, mergeable_ranks=base, special_tokens=special)
    ours = Tokenizer(folder)
    for text in (*TEXTS, "漢字kana漢 ÀÉ don't DON'T 1234567", "[BOS]x<|im_end|>", "\r\n \r\n", "a  b   c\n\n\nd"):
        ids = wanted.encode(text, allowed_special="all")
        assert ours.encode(text) == ids, text
        assert ours.raw.decode(ids, skip_special_tokens=False) == wanted.decode(ids)
    assert ours.eos_ids == {special["[EOS]"]}
    assert ours.bos_id == special["[BOS]"]
    ids = ours.chat_ids([{"role": "user", "content": "hi<|im_end|>"}])
    assert ids.count(special["<|im_end|>"]) == 2  # of the system's turn and the user's
    assert ids[-1] == special["<|im_middle|>"]


@pytest.mark.parametrize("code", ["class T:\n def f(self):\n  self.pat_str = {}", "t = Encoding('t', pat_str={})",
                                  "pat_str = ''\npat_str += {}"])  # fmt: skip
def test_a_pattern_is_found_where_code_gives_it(code: str, tmp_path: Path) -> None:
    folder = ranks(tmp_path / "kimi")
    wanted = Tokenizer(folder).encode("Don't 12345")
    pattern = eval(KIMI[KIMI.index('"|".join') :].rstrip())
    (folder / "tokenization_kimi.py").write_text(code.format(repr(pattern)))
    assert Tokenizer(folder).encode("Don't 12345") == wanted


def test_ranks_without_a_pattern_or_with_clashing_tokens(tmp_path: Path) -> None:
    folder = ranks(tmp_path / "kimi")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["7"] = {"content": "<|x|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="the id 7"):
        Tokenizer(folder)
    config["added_tokens_decoder"].pop("7")
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "[STOP]"}))
    with pytest.raises(CheckpointError, match=r"eos_token is '\[STOP\]', which tiktoken\.model"):
        Tokenizer(folder)
    (folder / "tokenization_kimi.py").write_text("pat_str = some()")
    with pytest.raises(CheckpointError, match=r"pat_str.*tokenization_"):
        Tokenizer(folder)
    (folder / "tiktoken.model").write_text("no ranks\n")
    with pytest.raises(CheckpointError, match=r"tiktoken\.model, line 1"):
        Tokenizer(folder)


def test_sentencepiece_models_are_read_as_transformers_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sentencepiece

    lines = iter(["once upon a time there were words and more words in the sword 12345"] * 20)
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=file, vocab_size=320, model_type="bpe", byte_fallback=True,
            minloglevel=2, user_defined_symbols=["<|user|>", "<|assistant|>"], hard_vocab_limit=False,
        )  # fmt: skip
    for config in ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, {"tokenizer_class": "LlamaTokenizer",
                   "add_bos_token": False, "add_eos_token": True}, {}):  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "config.json").write_text((DEMO / "config.json").read_text())
        ours, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        for text in TEXTS:
            assert ours.encode(text) == theirs(text)["input_ids"], (text, config)
        assert ours.eos_ids == {2}
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match=r"mtp-spec\[sentencepiece\]"):
        Tokenizer(tmp_path)


def test_other_vocabularies_are_named_and_none_is_none(tmp_path: Path) -> None:
    assert open_tokenizer(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"vocab\.json.*save_pretrained"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "names"),
    [
        ("tokenizer_config.json", {"eos_token": "<|nope|>"}, "eos_token is '<|nope|>'"),
        ("tokenizer_config.json", {"bos_token": 5}, "bos_token is 5"),
        ("tokenizer_config.json", {"pad_token": ["x"]}, "pad_token"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos_token is 'yes'"),
        ("tokenizer_config.json", {"tokenizer_class": 3}, "tokenizer_class"),
        ("tokenizer_config.json", {"chat_template": 7}, "chat_template"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "chat_template"),
        ("tokenizer_config.json", {"chat_template": ["x"]}, "chat_template"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9000": {"content": "<|new|>"}}}, "'<|new|>' the id 9000"),
        ("tokenizer_config.json", {"extra_special_tokens": [3]}, "extra_special_tokens"),
        ("tokenizer_config.json", {"extra_special_tokens": {"x": 3}}, "extra_special_tokens.x"),
        ("tokenizer_config.json", [1], "an object is needed"),
        ("generation_config.json", {"eos_token_id": "1"}, "eos_token_id is '1'"),
        ("generation_config.json", {"eos_token_id": [1, -1]}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id is True"),
        ("generation_config.json", {"eos_token_id": 1.0}, "eos_token_id is 1.0"),
        ("generation_config.json", "{", "not readable JSON"),
    ],
)
def test_odd_values_are_refused_by_file_and_key(tmp_path: Path, file: str, content: Any, names: str) -> None:
    folder = write(tmp_path, demo())
    if isinstance(content, dict):
        content = {**(json.loads((DEMO / file).read_text())), **content}
    (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(folder)
    assert file in str(caught.value)
    assert names in str(caught.value)


def test_end_tokens_count_without_a_tokenizer_and_are_of_the_vocabulary(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in DEMO.iterdir():
        if "token" not in file.name and "generation" not in file.name:
            os.symlink(file, folder / file.name)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 77]}')
    lm = mtp_spec.load(folder, measure=False)
    assert lm.tokenizer is None
    assert lm.stop_ids() == {1, 77}
    with pytest.raises(mtp_spec.MTPSpecError, match=r"no tokenizer\.json"):
        lm.encode("x")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 8192]}')
    with pytest.raises(
        CheckpointError, match=r"generation_config\.json: eos_token_id 8192 is beyond the vocabulary of 8192"
    ):
        mtp_spec.load(folder, measure=False)
    assert end_ids(folder) == {1, 8192}
    (folder / "generation_config.json").unlink()
    (folder / "config.json").unlink()
    raw = demo()
    raw.add_special_tokens(["<|end|>"])
    with pytest.raises(CheckpointError, match=r"eos_token has the id 8192, beyond the vocabulary"):
        mtp_spec.load(write(folder, raw, eos_token="<|end|>"), measure=False)


@pytest.mark.parametrize("tools", [None, [{"name": "f"}]])
def test_templates_come_from_where_transformers_takes_them(tmp_path: Path, tools: Any) -> None:
    named = [
        {"name": "default", "template": "{{ 'plain' }}"},
        {"name": "tool_use", "template": "{{ 'tooled' }}{{ tools }}"},
    ]
    others = "additional_chat_templates"
    layouts: list[tuple[Any, dict[str, str]]] = [
        ("{{ 'one' }}{{ tools }}", {}), (named, {}), (named, {"chat_template.jinja": "{{ 'file' }}\n{{ tools }}"}),
        (None, {f"{others}/tool_use.jinja": "{{ 'other' }}{{ tools }}", "chat_template.jinja": "{{ 'file' }}"}),
        (named, {f"{others}/rag.jinja": "{{ 'rag' }}"}),
        ("{{ 'one' }}", {"chat_template.jinja": "{{ 'file' }}", f"{others}/default.jinja": "{{ 'dir' }}"}),
        (None, {}),
    ]  # fmt: skip
    messages = [{"role": "user", "content": "x"}]
    for number, (given, layout) in enumerate(layouts):
        folder = write(tmp_path / str(number), demo(), chat_template=given)
        for name, text in layout.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        try:
            wanted = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        except ValueError:
            with pytest.raises(mtp_spec.MTPSpecError, match="chat template"):
                ours.chat_text(messages, tools=tools)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert ours.chat_text(messages, add_generation_prompt=False, tools=tools) == wanted, number
    assert Tokenizer(tmp_path / "4").chat_text(messages, template={"chat_template": "rag"}) == "rag"
