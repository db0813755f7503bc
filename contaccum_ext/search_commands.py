"""What the `contaccum` command does with a trained retriever: mine, encode, search."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from contaccum_ext.commands import UsageError, load_data, say
from contaccum_ext.datasets import RetrievalDataset, write_dataset
from contaccum_ext.retrieval import encode_texts, search
from contaccum_ext.retrieval.mining import mine_dense_negatives
from contaccum_ext.retrieval.vectors import CorpusVectors, weights_fingerprint
from contaccum_ext.training import Checkpoint, load_checkpoint
from contaccum_ext.training.checkpoint import write_atomically
from contaccum_ext.training.data import fingerprint
from contaccum_ext.training.precision import autocast_dtype
from contaccum_ext.training.trainer import resolve_device

SNIPPET = 300  # characters of a passage shown


@dataclass(frozen=True)
class _Retriever:
    """A checkpoint and the data it is used on."""

    checkpoint: Checkpoint
    dataset: RetrievalDataset

    @classmethod
    def open(cls, options: argparse.Namespace) -> _Retriever:
        dataset = load_data(options)
        checkpoint = load_checkpoint(options.checkpoint)
        checkpoint.model.to(resolve_device(options.device))
        return cls(checkpoint, dataset)

    def query_vectors(self, queries: list[str], progress: bool = False) -> torch.Tensor:
        """(Q, d) fp32."""
        config = self.checkpoint.config
        return encode_texts(
            self.checkpoint.model.query,
            self.checkpoint.tokenizer,
            queries,
            max_length=config.query_max_length,
            autocast_dtype=autocast_dtype(config),
            progress=progress,
        )

    def corpus_vectors(self, stored: Path | None) -> CorpusVectors:
        """Read from disk where they are stored, else encoded now."""
        config = self.checkpoint.config
        origin = {
            "encoder": weights_fingerprint(self.checkpoint.model.passage),
            "corpus": fingerprint(self.dataset)["corpus"],
        }
        if stored is not None:
            return CorpusVectors.load(stored, origin)
        vectors = encode_texts(
            self.checkpoint.model.passage,
            self.checkpoint.tokenizer,
            [passage.full() for passage in self.dataset.corpus.values()],
            max_length=config.passage_max_length,
            autocast_dtype=autocast_dtype(config),
            progress=True,
        )
        return CorpusVectors(vectors, list(self.dataset.corpus), origin)


def mine(options: argparse.Namespace) -> None:
    """Write the data anew, with hard negatives that a checkpoint ranks high."""
    _refuse_existing(options.output)
    retriever = _Retriever.open(options)
    dataset = retriever.dataset
    try:
        queries = [example.query for example in dataset.train_examples()]
    except ValueError as error:
        raise UsageError(f"--data: {error}") from None
    corpus = retriever.corpus_vectors(options.vectors)
    mined = mine_dense_negatives(
        dataset,
        retriever.query_vectors(queries, progress=True),
        corpus.vectors,
        options.negatives,
        depth=options.depth,
        margin=options.margin,
    )
    write_atomically(
        options.output, lambda directory: write_dataset(replace(dataset, train=mined), directory)
    )
    count = sum(len(example.negatives) for example in mined)
    print(f"{count} hard negatives for {len(mined)} training queries: {options.output}")
    short = sum(len(example.negatives) < options.negatives for example in mined)
    if short:
        say(f"{short} queries have fewer than {options.negatives}: raise --depth or lower --margin")


def encode(options: argparse.Namespace) -> None:
    """Encode a corpus and keep the vectors."""
    _refuse_existing(options.output)
    corpus = _Retriever.open(options).corpus_vectors(None)
    write_atomically(options.output, corpus.save)
    count, dim = corpus.vectors.shape
    print(f"{count} vectors of {dim} dimensions: {options.output}")


def search_corpus(options: argparse.Namespace) -> None:
    """Show the passages a checkpoint ranks first for questions."""
    retriever = _Retriever.open(options)
    corpus = retriever.corpus_vectors(options.vectors)
    count = min(options.results, len(corpus.ids))
    for question in _questions(options.query):
        vector = retriever.query_vectors([question])
        # An index would be built anew for every question.
        scores, indices = search(vector, corpus.vectors, count, backend="torch")
        results = [
            (corpus.ids[index], score)
            for index, score in zip(indices[0].tolist(), scores[0].tolist(), strict=True)
        ]
        _show(question, results, retriever.dataset, options.json)


def _questions(given: list[str] | None) -> Iterable[str]:
    """Those of the command line, else lines of standard input."""
    if given:
        yield from given
        return
    asks = sys.stdin.isatty()
    if asks:
        say("a question per line; an end of file (Ctrl-D) ends it")
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def _show(
    question: str, results: list[tuple[str, float]], dataset: RetrievalDataset, as_json: bool
) -> None:
    if as_json:
        found = [
            {"id": key, "score": score, "text": dataset.corpus[key].full()}
            for key, score in results
        ]
        print(json.dumps({"query": question, "results": found}, ensure_ascii=False), flush=True)
        return
    print(f"\n{question}")
    for rank, (key, score) in enumerate(results, 1):
        text = " ".join(dataset.corpus[key].full().split())
        snippet = text if len(text) <= SNIPPET else text[:SNIPPET].rstrip() + " ..."
        print(f"{rank:>3}  {score:8.4f}  {key}  {snippet}", flush=True)


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise UsageError(f"--output: {output} is already there; choose another directory")
