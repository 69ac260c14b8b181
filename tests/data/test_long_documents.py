"""Documents of 131,072 tokens: cut, corrupted and packed like short ones."""

import numpy as np
import pytest

from fat5.data import BatchConfig, MixtureOfDenoisers, PackedLoader, PieceStream, WeightedShards, reconstruct, unpack
from made_corpus import made_documents, made_info, write_corpus

LONGEST = 1 << 17
INFO = made_info()


@pytest.mark.parametrize("mixture", ["fat5", "ul2"])
def test_no_token_of_a_long_document_is_dropped(tmp_path, mixture: str) -> None:
    documents = made_documents([LONGEST, 2 * LONGEST + 1, 300, LONGEST + 5, 70_000])
    shards = WeightedShards(write_corpus(tmp_path, documents))
    stream = PieceStream([shards], MixtureOfDenoisers.named(mixture), INFO, LONGEST, seed=1)
    sides = [-(-side // 128) * 128 for side in stream.max_lengths]
    loader = PackedLoader(stream, BatchConfig(LONGEST, *sides, packs_per_step=1, window=8))
    pieces: dict[int, np.ndarray] = {}
    for batch in loader:
        assert max(batch.cu_seqlens.diff().max(), 1) <= batch.max_seqlen <= sides[0]
        for piece, (inputs, targets) in zip(batch.piece.tolist(), unpack(batch)):
            pieces[piece] = reconstruct(inputs, targets, INFO)
        if len(pieces) == sum(stream.num_pieces):
            break
    assert max(map(len, pieces.values())) == LONGEST
    assert np.array_equal(np.concatenate([pieces[piece] for piece in sorted(pieces)]), np.concatenate(documents))
