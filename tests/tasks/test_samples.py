"""The sentences that the demo fills in: chosen by a rule from what is held out."""

import hashlib
import json
from pathlib import Path

import pytest

from fat5.data import load_tokenizer, open_shards, sample_path
from fat5.data.config import PrepareConfig, TokenizerTraining
from fat5.data.shards.prepare import prepare
from fat5.data.tokenizer.training import train_tokenizer
from fat5.tasks.samples import held_out_blanks

KEPT = [
    "Le fichier de configuration se trouve dans le répertoire personnel.",
    "Choisissez une couleur, une police et une taille.",
    "L’utilisateur peut ouvrir, fermer et imprimer des documents texte.",
]
DOCUMENTS = [
    f"Titre\n{KEPT[0]} Cette autre phrase vient après la première et ne compte pas.",
    f"Trop court. {KEPT[1]}",
    f"Le fichier /etc/passwd a sept colonnes par ligne et par utilisateur. {KEPT[2]}",
    KEPT[2],  # twice: shown once
    "Il y a 12 lignes dans le fichier de cette petite liste.",
    "la minuscule du début de cette phrase en fait un fragment.",
    "Cette phrase sans fin a pourtant assez de mots pour la règle",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t") / "tokenizer"
    train_tokenizer(TokenizerTraining([str(sample_path("fr"))], str(folder), vocab_size=1024))
    return folder


def blanks(documents: list[str], tokenizer: Path, folder: Path, held_out: float = 0.999) -> list[tuple[str, str]]:
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    out = str(folder / "shards")
    prepare(PrepareConfig([str(folder / "text.jsonl")], str(tokenizer), out, validation_fraction=held_out, workers=1))
    return held_out_blanks(open_shards(out, "validation"), load_tokenizer(tokenizer))


def test_the_rule(tokenizer: Path, tmp_path: Path) -> None:
    found = blanks(DOCUMENTS, tokenizer, tmp_path)
    assert found == [
        (prompt, sentence)
        for sentence, prompt in sorted(
            zip(
                KEPT,
                [
                    "Le fichier de configuration ___ dans le répertoire personnel.",
                    "Choisissez une couleur, ___ et une taille.",
                    "L’utilisateur peut ouvrir, ___ imprimer des documents texte.",
                ],
                strict=True,
            ),
            key=lambda pair: hashlib.sha256(pair[0].encode()).digest(),
        )
    ]


def test_twenty_at_most_in_any_order_of_the_documents(tokenizer: Path, tmp_path: Path) -> None:
    names = ["Ada", "Bea", "Cid", "Dan", "Eva", "Fay", "Gil"]
    documents = [f"{one} donne à {other} le livre rouge de la maison." for one in names for other in names]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    found = blanks(documents, tokenizer, tmp_path / "a")
    assert len(found) == 20
    assert found == blanks(documents[::-1], tokenizer, tmp_path / "b")


def test_a_comma_behind_the_blank_stays(tokenizer: Path, tmp_path: Path) -> None:
    found = blanks(["Dans la liste des papiers, cliquez sur Fermer."], tokenizer, tmp_path)
    assert found == [("Dans la liste ___, cliquez sur Fermer.", "Dans la liste des papiers, cliquez sur Fermer.")]


def test_without_held_out_documents_there_are_none(tokenizer: Path, tmp_path: Path) -> None:
    assert blanks(DOCUMENTS, tokenizer, tmp_path, held_out=0.0) == []
