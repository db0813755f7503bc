"""A small transformer from random initialisation, and the tokenizer trained on the same texts.

Written in Hugging Face layout, so that training from nothing and training from a pretrained model
take the same path from there on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class ScratchConfig:
    """Shape of the small encoder; the defaults train in about a minute on two CPU cores."""

    vocabulary: int = 8192  # word pieces
    hidden: int = 256
    layers: int = 1
    heads: int = 4
    feed_forward: int = 512
    max_length: int = 128  # positions
    seed: int = 1


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of lower-case words; `snake_case` and `camelCase` fall into their words.

    Punctuation is dropped: in source code it would take half of a short passage. The same texts
    give the same tokenizer (WordPiece training, as implemented, does not).

    Args:
        texts: what the vocabulary is learned from.
        vocabulary: pieces at most, special tokens included.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Replace(Regex(r"(?<=[a-z0-9])(?=[A-Z])|[^\p{L}\p{N}]+"), " "),
            normalizers.Lowercase(),
        ]
    )
    # The mark of a word's beginning tells a whole word from the tail of another.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL_TOKENS),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def write_scratch_encoder(directory: Path, texts: list[str], config: ScratchConfig) -> None:
    """Write an untrained encoder with its tokenizer to a directory `from_pretrained` opens.

    Args:
        directory: made if missing.
        texts: passages and queries the tokenizer is trained on; no test queries belong here.
        config: shape and seed.
    """
    tokenizer = train_tokenizer(texts, config.vocabulary)
    torch.manual_seed(config.seed)
    backbone = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.feed_forward,
            max_position_embeddings=config.max_length,
            # Each text is seen a few times only: dropout slows learning more than it helps.
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # What all texts have in common (positions, the one segment) would otherwise weigh as much as
    # the words: texts start out nearly parallel, and drift is at its worst.
    with torch.no_grad():
        backbone.embeddings.position_embeddings.weight.mul_(0.1)
        backbone.embeddings.token_type_embeddings.weight.zero_()
    directory.mkdir(parents=True, exist_ok=True)
    backbone.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
