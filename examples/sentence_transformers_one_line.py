"""A sentence-transformers training script with memory banks: one line differs. No download.

A small BERT with random weights learns which function of Python's own library a docstring belongs
to: a minute or two on one CPU core.
"""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from contaccum_ext.datasets import load_stdlib
from contaccum_ext.integrations.sentence_transformers import ContAccumLoss
from contaccum_ext.training.scratch import ScratchConfig, write_scratch_encoder

EPOCHS = 3

torch.set_num_threads(1)  # on tensors this small a second thread only gets in the way
stdlib = load_stdlib()
texts = {passage_id: passage.full() for passage_id, passage in stdlib.corpus.items()}
output = Path(tempfile.mkdtemp(prefix="contaccum_"))
write_scratch_encoder(
    output / "untrained",
    [*texts.values(), *(example.query for example in stdlib.train)],
    ScratchConfig(max_length=64),
)

model = SentenceTransformer(str(output / "untrained"))
model.max_seq_length = 64
train_dataset = Dataset.from_dict(
    {
        "anchor": [example.query for example in stdlib.train],
        "positive": [texts[example.positives[0]] for example in stdlib.train],
    }
)
evaluator = InformationRetrievalEvaluator(
    queries={query.id: query.query for query in stdlib.test},
    corpus=texts,
    relevant_docs={query.id: set(query.positives) for query in stdlib.test},
    name="stdlib",
)

# The line that differs; it was
# loss = MultipleNegativesRankingLoss(model)
loss = ContAccumLoss(model, bank_size=256)  # slots: eight updates of 4 x 8 rows

args = SentenceTransformerTrainingArguments(
    output_dir=str(output),
    num_train_epochs=EPOCHS,
    per_device_train_batch_size=8,  # what fits in memory
    gradient_accumulation_steps=4,
    learning_rate=3.5e-4,
    warmup_steps=30,
    max_grad_norm=2.0,
    save_strategy="no",  # to resume from checkpoints: callbacks=[ContAccumCallback(loss)]
    logging_steps=50,
    report_to=[],
)
trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=train_dataset, loss=loss)

before = evaluator(model)["stdlib_cosine_ndcg@10"]
trainer.train()
after = evaluator(model)["stdlib_cosine_ndcg@10"]
print(f"NDCG@10 before training {before:.3f}, after {after:.3f}")
model.save_pretrained(str(output / "trained"))
