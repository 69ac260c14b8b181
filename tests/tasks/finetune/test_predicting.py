"""Texts for many rows: batches by length share a decoding step where recording it pays."""

import numpy as np
import torch

from fat5.data import load_tokenizer
from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer
from fat5.generate.decoding import Decoder
from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from fat5.tasks.finetune import predicting
from fat5.tasks.finetune.predicting import write_texts
from fat5.train.evaluation import Scorer
from fat5.train.precision import Precision
from fat5.train.world import World

CPU = torch.device("cpu")


class Examples:
    """Inputs of these lengths."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.input_lengths, self.rows = lengths, np.arange(len(lengths))

    def __len__(self) -> int:
        return len(self.rows)

    def input(self, index: int) -> np.ndarray:
        return np.arange(index, index + self.input_lengths[index]) % 900 + 100


def test_shared_steps_write_the_same_texts(tmp_path, monkeypatch):
    train_tokenizer(TokenizerTraining(inputs=["sample:fr"], output_dir=str(tmp_path / "t"), vocab_size=1024, rows=200))
    tokenizer = load_tokenizer(tmp_path / "t")
    torch.manual_seed(0)
    config = FAT5Config.preset("fat5-demo", vocab_size=1024, num_layers=1, num_decoder_layers=1)
    model = FAT5ForConditionalGeneration(config).eval()
    lengths = np.random.default_rng(0).integers(1, 200, 13)
    examples = Examples(lengths)
    asked = []

    class Watched(Decoder):
        def generate(self, *given, cuda_graph, **how):
            asked.append(cuda_graph)
            return super().generate(*given, **how)

        def _step(self, *shape, shared):
            return super()._step(*shape, shared=asked[-1])

    monkeypatch.setattr(predicting, "Decoder", Watched)
    scorer = Scorer(model, Precision("fp32", CPU), World(CPU), model)
    for beams in (1, 3):
        written = []
        for least in (5, 4):
            monkeypatch.setattr(predicting, "pays", lambda device, batches: batches >= least)  # noqa: B023
            found = write_texts(
                scorer, examples, tokenizer, batch_size=4, max_new_tokens=8, num_beams=beams, cuda_graphs=True
            )
            written.append([one for some in found for one in some])
        assert written[0] == written[1]
        assert sorted(row for row, *_ in written[0]) == list(range(13))
        assert any(text for _, text, _ in written[0])
    assert asked == ([False] * 4 + [True] * 4) * 2
