import json

import numpy as np
import pytest

from fat5.data import Denoiser, load_tokenizer, sample_path
from fat5.data.audit import audit
from fat5.data.examples.config import AuditConfig
from fat5.data.examples.order import PieceStream
from fat5.data.tokenizer.json_file import byte_tokenizer
from fat5.data.tokenizer.loading import Tokenizer
from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer
from fat5.errors import ConfigurationError, DataError, TokenizerError
from made_corpus import made_documents, write_corpus


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    config = TokenizerTraining(inputs=[str(sample_path("fr"))], output_dir=str(folder / "t"), vocab_size=1024)
    train_tokenizer(config)
    return load_tokenizer(folder / "t")


def write_text(folder, tokenizer, documents):
    shards = write_corpus(folder, documents, 2, tokenizer.info)
    tokenizer.save(folder / "tokenizer")
    return shards


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer):
    """Long documents of the tokenizer's ordinary tokens."""
    folder = tmp_path_factory.mktemp("prepared")
    text = "Les paquets de la distribution sont installés par l'administrateur du système. " * 60
    ids = tokenizer.encode_documents([text])[0]
    lengths = np.random.default_rng(0).integers(300, 512, 120)
    write_text(folder, tokenizer, [np.resize(ids, length) for length in lengths])
    return folder


def config(prepared, tmp_path, **changes) -> AuditConfig:
    keys = {"inputs": [str(prepared)], "output_dir": str(tmp_path / "out"), "max_tokens": 512}
    return AuditConfig(**(keys | {"encoder_tokens": 4096, "tokens": 400_000, "window": 256} | changes))


@pytest.fixture(scope="module")
def audited(prepared, tmp_path_factory):
    """What the audit of `prepared` says, and the folder in which it writes."""
    folder = tmp_path_factory.mktemp("audited")
    return audit(config(prepared, folder)), folder / "out"


def test_long_documents_meet_the_specification(audited):
    report, out = audited
    assert report["reconstructed"] == report["examples"] > 900
    assert report["tokens"] >= 400_000
    assert report["tokens_dropped"] == 0
    rows = {row["name"]: row for row in report["mixture"]}
    assert {row["verdict"] for name, row in rows.items() if "mu=64" not in name} == {"ok"}
    assert rows["[R] mu=3 r=0.15"]["mean_span_length"]["measured"] == pytest.approx(3.0, rel=0.02)
    assert rows["[S] mu=4 r=0"]["corruption_rate"]["measured"] == pytest.approx(0.75, rel=0.01)
    assert sum(row["proportion"]["measured"] for row in rows.values()) == pytest.approx(1)
    assert rows["[X] mu=3 r=0.5"]["sentinels_used"] == max(row["sentinels_used"] for row in rows.values())
    assert report["budgets"]["encoder_fill"] > 0.97
    assert {row["denoiser"] for row in report["shown"]} == set(range(7))
    shown = next(row for row in report["shown"] if row["denoiser"] == 0)
    assert shown["inputs"].startswith("[R]")
    assert "<extra_id_0>" in shown["inputs"]
    assert shown["targets"].startswith("<extra_id_0>")
    assert json.loads((out / "audit.json").read_text()) == json.loads(json.dumps(report))
    assert (out / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_suggested_budgets_fill_as_promised(prepared, tmp_path):
    better = audit(config(prepared, tmp_path, encoder_tokens=16384, tokens=2_000_000))["suggested"]
    assert max(better["encoder_fill"], better["decoder_fill"]) >= 0.99
    assert min(better["encoder_fill"], better["decoder_fill"]) >= 0.97
    assert better["decoder_tokens"] % 128 == 0


def test_short_documents_are_told_from_a_broken_rule(tmp_path, tokenizer, monkeypatch):
    documents = [np.resize(tokenizer.encode_documents(["Une phrase courte, et voilà tout."])[0], 8)] * 200
    write_text(tmp_path / "short", tokenizer, [*documents, np.zeros(0, np.int64), documents[0][:1]])
    short = config(tmp_path / "short", tmp_path, tokens=20_000)
    report = audit(short)
    rows = {row["name"]: row["verdict"] for row in report["mixture"]}
    assert rows["[X] mu=64 r=0.5"] == "short documents"
    assert "FAIL" not in rows.values()
    assert report["tokens_dropped"] == 1
    assert "2 of 202 documents" in report["notes"][0]
    real = Denoiser.spans

    def one_more(self, *rest):
        noise, spans = real(self, *rest)
        return noise + (self.mu == 8.0), spans

    monkeypatch.setattr(Denoiser, "spans", one_more)
    rows = {row["name"]: row["verdict"] for row in audit(short)["mixture"]}
    assert {name for name, verdict in rows.items() if verdict == "FAIL"} == {"[R] mu=8 r=0.15", "[X] mu=8 r=0.15"}


def test_fertility_and_corpora_are_measured(prepared, audited, tmp_path, tokenizer):
    other = tmp_path / "other"
    write_text(other, tokenizer, made_documents([400] * 60, vocab_size=1024))
    report = audit(config(prepared, tmp_path, inputs=[str(prepared), str(other)], weights=[3.0, 1.0]))
    shares = [corpus["share_seen"] for corpus in report["corpora"]]
    assert shares == pytest.approx([0.75, 0.25], abs=0.02)
    words = audited[0]["tokenizer"]
    text = "Les paquets de la distribution sont installés par l'administrateur du système. " * 60
    ids = tokenizer.encode_documents([text])[0]
    assert words["tokens_per_word"] == pytest.approx(len(ids) / len(text.split()), rel=0.05)
    assert words["tokens_per_byte"] == pytest.approx(len(ids) / len(text.encode()), rel=0.05)
    assert words["unknown_rate"] == 0.0


def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer, monkeypatch):
    write_text(tmp_path / "many", tokenizer, made_documents([8] * 20_000, vocab_size=1024))
    resolved = []
    resolve = PieceStream.resolve

    def count(self, positions):
        resolved.append(positions.size)
        return resolve(self, positions)

    monkeypatch.setattr(PieceStream, "resolve", count)
    report = audit(config(tmp_path / "many", tmp_path, tokens=10_000))
    assert report["tokenizer"]["tokens_measured"] == 160_000
    assert max(resolved) <= 4096, "the packing looks at 4,096 positions at a time, nothing at more"


def test_what_cannot_be_audited_is_named(prepared, tmp_path):
    other = tmp_path / "bytes"
    another = Tokenizer(byte_tokenizer(), None, {})
    write_text(other, another, made_documents([40] * 9))
    for changes, error, message in (
        ({"inputs": []}, ConfigurationError, "no prepared folder"),
        ({"inputs": [str(tmp_path / "none")]}, DataError, "manifest"),
        ({"inputs": [str(prepared), str(other)]}, TokenizerError, "another tokenizer"),
        ({"weights": [1.0, 2.0]}, ConfigurationError, "2 weights for 1 folders"),
        ({"split": "test"}, DataError, "no split"),
        ({"mixture": "none"}, ConfigurationError, "no mixture"),
        ({"encoder_tokens": 128}, ConfigurationError, "smaller than one example"),
        ({"tokens": 0}, ConfigurationError, "tokens"),
        ({"output_dir": str(prepared / "manifest.json")}, ConfigurationError, "is a file"),
    ):
        with pytest.raises(error, match=message):
            audit(config(prepared, tmp_path, **changes))
