"""A folder that FAT5 saved, read where there is no FAT5: by stock transformers and by CTranslate2.

    python scripts/without_fat5.py demo --venv /tmp/stock      # makes an environment without FAT5, with the pinned set
    python scripts/without_fat5.py demo                        # in this environment, with fat5 made unimportable

FAT5 computes logits and greedy tokens of some prompts, and `fat5 convert` makes a CTranslate2 copy; another process,
which cannot import fat5, computes the same from both folders. What it prints is the transcript; it ends with exit code
1 where logits differ by more than 1e-5 of the largest, or any token differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ["torch", "transformers", "ctranslate2"]
PROMPTS = [
    "[R] Le noyau<extra_id_0> est un logiciel libre.",
    "[R] Pour installer<extra_id_0>, il faut<extra_id_1> le serveur.",
    "[S] Un paquet<extra_id_0>",
]
NEW_TOKENS = 24

# Runs without FAT5, so it stands alone. Given: folders of weights and of CTranslate2, what FAT5 computed, hide or show.
READER = """
import importlib.util, json, sys

folder, translated, expected, hide = sys.argv[1:]
if hide == "hide":
    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "fat5":
                raise ModuleNotFoundError(f"No module named {name!r}")
    sys.meta_path.insert(0, Hidden())
try:
    import fat5
except ModuleNotFoundError as error:
    print(f"import fat5                {error}")
else:
    sys.exit("fat5 can be imported here: this proves nothing")

import ctranslate2, torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}, "
      f"ctranslate2 {ctranslate2.__version__}")
want = load_file(expected)
tokenizer = AutoTokenizer.from_pretrained(folder)
model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
model = model.float().eval()
print(f"transformers reads         {type(model).__module__}.{type(model).__name__}, "
      f"missing {len(info['missing_keys'])}, unexpected {len(info['unexpected_keys'])}")
batch = {"input_ids": want["input_ids"], "attention_mask": want["attention_mask"]}
prompts = json.loads(bytes(want["prompts"].tolist()))
assert tokenizer(prompts, padding=True, return_tensors="pt")["input_ids"].equal(batch["input_ids"]), "other token ids"
with torch.no_grad():
    logits = model(**batch, decoder_input_ids=want["tokens"]).logits
difference = float((logits - want["logits"]).abs().max() / want["logits"].abs().max())
print(f"logits against FAT5's      largest difference {difference:.1e} of the largest")
tokens = model.generate(**batch, max_new_tokens=want["tokens"].shape[1] - 1, do_sample=False, num_beams=1)
same = torch.equal(tokens, want["tokens"])
print(f"greedy tokens              {'the same' if same else 'OTHERS'}: {tokenizer.decode(tokens[0])!r}")

translator = ctranslate2.Translator(translated, compute_type="float32")
rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
results = translator.translate_batch(
    [tokenizer.convert_ids_to_tokens(row) for row in rows], beam_size=1, max_decoding_length=tokens.shape[1] - 1
)
end, equal = model.config.eos_token_id, True
for result, row in zip(results, want["tokens"].tolist()):
    wanted = row[1:row.index(end)] if end in row else row[1:]
    equal &= tokenizer.convert_tokens_to_ids(result.hypotheses[0]) == wanted
print(f"CTranslate2, greedy        {'the same tokens' if equal else 'OTHER TOKENS'}")
sys.exit(0 if difference <= 1e-5 and same and equal else 1)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a run or of a model that FAT5 saved, with its tokenizer")
    parser.add_argument("--venv", help="folder of an environment without FAT5; made if it is not there")
    arguments = parser.parse_args()
    python = Path(sys.executable)
    if arguments.venv:
        python = Path(arguments.venv).absolute() / "bin" / "python"
        if not python.exists():
            run([sys.executable, "-m", "venv", arguments.venv])
            constraints = ["--constraint", str(ROOT / "constraints.txt")]
            run([str(python), "-m", "pip", "install", "--quiet", *constraints, *PACKAGES])
    with tempfile.TemporaryDirectory() as scratch:
        folder, translated, expected = compute(Path(arguments.model), Path(scratch))
        hide = "show" if arguments.venv else "hide"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run(
            [str(python), "-c", READER, str(folder), str(translated), str(expected), hide],
            cwd=scratch, env=environment | {"HF_HUB_OFFLINE": "1"}, check=False,
        ).returncode  # fmt: skip


def compute(model: Path, scratch: Path) -> tuple[Path, Path, Path]:
    """FAT5's logits and tokens; returns the model's folder, its CTranslate2 copy, and the file of what was computed."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from fat5.convert import ConvertConfig, convert
    from fat5.model import load_model
    from fat5.train.checkpoint.store import model_folder

    folder = model_folder(model).absolute()
    report = convert(ConvertConfig(model=str(folder), to="ctranslate2", output_dir=str(scratch / "ctranslate2")))
    print(*report.lines()[:3], sep="\n", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    ours = load_model(folder, device="cpu", dtype=torch.float32)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    tokens = ours.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)
    with torch.no_grad():
        logits = ours(**inputs, decoder_input_ids=tokens).logits
    text = torch.tensor(list(json.dumps(PROMPTS).encode()), dtype=torch.uint8)
    found = inputs | {"tokens": tokens, "logits": logits.contiguous(), "prompts": text}
    save_file(found, scratch / "expected.safetensors")
    return folder, report.target, scratch / "expected.safetensors"


def run(command: list[str]) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
