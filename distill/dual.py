"""Two encoders of one embedding space, without fusion and heads: CLIP-like models, for retrieval and zero-shot classes.

(Radford et al. 2021, arXiv 2103.00020.)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distill.contracts import Batch, Outputs, UserError
from distill.losses.numeric import unit, upcast
from distill.multimodal import Encoder, encode_present


class DualEncoder(nn.Module):
    """Encoders, each with a linear projection to the shared space; embeddings have length 1.

    No row of one modality reads another one, so each encoder can be exported and run alone.

    Args:
        encoders: modality -> encoder; one that :attr:`~distill.multimodal.Encoder.projected` its pooled vector already
            has no projection here.
        embedding_dim: E, width of the shared space.

    Raises:
        UserError: an encoder has its own projection to another width.
    """

    def __init__(self, encoders: dict[str, Encoder], embedding_dim: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.encoders = nn.ModuleDict(encoders)
        self.embedders = nn.ModuleDict()
        for name, encoder in encoders.items():
            if encoder.projected and encoder.out_dim != embedding_dim:
                raise UserError(
                    f"the encoder of {name} projects to {encoder.out_dim} numbers and embedding_dim is "
                    f"{embedding_dim}; set it to {encoder.out_dim}"
                )
            linear = nn.Linear(encoder.out_dim, embedding_dim, bias=False)
            self.embedders[name] = nn.Identity() if encoder.projected else linear

    def forward(self, batch: Batch) -> Outputs:
        """Return embeddings of each modality, [B, E], of length 1; zeros where a row lacks it."""
        found = {}
        for name in self.encoders:
            pooled = encode_present(self.encoders[name], name, batch).pooled
            vectors = unit(upcast(self.project(name, pooled)))
            found[name] = vectors * batch.present[name][:, None].to(vectors.dtype)
        return Outputs({}, found, {})

    def alone(self, modality: str) -> DualEncoder:
        """The model of one encoder and its projection, with the same weights."""
        encoder: Any = self.encoders[modality]
        part = DualEncoder({modality: encoder}, self.embedding_dim)
        part.embedders[modality] = self.embedders[modality]
        return part

    def project(self, modality: str, pooled: Tensor) -> Tensor:
        """A modality's linear projection: [V, D] to [V, E]."""
        embed: Any = self.embedders[modality]
        return embed(pooled)
