"""`init_from`: a run that begins from the weights of a T5-family checkpoint, with its vocabulary or another one.

find_initial   where the weights are, and the model they make        InitialModel.build   the model with the new rows
adopt          the keys of a configuration that follow from it
fingerprint    a hash of a model's weights                           find_tokenizer       what it was trained with
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fat5.convert.source import read_source
from fat5.data import Tokenizer, TokenizerInfo, load_tokenizer
from fat5.data.tokenizer.matching import TokenMatch, match_tokens
from fat5.errors import CheckpointError, ConfigurationError, FAT5Error, TokenizerError
from fat5.files import is_count
from fat5.model import FAT5Config, FAT5ForConditionalGeneration, load_model
from fat5.model.configuration import PRESETS
from fat5.model.loading import is_tied, readable, weight_files
from fat5.tasks.config import INIT_FROM, PretrainConfig
from fat5.train.checkpoint.state import TRAINER, read_trainer_state
from fat5.train.checkpoint.store import CheckpointStore
from fat5.train.run_directory import RunDirectory
from fat5.yaml_text import read_yaml

CHANGEABLE = (
    "dropout_rate",
    "attention_dropout_rate",
    "z_loss",
    "label_smoothing",
    "rotary_base",
    "rotary_scaling",
    "relative_attention_max_distance",
)
"""The model's keys that may differ from the checkpoint's: its weights keep their shapes and their meaning."""

COUNTS = ("kept", "averaged", "fresh")

SAMPLE_BYTES = 1 << 20
"""Of each end of a file of weights: two states of a training differ in every tensor."""


@dataclass
class InitialModel:
    """The checkpoint that a run begins from.

    Attributes:
        given: the folder as the configuration names it.
        folder: with the weights; None if it is gone, which only a run with a checkpoint of its own survives.
        sha256: of config.json and of both ends of each file of weights.
        config: the checkpoint's, or that of the run's own checkpoint.
        tokenizer: that the weights were trained with; None if the run has a checkpoint of its own.
        rows: `COUNTS` of the embeddings, as the run's own checkpoint has them.
    """

    given: str
    folder: Path | None
    sha256: str
    config: FAT5Config
    tokenizer: Tokenizer | None = None
    rows: dict[str, int] | None = None

    def configure(self, overrides: Mapping[str, Any], info: TokenizerInfo) -> FAT5Config:
        """The configuration of the run's model: the checkpoint's, for the vocabulary of the run's data.

        Raises:
            ConfigurationError: an override that the weights do not allow, or with an impossible value.
        """
        config = copy.deepcopy(self.config)
        config.prefix = None  # of a task that the checkpoint was fine-tuned on
        if self.tokenizer is not None:
            config.pad_token_id, config.eos_token_id = info.pad_id, info.eos_id
            if self.tokenizer.info.sha256 == info.sha256:
                config.vocab_size = max(config.vocab_size, info.vocab_size)
            else:
                config.vocab_size, config.bos_token_id = info.vocab_size, None
                config.decoder_start_token_id = info.pad_id
        for key, value in overrides.items():
            if key in CHANGEABLE:
                setattr(config, key, value)
            elif getattr(self.config, key) != value:
                raise ConfigurationError(
                    f"is {value!r}, and the weights of init_from have {getattr(self.config, key)!r}",
                    where=f"model.overrides.{key}",
                    hint=f"Leave it out; with init_from only these may differ: {', '.join(CHANGEABLE)}",
                )
        config.validate()
        return config

    def match(self, new: Tokenizer, rows: int) -> TokenMatch:
        """From which of the checkpoint's embeddings each of the run's `rows` starts."""
        assert self.tokenizer is not None, "a run with a checkpoint has its embeddings"
        return match_tokens(self.tokenizer, new, self.config.vocab_size, rows)

    def build(self, config: FAT5Config, match: TokenMatch) -> FAT5ForConditionalGeneration:
        """The model on the CPU, in float32: the checkpoint's weights, its embeddings matched to the new vocabulary."""
        assert self.folder is not None, "a run with a checkpoint has its weights"
        assert self.tokenizer is not None, "a run with a checkpoint has its embeddings"
        loaded = load_model(self.folder, device="cpu", dtype=torch.float32)
        used, state = self.tokenizer.own_size, loaded.state_dict()
        shared = transfer_rows(state["shared.weight"], match, used)
        head = shared if config.tie_word_embeddings else transfer_rows(state["lm_head.weight"], match, used)
        state |= {name: shared for name in state if name == "shared.weight" or name.endswith(".embed_tokens.weight")}
        state["lm_head.weight"] = head
        model = FAT5ForConditionalGeneration(config)
        model.load_state_dict(state)
        return model


def find_initial(config: PretrainConfig) -> InitialModel | None:
    """The checkpoint that `init_from` names; None without it. A run that is continued needs its folder no more.

    Raises:
        CheckpointError: no folder, or one with something else than a whole T5-family encoder-decoder.
        TokenizerError: its tokenizer is not there, or has more tokens than the model.
    """
    given = config.init_from
    if given is None:
        return None
    held = _held(config)
    if held is not None and not Path(given).exists() and held.given == given:
        return held
    source = read_source(given, config.init_tokenizer, "init_tokenizer")
    if source.kind != "ForConditionalGeneration":
        raise CheckpointError(
            f"holds a model of class …{source.kind}, and pretraining needs …ForConditionalGeneration",
            where=source.folder,
            hint="Give the checkpoint that it was made from",
        )
    initial = InitialModel(given, source.folder, fingerprint(source.folder), source.config)
    with readable(source.folder):
        initial.config.tie_word_embeddings = is_tied(source.folder, bool(source.config.tie_word_embeddings))
    if held is None:
        prepared = [one.path for one in config.data.sources[:1]]
        initial.tokenizer = load_tokenizer(
            source.tokenizer or find_tokenizer(source.folder, prepared, "init_tokenizer")
        )
        return initial
    for key in CHANGEABLE:
        setattr(held.config, key, getattr(initial.config, key))
    return replace(held, given=given, folder=initial.folder, sha256=initial.sha256)


def adopt(config: PretrainConfig, initial: InitialModel) -> PretrainConfig:
    """A copy whose `model.preset` and `model.position_encoding` say what `init_from` makes of them.

    Raises:
        ConfigurationError: they say something else.
    """
    asked, found = config.model, initial.config
    if asked.preset not in ("auto", INIT_FROM):
        FAT5Config.preset(asked.preset)  # refuses an unknown name
        wanted = PRESETS[asked.preset] | asked.overrides
        for key in wanted.keys() - {"vocab_size", *CHANGEABLE}:
            if getattr(found, key, None) != wanted[key]:
                raise ConfigurationError(
                    f"{asked.preset} has {key} {wanted[key]}, and the checkpoint {initial.given} has "
                    f"{getattr(found, key, None)}",
                    where="model.preset",
                    hint="Leave it out: with init_from the checkpoint says what the model is",
                )
    if asked.position_encoding not in ("auto", found.position_encoding):
        raise ConfigurationError(
            f"is {asked.position_encoding}, and the checkpoint {initial.given} has {found.position_encoding}",
            where="model.position_encoding",
            hint="Leave it out: with init_from the checkpoint says what the model is",
        )
    preset = INIT_FROM if asked.preset == "auto" else asked.preset
    model = replace(asked, preset=preset, position_encoding=found.position_encoding)  # type: ignore[arg-type]
    return replace(config, model=model)


def transfer_rows(table: Tensor, match: TokenMatch, used: int) -> Tensor:
    """Embeddings (new rows, d) from a `table` (old rows, d) of which the first `used` belong to tokens.

    Means are taken in float64.
    """
    mean = table[:used].mean(0, dtype=torch.float64).to(table.dtype)
    rows = mean.repeat(len(match.same), 1)
    kept = torch.from_numpy(match.same)
    rows[kept >= 0] = table[kept[kept >= 0]]
    for index, ids in match.spelled.items():
        rows[index] = table[ids].mean(0, dtype=torch.float64).to(table.dtype)
    return rows


def fingerprint(folder: Path) -> str:
    """SHA-256 of config.json, and of the size and both ends of each file of weights: quick for any size."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    with readable(folder):
        for path in weight_files(folder):
            size = path.stat().st_size
            with path.open("rb") as file:
                digest.update(f"{size}\n".encode() + file.read(SAMPLE_BYTES))
                file.seek(max(0, size - SAMPLE_BYTES))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def find_tokenizer(checkpoint: Path, prepared: Sequence[str] = (), key: str = "tokenizer") -> Path:
    """The folder of a checkpoint's tokenizer: in prepared data, in the checkpoint's run, or in the data of that run.

    Args:
        prepared: folders made by `fat5 prepare`, which are looked at first.
        key: of the configuration, which the error names.

    Raises:
        TokenizerError: none of these folders has a tokenizer of the hash that the checkpoint recorded.
    """
    if (checkpoint / TRAINER).is_file():
        wanted, run = read_trainer_state(checkpoint)["configuration"].get("tokenizer"), checkpoint.absolute().parents[1]
        recipe = read_yaml(run / "config.yaml", run / "config.yaml") if (run / "config.yaml").is_file() else {}
        data = recipe.get("data")
        sources = data.get("sources") if isinstance(data, dict) else None
        own = [one["path"] for one in sources or [] if isinstance(one, dict) and isinstance(one.get("path"), str)]
        for place in [*(Path(path) / "tokenizer" for path in [*prepared, *own]), run / "model"]:
            if _hash(place) == wanted:
                return place
    raise TokenizerError(
        "holds no tokenizer", where=checkpoint, hint=f"Give the one that the model was trained with: --{key} DIR"
    )


def _hash(folder: Path) -> str | None:
    try:
        return load_tokenizer(folder).info.sha256 if folder.is_dir() else None
    except TokenizerError:
        return None


def _held(config: PretrainConfig) -> InitialModel | None:
    """What the newest readable checkpoint of the run that is continued says about its beginning."""
    if config.resume == "never":
        return None
    folders = [Path(config.resume)]
    if config.resume == "auto":
        store = CheckpointStore(RunDirectory(config.output_dir).checkpoints)
        folders = [store.path(step) for step in reversed(store.steps())]
    for folder in folders:
        try:
            facts = read_trainer_state(folder)["configuration"].get("init_from")
            with readable(folder):
                found = FAT5Config.from_pretrained(folder)
        except FAT5Error:  # it is judged when the run continues
            continue
        if not isinstance(facts, dict):
            return None
        given, sha256, *rows = (facts.get(key) for key in ("folder", "sha256", *COUNTS))
        if isinstance(given, str) and isinstance(sha256, str) and all(is_count(count) for count in rows):
            return InitialModel(given, None, sha256, found, rows=dict(zip(COUNTS, rows)))  # type: ignore[arg-type]
    return None
