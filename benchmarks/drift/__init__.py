"""Banks that do not go stale: which correction of old banked vectors makes a large bank harmless.

Many short trainings of a small retriever, each a setting that becomes one row: quality on the test
queries, and a trace of how stale the bank was. Only torch, numpy, tokenizers and safetensors are
needed, not the compiled extension.

    python -m benchmarks.drift prepare --model MINILM --source squad_sent medquad --out DIR
        once, where the data are: tokens and the first 2 layers' weights (fp16), some 35 MiB;
        --layers 6 for the table `start`
    python -m benchmarks.drift grid central ideas --data DIR --out ROWS.jsonl --gpus 2
        --workers 12 --deadline 540
        on the GPUs; call it again to go on, finished settings are skipped
    python -m benchmarks.drift table central ideas --rows ROWS.jsonl
        the results; `harm` and `figure` take the same rows
    python -m benchmarks.drift one '{"data": "squad_sent", "bank": 1024, "correction": "mean",
        "updates": 5, "bf16": false}' --data DIR --device cpu
        one setting, for a look

An update's K micro-batches are encoded at once, which changes nothing but the draw of dropout: the
weights stay the same meanwhile. The loss is then that of each micro-batch with the bank as it would
be by then (`loss`), its gradients go back through the encoders in one pass (`run`). Corrections are
classes with hooks (`corrections`, `transport`, `guards`, listed in `methods`), tables are lists of
settings (`tables`), `staleness` defines the trace, `harm` what it tells, `grid` the processes and
the deadline.

A window of the newest E slots is no correction of its own: it is a bank of E slots. One that
changes is a guard. What came out is in `docs/drift.md`.
"""
