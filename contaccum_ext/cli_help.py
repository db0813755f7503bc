"""What `contaccum --help` and its commands' say."""

from __future__ import annotations

OVERVIEW = """\
Train dense retrievers by contrastive learning with memory banks (ContAccum, arXiv 2406.12356).

A dense retriever learns by telling a query's passage from the other passages of its batch: the
larger the batch, the better it learns, and the more memory it needs. Three numbers set this up:

  n      local_batch_size     queries encoded at once: what fits into memory
  K      accumulation_steps   micro-batches of n per optimizer update
  bank   bank_size            slots that remember the vectors of earlier micro-batches, so that
                              each query meets thousands of passages while only n are encoded
"""

EXAMPLES = """\
examples:
  contaccum demo                                  two to three minutes, nothing to download
  contaccum demo --data DIR --encoder MODEL       the same on your data and your model
  contaccum train --data DIR --encoder MODEL --output runs/first
  contaccum eval --checkpoint runs/first --data DIR
  contaccum report runs/first runs/second         one page with the curves of both
  contaccum search --checkpoint runs/first --data DIR --query "who repairs engines"
  contaccum mine --checkpoint runs/first --data DIR --output data/mined   for the next run

'contaccum COMMAND --help' explains each command.
"""

METHODS_HELP = """\
methods, all on the same examples in the same order:
  inbatch     one batch of n*K: what enough memory would allow (DPR)
  gradaccum   K micro-batches of n: the memory of n, and few negatives
  contaccum   K micro-batches of n against memory banks of queries and passages
  prebatch    as contaccum with the passage bank only
  gradcache   inbatch in the memory of n: K micro-batches of n, each encoded twice
  gradcache_contaccum   likewise, and the whole update meets both memory banks
"""

DEMO_HELP = """\
Train with 'gradaccum' and with 'contaccum' (same data, same updates, same seed), score both beside
BM25 and the untrained model, and write an HTML report.

Without --encoder, a small transformer starts from random initialisation, with a tokenizer trained
on the corpus; such a start needs settings of its own:
"""

TRAIN_HELP = """\
Train a query and a passage encoder. OUTPUT receives

  metrics.jsonl                 a line per optimizer update
  final/query_encoder/          opens with transformers' AutoModel.from_pretrained
  final/passage_encoder/        likewise
  checkpoint-NNNNNN/            the same every `checkpoint_every` updates, with what --resume needs
  run.json                      settings and data of the run

A run that was killed, at whatever moment, goes on with the same command and --resume, and ends as
if it had not been (on the CPU to the bit). Settings and data must be the same; `checkpoint_every`,
`keep_checkpoints` and `tensorboard` may change. A run is never overwritten, and a finished one is
left as it is.
"""

DATA_HELP = (
    "directory with corpus.jsonl and train|valid|test.jsonl (or BEIR's or DPR's files), "
    "or 'stdlib': docstrings and functions of Python's own library"
)

MINE_HELP = """\
Search the corpus for every training query and write the data to OUTPUT again, with the passages
ranked best as hard negatives in place of those there were. Passed over are positives, passages with
the text of one, and with --margin those that score higher than the positive less the margin: they
are often right answers that nobody has marked.
"""

ENCODE_HELP = """\
Encode every passage and keep the vectors in OUTPUT: vectors.safetensors, (N, d) fp32, and the ids
in vectors.json. 'mine' and 'search' take them with --vectors, and refuse those of another encoder
or another corpus.
"""

SEARCH_HELP = """\
Show the passages ranked first for questions: those given with --query, else a question per line of
standard input.
"""
