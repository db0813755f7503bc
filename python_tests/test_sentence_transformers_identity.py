"""Texts are told apart by their tokens, and by nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

from contaccum_ext.integrations.sentence_transformers import identity
from contaccum_ext.integrations.sentence_transformers.identity import text_ids

TEXTS = st.lists(st.lists(st.integers(0, 250_000), max_size=12), min_size=1, max_size=8)
PAD = 7  # also a token that texts may hold


def padded(texts: list[list[int]], extra: int = 0, left: bool = False) -> dict[str, torch.Tensor]:
    width = max(map(len, texts)) + extra
    tokens = torch.full((len(texts), width), PAD)
    mask = torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(width - len(text), width) if left else slice(0, len(text))
        tokens[row, place] = torch.tensor(text, dtype=torch.int64)
        mask[row, place] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def starts_of(texts: list[list[int]]) -> torch.Tensor:
    return torch.tensor([0, *map(len, texts)]).cumsum(0)


@given(TEXTS, st.integers(0, 5))
def test_padding_and_layout_make_no_difference(texts, extra):
    ids = text_ids(padded(texts))
    assert ids.shape == (len(texts),)
    assert ids.dtype == torch.int64
    flat = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    starts = starts_of(texts)
    for other in (
        padded(texts, extra),
        padded(texts, extra, left=True),
        {"input_ids": flat, "offsets": starts[:-1]},
        {"input_ids": flat[None], "cu_seq_lens_q": starts.int()},
    ):
        assert torch.equal(text_ids(other), ids)


@given(TEXTS)
def test_equal_exactly_where_the_tokens_are_and_never_negative(texts):
    texts = [*texts, texts[0]]
    ids = text_ids(padded(texts)).tolist()
    assert min(ids) >= 0
    for first, one in zip(texts, ids, strict=True):
        assert [first == second for second in texts] == [one == other for other in ids]


def test_order_repetition_and_length_count():
    texts = [[1, 2], [2, 1], [1, 2, 2], [1, 1, 2], [1, 2, 0], [0, 1, 2], [0], [0, 0], []]
    assert len(set(text_ids(padded(texts)).tolist())) == len(texts)


def test_hashes_fill_the_63_bits_evenly():
    ids = text_ids(padded([[i] for i in range(4096)]))
    assert len(set(ids.tolist())) == 4096
    for bit in range(63):
        share = ((ids >> bit) & 1).double().mean().item()
        # 4,096 fair coins: six standard deviations of 1/128 each.
        assert abs(share - 0.5) < 6 / 128, bit


def test_the_numbers_stay_what_they_are():
    """Checkpoints hold them. The mixing function is splitmix64's: its first output for seed 0."""
    mixed = identity._scramble(torch.tensor(identity._GOLDEN)).item()
    assert mixed % 2**64 == 0xE220A8397B1DCDAF
    assert text_ids({"input_ids": torch.tensor([[101, 7592, 102]])}).tolist() == [
        787_076_525_674_201_306
    ]


def test_without_a_mask_every_token_is_real():
    tokens = torch.tensor([[5, 6, PAD]])
    assert torch.equal(text_ids({"input_ids": tokens}), text_ids(padded([[5, 6, PAD]])))


def test_another_process_gives_the_same_numbers():
    code = (
        "import torch\n"
        "from contaccum_ext.integrations.sentence_transformers.identity import text_ids\n"
        "print(*text_ids({'input_ids': torch.tensor([[101, 7592, 102], [101, 0, 3]])}).tolist())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    here = text_ids({"input_ids": torch.tensor([[101, 7592, 102], [101, 0, 3]])}).tolist()
    assert here == [int(number) for number in there.split()]


@pytest.mark.parametrize(
    "name", ["pixel_values", "pixel_values_videos", "input_features", "input_values"]
)
def test_inputs_that_are_not_text_alone_are_not_identified(name):
    # Two images come with one and the same placeholder text.
    assert text_ids({**padded([[1, 2], [1, 2]]), name: torch.randn(2, 3)}) is None


def test_inputs_without_tokens_are_not_identified():
    assert text_ids({"sentence_embedding": torch.randn(2, 3)}) is None
