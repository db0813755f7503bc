"""Text encoders: a transformers backbone, pooling, optional normalisation; one or two towers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from contaccum_ext.training.config import TrainConfig
    from contaccum_ext.training.data import Batch

QUERY_DIRECTORY = "query_encoder"
PASSAGE_DIRECTORY = "passage_encoder"
ENCODER_FILE = "contaccum_encoder.json"


class EncoderError(ValueError):
    """An encoder directory that cannot be opened or does not fit; the message is one line."""


class Encoder(nn.Module):
    """Token ids to one fp32 vector per text.

    Args:
        backbone: transformers model whose output has `last_hidden_state` (b, t, d).
        pooling: "mean" over real tokens, or "cls" (the first token).
        normalize: scale each vector to length 1.

    Raises:
        EncoderError: no such pooling.
    """

    def __init__(self, backbone: nn.Module, pooling: str = "mean", normalize: bool = True) -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise EncoderError(f"pooling: expected mean or cls, got {pooling!r}")
        self.backbone = backbone
        self.pooling = pooling
        self.normalize = normalize

    @property
    def dim(self) -> int:
        """Embedding size d."""
        return int(self.backbone.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Encode a batch.

        Args:
            input_ids: (b, t) int64.
            attention_mask: (b, t), 1 for real tokens, 0 for padding.
            inputs: what else the tokenizer returned (b, t), passed on to the backbone.

        Returns:
            (b, d) fp32, also under autocast: the loss keeps full precision.
        """
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        hidden = output.last_hidden_state.float()
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        pooling: str | None = None,
        normalize: bool | None = None,
        layers: int | None = None,
    ) -> Encoder:
        """Open a Hugging Face model directory or one written by `save_pretrained`.

        Args:
            path: directory, or a model name that transformers resolves.
            pooling: "mean" or "cls"; None takes what was saved beside the weights, else "mean".
            normalize: None takes what was saved beside the weights, else True.
            layers: keep only the first layers; None keeps all.

        Raises:
            EncoderError: no such model, or it has fewer layers than asked for.
        """
        saved: dict[str, Any] = {}
        beside = Path(path) / ENCODER_FILE
        if beside.is_file():
            saved = json.loads(beside.read_text(encoding="utf-8"))
        backbone = _load_backbone(str(path), layers)
        return cls(
            backbone,
            pooling=saved.get("pooling", "mean") if pooling is None else pooling,
            normalize=saved.get("normalize", True) if normalize is None else normalize,
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, and pooling and normalisation beside them."""
        directory = Path(directory)
        self.backbone.save_pretrained(directory)  # type: ignore[operator]
        settings = {"pooling": self.pooling, "normalize": self.normalize}
        (directory / ENCODER_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def _load_backbone(path: str, layers: int | None) -> nn.Module:
    _refuse_missing_directory(path)
    try:
        config = AutoConfig.from_pretrained(path)
        available = getattr(config, "num_hidden_layers", 0)
        if layers is not None:
            if layers > available:
                raise EncoderError(f"{path}: has {available} layers, asked for the first {layers}")
            config.num_hidden_layers = layers
        # Masters stay fp32 whatever they were saved in; bf16 belongs to autocast.
        return AutoModel.from_pretrained(path, config=config).float()
    except EncoderError:
        raise
    except (OSError, ValueError) as error:
        raise _cannot_open(path, "encoder", error) from None


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face model directory or name.

    Raises:
        EncoderError: there is none.
    """
    _refuse_missing_directory(str(path))
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _cannot_open(str(path), "tokenizer", error) from None


def _refuse_missing_directory(path: str) -> None:
    """What is plainly meant as a path is not looked up as a model name on the network."""
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise EncoderError(f"{path}: no such directory")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise EncoderError(f"{path}: no encoder there (expected config.json and model.safetensors)")


def _cannot_open(path: str, what: str, error: Exception) -> EncoderError:
    reason = str(error).strip().splitlines()[0]
    return EncoderError(f"{path}: no {what} can be opened there: {reason}")


class DualEncoder(nn.Module):
    """The query and the passage encoder of a retriever; the same module twice when shared.

    Args:
        query: encodes queries.
        passage: encodes passages; pass `query` again to share one encoder.

    Raises:
        EncoderError: the two give vectors of different sizes.
    """

    def __init__(self, query: Encoder, passage: Encoder) -> None:
        super().__init__()
        if query.dim != passage.dim:
            raise EncoderError(
                f"query encoder gives {query.dim} dimensions, passage encoder {passage.dim}"
            )
        self.query = query
        self.passage = passage

    @property
    def shared(self) -> bool:
        """Whether one encoder serves both sides."""
        return self.query is self.passage

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Encode one micro-batch.

        Args:
            batch: n tokenized queries and their n * m passages.

        Returns:
            queries (n, d) and passages (n, m, d), positive first; both fp32.
        """
        queries = self.query(**batch.queries)
        passages = self.passage(**batch.passages)
        return queries, passages.view(batch.size, -1, passages.shape[-1])

    @classmethod
    def from_pretrained(cls, path: str | Path, config: TrainConfig) -> DualEncoder:
        """Both encoders start from the model at `path`, set up as the configuration says.

        Raises:
            EncoderError: see `Encoder.from_pretrained`; or texts may be longer than the model's
                positions.
        """
        query = Encoder.from_pretrained(path, config.pooling, config.normalize, config.layers)
        positions = getattr(query.backbone.config, "max_position_embeddings", None)
        for key in ("query_max_length", "passage_max_length"):
            if positions and (tokens := getattr(config, key)) > positions:
                raise EncoderError(f"{key}: {path} takes at most {positions} tokens, got {tokens}")
        return cls(query, query if config.shared_encoder else copy.deepcopy(query))

    def prepare_training(self, config: TrainConfig) -> None:
        """Switch on what the settings ask for; weights and their names stay the same.

        Raises:
            EncoderError: the model cannot do gradient checkpointing.
        """
        for encoder in {self.query, self.passage}:
            backbone: Any = encoder.backbone
            if config.gradient_checkpointing:
                # transformers 5 has given it another name.
                names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
                try:
                    enable = next(getattr(backbone, n) for n in names if hasattr(backbone, n))
                    enable({"use_reentrant": False})
                except (StopIteration, ValueError) as error:
                    reason = str(error) or "this model has none"
                    name = type(backbone).__name__
                    raise EncoderError(f"gradient_checkpointing: {name}: {reason}") from None
            if config.compile:
                # One graph for all lengths: each micro-batch is padded to another.
                backbone.compile(dynamic=True)

    @classmethod
    def load(cls, directory: str | Path) -> DualEncoder:
        """Open what `save` wrote.

        Raises:
            EncoderError: not such a directory.
        """
        directory = Path(directory)
        query = Encoder.from_pretrained(directory / QUERY_DIRECTORY)
        if not (directory / PASSAGE_DIRECTORY).exists():
            return cls(query, query)
        return cls(query, Encoder.from_pretrained(directory / PASSAGE_DIRECTORY))

    def save(self, directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write query_encoder/ and, unless shared, passage_encoder/, each with the tokenizer."""
        directory = Path(directory)
        # A tokenizer remembers how it was last called, and would be saved with our maximum length.
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            backend.no_truncation()
            backend.no_padding()
        towers = {QUERY_DIRECTORY: self.query}
        if not self.shared:
            towers[PASSAGE_DIRECTORY] = self.passage
        for name, encoder in towers.items():
            encoder.save_pretrained(directory / name)
            tokenizer.save_pretrained(directory / name)
