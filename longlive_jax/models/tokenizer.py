"""From prompt to token ids: the release's text cleaning and the umT5 `tokenizer.json`."""

import collections
import html
import os
import pathlib
import secrets
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import ftfy
import numpy as np
import regex
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from longlive_jax.config import TextEncoderConfig
from longlive_jax.errors import UserError, require

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"

_HOW_TO_GET = "get it with `hf download google/umt5-xxl tokenizer.json --local-dir FOLDER`"


class Tokens(NamedTuple):
    """A batch of tokenised prompts.

    Attributes:
      ids: int32 `[B, M]`, padded at the end.
      lengths: int32 `[B]` in [1, M], tokens before the padding, the end token among them.
    """

    ids: np.ndarray
    lengths: np.ndarray


def clean_text(text: str) -> str:
    """Repairs mojibake, undoes (doubled) HTML escapes and makes every run of white space one space.

    Source: the tokenizer front end of the release, mode "whitespace".
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    # `regex` and `re` differ on the separators U+001C..U+001F; the release uses `regex`.
    return regex.sub(r"\s+", " ", text.strip()).strip()


class Tokenizer:
    """Cleans, tokenises, ends with `</s>`, truncates and pads. Immutable once built."""

    def __init__(self, backend: tokenizers.Tokenizer, config: TextEncoderConfig, *, name: str = "tokenizer"):
        """Takes ownership of `backend` and sets its truncation and padding.

        Args:
          backend: a tokenizer with the token `</s>` and a token for `config.pad_id`.
          config: gives `vocab_size`, `text_len` and `pad_id`.
          name: what error messages call the tokenizer, usually its path.

        Raises:
          UserError: a special token is missing or the vocabulary does not fit the encoder.
        """
        largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        require(
            largest < config.vocab_size,
            f"tokenizer={name} has token ids up to {largest} but text_encoder.vocab_size is "
            f"{config.vocab_size}; use the tokenizer the encoder was trained with",
        )
        pad = backend.id_to_token(config.pad_id)
        if pad is None:
            raise UserError(f"tokenizer={name} has no token for text_encoder.pad_id={config.pad_id}")
        _ensure_end_token(backend, name)
        backend.enable_truncation(config.text_len)
        backend.enable_padding(length=config.text_len, pad_id=config.pad_id, pad_token=pad)
        self._backend = backend
        self._config = config

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], config: TextEncoderConfig) -> "Tokenizer":
        """Reads a `tokenizer.json`.

        Args:
          path: the file, or a folder that holds it.
          config: shape of the encoder the tokens are for.

        Raises:
          UserError: no such file, not a tokenizer, or one that does not fit `config`.
        """
        file = _find(pathlib.Path(path))
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"tokenizer={file} is not a readable tokenizer.json ({reason}); {_HOW_TO_GET}"
            ) from error
        return cls(backend, config, name=str(file))

    @property
    def config(self) -> TextEncoderConfig:
        """The encoder the tokens are for."""
        return self._config

    @property
    def text_len(self) -> int:
        """Tokens M that every prompt is truncated or padded to."""
        return self._config.text_len

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Tokenises prompts; an empty one is the end token alone.

        Args:
          prompts: any text; cleaned with `clean_text` first. What does not fit in `text_len`
            tokens, the end token included, is cut off.

        Raises:
          UserError: `prompts` is not a list of strings.
        """
        check_prompts(prompts)
        encoded = self._backend.encode_batch([clean_text(prompt) for prompt in prompts])
        ids = np.array([e.ids for e in encoded], dtype=np.int32).reshape(len(encoded), self.text_len)
        # Not `ids != pad_id`: a prompt may spell out "<pad>".
        lengths = np.array([sum(e.attention_mask) for e in encoded], dtype=np.int32)
        return Tokens(ids, lengths)


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuses a bare string (a sequence of characters to Python) and anything that is not text."""
    require(not isinstance(prompts, str), f"prompts={prompts!r} must be a list; put the prompt in brackets")
    for prompt in prompts:
        require(isinstance(prompt, str), f"prompts: {prompt!r} must be a string")


def train_word_tokenizer(
    texts: Iterable[str], *, vocab_size: int, path: str | os.PathLike[str]
) -> pathlib.Path:
    """Writes a `tokenizer.json` whose tokens are the most frequent words of `texts`, lower-cased.

    For small worlds with a closed vocabulary. Ids: `<pad>` 0, `</s>` 1, `<unk>` 2, then words and
    punctuation marks by falling count, ties in alphabetical order; the same texts give the same file.

    Args:
      texts: the corpus.
      vocab_size: most tokens, the three special ones included; rarer words become `<unk>`.
      path: the file, or an existing folder to put `tokenizer.json` in.

    Returns:
      The file that was written.

    Raises:
      UserError: `vocab_size` leaves no room for a word, or the folder does not exist.
    """
    special = (PAD, EOS, UNKNOWN)
    require(vocab_size > len(special), f"vocab_size={vocab_size} must be at least {len(special) + 1}")
    path = pathlib.Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    require(file.parent.is_dir(), f"path={path}: the folder {file.parent} does not exist; create it first")
    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    counts = collections.Counter(
        word
        for text in texts
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(clean_text(text)))
    )
    words = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - len(special)]
    vocabulary = {word: index for index, word in enumerate((*special, *words))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizer
    backend.pre_tokenizer = splitter
    backend.add_special_tokens(list(special))
    _ensure_end_token(backend, str(file))
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(backend.to_str(pretty=True), encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def _find(path: pathlib.Path) -> pathlib.Path:
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.suffix != ".model" and file.is_file():
        return file
    folder = path if path.is_dir() else path.parent
    if (folder / "spiece.model").is_file():
        raise UserError(
            f"tokenizer={path} has only spiece.model, which is not read; {_HOW_TO_GET}, or convert it: "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    raise UserError(f"tokenizer={path} has no tokenizer.json; {_HOW_TO_GET}")


def _ensure_end_token(backend: tokenizers.Tokenizer, name: str) -> None:
    """Makes every encoding end with `</s>` (files converted from sentencepiece may lack the rule)."""
    end = backend.token_to_id(EOS)
    if end is None:
        raise UserError(f"tokenizer={name} has no {EOS} token; {_HOW_TO_GET}")
    if backend.encode("").ids[-1:] != [end]:
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {EOS}", special_tokens=[(EOS, end)]
        )
