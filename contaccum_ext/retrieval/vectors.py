"""Vectors of a corpus on disk, and whose they are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

VECTORS_FILE = "vectors.safetensors"
ABOUT_FILE = "vectors.json"


class VectorsError(ValueError):
    """Stored vectors that cannot be used; the message is one line."""


@dataclass(frozen=True)
class CorpusVectors:
    """One vector per passage.

    Attributes:
        vectors: (N, d) fp32.
        ids: N passage ids, in the order of the rows.
        origin: what they were made of, by name: encoder and corpus.
    """

    vectors: torch.Tensor
    ids: list[str]
    origin: dict[str, str]

    def save(self, directory: str | Path) -> None:
        """Write vectors.safetensors (`vectors`) and vectors.json (`ids`, `origin`)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file({"vectors": self.vectors.contiguous()}, directory / VECTORS_FILE)
        about = {"origin": self.origin, "ids": self.ids}
        (directory / ABOUT_FILE).write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path, origin: dict[str, str]) -> CorpusVectors:
        """Read what `save` wrote.

        Args:
            directory: it was written to.
            origin: what the vectors must have been made of.

        Raises:
            VectorsError: nothing is there, it is damaged, or of another encoder or corpus.
        """
        directory = Path(directory)
        try:
            about = json.loads((directory / ABOUT_FILE).read_text(encoding="utf-8"))
            vectors = load_file(directory / VECTORS_FILE)["vectors"]
            saved, ids = dict(about["origin"]), list(about["ids"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise VectorsError(f"{directory}: no usable vectors there: {reason}") from None
        for name, wanted in origin.items():
            if saved.get(name) != wanted:
                raise VectorsError(
                    f"{directory}: vectors of another {name}: expected {wanted}, got "
                    f"{saved.get(name)}"
                )
        if len(ids) != len(vectors):
            raise VectorsError(f"{directory}: expected {len(ids)} rows, got {len(vectors)}")
        return cls(vectors, ids, saved)


def weights_fingerprint(module: nn.Module) -> str:
    """A digest of a module's weights, to tell one encoder from another."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
