"""LoRA of PEFT on a FAT5 model, trained by a plain loop; the adapter is saved and read back.

python examples/lora_peft.py google/flan-t5-small --output_dir example/adapter
"""

import argparse

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from fat5 import FAT5ForConditionalGeneration

PAIRS = {
    "correct: Le paquets est installé.": "Le paquet est installé.",
    "correct: Les fichier sont copiés dans le dossier.": "Les fichiers sont copiés dans le dossier.",
    "correct: La commande affichent la version.": "La commande affiche la version.",
}

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("model", nargs="?", default="google/flan-t5-small", help="any T5-family model: name or folder")
arguments.add_argument("--output_dir", default="example/adapter")
arguments.add_argument("--steps", default=50, type=int)
arguments.add_argument("--rank", default=8, type=int)


def main() -> None:
    args = arguments.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    batch = tokenizer(list(PAIRS), padding=True, return_tensors="pt")
    labels = tokenizer(text_target=list(PAIRS.values()), padding=True, return_tensors="pt").input_ids
    batch["labels"] = labels.masked_fill(labels == tokenizer.pad_token_id, -100)

    lora = LoraConfig(task_type="SEQ_2_SEQ_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules=["q", "v"])
    model = get_peft_model(FAT5ForConditionalGeneration.from_pretrained(args.model), lora)
    model.print_trainable_parameters()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    model.train()
    for step in range(1, args.steps + 1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    model.save_pretrained(args.output_dir)

    again = PeftModel.from_pretrained(FAT5ForConditionalGeneration.from_pretrained(args.model), args.output_dir)
    with torch.no_grad():
        after, read = model.eval()(**batch).loss.item(), again.eval()(**batch).loss.item()
        with again.disable_adapter():
            before = again(**batch).loss.item()
    print(f"loss {before:.6f} without the adapter, {after:.6f} with it, {read:.6f} when read back")


if __name__ == "__main__":
    main()
