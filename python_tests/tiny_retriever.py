"""A data set and an encoder small enough to train within a test."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from contaccum_ext.datasets import EvalQuery, Passage, RetrievalDataset, TrainExample
from contaccum_ext.training import TrainConfig
from contaccum_ext.training.scratch import ScratchConfig, write_scratch_encoder

TOPICS = ("river", "engine", "violin", "glacier", "harbour", "lantern", "orchid", "falcon")
VERBS = ("crosses", "repairs", "admires", "measures", "paints", "follows")
SHAPE = ScratchConfig(vocabulary=200, hidden=16, heads=2, max_length=32)


def tiny_dataset(train: int = 40, negatives: int = 2) -> RetrievalDataset:
    """Each passage says that someone does something to a numbered thing; its query asks who."""
    facts = [(TOPICS[i % len(TOPICS)], VERBS[i % len(VERBS)], f"no {i}") for i in range(train + 16)]
    corpus = {
        f"p{i}": Passage(f"p{i}", "", f"The old man {verb} the {topic} {name} at dawn.")
        for i, (topic, verb, name) in enumerate(facts)
    }
    queries = [f"who {verb} {topic} {name}" for topic, verb, name in facts]
    examples = [
        TrainExample(
            f"q{i}",
            queries[i],
            (f"p{i}",),
            tuple(f"p{(i + 1 + k) % len(facts)}" for k in range(negatives)),
        )
        for i in range(train)
    ]
    # Without the number: several passages fit, so that scores lie between 0 and 1.
    held_out = [
        EvalQuery(f"q{i}", queries[i].split(" no ")[0], (f"p{i}",))
        for i in range(train, train + 16)
    ]
    return RetrievalDataset("tiny", corpus, examples, held_out[:8], held_out[8:])


def tiny_config(**changes) -> TrainConfig:
    settings = {
        "local_batch_size": 4,
        "accumulation_steps": 2,
        "hard_negatives": 1,
        "query_max_length": 16,
        "passage_max_length": 24,
        "learning_rate": 1e-3,
        "device": "cpu",
    }
    return TrainConfig.from_mapping(settings | changes)


def write_tiny_encoder(directory: Path, dropout: float = 0.0, layers: int = 1) -> Path:
    dataset = tiny_dataset()
    texts = [passage.full() for passage in dataset.corpus.values()]
    shape = ScratchConfig(**{**vars(SHAPE), "layers": layers})
    write_scratch_encoder(directory, texts, shape)
    if dropout:
        file = directory / "config.json"
        settings = json.loads(file.read_text())
        file.write_text(json.dumps(settings | {"hidden_dropout_prob": dropout}))
    return directory


def write_tiny_data(directory: Path) -> Path:
    """The tiny data set as files."""
    dataset = tiny_dataset()
    directory.mkdir(parents=True)

    def write(name: str, records) -> None:
        (directory / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    write(
        "corpus.jsonl", ({"id": p.id, "title": "", "text": p.text} for p in dataset.corpus.values())
    )
    write(
        "train.jsonl",
        (
            {"id": e.id, "query": e.query, "pos": e.positives, "neg": e.negatives}
            for e in dataset.train
        ),
    )
    for split in ("valid", "test"):
        queries = dataset.eval_queries(split)
        write(
            f"{split}.jsonl", ({"id": q.id, "query": q.query, "pos": q.positives} for q in queries)
        )
    return directory


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
