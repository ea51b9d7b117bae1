"""The tokenizer front end against transformers' tokenizers reading the same `tokenizer.json`."""

import dataclasses
import html

import ftfy
import numpy as np
import pytest
import regex
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from longlive_jax.config import TextEncoderConfig
from longlive_jax.errors import UserError
from longlive_jax.models.tokenizer import Tokenizer, clean_text, train_word_tokenizer

CONFIG = TextEncoderConfig(
    vocab_size=300, dim=32, attn_dim=32, ffn_dim=64, num_heads=4, num_layers=2, text_len=16
)
CORPUS = [
    "A red ball rolls slowly down a green hill, then it stops.",
    "The café is closed; a cat and a dog walk along the street at night.",
    "一只红色的球从山上滚下来。猫在睡觉。",
    "Camera pans left & right, 35mm film, 'cinematic' light <soft>.",
]
MOJIBAKE = "the café".encode().decode("latin-1")
DIRTY = [
    "",
    "   ",
    "a red ball",
    "A  red\u00a0ball\u3000rolls\u2003down\n\n\ta hill\r\n",
    "cat &amp;amp; dog &amp;lt;soft&amp;gt; &quot;night&quot;",
    "light <soft> &amp;lt;soft&amp;gt; &amp;amp; cinematic",
    f"{MOJIBAKE} is closed",
    "一只红色的球　从山上滚下来。",
    "unknown \U0001f600 glyphs \u0416 here",
    "ball\x1fcat \u200bdog",
    "the end </s> and <pad> spelled out",
    "a lone surrogate \ud800 in the middle",
    "a red ball rolls down a hill and then " * 20,
]


def _release_cleaning(text: str) -> str:
    """The cleaning steps in the order the release applies them, spelled out one by one."""
    text = ftfy.fix_text(text)
    text = html.unescape(text)
    text = html.unescape(text)
    text = text.strip()
    text = regex.sub(r"\s+", " ", text)
    return text.strip()


@pytest.fixture(scope="module")
def unigram(tmp_path_factory):
    """A folder with a small umT5-like `tokenizer.json`: Unigram, metaspace, `</s>` at the end."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always"),
        ]
    )
    backend.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    backend.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path_factory.mktemp("umt5")
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("cls", [transformers.PreTrainedTokenizerFast, transformers.T5TokenizerFast])
def test_ids_equal_those_of_transformers(unigram, cls):
    theirs = cls.from_pretrained(unigram, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_ids=0)
    expected = theirs(
        [_release_cleaning(text) for text in DIRTY],
        padding="max_length", truncation=True, max_length=CONFIG.text_len, add_special_tokens=True,
    )  # fmt: skip
    ids, lengths = Tokenizer.from_file(unigram, CONFIG)(DIRTY)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(
        np.arange(CONFIG.text_len) < lengths[:, None], np.array(expected["attention_mask"], bool)
    )
    assert ids.dtype == lengths.dtype == np.int32


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("  a\n\nb\t c ", "a b c"),
        ("a\u00a0b\u3000c\u2003d", "a b c d"),
        # ftfy leaves entities alone in text that has a "<", so both rounds of unescaping show here.
        ("1 < 2 &amp;lt; 3 &gt; 0", "1 < 2 < 3 > 0"),
        ("R&amp;amp;B &amp;lt;3", "R&B <3"),
        (f"{MOJIBAKE} \u2026", "the café …"),
        ("&amp;nbsp;x&nbsp;", "x"),
        ("一只 红色的　球", "一只 红色的 球"),
        ("", ""),
    ],
)
def test_clean_text(dirty, clean):
    assert clean_text(dirty) == clean == _release_cleaning(dirty)


def test_an_empty_prompt_is_the_end_token_alone(unigram):
    ids, lengths = Tokenizer.from_file(unigram, CONFIG)(["", " \n"])
    assert ids.tolist() == [[1] + [0] * 15] * 2
    assert lengths.tolist() == [1, 1]


def test_a_long_prompt_is_cut_and_still_ends_with_the_end_token(unigram):
    ids, lengths = Tokenizer.from_file(unigram, CONFIG)(["a red ball rolls " * 50])
    assert lengths.tolist() == [16]
    assert ids[0, -1] == 1
    assert 1 not in ids[0, :-1]


def test_no_prompts_give_an_empty_batch(unigram):
    ids, lengths = Tokenizer.from_file(unigram, CONFIG)([])
    assert ids.shape == (0, 16)
    assert lengths.shape == (0,)


def test_file_and_folder_are_the_same_tokenizer(unigram):
    by_file = Tokenizer.from_file(unigram / "tokenizer.json", CONFIG)(DIRTY)
    np.testing.assert_array_equal(by_file.ids, Tokenizer.from_file(unigram, CONFIG)(DIRTY).ids)


def test_settings_inside_the_file_do_not_decide_length_or_padding(unigram, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(unigram / "tokenizer.json"))
    backend.enable_truncation(3, direction="left")
    backend.enable_padding(length=5, direction="left", pad_id=2, pad_token="<unk>")
    backend.save(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(
        Tokenizer.from_file(tmp_path, CONFIG)(DIRTY).ids, Tokenizer.from_file(unigram, CONFIG)(DIRTY).ids
    )


def test_the_end_token_is_added_where_the_file_has_no_rule_for_it(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "red": 2}, unk_token="red"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_file(tmp_path, CONFIG)(["red"]).ids[0, :3].tolist() == [2, 1, 0]


# --- errors -----------------------------------------------------------------------------------------


def assert_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_missing_tokenizer(tmp_path):
    with pytest.raises(UserError) as error:
        Tokenizer.from_file(tmp_path, CONFIG)
    assert_one_line(error, f"tokenizer={tmp_path}", "no tokenizer.json", "hf download google/umt5-xxl")


@pytest.mark.parametrize("name", ["", "spiece.model", "tokenizer.json"])
def test_only_a_sentencepiece_model(tmp_path, name):
    (tmp_path / "spiece.model").write_bytes(b"\x0a\x0e")
    with pytest.raises(UserError) as error:
        Tokenizer.from_file(tmp_path / name, CONFIG)
    assert_one_line(error, "spiece.model", "hf download google/umt5-xxl", "AutoTokenizer")


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0", "model"', "[1, 2]\n[3]"])
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError) as error:
        Tokenizer.from_file(tmp_path, CONFIG)
    assert_one_line(error, f"tokenizer={tmp_path}", "not a readable tokenizer.json")


def test_a_vocabulary_larger_than_the_encoder(unigram):
    size = tokenizers.Tokenizer.from_file(str(unigram / "tokenizer.json")).get_vocab_size()
    Tokenizer.from_file(unigram, dataclasses.replace(CONFIG, vocab_size=size))
    with pytest.raises(UserError) as error:
        Tokenizer.from_file(unigram, dataclasses.replace(CONFIG, vocab_size=size - 1))
    assert_one_line(error, f"ids up to {size - 1}", f"vocab_size is {size - 1}")


@pytest.mark.parametrize(
    ("vocabulary", "part"), [({"<pad>": 0, "red": 1}, "</s>"), ({"red": 1, "</s>": 2}, "pad_id=0")]
)
def test_a_vocabulary_without_special_tokens(tmp_path, vocabulary, part):
    tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="red")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError) as error:
        Tokenizer.from_file(tmp_path, CONFIG)
    assert_one_line(error, f"tokenizer={tmp_path}", part)


@pytest.mark.parametrize("prompts", ["a red ball", ["a red ball", None], [3]])
def test_prompts_that_are_not_a_list_of_text(unigram, prompts):
    with pytest.raises(UserError, match=r"^prompts"):
        Tokenizer.from_file(unigram, CONFIG)(prompts)


# --- word tokenizer ---------------------------------------------------------------------------------

WORLD = ["A red ball moves left.", "A blue ball moves up.", "a RED square moves left."]


def test_word_tokenizer_numbers_words_by_frequency(tmp_path):
    file = train_word_tokenizer(WORLD, vocab_size=64, path=tmp_path)
    assert file == tmp_path / "tokenizer.json"
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    vocabulary = tokenizers.Tokenizer.from_file(str(file)).get_vocab()
    words = ["<pad>", "</s>", "<unk>", ".", "a", "moves", "ball", "left", "red", "blue", "square", "up"]
    assert vocabulary == {word: index for index, word in enumerate(words)}
    ids, lengths = Tokenizer.from_file(tmp_path, CONFIG)(["A  Red ball, upward."])
    assert ids[0].tolist() == [4, 8, 6, 2, 2, 3, 1] + [0] * 9
    assert lengths.tolist() == [7]


def test_word_tokenizer_is_deterministic_and_keeps_the_most_frequent(tmp_path):
    first = train_word_tokenizer(WORLD, vocab_size=7, path=tmp_path / "first.json")
    second = train_word_tokenizer(reversed(WORLD), vocab_size=7, path=tmp_path / "second.json")
    assert first.read_bytes() == second.read_bytes()
    backend = tokenizers.Tokenizer.from_file(str(first))
    assert sorted(backend.get_vocab()) == [".", "</s>", "<pad>", "<unk>", "a", "ball", "moves"]


def test_word_tokenizer_is_read_alike_by_transformers(tmp_path):
    train_word_tokenizer(WORLD, vocab_size=64, path=tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
    )
    expected = theirs(WORLD, padding="max_length", truncation=True, max_length=CONFIG.text_len)
    np.testing.assert_array_equal(Tokenizer.from_file(tmp_path, CONFIG)(WORLD).ids, expected["input_ids"])


def test_word_tokenizer_refuses_bad_settings(tmp_path):
    with pytest.raises(UserError, match="vocab_size=3 must be at least 4"):
        train_word_tokenizer(WORLD, vocab_size=3, path=tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        train_word_tokenizer(WORLD, vocab_size=9, path=tmp_path / "nowhere" / "tokenizer.json")
    assert not list(tmp_path.iterdir())
