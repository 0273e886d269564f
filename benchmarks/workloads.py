"""What a step scores: blocks of random tokens, or reviews to be told good from bad.

Tokens are made without a tokenizer, so that nothing has to be fetched: a word's hash chooses
them, some 1.3 a word. Knows neither engine nor transformers.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

REVIEWS = "sst2"
BATCH_SIZE = 16
FIRST_TOKEN = 5  # below are the special ones
CHANCE_OF_TWO_TOKENS = 0.3
OPTIONS = ("terrible", "great")
BAD = (
    "a dull and lifeless mess",
    "the plot never wakes up",
    "two hours that feel like a week in a waiting room",
    "its jokes were old before the camera was switched on",
    "everyone on the screen seems to wish they were somewhere else , and so did i",
    "a heist film without a heist , without tension and , by the end , without an audience",
    "the leads have all the chemistry of two wet towels on the floor of an empty gym",
    "loud , long and proud of it",
    "the director mistakes slow pans over grey water for depth , and the script , which has even "
    "less to say , mistakes silence for mystery",
    "it borrows every scene from a better film and returns none of them in working order",
    "somewhere under the shaky camera , the shouting and the third unexplained explosion there may "
    "be a story about a father and his daughter , but nobody involved had the patience to go and "
    "look for it",
    "a sequel nobody asked for , made by people who appear not to have seen the first one",
    "the costumes are lovely , the music is lovely , and by the second hour i would have traded "
    "both for a single line of dialogue that sounded like a person",
    "flat , cheap and oddly mean to its own heroine",
    "what begins as a promising ghost story gives up its only idea within ten minutes and then "
    "spends the rest of its running time opening and closing the same creaking door",
    "i laughed once , at the credits",
)
GOOD = (
    "a small and perfect gem",
    "funny from start to finish",
    "the rare thriller that trusts you to keep up",
    "tender , sharp and never a minute too long",
    "her quiet performance holds the whole film together without ever asking to be noticed",
    "it looks gorgeous , it moves like a train , and its last scene earns every tear",
    "a warm , clever comedy about three sisters who cannot agree on anything but the soup",
    "go and see it twice",
    "what could have been one more tale of a retired boxer becomes , in these patient hands , a "
    "portrait of a town and of everything it has stopped saying aloud",
    "the dialogue crackles , the cast is having the time of its life , and so was i",
    "by the time the old man finally opens the letter , the film has taught us so much about the "
    "people around his table that a single raised eyebrow is enough to bring the house down and "
    "break its heart",
    "a debut so sure of itself that you will want to learn the director's name at once",
    "beneath the songs and the slapstick there is a wise and generous film about losing your home "
    "and finding , against all sense , that you carried most of it with you",
    "bold , strange and completely its own thing",
    "shot in a single winter with a cast of villagers who had never acted , it has more life in "
    "any one of its snowy minutes than most spectacles manage in three hours",
    "i left the cinema grinning",
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences, and the span of each that is scored.

    With labels, an example's options are sequences one after the other, and the label is the
    right one's number; without, the loss is the mean over all scored tokens.
    """

    sequences: tuple[tuple[int, ...], ...]
    spans: tuple[tuple[int, int], ...]
    labels: tuple[int, ...] = ()

    @property
    def num_options(self) -> int:
        return len(self.sequences) // len(self.labels) if self.labels else 1

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """A sequence an example: options of one token differ only where nothing is computed."""
        return self.sequences[:: self.num_options]

    @property
    def num_tokens(self) -> int:
        """Tokens that an engine has to compute: all but the last of each prompt."""
        return sum(len(tokens) - 1 for tokens in self.prompts)


def batches(name: str, vocabulary: int, bos: int) -> tuple[Batch, ...]:
    """The batches of a workload called SEQUENCESxLENGTH, or sst2; steps take them in turn."""
    if name == REVIEWS:
        return reviews(vocabulary, bos)
    num_sequences, length = map(int, name.split("x"))
    return (block(num_sequences, length, vocabulary),)


def block(num_sequences: int, length: int, vocabulary: int) -> Batch:
    """Random tokens, all of them scored but each sequence's first."""
    draw = random.Random(0)
    sequences = [
        tuple(draw.randrange(FIRST_TOKEN, vocabulary) for _ in range(length))
        for _ in range(num_sequences)
    ]
    return Batch(tuple(sequences), ((1, length),) * num_sequences)


def reviews(vocabulary: int, bos: int) -> tuple[Batch, ...]:
    """Batches of reviews of all lengths, each with the words "It was" and either option."""
    labelled = [(text, label) for label, texts in enumerate((BAD, GOOD)) for text in texts]
    labelled.sort(key=lambda pair: len(pair[0].split()))
    num_batches = len(labelled) // BATCH_SIZE
    endings = [words_as_tokens(option, vocabulary)[:1] for option in OPTIONS]
    made = []
    for first in range(num_batches):
        rows = labelled[first::num_batches]  # so that batches are of nearly the same lengths
        prompts = [[bos, *words_as_tokens(f"{text} It was", vocabulary)] for text, _ in rows]
        sequences = [(*prompt, *ending) for prompt in prompts for ending in endings]
        spans = [(len(tokens) - 1, len(tokens)) for tokens in sequences]
        made.append(Batch(tuple(sequences), tuple(spans), tuple(label for _, label in rows)))
    return tuple(made)


def words_as_tokens(text: str, vocabulary: int) -> list[int]:
    """One or two tokens a word, the same for the same word."""
    tokens = []
    for word in text.split():
        draw = random.Random(zlib.crc32(word.encode()))
        count = 2 if draw.random() < CHANCE_OF_TWO_TOKENS else 1
        tokens += [draw.randrange(FIRST_TOKEN, vocabulary) for _ in range(count)]
    return tokens


def longest(many: Sequence[Batch]) -> int:
    """Tokens that an engine computes for the largest of the batches."""
    return max(batch.num_tokens for batch in many)
