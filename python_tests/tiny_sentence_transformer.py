"""A sentence-transformers model, data and runs small enough to train within a test."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Router
from tiny_retriever import tiny_dataset

from contaccum_ext import reference
from contaccum_ext.integrations.sentence_transformers import (
    CachedContAccumLoss,
    ContAccumCallback,
    ContAccumLoss,
)

EPS = torch.finfo(torch.float64).eps

# Theirs and ours, for the same way of encoding.
PAIRS = {
    "plain": (MultipleNegativesRankingLoss, ContAccumLoss, {}),
    "cached": (
        CachedMultipleNegativesRankingLoss,
        CachedContAccumLoss,
        {"mini_batch_size": 3},
    ),
}

BATCH, ACCUMULATION, STEPS = 4, 2, 8


def rows(count: int = 40, negatives: int = 0) -> dict[str, list[str]]:
    """Columns of a data set: anchor, positive, negative_1, ..., no text twice."""
    source = tiny_dataset(train=count)
    examples = source.train[:count]
    columns = {
        "anchor": [example.query for example in examples],
        "positive": [source.corpus[example.positives[0]].full() for example in examples],
    }
    for k in range(negatives):
        columns[f"negative_{k + 1}"] = [f"{text} Not {k}." for text in columns["positive"]]
    return columns


def load(directory: Path, device: str = "cpu") -> SentenceTransformer:
    """The encoder in a directory with mean pooling."""
    return SentenceTransformer(str(directory), device=device, local_files_only=True)


def asymmetric(directory: Path) -> SentenceTransformer:
    """Two encoders with one address."""
    query, document = load(directory), load(directory)
    with torch.no_grad():
        for parameter in document.parameters():
            parameter.mul_(1.1)
    router = Router.for_query_document(query_modules=list(query), document_modules=list(document))
    return SentenceTransformer(modules=[router], device="cpu").double().train()


def features(model: SentenceTransformer, columns: dict[str, list[str]], **options) -> list[dict]:
    """What the data collator hands to a loss, on the model's device as by the Trainer."""
    made = [model.preprocess(texts, **options) for texts in columns.values()]
    return [
        {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in column.items()}
        for column in made
    ]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of all parameters, which are cleared."""
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return found


def batch(model, size: int = 6, negatives: int = 0, first: int = 0, **options) -> list[dict]:
    columns = rows(first + size, negatives)
    return features(model, {name: texts[first:] for name, texts in columns.items()}, **options)


def routed(model, size: int, negatives: int, first: int = 0) -> list[dict]:
    """The batch for an asymmetric encoder."""
    columns = rows(first + size, negatives)
    tasks = ["query"] + ["document"] * (1 + negatives)
    return [
        {**model.preprocess(texts[first:], task=task), "task": task}
        for texts, task in zip(columns.values(), tasks, strict=True)
    ]


def step(loss, columns) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    value = loss(columns, None)
    value.backward()
    return value.detach(), gradients(loss.model)


def embed(model, columns) -> list[torch.Tensor]:
    return [
        torch.nn.functional.normalize(model(column)["sentence_embedding"], dim=-1)
        for column in columns
    ]


def assert_same(ours, theirs) -> None:
    """Both are float64 sums of the same few thousand terms in another order."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e4 * EPS, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    size = max(gradient.norm() for gradient in theirs[1].values())
    assert size > 1e-3
    for name, gradient in theirs[1].items():
        error = (ours[1][name] - gradient).norm()
        assert error <= 1e5 * EPS * size, name


def oracle(bank, columns, ids=None, anticipates=True, **kinds) -> torch.Tensor:
    """The reference's loss of embedded columns, which enter its bank; kinds are its arguments.

    `anticipates`: running means have the batch before its loss, as in updates of few batches.
    """
    queries, passages = columns[0], torch.stack(columns[1:], 1)
    bank.anticipate = anticipates and bank.drift == "mean"
    return reference.contaccum_loss(queries, passages, bank, 1 / 20, ids, **kinds)


def recorded(kind):
    """A loss that notes what each of its training batches was, and the value."""
    _, ours, options = PAIRS[kind]

    class Recorded(ours):
        def forward(self, sentence_features, labels):
            columns = list(sentence_features)
            copies = [
                {k: v.clone() if torch.is_tensor(v) else v for k, v in column.items()}
                for column in columns
            ]
            value = super().forward(columns, labels)
            if self.model.training:
                self.seen.append((copies, value.item()))
            return value

    def make(model, **changes):
        loss = Recorded(model, **(options | changes))
        loss.seen = []
        return loss

    return make


def texts(column) -> list[tuple]:
    """The token ids of each row of an encoded column."""
    return [
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(column["input_ids"], column["attention_mask"], strict=True)
    ]


def identities(passages) -> torch.Tensor:
    """(n, m) numbers that only equal texts share: in a later epoch they are in the bank."""
    return torch.tensor([[hash(text) for text in texts(column)] for column in passages]).T


def dataset(count: int = 40, negatives: int = 0):
    from datasets import Dataset  # here and not above: the losses' tests do without

    return Dataset.from_dict(rows(count, negatives))


def arguments(output: Path, **changes) -> SentenceTransformerTrainingArguments:
    settings = {
        "output_dir": str(output),
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    made = SentenceTransformerTrainingArguments(**(settings | changes))
    made._n_gpu = min(made.n_gpu, 1)  # with all of several, batches would be as many times as large
    return made


def trainer(start, output, make_loss, callback=True, data=None, device="cpu", **changes):
    """`make_loss` maps a model to a loss; `callback` a loss to one, True for the usual one."""
    model = load(start, device)
    loss = make_loss(model)
    make_callback = ContAccumCallback if callback is True else callback
    return SentenceTransformerTrainer(
        model=model,
        args=arguments(output, **{"use_cpu": device == "cpu"} | changes),
        train_dataset=dataset() if data is None else data,
        loss=loss,
        callbacks=[make_callback(loss)] if make_callback else [],
    )


def memory(run):
    return run.loss.memory


def losses_of(run) -> list[float]:
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def weights(run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def bank_state(run) -> dict[str, torch.Tensor]:
    return {n: v for n, v in memory(run).banks.state_dict().items() if isinstance(v, torch.Tensor)}
