"""From a file and a sentence to a model's inputs, without torch.

Training and ``predict`` call this code, so that a deployed bundle reads exactly the numbers that the student
was trained on. Normalisation is not here: every exported graph takes uint8 images and normalises inside.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from distill.contracts import UserError
from distill.formats import TEXT, BadInput, Format, from_json, to_json
from distill.token_rows import TokenRows

LARGEST = 2**31 - 1
"""Token id, or number of tokens."""
SPEC_FILE = "preprocess.json"
TOKENIZER_FILE = "tokenizer.json"
ROWS = "token_rows"
"""The entry of a pruned vocabulary in ``preprocess.json``."""
UNKNOWN = ("[UNK]", "<unk>")
"""Names of tokens that stand for unknown ones where a tokenizer does not say which does."""


class Tokenizer:
    """A ``tokenizer.json`` with the truncation and padding of the recipe, not of the file.

    Attributes:
        path: the file.
        max_length: most tokens a text keeps, special tokens included.
        pad_id: id that fills the positions where the mask is False, one of the model's.
        rows: the model's own ids of the file's, after its vocabulary was pruned; None: they are the same.
    """

    def __init__(self, path: str | Path, max_length: int, pad_id: int = 0, rows: TokenRows | None = None) -> None:
        """Read the file.

        Raises:
            UserError: the file is missing or no tokenizer, or ``max_length`` leaves no room for a word.
        """
        self.path, self.max_length, self.pad_id, self.rows = Path(path), max_length, pad_id, rows
        if not self.path.is_file():
            raise UserError(f"no tokenizer file {self.path}; it should be a Hugging Face tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{self.path} is not a tokenizer.json: {' '.join(str(error).split())}") from error
        special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if max_length <= special:
            raise UserError(f"max_length {max_length} leaves no room beside {special} special tokens; raise it")
        if rows is not None and self.num_ids > len(rows):
            raise UserError(f"{self.path} has ids beyond the {len(rows)} that the model was pruned by; prune again")
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return ids int64 [B, L] and mask bool [B, L], L being the longest of the batch (at least 1).

        An empty text has no tokens at all: its row is padding.
        """
        return self._pad([self._ids(encoding) for encoding in self._encode(texts)])

    def words(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
        """Return ids and mask like a call, and the index of the whitespace word of every token, int64 [B, L].

        Special tokens and padding have word -1. The indices do not depend on the tokenizer, so two tokenizers
        can drop the same words.
        """
        encodings = self._encode(texts)
        ids, mask = self._pad([self._ids(encoding) for encoding in encodings])
        words = np.full(ids.shape, -1, dtype=np.int64)
        for row, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            words[row, : len(encoding.ids)] = _word_indices(text, encoding)
        return ids, mask, words

    @property
    def num_ids(self) -> int:
        """How many ids the file has, those of added tokens included."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def roles(self) -> tuple[list[int], int | None]:
        """Return the file's ids of special tokens, rising, and that of the token for unknown ones.

        None where there is no such token, or where it is one of those around a text, as CLIP's is.
        """
        framed = self._tokenizer.encode("a")
        frame = {code for code, special in zip(framed.ids, framed.special_tokens_mask, strict=True) if special}
        added = {code for code, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        model = json.loads(self.path.read_text(encoding="utf-8"))["model"]
        names = [model.get("unk_token"), *UNKNOWN]
        found = [self._tokenizer.token_to_id(name) for name in names if name is not None]
        unknown = next((code for code in (model.get("unk_id"), *found) if code is not None), None)
        known = None if unknown in frame else unknown
        return sorted(frame | added | ({known} if known is not None else set())), known

    def _ids(self, encoding: tokenizers.Encoding) -> NDArray[np.int64]:
        ids = np.array(encoding.ids, dtype=np.int64)
        return ids if self.rows is None else self.rows.rows[ids]

    def _encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        empty = tokenizers.Encoding()
        filled = iter(self._tokenizer.encode_batch([text for text in texts if has_text(text)]))
        return [next(filled) if has_text(text) else empty for text in texts]

    def _pad(self, rows: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        mask = np.arange(max(1, lengths.max(initial=0))) < lengths[:, None]
        ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        ids[mask] = np.concatenate(rows) if rows else []
        return ids, mask


def has_text(text: str | None) -> bool:
    """Return whether a text counts as present: more than white space."""
    return bool(text and text.strip())


def _word_indices(text: str, encoding: tokenizers.Encoding) -> NDArray[np.int64]:
    starts = np.array([match.start() for match in re.finditer(r"\S+", text)], dtype=np.int64)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)  # also where there are no tokens
    # the last character decides: byte-level tokens may begin with the space before their word
    words = np.searchsorted(starts, offsets[:, 1] - 1, side="right") - 1
    special = np.array(encoding.special_tokens_mask, dtype=bool)
    return np.where(special, -1, np.maximum(words, 0))


class Preprocessor:
    """Rows to the feeds of an exported graph; saved in every bundle as ``preprocess.json``.

    Attributes:
        formats: of the model's modalities other than text.
        tokenizer: the model's tokenizer; None for a model without text.
    """

    def __init__(self, formats: Mapping[str, Format], tokenizer: Tokenizer | None = None) -> None:
        """Take the parts; a modality without one is not read."""
        self.formats, self.tokenizer = dict(formats), tokenizer

    @classmethod
    def load(cls, folder: str | Path) -> Preprocessor:
        """Read ``preprocess.json`` and the tokenizer beside it.

        Raises:
            UserError: a file is missing or malformed.
        """
        file = Path(folder) / SPEC_FILE
        try:
            spec = json.loads(file.read_text(encoding="utf-8"))
            text = spec.pop(TEXT, None)
            formats = from_json(spec)
            options = None if text is None else (str(text["tokenizer"]), int(text["max_length"]), int(text["pad_id"]))
            rows = None if text is None or ROWS not in text else TokenRows(text[ROWS])
            if rows is not None and options is not None and options[2] >= rows.count:
                raise ValueError(f"pad_id is {options[2]}, and there are {rows.count} tokens")
            if options is not None and not (1 <= options[1] <= LARGEST and 0 <= options[2] <= LARGEST):
                raise ValueError(f"max_length is {options[1]} and pad_id {options[2]}")
        except FileNotFoundError:
            raise UserError(f"no {SPEC_FILE} in {folder}; is it a bundle made by `distill export`?") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{file} is malformed ({error!r}); export the bundle again") from error
        if options is None:
            return cls(formats)
        name, max_length, pad_id = options
        if name != TOKENIZER_FILE:
            raise UserError(f"{file} names the tokenizer {name!r} and not {TOKENIZER_FILE}; export the bundle again")
        return cls(formats, Tokenizer(file.parent / name, max_length, pad_id, rows))

    def save(self, folder: str | Path) -> None:
        """Write ``preprocess.json`` and copy the tokenizer beside it; the folder is made if absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        spec: dict[str, Any] = to_json(self.formats)
        if self.tokenizer is not None:
            spec[TEXT] = {
                "tokenizer": TOKENIZER_FILE,
                "max_length": self.tokenizer.max_length,
                "pad_id": self.tokenizer.pad_id,
                **({} if self.tokenizer.rows is None else {ROWS: self.tokenizer.rows.to_json()}),
            }
            if self.tokenizer.path.resolve() != (folder / TOKENIZER_FILE).resolve():
                shutil.copyfile(self.tokenizer.path, folder / TOKENIZER_FILE)
        long = self.tokenizer is not None and self.tokenizer.rows is not None  # a line an id would double it
        (folder / SPEC_FILE).write_text(json.dumps(spec, indent=None if long else 2) + "\n", encoding="utf-8")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
        """Turn rows into the graph's named inputs.

        Args:
            rows: mappings of modalities to values: a file's bytes or path or what it holds as an array (``image``,
                ``audio``, ``video``, ``series``), a string (``text``), a mapping of columns (``tabular``). An absent
                key, None or an empty text is an absent modality.

        Returns:
            Of each of the model's modalities its inputs, as :data:`~distill.contracts.INPUTS` describes them, and
            ``MODALITY_present`` bool [B]. What is absent is zeros.

        Raises:
            BadInput: a value is undecodable, or has the wrong type; the message names the row.
        """
        feeds: dict[str, NDArray[Any]] = {}
        for name, format in self.formats.items():
            found = [self._read(number, name, format, row.get(name)) for number, row in enumerate(rows)]
            for key, (dtype, shape) in format.arrays.items():
                feeds[key] = np.zeros((len(rows), *shape), dtype)
                for number, arrays in enumerate(found):
                    if arrays is not None:
                        feeds[key][number] = arrays[key]
            feeds[f"{name}_present"] = np.array([arrays is not None for arrays in found], dtype=bool)
        if self.tokenizer is not None:
            texts = [self._text(number, row.get(TEXT)) for number, row in enumerate(rows)]
            feeds["text"], feeds["text_mask"] = self.tokenizer(texts)
            feeds["text_present"] = np.array([has_text(text) for text in texts], dtype=bool)
        return feeds

    @staticmethod
    def _read(number: int, name: str, format: Format, value: Any) -> dict[str, NDArray[Any]] | None:
        try:
            return None if format.lacks(value) else format.read(value)
        except BadInput as error:
            raise BadInput(f"row {number}: {error}") from error

    @staticmethod
    def _text(number: int, value: Any) -> str:
        if value is not None and not isinstance(value, str):
            raise BadInput(f"row {number}: text is a {type(value).__name__}; give a string")
        try:
            (value or "").encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"row {number}: the text has half of a surrogate pair, which is no character") from error
        return value or ""
