"""A task's examples as tokens: what is scored, what is calibrated by, and what is continued.

Knows neither the model nor its tokenizer, which is handed in as a function.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from orchestrator.config import ConfigError
from orchestrator.records import Split
from orchestrator.tasks import Example, TaskData
from orchestrator.templates import MARK

TEXTS_PER_CALL = 1024  # bounds the tokens of long texts that exist before they are cut


@dataclass(frozen=True, slots=True)
class Encoding:
    """An example as tokens: a sequence per option, and where the option's tokens stand in it.

    None where there is nothing but a prompt.
    """

    sequences: tuple[tuple[int, ...], ...]
    spans: tuple[tuple[int, int], ...]
    label: int
    also_right: tuple[int, ...]
    context: int = 0
    """How many tokens of each sequence, or of the bare prompt, stand before the place from which
    the adapter acts."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to be continued, and how many of them the adapter does not act on."""

    tokens: list[int]
    context: int


class Encoder:
    """All examples of a task as tokens."""

    def __init__(
        self,
        data: TaskData,
        tokenize: Callable[[list[str]], list[list[int]]],
        *,
        bos: int | None,
        max_length: int,
        eos: int | None = None,
        is_activated: bool = False,
    ) -> None:
        """Encode everything, so that what is wrong is told before the first step.

        `tokenize` adds the special tokens that the model expects; a `bos` that stands first
        survives a cut. Raises ConfigError, naming file and line, where an option cannot be told
        from its prompt in tokens, or nothing of a prompt would be left.

        `is_activated` has the template's mark found in each row, and that what stands there is
        what PEFT would act from too: `invocation`. ConfigError names the first row where not.
        """
        self._data = data
        self._tokenize = tokenize
        self._bos, self._eos = bos, eos
        self._max_length = max_length
        self._is_activated = is_activated
        self._splits: dict[Split, list[Encoding]] = {}
        self._contexts: dict[Split, list[int]] = {}
        self._longest_prompt = 0
        self._cue: list[int] | None = None
        self._digest = hashlib.sha256()
        for split in get_args(Split):
            self._encode_split(split)
        if is_activated:
            self._check_invocation()

    def _encode_split(self, split: Split) -> None:
        shown, examples = self._data.demonstrations, self._data.split(split)
        texts = (text for example in examples for text in self._texts(example))
        tokens = self._tokens(shown + text for text in texts)
        self._splits[split], self._contexts[split] = [], []
        for example in examples:
            prompt, sequences = next(tokens), [next(tokens) for _ in example.texts]
            self._digest.update(repr((prompt, sequences)).encode())
            context = 0
            if self._is_activated:
                marked = next(tokens), next(tokens)
                context = self._marked(example, marked, [prompt, *sequences])
            self._contexts[split].append(context)
            whole = shown + example.prompt, example.texts
            self._splits[split].append(
                self._encode("task.template", example, whole, prompt, sequences, context)
            )

    def _texts(self, example: Example) -> tuple[str, ...]:
        if not self._is_activated:
            return example.prompt, *example.texts
        assert example.context is not None  # the configuration has seen to that
        return example.prompt, *example.texts, *example.context

    @property
    def fingerprint(self) -> str:
        """Hash (16 hex digits) of all tokens: another tokenizer has another."""
        return self._digest.hexdigest()[:16]

    @property
    def invocation(self) -> tuple[int, ...]:
        """The tokens that stand behind the mark in every row, and nowhere later: where PEFT's
        activated LoRA begins to act. Empty for an adapter that acts on all tokens."""
        return tuple(self._cue or ())

    def encode(self, split: Split, ids: Sequence[int]) -> list[Encoding]:
        return [self._splits[split][id] for id in ids]

    def unconditional(self, split: Split, ids: Sequence[int]) -> list[Encoding]:
        """What calibration scores beside `encode`'s, span for span: the options without the row.

        Where nothing else stands before an option, a BOS token does, or an EOS token where the
        model has none of that; ConfigError where it has neither. Not for the train split.
        """
        encodings = []
        for example in (self._data.split(split)[id] for id in ids):
            assert example.unconditional is not None, f"{split} is not calibrated"
            prompt, texts = example.unconditional
            before, *sequences = self._tokenize([prompt, *texts])
            if not before:
                first = self._first_token()
                before, sequences = [first], [[first, *tokens] for tokens in sequences]
            encodings.append(
                self._encode(
                    "task.unconditional", example, example.unconditional, before, sequences
                )
            )
        return encodings

    def _first_token(self) -> int:
        for token in (self._bos, self._eos):
            if token is not None:
                return token
        raise ConfigError(
            "task.unconditional: begins with the option, and the tokenizer has no BOS or EOS token "
            "to stand before it; put text there"
        )

    def prompts(self, split: Split, ids: Sequence[int], max_new_tokens: int) -> list[Prompt]:
        """Prompts to be continued, cut so that so many more tokens do not exceed max_length."""
        examples = [self._data.split(split)[id] for id in ids]
        texts = (self._data.demonstrations + example.prompt for example in examples)
        room = self._max_length - max_new_tokens
        found = []
        for id, example, tokens in zip(ids, examples, self._tokens(texts), strict=True):
            excess, context = max(0, len(tokens) - room), self._contexts[split][id]
            if self._is_activated:
                self._require_context(example, context, excess)
            found.append(Prompt(self._cut(tokens, excess), max(0, context - excess)))
        return found

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; 0 where there are only prompts."""
        encodings = [encoding for split in self._splits.values() for encoding in split]
        lengths = (len(tokens) for encoding in encodings for tokens in encoding.sequences)
        return max(lengths, default=0)

    def room(self, num_copies: int) -> int:
        """KV entries that the largest sequence takes, so many times over: its context once; 0 where
        there are only prompts."""
        encodings = [encoding for split in self._splits.values() for encoding in split]
        rooms = (
            encoding.context + num_copies * (len(tokens) - encoding.context)
            for encoding in encodings
            for tokens in encoding.sequences
        )
        return max(rooms, default=0)

    def longest_continued(self, max_new_tokens: int) -> int:
        """Tokens of the longest prompt of `prompts` and of what continues it."""
        return min(self._longest_prompt + max_new_tokens, self._max_length)

    def _tokens(self, texts: Iterable[str]) -> Iterator[list[int]]:
        texts = iter(texts)
        while some := list(itertools.islice(texts, TEXTS_PER_CALL)):
            yield from self._tokenize(some)

    def _encode(
        self,
        key: str,
        example: Example,
        texts: tuple[str, tuple[str, ...]],
        prompt: list[int],
        sequences: list[list[int]],
        context: int = 0,
    ) -> Encoding:
        """`texts` are the prompt and all of it with each option, by the template of that key;
        `prompt` and `sequences` are their tokens, of which `context` stand before the mark."""
        self._longest_prompt = max(self._longest_prompt, len(prompt))
        if not prompt and not sequences:
            raise ConfigError(f"{key}: nothing stands before {{option}}, in {example.origin}")
        if not sequences:
            return Encoding((), (), example.label, example.also_right, context)
        start = self._border(key, example, texts, prompt, sequences)
        # all options lose the same tokens, so that they follow the same prompt
        excess = max(0, max(map(len, sequences)) - self._max_length)
        if excess and excess >= start - 1:
            longest = max(len(tokens) - start for tokens in sequences)
            raise ConfigError(
                f"task.max_length: {self._max_length} leaves no room for a prompt before an "
                f"option of {longest} tokens, in {example.origin}"
            )
        if context:
            self._require_context(example, context, excess)
        return Encoding(
            sequences=tuple(tuple(self._cut(tokens, excess)) for tokens in sequences),
            spans=tuple((start - excess, len(tokens) - excess) for tokens in sequences),
            label=example.label,
            also_right=example.also_right,
            context=max(0, context - excess),
        )

    def _require_context(self, example: Example, context: int, excess: int) -> None:
        if excess >= context:
            raise ConfigError(
                f"task.max_length: {self._max_length} leaves nothing of what stands before {MARK} "
                f"in {example.origin}"
            )

    def _marked(
        self, example: Example, marked: tuple[list[int], list[int]], sequences: list[list[int]]
    ) -> int:
        """How many tokens stand before the mark; what follows it is noted as `invocation`.

        `marked` is the text before the mark, alone and with the fixed text behind it. That text's
        last tokens may be drawn to what follows, and are then not of the invocation.
        """
        assert example.context is not None
        context, cued = marked
        if not _is_before(context, sequences):
            text = self._data.demonstrations + example.context[0].rstrip()
            (context,) = self._tokenize([text])
        if not _is_before(context, sequences):
            raise ConfigError(
                f"task.template: the tokenizer merges what stands on both sides of {MARK} in "
                f"{example.context[1][-60:]!r}, {example.origin}; put a line break or a space "
                "before it"
            )
        start = len(context)
        cue = list(os.path.commonprefix([cued, *sequences])[start:])
        self._cue = cue if self._cue is None else list(os.path.commonprefix([self._cue, cue]))
        if not self._cue:
            raise ConfigError(
                f"task.template: no token of the text behind {MARK} is the same in "
                f"{example.origin} as in all rows before; put a word and a line break there"
            )
        return start

    def _check_invocation(self) -> None:
        """Refuse rows in which PEFT would find the invocation's last occurrence elsewhere."""
        cue = self.invocation
        for split, encodings in self._splits.items():
            examples = self._data.split(split)
            bare = self._tokens(
                self._data.demonstrations + example.prompt
                for example in examples
                if not example.texts
            )
            for example, encoding in zip(examples, encodings, strict=True):
                for tokens in encoding.sequences or (tuple(next(bare)),):
                    places = range(len(tokens) - len(cue), encoding.context, -1)
                    if any(tokens[place : place + len(cue)] == cue for place in places):
                        raise ConfigError(
                            f"task.template: the text behind {MARK} stands again further on, in "
                            f"{example.origin}; put there what is in no row"
                        )

    def _border(
        self,
        key: str,
        example: Example,
        texts: tuple[str, tuple[str, ...]],
        prompt: list[int],
        sequences: list[list[int]],
    ) -> int:
        """How many tokens of the sequences are the prompt's.

        Tokenizers may draw white space at the prompt's end to what follows; it is the option's
        then. Where they draw more, no token begins where the option does.
        """
        if _is_before(prompt, sequences):
            return len(prompt)
        text, whole = texts
        (shorter,) = self._tokenize([text.rstrip()])
        if _is_before(shorter, sequences):
            return len(shorter)
        raise ConfigError(
            f"{key}: the tokenizer merges prompt and option in {whole[0][-60:]!r}, "
            f"{example.origin}; put text, and a space or a line break, before {{option}}"
        )

    def _cut(self, tokens: list[int], excess: int) -> list[int]:
        """Drop `excess` tokens from the left, but not a BOS token that stands first."""
        if excess and tokens[0] == self._bos:
            return [tokens[0], *tokens[1 + excess :]]
        return tokens[excess:]


def _is_before(prompt: list[int], sequences: list[list[int]]) -> bool:
    """Whether every sequence goes on where the prompt ends."""
    size = len(prompt)
    return bool(prompt) and all(
        len(tokens) > size and tokens[:size] == prompt for tokens in sequences
    )
