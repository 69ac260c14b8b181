"""The encoder in an image generator: PixArt of diffusers, whose text encoder is a T5."""

import copy

import pytest
import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

import fat5
from stock import SIZES, fat5_like

diffusers = pytest.importorskip("diffusers", reason="waits for diffusers, which FAT5 does not need")
# Of an image between 0 and 1, after two steps of denoising.
IMAGE_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def pipeline():
    """A small PixArt with random weights, around the encoder that it is given."""
    torch.manual_seed(0)
    letters = [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz▁"]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=10)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        caption_channels=SIZES["d_model"], cross_attention_dim=24, out_channels=8,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL().eval()

    def make(encoder):
        made = diffusers.PixArtAlphaPipeline(
            tokenizer=tokenizer, text_encoder=encoder, vae=vae, transformer=transformer,
            scheduler=diffusers.DDIMScheduler(),
        )  # fmt: skip
        made.set_progress_bar_config(disable=True)
        return made

    return make


def image(pipe):
    return pipe(
        "un chat est libre", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0),
        use_resolution_binning=False, height=64, width=64, clean_caption=False,
    ).images  # fmt: skip


def test_the_same_image(pipeline, tmp_path):
    stock = T5EncoderModel(T5Config(**SIZES, feed_forward_proj="gated-gelu")).eval()
    want = image(pipeline(stock))
    fast = pipeline(fat5.accelerate(copy.deepcopy(stock)))
    for pipe in (fast, pipeline(fat5_like(stock, fat5.FAT5EncoderModel))):
        assert abs(image(pipe) - want).max() <= IMAGE_TOLERANCE
    other = T5EncoderModel(T5Config(**SIZES, feed_forward_proj="gated-gelu")).eval()
    assert abs(image(pipeline(other)) - want).max() > 100 * IMAGE_TOLERANCE
    # An accelerated encoder is saved and read again as the stock one that it is.
    fast.save_pretrained(tmp_path)
    again = diffusers.PixArtAlphaPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.text_encoder) is T5EncoderModel
    assert abs(image(again) - want).max() <= IMAGE_TOLERANCE
