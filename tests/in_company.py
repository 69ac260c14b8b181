"""Scores a document alone, padded, and packed among others; prints by how much its losses differ, as JSON.

python tests/in_company.py MODEL
"""

import json
import sys

import torch

from fat5.model import FAT5ForConditionalGeneration

SOURCES, TARGETS = (21, 7, 33, 12), (6, 9, 4, 11)
OURS = 2
"""The document among SOURCES and TARGETS that is looked at."""


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = FAT5ForConditionalGeneration.from_pretrained(sys.argv[1]).eval()
    most = model.config.vocab_size - 300
    sources = [torch.randint(3, most, (length,)) for length in SOURCES]
    targets = [torch.randint(3, most, (length,)) for length in TARGETS]
    others = [torch.randint(3, most, (length,)) for length in SOURCES]
    others[0][0] = most  # which no other document has
    with torch.no_grad():
        ours = sources[OURS], targets[OURS]
        alone = packed(model, [ours])[0]
        together = packed(model, list(zip(sources, targets, strict=True)))[OURS]
        company = [*others[:OURS], ours[0], *others[OURS + 1 :]]
        other = packed(model, list(zip(company, targets, strict=True)))[OURS]
        turned = packed(model, list(zip(sources, targets, strict=True))[::-1])[-1 - OURS]
        padded = padded_losses(model, sources, targets, OURS)
        model.get_input_embeddings().weight[most] = torch.nan
        poisoned = packed(model, list(zip([others[0], *sources[1:]], targets, strict=True)))
    assert poisoned[0].isnan().all()
    found = {
        "packed": together - alone,
        "packed, other neighbours": other - together,
        "packed, in another order": turned - alone,
        "packed, a neighbour that is NaN": poisoned[OURS] - together,
        "padded": padded - alone,
    }
    print(json.dumps({name: float((difference / alone).abs().max()) for name, difference in found.items()}))


def packed(model, documents):
    """Losses by target token of each document, all in one pack."""
    sources, targets = zip(*documents, strict=True)

    def starts(parts):
        return torch.tensor([0, *map(len, parts)]).cumsum(0).int()

    losses = model(
        input_ids=torch.cat(sources),
        cu_seqlens=starts(sources),
        max_seqlen=max(map(len, sources)),
        labels=torch.cat(targets),
        decoder_cu_seqlens=starts(targets),
        decoder_max_seqlen=max(map(len, targets)),
        per_token=True,
    ).token_loss
    return losses.split([len(target) for target in targets])


def padded_losses(model, sources, targets, index):
    """Losses by target token of one document in a batch with a mask, behind which stands no padding but other ids."""
    longest, most = max(SOURCES), max(TARGETS)
    ids = torch.stack([torch.nn.functional.pad(one, (0, longest - len(one)), value=5) for one in sources])
    mask = torch.stack([torch.arange(longest) < len(one) for one in sources]).long()
    labels = torch.stack([torch.nn.functional.pad(one, (0, most - len(one)), value=-100) for one in targets])
    logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits[index]
    return torch.nn.functional.cross_entropy(logits[: len(targets[index])], targets[index], reduction="none")


if __name__ == "__main__":
    main()
