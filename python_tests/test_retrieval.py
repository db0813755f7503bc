"""Encoding texts, and scoring a dense retriever over the whole corpus."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from contaccum_ext.datasets import (
    EvalQuery,
    Passage,
    RetrievalDataset,
)
from contaccum_ext.retrieval import (
    EvalOptions,
    encode_texts,
    evaluate_dense,
)

DIM = 16


def corpus_of(**texts: str) -> dict[str, Passage]:
    return {name: Passage(name, "", text) for name, text in texts.items()}


def hash_tokenizer(texts, *, padding, truncation, max_length, return_tensors):
    """Character codes as tokens, padded with 0: a transformers tokenizer's interface."""
    assert padding and truncation and return_tensors == "pt"
    tokens = [[ord(c) % 97 + 1 for c in text[:max_length]] or [1] for text in texts]
    longest = max(map(len, tokens))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in tokens])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class MeanEncoder(nn.Module):
    """Mean of token embeddings; dropout shows whether it runs in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(98, DIM)
        self.dropout = nn.Dropout(0.5)
        self.batch_sizes: list[int] = []

    def forward(self, input_ids, attention_mask):
        self.batch_sizes.append(len(input_ids))
        assert torch.is_inference_mode_enabled()
        mask = attention_mask.unsqueeze(-1)
        return (self.dropout(self.embedding(input_ids)) * mask).sum(1) / mask.sum(1)


@pytest.fixture
def encoder():
    return MeanEncoder().train()


TEXTS = ["a dog", "", "the satellite that came first", "cat", "Laika flew", "a dog"]


def mean_of_tokens(encoder: MeanEncoder, text: str, max_length: int = 256) -> torch.Tensor:
    ids = torch.tensor([ord(c) % 97 + 1 for c in text[:max_length]] or [1])
    return encoder.embedding.weight[ids].mean(0).detach()


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_encode_keeps_the_order(encoder, batch_size):
    vectors = encode_texts(encoder, hash_tokenizer, TEXTS, batch_size=batch_size)
    expected = torch.stack([mean_of_tokens(encoder, text) for text in TEXTS])
    assert vectors.dtype == torch.float32
    assert vectors.device.type == "cpu"
    torch.testing.assert_close(vectors, expected)
    full, rest = divmod(len(TEXTS), batch_size)
    assert encoder.batch_sizes == [batch_size] * full + [rest] * (rest > 0)


def test_encode_truncates(encoder):
    vectors = encode_texts(encoder, hash_tokenizer, ["abcdef"], max_length=3)
    torch.testing.assert_close(vectors[0], mean_of_tokens(encoder, "abc"))


def test_encode_restores_every_mode_also_after_an_error(encoder):
    encoder.embedding.eval()
    encode_texts(encoder, hash_tokenizer, TEXTS)
    assert (encoder.training, encoder.embedding.training, encoder.dropout.training) == (
        True,
        False,
        True,
    )
    with pytest.raises(TypeError):
        encode_texts(encoder, lambda texts, **_: {"ids": torch.zeros(1)}, TEXTS)
    assert (encoder.training, encoder.embedding.training) == (True, False)


def test_encoded_vectors_may_take_part_in_autograd(encoder):
    vectors = encode_texts(encoder, hash_tokenizer, TEXTS)
    weight = torch.ones(DIM, requires_grad=True)
    (vectors @ weight).sum().backward()
    torch.testing.assert_close(weight.grad, vectors.sum(0))


def test_encode_autocast_returns_fp32(encoder):
    head = nn.Linear(DIM, 4)
    seen = []

    class Headed(nn.Module):
        def forward(self, **batch):
            out = head(encoder(**batch))
            seen.append(out.dtype)
            return out

    vectors = encode_texts(Headed(), hash_tokenizer, TEXTS, autocast_dtype=torch.bfloat16)
    assert seen == [torch.bfloat16]
    assert vectors.dtype == torch.float32


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("x", "expected a tensor (6, d), got str"),
        (torch.zeros(6, 2, 3), "expected floating-point (6, d), got torch.float32 (6, 2, 3)"),
        (torch.zeros(5, 3), "expected floating-point (6, d), got torch.float32 (5, 3)"),
        (torch.zeros(6, 3).long(), "expected floating-point (6, d), got torch.int64 (6, 3)"),
    ],
)
def test_encode_refuses_what_is_no_vector_per_text(returned, message):
    class Bad(nn.Module):
        def forward(self, **batch):
            return returned

    with pytest.raises(ValueError, match=re.escape(f"encoder: {message}")):
        encode_texts(Bad(), hash_tokenizer, TEXTS)


def test_encode_refuses_bad_arguments(encoder):
    with pytest.raises(ValueError, match="texts: expected at least one"):
        encode_texts(encoder, hash_tokenizer, [])
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        encode_texts(encoder, hash_tokenizer, TEXTS, batch_size=0)


class LetterEncoder(nn.Module):
    """One-hot of the first character."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.eye(98)))

    def forward(self, input_ids, attention_mask):
        return self.weight[input_ids[:, 0]]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_evaluate_dense_searches_the_whole_corpus(backend):
    corpus = corpus_of(**{f"p{letter}": letter * 3 for letter in "zabcdefgh"})
    queries = [EvalQuery("q1", "c?", ("pc",)), EvalQuery("q2", "d?", ("pe",))]
    valid = [EvalQuery("v1", "a", ("pa",))]
    dataset = RetrievalDataset("letters", corpus, [], valid, queries)
    encoder = LetterEncoder()
    result = evaluate_dense(
        encoder,
        encoder,
        hash_tokenizer,
        dataset,
        metrics=["MRR@10", "Recall@100"],
        options=EvalOptions(batch_size=2, backend=backend),
    )
    # q2 finds "pd" first, then all others with score 0 in corpus order: "pe" is the sixth.
    assert result.per_query["MRR@10"] == {"q1": 1.0, "q2": pytest.approx(1 / 6)}
    assert result.metrics["MRR@10"] == pytest.approx((1 + 1 / 6) / 2)
    assert result.metrics["Recall@100"] == 1.0
    assert (result.n_queries, result.n_passages) == (2, 9)
    assert result.seconds > 0
    shallow = evaluate_dense(encoder, encoder, hash_tokenizer, dataset, k=1, metrics=["Recall@100"])
    assert shallow.metrics == {"Recall@100": 0.5}
    on_valid = evaluate_dense(encoder, encoder, hash_tokenizer, dataset, split="valid")
    assert on_valid.n_queries == 1
    assert list(on_valid.metrics) == ["NDCG@10", "MRR@10", "Recall@20", "Recall@100"]


def test_evaluate_dense_checks_before_encoding():
    queries = [EvalQuery("q1", "a", ("pa",))]
    dataset = RetrievalDataset("letters", corpus_of(pa="a"), [], [], queries)

    class Never(nn.Module):
        def forward(self, **batch):
            raise AssertionError("encoded")

    for arguments, message in (
        ({"metrics": ["MAP"]}, "metrics: expected"),
        ({"metrics": ["Top@1"]}, "'q1' has no answers"),
        ({"split": "valid"}, "has no 'valid' split; it has test"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_dense(Never(), Never(), hash_tokenizer, dataset, **arguments)


def test_importing_needs_no_optional_package():
    names = ["faiss", "bm25s", "ir_measures", "pytrec_eval", "transformers", "tqdm"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({names})); "
        "import contaccum_ext.retrieval as r; print(r.evaluate_dense.__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.stdout.strip() == "evaluate_dense"
