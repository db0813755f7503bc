"""Parts of a batch's columns, in every layout that tokenizers give, and sums of weights' bits."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")


from contaccum_ext.integrations.sentence_transformers.features import join, row_count, split
from contaccum_ext.integrations.sentence_transformers.identity import text_ids
from contaccum_ext.integrations.sentence_transformers.weights import bit_sums, fingerprint

TEXTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14], [15]]


def padded(texts=TEXTS, left=False) -> dict:
    width = max(map(len, texts))
    ids, mask = torch.full((len(texts), width), 99), torch.zeros(len(texts), width).long()
    for i, text in enumerate(texts):
        place = slice(width - len(text), width) if left else slice(len(text))
        ids[i, place], mask[i, place] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": mask, "modality": "text", "prompt_length": 1}


def flattened(texts=TEXTS) -> dict:
    lengths = torch.tensor([len(text) for text in texts])
    ends = lengths.cumsum(0).int()
    return {
        "input_ids": torch.tensor([[*chain(*texts)]]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "seq_idx": torch.repeat_interleave(lengths)[None],
        "cu_seq_lens_q": torch.nn.functional.pad(ends, (1, 0)),
        "cu_seq_lens_k": torch.nn.functional.pad(ends, (1, 0)),
        "max_length_q": 4,
        "modality": "text",
    }


def bags(texts=TEXTS) -> dict:
    starts = torch.tensor([0] + [len(text) for text in texts[:-1]]).cumsum(0)
    return {"input_ids": torch.tensor([*chain(*texts)]), "offsets": starts}


LAYOUTS = {
    "padded": padded,
    "left": lambda texts=TEXTS: padded(texts, left=True),
    "flat": flattened,
    "bags": bags,
}


def assert_same_features(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        same = torch.equal(ours[name], value) if torch.is_tensor(value) else ours[name] == value
        assert same, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "at_once"), [(5, 5), (5, 2), (3, 2), (4, 1), (9, 9)])
def test_parts_hold_the_texts_of_the_first_rows(layout, rows, at_once):
    whole = LAYOUTS[layout]()
    kept = TEXTS[:rows]
    groups = [kept[begin : begin + at_once] for begin in range(0, len(kept), at_once)]
    parts = split(whole, rows, at_once)
    assert [row_count(part) for part in parts] == [len(group) for group in groups]
    assert torch.equal(torch.cat([text_ids(part) for part in parts]), text_ids(whole)[:rows])
    if layout != "left":  # padding before the texts is kept
        for part, group in zip(parts, groups, strict=True):
            longest = {"max_length_q": 4} if layout == "flat" else {}
            assert_same_features(part, LAYOUTS[layout](group) | longest)


def test_parts_are_copies():
    whole = padded()
    (part,) = split(whole, 5, 5)
    whole["attention_mask"].zero_()
    assert part["attention_mask"].sum() == sum(map(len, TEXTS))


def test_images_cut_into_patches_stay_together():
    columns = padded() | {"pixel_values": torch.arange(7.0), "grid": torch.ones(5, 3)}
    (part,) = split(columns, 2, 1)
    assert_same_features(part, columns)


def test_padded_parts_are_joined_up_to_a_number_of_rows():
    parts = [padded(TEXTS[begin : begin + 2]) for begin in (0, 2)] + [padded(TEXTS[4:])]
    joined = join(parts, 4)
    assert [row_count(batch) for batch in joined] == [4, 1]
    assert torch.equal(torch.cat([text_ids(batch) for batch in joined]), text_ids(padded()))
    assert joined[0]["input_ids"].tolist()[1] == [8, 99, 99, 0]  # 0 is padding by the mask
    assert joined[0]["attention_mask"].sum(1).tolist() == [3, 1, 4, 2]
    assert joined[0]["prompt_length"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_length": 2},
        {"modality": "message"},
        {"token_type_ids": torch.zeros(1, 3)},
        {"weights": torch.ones(2)},
    ],
)
def test_parts_that_differ_in_more_than_their_texts_are_not_joined(change):
    first = padded(TEXTS[:1]) | {"weights": torch.ones(3)}
    second = padded(TEXTS[:1]) | {"weights": torch.ones(3)}
    assert len(join([first, second], 9)) == 1
    assert len(join([first, second | change], 9)) == 2


@pytest.mark.parametrize("layout", ["flat", "bags"])
def test_texts_without_padding_are_not_joined(layout):
    parts = [LAYOUTS[layout](TEXTS[:2]), LAYOUTS[layout](TEXTS[2:])]
    assert join(parts, 9) == parts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 7])
def test_a_changed_weight_changes_the_sum_of_bits(dtype, size):
    weights = [torch.randn(3, size).to(dtype), torch.randn(1 + 3 * size).to(dtype)[1:]]
    before = bit_sums(weights), fingerprint(weights)
    assert (bit_sums([w.clone() for w in weights]), fingerprint(weights)) == before
    weights[1][-1] = torch.nextafter(weights[1][-1], torch.tensor(9.0).to(dtype))
    (first, second), (_, whole) = bit_sums(weights), before
    assert first == before[0][0]
    assert second != before[0][1]
    assert fingerprint(weights) != whole


def test_there_may_be_no_weights():
    assert bit_sums([]) == []
