"""Tokenizers of the kinds that matter, trained on a few sentences: how they cut at spaces, line
breaks and borders is as in the large ones, their vocabularies are not."""

from collections.abc import Callable, Iterable

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY_SIZE = 3000


def gpt2(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Bytes, words with the space before them; adds no BOS token."""
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), texts)


def opt(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """GPT-2's, with `</s>` before every text."""
    tokenizer = _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), texts, "</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def qwen(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Bytes, cut by another pattern: a mark may take line breaks after it; no BOS token at all."""
    pattern = pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = _byte_level(pre_tokenizers.Sequence([pattern, in_bytes]), texts)
    tokenizer.bos_token = None
    return tokenizer


def _byte_level(
    pre_tokenizer: pre_tokenizers.PreTokenizer, texts: Iterable[str], end: str = "<|endoftext|>"
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)


def llama(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """As SentencePiece has it: a space before the text, `▁` for spaces, bytes for what is in no
    piece, such as line breaks; `<s>` before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # in training, no piece spans words, and first words of a line stand without a space
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for text in texts for line in text.split("\n")), trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


KINDS: dict[str, Callable[[Iterable[str]], PreTrainedTokenizerFast]] = {
    "gpt2": gpt2,
    "opt": opt,
    "llama": llama,
    "qwen": qwen,
}


def tokenize(tokenizer: PreTrainedTokenizerFast) -> Callable[[list[str]], list[list[int]]]:
    """As a replica hands it to an Encoder."""

    def ids(texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(texts)["input_ids"]
        return found

    return ids
