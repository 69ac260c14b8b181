"""Loading and saving: every family, tied and not, sharded, in other dtypes, spread by a device_map; both directions."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration, UMT5EncoderModel

import fat5
from fat5.errors import CheckpointError
from fat5.generate.decoding import Decoder
from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from stock import (
    ENCODERS,
    EVERY_FAMILY,
    FAMILIES,
    LOGITS_TOLERANCE,
    SIZES,
    difference,
    fat5_like,
    rows,
    t5_v1_0,
    t5_v1_1,
)

SHARD = "20KB"


def with_tying(family, tied):
    """A stock model of the family whose output projection is the embedding, or is not."""
    like = family()
    keys = {key: value for key, value in like.config.to_dict().items() if key != "scale_decoder_outputs"}
    model = type(like)(type(like.config)(**(keys | {"tie_word_embeddings": tied})))
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model.eval()


@EVERY_FAMILY
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_shards_both_ways(family, tied, tmp_path):
    stock, batch = with_tying(family, tied), rows()
    want = stock(**batch).logits
    stock.save_pretrained(tmp_path / "stock", max_shard_size=SHARD)
    ours = FAT5ForConditionalGeneration.from_pretrained(tmp_path / "stock").eval()
    assert difference(ours(**batch).logits, want) <= LOGITS_TOLERANCE
    assert (ours.lm_head.weight is ours.shared.weight) == tied == ours.config.tie_word_embeddings
    ours.save_pretrained(tmp_path / "ours", max_shard_size=SHARD)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 5
    back, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(back) is type(stock)
    assert not any(info.values()), info
    assert torch.equal(back.eval()(**batch).logits, want)
    again = FAT5ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(**batch).logits, ours(**batch).logits)


@pytest.mark.parametrize(
    ("how", "dtype", "tolerance"),
    [
        ({"dtype": "auto"}, torch.float32, LOGITS_TOLERANCE),
        ({"dtype": torch.bfloat16}, torch.bfloat16, 0.05),
        ({"dtype": "float16"}, torch.float16, 0.01),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16, 0.05),
        ({"device_map": "cpu"}, torch.float32, LOGITS_TOLERANCE),
        ({"device_map": "auto", "dtype": torch.bfloat16}, torch.bfloat16, 0.05),
        ({"low_cpu_mem_usage": True}, torch.float32, LOGITS_TOLERANCE),
    ],
    ids=str,
)
def test_dtypes_and_devices(how, dtype, tolerance, tmp_path):
    stock, batch = t5_v1_1().eval(), rows()
    stock.save_pretrained(tmp_path)
    ours = FAT5ForConditionalGeneration.from_pretrained(tmp_path, **how).eval()
    assert ours.dtype == ours(**batch).logits.dtype == dtype
    # float16 keeps wo, whose output overflows it, in float32; nothing else.
    kept = {name for name, parameter in ours.named_parameters() if parameter.dtype != dtype}
    assert kept == (
        {name for name, _ in ours.named_parameters() if ".wo." in name} if dtype == torch.float16 else set()
    )
    assert difference(ours(**batch).logits.float(), stock(**batch).logits) <= tolerance


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention", "fat5"])
def test_every_exact_attention_is_ours(name, tmp_path):
    stock, batch = t5_v1_1().eval(), rows()
    stock.save_pretrained(tmp_path)
    ours = FAT5ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=name).eval()
    assert ours.config._attn_implementation == ("eager" if name == "eager" else "sdpa")
    assert difference(ours(**batch).logits, stock(**batch).logits) <= LOGITS_TOLERANCE
    ours.set_attn_implementation(name)
    assert len(ours(**batch, output_attentions=True).encoder_attentions) == SIZES["num_layers"]
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")} | {"cache_implementation": "static"}
    assert torch.equal(*(m.generate(**prompt, max_new_tokens=6, disable_compile=True) for m in (stock, ours)))


def test_flash_attention_is_refused_as_by_stock(tmp_path):
    t5_v1_1().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Flash Attention 2"):
        FAT5ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


def test_the_dtype_saved_is_the_dtype_loaded(tmp_path):
    fat5_like(t5_v1_1()).to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    for cls in (FAT5ForConditionalGeneration, AutoModelForSeq2SeqLM):
        assert cls.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["v1.0", "v1.1", "umT5"])
def test_a_device_map_that_puts_blocks_on_the_disk(family, tmp_path):
    """Also the block whose bias table all the others read."""
    stock, batch = FAMILIES[family]().eval(), rows()
    prompt = {key: value for key, value in batch.items() if key != "labels"}
    stock.save_pretrained(tmp_path / "stock")
    here = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "encoder.block.1", "lm_head")
    there = ("encoder.block.0", "encoder.block.2", "encoder.final_layer_norm", "decoder.block")
    places = dict.fromkeys(here, "cpu") | dict.fromkeys((*there, "decoder.final_layer_norm"), "disk")
    ours = FAT5ForConditionalGeneration.from_pretrained(
        tmp_path / "stock", device_map=places, offload_folder=tmp_path / "off"
    ).eval()
    assert any(parameter.is_meta for parameter in ours.parameters())
    assert difference(ours(**batch).logits, stock(**batch).logits) <= LOGITS_TOLERANCE
    assert torch.equal(ours.generate(**prompt, max_new_tokens=6), stock.generate(**prompt, max_new_tokens=6))
    with pytest.raises(TypeError, match="weights that a device_map put elsewhere"):
        Decoder(ours)
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()(**batch).logits, stock(**batch).logits
    )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="waits for two GPUs")
@pytest.mark.parametrize("family", ["v1.0", "v1.1", "umT5"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_device_map_over_two_gpus(family, side, tmp_path):
    """Bias, layout and memory follow the hidden states from one device to the other."""
    stock, batch = FAMILIES[family]().eval().cuda(), {name: x.cuda() for name, x in rows(side).items()}
    stock.save_pretrained(tmp_path)
    first = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "encoder.block.0", "decoder.block.0", "lm_head")
    second = ("encoder.block.1", "encoder.block.2", "encoder.final_layer_norm", "decoder.block.1", "decoder.block.2")
    places = dict.fromkeys(first, 0) | dict.fromkeys((*second, "decoder.final_layer_norm"), 1)
    ours = FAT5ForConditionalGeneration.from_pretrained(tmp_path, device_map=places).eval()
    assert {parameter.device.index for parameter in ours.parameters()} == {0, 1}
    # Matrix products of the GPU may use TF32, in both.
    assert difference(ours(**batch).logits.cuda(), stock(**batch).logits) <= 1e-3
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(ours.generate(**prompt, max_new_tokens=6), stock.generate(**prompt, max_new_tokens=6))


def test_a_subfolder_and_a_variant(tmp_path):
    stock, batch = t5_v1_1().eval(), rows()
    stock.save_pretrained(tmp_path / "text_encoder", variant="fp16")
    ours = FAT5ForConditionalGeneration.from_pretrained(tmp_path, subfolder="text_encoder", variant="fp16").eval()
    assert difference(ours(**batch).logits, stock(**batch).logits) <= LOGITS_TOLERANCE


def test_an_encoder_of_a_whole_model_is_saved_as_the_stock_encoder(tmp_path):
    FAMILIES["umT5"]().save_pretrained(tmp_path / "whole")
    ours = fat5.FAT5EncoderModel.from_pretrained(tmp_path / "whole").eval()
    ours.save_pretrained(tmp_path / "encoder", max_shard_size=SHARD)
    stock, info = UMT5EncoderModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not any(info.values())
    batch = rows()
    kept = batch["attention_mask"].bool()
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert difference(ours(**given)[0][kept], stock.eval()(**given)[0][kept]) <= LOGITS_TOLERANCE


@pytest.mark.parametrize(
    "names", [["shared"], ["encoder.embed_tokens"], ["shared", "encoder.embed_tokens"]], ids="+".join
)
@pytest.mark.parametrize("family", ENCODERS.values(), ids=ENCODERS.keys())
def test_embeddings_under_either_name(family, names, tmp_path):
    """Text encoders of image generators are saved in each of these ways."""
    stock, batch = family().eval(), rows()
    stock.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors.pop("shared.weight")
    tensors |= {f"{name}.weight": table.clone() for name in names}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = fat5.FAT5EncoderModel.from_pretrained(tmp_path).eval()
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    kept = batch["attention_mask"].bool()
    assert difference(ours(**given)[0][kept], stock(**given)[0][kept]) <= LOGITS_TOLERANCE


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("EncoderModel", ""),
        ("Model", ""),
        ("ForConditionalGeneration", ""),
        ("ForTokenClassification", ""),
        ("ForTokenClassification", "transformer."),  # its own checkpoint, and not one of a seq2seq
    ],
)
@pytest.mark.parametrize("family", [t5_v1_0, t5_v1_1, FAMILIES["umT5"]], ids=["v1.0", "v1.1", "umT5"])
def test_embeddings_under_the_name_of_the_decoder(prefix, family, kind, tmp_path):
    """What safetensors.torch.save_model leaves of a shared table: the first of its names, as of madlad400."""
    stock = family().eval()
    stock.save_pretrained(tmp_path / "source")
    cls = getattr(fat5.model, f"FAT5{kind}")
    if prefix:
        cls.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    table = tensors.pop(f"{prefix}shared.weight")
    save_file(tensors | {f"{prefix}decoder.embed_tokens.weight": table}, file, metadata={"format": "pt"})
    ours = cls.from_pretrained(tmp_path / "source").eval()
    assert torch.equal(ours.get_input_embeddings().weight, table)
    ours.save_pretrained(tmp_path / "again")
    names = [
        name for name in load_file(tmp_path / "again" / "model.safetensors") if "embed" in name or "shared" in name
    ]
    assert names == [f"{ours.base_model_prefix}.shared.weight" if kind.startswith("ForToken") else "shared.weight"]


def test_a_configuration_that_calls_an_encoder_decoder_something_else(tmp_path):
    """nanoT5 writes so."""
    stock, batch = t5_v1_1().eval(), rows()
    stock.save_pretrained(tmp_path / "source")
    written = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(written | {"is_encoder_decoder": False}))
    ours = FAT5ForConditionalGeneration.from_pretrained(tmp_path / "source").eval()
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    want = stock.generate(**prompt, max_new_tokens=6)
    assert torch.equal(ours.generate(**prompt, max_new_tokens=6), want)
    assert torch.equal(Decoder(ours).generate(**prompt, max_new_tokens=6), want)
    ours.save_pretrained(tmp_path / "again")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again.generate(**prompt, max_new_tokens=6), want)


def test_the_first_checkpoints_of_t5(tmp_path):
    """A configuration with a handful of keys and an old class's name, and a table that no T5 reads."""
    stock, batch = t5_v1_0().eval(), rows()
    stock.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    old = {key: written[key] for key in ("d_ff", "d_kv", "d_model", "num_heads", "num_layers", "vocab_size")}
    old |= {"model_type": "t5", "architectures": ["T5WithLMHeadModel"], "n_positions": 512, "output_past": True}
    old |= {
        "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
        "task_specific_params": {"summarization": {"num_beams": 4}},
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(32, 4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = FAT5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert difference(ours(**batch).logits, stock(**batch).logits) <= LOGITS_TOLERANCE


def test_more_tokens_than_before(tmp_path):
    for stock in (t5_v1_1(), t5_v1_0()):
        ours, batch = fat5_like(stock).eval(), rows()
        ours.resize_token_embeddings(128)
        ours.save_pretrained(tmp_path)
        back = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
        assert back.lm_head.weight.shape[0] == back.config.vocab_size == 128
        assert difference(ours(**batch).logits, back(**batch).logits) <= LOGITS_TOLERANCE


def test_keys_given_to_from_pretrained_win(tmp_path):
    t5_v1_1().save_pretrained(tmp_path)
    ours = FAT5ForConditionalGeneration.from_pretrained(tmp_path, dropout_rate=0.25, label_smoothing=0.1)
    assert (ours.config.dropout_rate, ours.encoder.dropout.p, ours.config.label_smoothing) == (0.25, 0.25, 0.1)


def test_a_feed_forward_given_to_from_pretrained_wins_over_what_the_file_derived_from_its_own(tmp_path):
    t5_v1_0().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dense_act_fn"] == "relu"
    config = FAT5Config.from_pretrained(tmp_path, feed_forward_proj="gated-gelu")
    assert (config.feed_forward_proj, config.is_gated_act, config.dense_act_fn) == ("gated-gelu", True, "gelu_new")


def test_generation_settings_come_along(tmp_path):
    stock = t5_v1_1()
    stock.generation_config.num_beams = 3
    ours = fat5_like(stock)
    assert ours.generation_config.num_beams == 3
    ours.save_pretrained(tmp_path)
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path).generation_config.num_beams == 3


@pytest.mark.parametrize("kind", ["ForConditionalGeneration", "EncoderModel"])
def test_a_pushed_folder_is_what_stock_reads(kind, tmp_path, monkeypatch):
    """push_to_hub up to the network: the folder that it would upload."""
    ours = getattr(fat5, f"FAT5{kind}")(FAT5Config(**SIZES)).eval()
    hub = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("# card"))
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr(
        type(ours), "_upload_modified_files", lambda _, folder, *__, **___: shutil.copytree(folder, tmp_path / "sent")
    )
    ours.push_to_hub("me/mine")
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in (tmp_path / "sent").iterdir()}
    assert AutoConfig.from_pretrained(tmp_path / "sent").model_type == "t5"


@EVERY_FAMILY
@pytest.mark.parametrize(
    "make", [FAT5Config.from_stock, lambda config: FAT5Config(**config.to_dict())], ids=["from_stock", "to_dict"]
)
def test_weights_go_from_one_class_to_the_other_in_memory(family, make, tmp_path):
    """An untied T5 too, whose stock configuration says that it is tied."""
    stock, batch = family().eval(), rows()
    ours = FAT5ForConditionalGeneration(make(stock.config)).eval()
    assert str(ours.load_state_dict(stock.state_dict())) == "<All keys matched successfully>"
    assert difference(ours(**batch).logits, stock(**batch).logits) <= LOGITS_TOLERANCE
    assert str(type(stock)(stock.config).load_state_dict(ours.state_dict())) == "<All keys matched successfully>"
    ours.save_pretrained(tmp_path)
    back = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert type(back) is type(stock)
    assert difference(back(**batch).logits, stock(**batch).logits) <= LOGITS_TOLERANCE


def test_a_stock_configuration_is_named():
    with pytest.raises(TypeError, match=r"^config: expected a FAT5Config, got a T5Config; FAT5Config\.from_stock"):
        FAT5ForConditionalGeneration(T5Config(**SIZES))


@EVERY_FAMILY
def test_a_folder_with_its_stock_configuration(family, tmp_path):
    """As scripts around transformers load: AutoConfig first, then the model with it."""
    stock, batch = family().eval(), rows()
    stock.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.dropout_rate = 0.25
    ours = FAT5ForConditionalGeneration.from_pretrained(tmp_path, config=config).eval()
    assert ours.encoder.dropout.p == 0.25
    assert difference(ours(**batch).logits, stock(**batch).logits) <= LOGITS_TOLERANCE


def test_a_state_dict_stands_in_for_the_weights_of_a_folder(tmp_path):
    stock, batch = t5_v1_1().eval(), rows()
    t5_v1_1().save_pretrained(tmp_path)
    how = {"state_dict": stock.state_dict(), "dropout_rate": 0.25}
    ours = FAT5ForConditionalGeneration.from_pretrained(tmp_path, **how).eval()
    assert ours.encoder.dropout.p == 0.25
    assert difference(ours(**batch).logits, stock(**batch).logits) <= LOGITS_TOLERANCE


def remove(name):
    return lambda folder: (folder / name).unlink()


def misshape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.block.1.layer.0.SelfAttention.q.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lose_a_shard(folder):
    T5ForConditionalGeneration.from_pretrained(folder).save_pretrained(folder, max_shard_size=SHARD)
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-*"))[1].unlink()


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (shutil.rmtree, OSError),
        (remove("model.safetensors"), OSError),
        (lambda folder: (folder / "config.json").write_text("{"), OSError),
        (lose_a_shard, OSError),
        (misshape, RuntimeError),
    ],
    ids=["no folder", "no weights", "no JSON", "no shard", "another shape"],
)
def test_errors_are_also_of_the_kind_that_stock_raises(damage, kind, tmp_path):
    """So that `except OSError` around from_pretrained goes on working."""
    t5_v1_1().save_pretrained(tmp_path / "model")
    damage(tmp_path / "model")
    for cls in (T5ForConditionalGeneration, FAT5ForConditionalGeneration):
        with pytest.raises(kind) as raised:
            cls.from_pretrained(tmp_path / "model")
    assert isinstance(raised.value, CheckpointError)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_configuration(tmp_path):
    t5_v1_1().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(OSError, match=r"holds no config\.json"):
        FAT5ForConditionalGeneration.from_pretrained(tmp_path)


def test_a_whole_file_is_read_and_not_shards_beside_it(tmp_path):
    """Nor one of another variant, nor a safetensors file of another name."""
    stock, batch = t5_v1_1().eval(), rows()
    t5_v1_1().save_pretrained(tmp_path, max_shard_size=SHARD)
    t5_v1_1().save_pretrained(tmp_path, variant="fp16")
    stock.save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path)
    ours = FAT5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert difference(ours(**batch).logits, stock(**batch).logits) <= LOGITS_TOLERANCE
    for file in tmp_path.glob("model*"):
        file.unlink()
    torch.save(stock.state_dict(), tmp_path / "pytorch_model.bin")
    save_file({"x": torch.ones(1)}, tmp_path / "optimizer.safetensors")
    ours = FAT5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert difference(ours(**batch).logits, stock(**batch).logits) <= LOGITS_TOLERANCE


def test_shards_of_pickles_are_read_as_tensors_or_refused(tmp_path):
    """As the largest of the old checkpoints are stored."""
    stock, batch, index = t5_v1_1().eval(), rows(), {}
    stock.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for number in (1, 2):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        part = {name: tensors[name] for name in sorted(tensors)[number - 1 :: 2]}
        torch.save(part, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    ours = FAT5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert difference(ours(**batch).logits, stock(**batch).logits) <= LOGITS_TOLERANCE
    torch.save({name: Path("/") for name in part}, tmp_path / file)
    with pytest.raises(CheckpointError, match=r"one of its \.bin files is a pickle that holds more than tensors"):
        FAT5ForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "says"), [("none", "no such folder"), ("config.json", "is a file")])
def test_what_is_no_folder_is_said_so(name, says, tmp_path):
    t5_v1_1().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{name}: {says}"):
        FAT5ForConditionalGeneration.from_pretrained(tmp_path / name)
