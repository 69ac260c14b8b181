"""The memory plan against what autograd really keeps."""

import pytest
import torch

from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from fat5.train.memory import activations

# The count leaves out the small (norms' roots, softmax statistics, dropout masks), so it may be a quarter off, no more.
SHARE = 0.25


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_activations_are_what_autograd_keeps(checkpointing: bool) -> None:
    config = FAT5Config.preset("fat5-demo", vocab_size=256, num_layers=3, num_decoder_layers=3)
    model = FAT5ForConditionalGeneration(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    encoder, decoder, documents = 768, 512, 4
    batch = {
        "input_ids": torch.randint(3, 256, (encoder,)),
        "labels": torch.randint(3, 256, (decoder,)),
        "cu_seqlens": torch.arange(documents + 1, dtype=torch.int32) * (encoder // documents),
        "decoder_cu_seqlens": torch.arange(documents + 1, dtype=torch.int32) * (decoder // documents),
        "max_seqlen": encoder // documents,
        "decoder_max_seqlen": decoder // documents,
    }
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert model(**batch).loss.requires_grad
    measured = sum(kept.values())
    planned = activations(config, encoder, decoder, 4, checkpointing)
    if checkpointing:
        # The hooks see what is kept between forward and backward; the plan adds the block that is recomputed.
        assert planned / 4 < measured < planned < activations(config, encoder, decoder, 4, False) / 2
    else:
        assert abs(measured - planned) < SHARE * measured
