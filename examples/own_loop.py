"""ContAccum in your own loop: the lines that matter are numbered. Nothing to download.

A dual encoder in its simplest form, the mean of word vectors, learns which function of Python's own
library a docstring belongs to.
"""

import random

import torch
from torch import nn

import contaccum_ext as ca
from contaccum_ext.datasets import load_stdlib
from contaccum_ext.training.scratch import train_tokenizer

LOCAL_BATCH = 8  # n: what fits in memory
ACCUMULATION = 4  # K: micro-batches per optimizer update
UPDATES = 400

random.seed(0)
torch.manual_seed(0)
dataset = load_stdlib()
tokenizer = train_tokenizer((passage.full() for passage in dataset.corpus.values()), 8192)
query_encoder = nn.EmbeddingBag(len(tokenizer), 128)
passage_encoder = nn.EmbeddingBag(len(tokenizer), 128)
passage_encoder.load_state_dict(query_encoder.state_dict())  # shared words match from the start
optimizer = torch.optim.Adam([*query_encoder.parameters(), *passage_encoder.parameters()], lr=1e-2)


def encode(encoder: nn.EmbeddingBag, texts: list[str]) -> torch.Tensor:
    token_ids = tokenizer(texts, truncation=True, max_length=96)["input_ids"]
    starts = torch.tensor([0, *map(len, token_ids[:-1])]).cumsum(0)
    tokens = torch.tensor([token for text_ids in token_ids for token in text_ids])
    return nn.functional.normalize(encoder(tokens, starts), dim=-1)


@torch.no_grad()
def recall_at_20() -> float:
    """How many test queries find their function among the first 20 of the whole corpus."""
    ids = list(dataset.corpus)
    corpus = encode(passage_encoder, [dataset.corpus[passage_id].full() for passage_id in ids])
    queries = encode(query_encoder, [query.query for query in dataset.test])
    best = (queries @ corpus.T).topk(20).indices.tolist()
    hits = [
        query.positives[0] in {ids[index] for index in ranking}
        for query, ranking in zip(dataset.test, best, strict=True)
    ]
    return sum(hits) / len(hits)


print(f"Recall@20 before training: {recall_at_20():.3f}")
decay = ca.mean_decay(ACCUMULATION)  # means must not lag behind the model
# 1. Eight updates' worth. An update is of few micro-batches, so each is in its own loss's means.
bank = ca.DualMemoryBank(256, 128, drift="mean", drift_decay=decay, anticipate=True)

for update in range(UPDATES):
    total = 0.0
    for _ in range(ACCUMULATION):
        examples = random.sample(dataset.train, LOCAL_BATCH)
        queries = encode(query_encoder, [example.query for example in examples])  # (n, d)
        passages = encode(
            passage_encoder, [dataset.corpus[example.positives[0]].full() for example in examples]
        )  # (n, d)
        loss = ca.contaccum_loss(queries, passages, bank, temperature=0.05)  # 2. and enqueue
        (loss / ACCUMULATION).backward()  # 3. as in any gradient accumulation
        total += loss.item() / ACCUMULATION
    optimizer.step()  # 4.
    optimizer.zero_grad()
    if update % 50 == 0:
        print(f"update {update}: loss {total:.2f}, {len(bank)} of {bank.capacity} slots filled")
print(f"Recall@20 after training: {recall_at_20():.3f}")
