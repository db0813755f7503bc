"""The files of the paper's settings say what the paper says, and train on its formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contaccum_ext.cli import main
from contaccum_ext.training import TrainConfig
from contaccum_ext.training.config_text import read_yaml

PAPER = Path(__file__).resolve().parent.parent / "examples" / "paper"
SLOTS = {"nq": 2048, "triviaqa": 512, "webq": 128, "trec": 128, "msmarco": 1024}
EPOCHS = {"nq": 40, "triviaqa": 40, "webq": 100, "trec": 100, "msmarco": 10}


def test_there_is_a_file_for_each_data_set():
    assert {path.stem for path in PAPER.iterdir()} == set(SLOTS)


@pytest.mark.parametrize("name", SLOTS)
def test_it_holds_the_papers_settings(name):
    config = TrainConfig.from_mapping(read_yaml(PAPER / f"{name}.yaml"), name)
    assert (config.bank_size, config.epochs) == (SLOTS[name], EPOCHS[name])
    assert (config.local_batch_size, config.update_size) == (8, 128)
    expected = {
        "method": "contaccum",
        "drift": "none",
        "row_weighting": "all",
        "mask_false_negatives": False,
        "temperature": 1.0,
        "pooling": "cls",
        "normalize": False,
        "shared_encoder": False,
        "hard_negatives": 1,
        "bank_hard_negatives": True,
        "learning_rate": 2e-5,
        "weight_decay": 0.0,
        "warmup_updates": 1237,
        "max_grad_norm": 2.0,
        "precision": "fp32",
    }
    assert {key: getattr(config, key) for key in expected} == expected


FACTS = ["The old man paints the violin", "Who repairs engines", "A falcon crosses", "The harbour"]


def write_dpr(directory: Path) -> None:
    def context(index: int) -> dict:
        return {"title": f"Title {index}", "text": FACTS[index], "passage_id": str(index)}

    records = [
        {
            "question": f"question {i}",
            "answers": ["violin"],
            "positive_ctxs": [context(i % 4)],
            "hard_negative_ctxs": [context((i + 1) % 4)],
            "negative_ctxs": [],
        }
        for i in range(6)
    ]
    (directory / "nq-train.json").write_text(json.dumps(records))
    (directory / "nq-dev.json").write_text(json.dumps(records[:2]))
    (directory / "nq-test.qa.csv").write_text("who paints\t['violin']\n")
    passages = "".join(f"{i}\t{text}\tTitle {i}\n" for i, text in enumerate(FACTS))
    (directory / "psgs_w100.tsv").write_text("id\ttext\ttitle\n" + passages)


def write_beir(directory: Path) -> None:
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(FACTS)]
    queries = [{"_id": f"q{i}", "text": text.lower()} for i, text in enumerate(FACTS)]
    for name, records in (("corpus", corpus), ("queries", queries)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text(lines)
    (directory / "qrels").mkdir()
    judgments = "".join(f"q{i}\td{i}\t1\n" for i in range(4))
    (directory / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judgments)


@pytest.mark.parametrize("name", ["nq", "msmarco"])
def test_a_sample_of_the_data_trains_with_it(start, tmp_path, capsys, name):
    data, run = tmp_path / name, tmp_path / "run"
    data.mkdir()
    more = ["--mine-negatives", "1"] if name == "msmarco" else []
    (write_beir if name == "msmarco" else write_dpr)(data)
    small = {"query_max_length": 16, "passage_max_length": 24, "accumulation_steps": 1}
    for key, value in small.items():
        more += ["--set", f"{key}={value}"]
    arguments = ["train", "--config", str(PAPER / f"{name}.yaml"), "--data", str(data)]
    arguments += ["--encoder", str(start), "--output", str(run), "--updates", "3", *more]
    assert main(arguments) == 0
    size = 6 if name == "nq" else 4
    assert f"{name}: {size} training queries" in capsys.readouterr().err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["bank_filled"] for line in lines] == [size, 2 * size, 3 * size]
    assert lines[2]["learning_rate"] == pytest.approx(2e-5 * 3 / 1238)
