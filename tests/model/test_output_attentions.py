"""What the model cannot give is refused, not passed over."""

import pytest
import torch

from fat5.model import FAT5Config, FAT5ForConditionalGeneration


def test_attention_weights_are_refused_by_name() -> None:
    config = FAT5Config.preset("fat5-demo", vocab_size=128, d_model=16, d_ff=16, num_layers=1, num_decoder_layers=1)
    ids = torch.randint(3, 128, (1, 4))
    with pytest.raises(ValueError, match="output_attentions"):
        FAT5ForConditionalGeneration(config)(input_ids=ids, labels=ids, output_attentions=True)
